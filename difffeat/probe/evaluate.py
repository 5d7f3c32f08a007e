"""Stores in, numbers out: splits, one probe, a grid of taps, and where the numbers are written.

Results are plain JSON types with a `schema`, and each says on which split it was selected and on which it is reported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.base import Probe
from difffeat.probe.bootstrap import bootstrap_interval
from difffeat.probe.cautions import cautions, require_distinct_classes, require_learnable
from difffeat.probe.choices import OPTIMISTIC, TIES, brief_notes, choice_of, edge_text, is_at_edge
from difffeat.probe.data import FeatureStore
from difffeat.probe.factory import make_probe
from difffeat.probe.metrics import THRESHOLD, multi_label_report
from difffeat.probe.output import write_fresh
from difffeat.probe.provenance import provenance
from difffeat.probe.ridge import RidgeProbe
from difffeat.probe.ridge_solutions import ALPHAS, ridge_path
from difffeat.probe.sameness import left_out, require_apart, require_same
from difffeat.probe.search import Grid
from difffeat.probe.splits import FRACTIONS, SPLITS, Part, Parts, drawn_rows, labels_of, make_parts, split_rows, usable_rows
from difffeat.recipe import parse_tap

__all__ = ["SCHEMA", "Part", "Probed", "TapScores", "evaluate_taps", "make_parts", "probe_store", "split_rows", "usable_rows", "write_metrics"]

SCHEMA = "difffeat-metrics/1"


@dataclass(frozen=True)
class Probed:
    """A fitted probe, its scores on the split it is reported on, the numbers as plain JSON types, and the sample ids of each split."""

    probe: Probe
    labels: np.ndarray
    scores: np.ndarray
    result: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, list[str]] = field(default_factory=dict)


def probe_store(
    store: FeatureStore,
    tap: str,
    *,
    validation: FeatureStore | None = None,
    test: FeatureStore | None = None,
    report_on: str = "test",
    method: str = "adam",
    settings: Mapping[str, Any] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    n_resamples: int = 1000,
    allow_mixed: bool = False,
    allow_shared: bool = False,
    splits: Mapping[str, str] | None = None,
) -> Probed:
    """Fit one probe on a tap's training rows and score it on `report_on`.

    **Arguments:** stores, `fractions`, `allow_mixed`, `allow_shared` and `splits` as in `make_parts`; `method` and `settings` as in `make_probe`;
    `seed` of splits, training and bootstrap. Adam's learning rate, ridge's alpha and logistic's C are chosen on validation where `settings` does not
    give them; `chosen` in the result says what and where.
    """
    parts = make_parts(
        store, validation=validation, test=test, fractions=fractions, seed=seed, allow_mixed=allow_mixed, allow_shared=allow_shared, splits=splits
    )
    return probe_parts(parts, tap, report_on=report_on, method=method, settings=settings, seed=seed, n_resamples=n_resamples)


def probe_parts(
    parts: Parts,
    tap: str,
    *,
    report_on: str = "test",
    method: str = "adam",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    n_resamples: int = 1000,
) -> Probed:
    """The same on parts that are made already: several taps are probed on one split. Arguments as in `probe_store`."""
    if report_on not in SPLITS:
        raise ConfigError(f"report_on must be one of {', '.join(SPLITS)}; got {report_on!r}")
    store = parts["train"].store
    probe = _fit(parts, tap, method, dict(settings or {}), seed)
    part = parts[report_on]
    if len(part.rows) == 0:
        raise ProbeError(f"there are no rows to report on: give a {report_on} store, or a share above 0 in fractions")
    scores = probe.decision_function(part.features(tap), part.rows)
    rng = np.random.Generator(np.random.PCG64(seed))
    interval = bootstrap_interval(part.labels, scores, rng=rng, n_resamples=n_resamples, classes=store.classes)
    flattering = [OPTIMISTIC] if report_on == "validation" and len(parts["validation"].rows) else []
    result = {
        "schema": SCHEMA,
        "kind": "probe",
        "tap": tap,
        "method": method,
        "settings": probe.settings(),
        "seed": seed,
        "chosen": choice_of(probe),
        "selected_on": probe.selected_on_,
        "reported_on": report_on,
        "splits": {name: {"rows": len(value.rows), "from": value.source} for name, value in parts.items()},
        "split": dict(parts.record),
        "left_out": {name: left_out(value.store) for name, value in parts.items() if value.store is not store or name == "train"},
        "fingerprints": {name: value.store.fingerprint for name, value in parts.items()},
        "classes": list(store.classes),
        "threshold": THRESHOLD,
        "metrics": multi_label_report(part.labels, scores, probe.probabilities(scores)),
        "interval": interval.to_dict(),
        "notes": [*parts.notes, *probe.notes_, *brief_notes(probe), *interval.notes, *flattering],
    }
    if isinstance(probe, RidgeProbe):
        result["alpha"] = probe.alpha_
    return Probed(probe, part.labels, scores, result, {name: value.ids for name, value in parts.items()})


def _fit(parts: Mapping[str, Part], tap: str, method: str, settings: dict[str, Any], seed: int) -> Probe:
    train, validation = parts["train"], parts["validation"]
    probe = make_probe(method, **{"seed": seed, **settings})
    held = None if len(validation.rows) == 0 else (validation.features(tap), validation.labels, validation.rows)
    return probe.fit(train.features(tap), train.labels, rows=train.rows, classes=tuple(train.store.classes), validation=held)


@dataclass(frozen=True)
class TapScores:
    """mAP of a ridge probe at each tap. `values` and `alphas` float64 [blocks, timesteps], NaN where the store has no such tap.

    `at_edge`: taps whose alpha is the first or last of the grid and better than the one beside it. The values chose the alphas, which flatters them.
    """

    grid: Grid
    values: np.ndarray
    alphas: np.ndarray
    evaluated_classes: int
    rows: Mapping[str, int]
    at_edge: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What makes the numbers doubtful, in words."""
        edge = [edge_text(self.at_edge)] if self.at_edge else []
        return [OPTIMISTIC, *edge, *self.cautions]

    @property
    def best(self) -> str:
        """The tap with the highest mAP; of equal ones the smaller block, then the smaller timestep."""
        return self.grid.taps[int(np.nanargmax(self.values))]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "schema": SCHEMA,
            "kind": "taps",
            "method": "ridge",
            "selected_on": "validation",
            "reported_on": "validation",
            "blocks": list(self.grid.blocks),
            "timesteps": list(self.grid.timesteps),
            "mAP": _without_nan(self.values),
            "alpha": _without_nan(self.alphas),
            "evaluated_classes": self.evaluated_classes,
            "rows": dict(self.rows),
            "best": self.best,
            "ties": TIES,
            "at_edge": list(self.at_edge),
            "notes": self.notes,
        }


def evaluate_taps(
    train: FeatureStore,
    validation: FeatureStore,
    taps: Sequence[str] | None = None,
    *,
    alphas: Sequence[float] = ALPHAS,
    max_rows: int | None = None,
    seed: int = 0,
    allow_mixed: bool = False,
    allow_shared: bool = False,
) -> TapScores:
    """Ridge at every tap, fitted on one store and scored by mAP on the other, alpha chosen there too.

    These numbers are for choosing a tap; report the chosen one on a test split. `taps`: all of the training store when None;
    `max_rows`: train on so many of the valid rows only, drawn by `seed` (sources are often sorted by class).
    """
    require_same(train, validation, "validation", allow_mixed=allow_mixed)
    names = tuple(train.taps) if taps is None else tuple(taps)
    grid = Grid.of_taps(names)
    rows, held = drawn_rows(train, usable_rows(train), max_rows, seed), usable_rows(validation)
    shared = require_apart(train, rows, validation, held, ("train", "validation"), allow_shared=allow_shared)
    require_distinct_classes(train.classes, "training")
    y, truth = np.asarray(labels_of(train))[rows], np.asarray(labels_of(validation))[held]
    require_learnable(y, train.classes)
    values, chosen = (np.full((len(grid.blocks), len(grid.timesteps)), np.nan) for _ in range(2))
    at_edge = []
    for name in names:
        block, t = parse_tap(name)
        place = grid.blocks.index(block), grid.timesteps.index(t)
        chosen[place], maps = ridge_path(train[name], y, rows=rows).choose(validation[name], truth, alphas, held)
        values[place] = max(maps)
        if is_at_edge(chosen[place], alphas, maps):
            at_edge.append(name)
    evaluated = int((truth == 1).any(axis=0).sum())
    found = (*shared, *cautions({"train": y, "validation": truth}, train.classes))
    return TapScores(grid, values, chosen, evaluated, {"train": len(rows), "validation": len(held)}, tuple(at_edge), found)


def write_metrics(folder: str | os.PathLike[str], result: Mapping[str, Any], name: str = "metrics.json", beside: Sequence[str] = ()) -> Path:
    """Write a result as JSON into `folder`; an older file stays and the new one becomes `metrics-2.json`, and so on. Returns where it
    went. `beside`: files to be written under the same number, which is then one that none of them has taken. Where the result does not say where it
    comes from, the command and the version are added.
    """
    try:
        text = json.dumps({**result, "provenance": result.get("provenance") or provenance()}, indent=2, sort_keys=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"these metrics are not plain JSON: {error}") from None
    return write_fresh(Path(folder) / name, (text + "\n").encode(), beside)


def _without_nan(values: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]
