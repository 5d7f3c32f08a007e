"""The quickstart's comparisons that need care: the paper's probes by Adam, each with its own rate, and how flat a modality is over timesteps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from difffeat.probe.bootstrap import paired_bootstrap
from difffeat.probe.choices import choice_of, warnings_kept
from difffeat.probe.fusion import FusionProbe, PairedFeatures
from difffeat.probe.linear import LinearProbe
from difffeat.recipe import parse_tap

Features = Mapping[str, np.ndarray]
"""Features of one kind by split, each float32 [n, D]."""
OverTimesteps = Mapping[str, Any]
"""`clean`, `noisy`: the best tap at t = 0 and at another; `difference`, `low`, `high`: the first less the second, points of mAP on validation."""

DIFFERENCES = {
    "fused - image": ("fused", "image"),
    "fused - text": ("fused", "text"),
    "concatenation - addition": ("fused by concatenation", "fused"),
}


@dataclass(frozen=True)
class AdamScores:
    """The paper's probes: scores [n, C] of the test rows by name, and what each chose on validation and warned of."""

    scores: Mapping[str, np.ndarray]
    chosen: Mapping[str, Mapping[str, Any]]


def adam_scores(image: Features, text: Features, labels: Mapping[str, np.ndarray]) -> AdamScores:
    """Image, text, and both by the paper's projection to 512 and addition and by concatenation: one method, each with its own learning rate."""
    pairs = {split: PairedFeatures(image[split], text[split]) for split in image}
    probes: dict[str, tuple[Any, Mapping[str, Any]]] = {
        "image": (LinearProbe(), image),
        "text": (LinearProbe(), text),
        "fused": (FusionProbe(kind="add"), pairs),
        "fused by concatenation": (FusionProbe(kind="concat"), pairs),
    }
    scores, chosen = {}, {}
    with warnings_kept():
        for name, (probe, features) in probes.items():
            probe.fit(features["train"], labels["train"], validation=(features["validation"], labels["validation"]))
            scores[name] = probe.decision_function(features["test"])
            chosen[name] = {**choice_of(probe), "notes": list(probe.notes_)}
    return AdamScores(scores, chosen)


def in_points(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Paired bootstrap of two systems on the same samples, in points of mAP."""
    paired = paired_bootstrap(labels, first, second, rng=np.random.Generator(np.random.PCG64(0)))
    return {"difference": 100 * paired.difference, "low": 100 * paired.low, "high": 100 * paired.high}


def over_timesteps(trace: Iterable[Any], kind: str, scores: Callable[[str], np.ndarray], labels: np.ndarray) -> dict[str, Any]:
    """The best tap at t = 0 against the best at any other timestep, on validation, where both were chosen; empty where there is but one timestep."""
    values = {entry.taps[0]: entry.value for entry in trace if entry.kind == kind}
    clean = [tap for tap in values if parse_tap(tap)[1] == 0]
    noisy = [tap for tap in values if parse_tap(tap)[1] != 0]
    if not clean or not noisy:
        return {}
    best = [max(taps, key=lambda tap: values[tap]) for taps in (clean, noisy)]
    return {"clean": best[0], "noisy": best[1], **in_points(labels, *(scores(tap) for tap in best))}
