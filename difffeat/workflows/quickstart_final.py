"""The one reading of the test split: features of the chosen taps, the controls, fusion, and what came of the expectations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from difffeat.engines import Artifact
from difffeat.probe.bootstrap import bootstrap_interval
from difffeat.probe.choices import choice_text
from difffeat.probe.search import SearchResult
from difffeat.recipe import parse_tap
from difffeat.workflows.expectations import Outcome, judge
from difffeat.workflows.pairs import fit_ridge, percent_map
from difffeat.workflows.quickstart_adam import DIFFERENCES, AdamScores, Features, OverTimesteps, adam_scores, in_points
from difffeat.workflows.quickstart_data import bag_of_words, named_share, raw_pixels
from difffeat.workflows.scenes import multi_hot

SPLITS = ("train", "validation", "test")
SHUFFLE_SEED = 5


@dataclass(frozen=True)
class Chosen:
    """The taps that validation chose."""

    image_tap: str
    text_tap: str
    random_tap: str


@dataclass(frozen=True)
class Row:
    """One line of the table. `seeds` mAP (%) by noise seed; `low`, `high` of the first; `adam` mAP of the paper's probe, where it was trained."""

    name: str
    kind: str
    seeds: tuple[float, ...]
    low: float
    high: float
    adam: float | None = None

    @property
    def value(self) -> float:
        """Mean over noise seeds."""
        return float(np.mean(self.seeds))


@dataclass(frozen=True)
class Findings:
    """What was measured on test. `differences` are of two by ridge, `adam_differences` of two by Adam; `adam_chosen`: rates and notes."""

    rows: tuple[Row, ...]
    differences: Mapping[str, Mapping[str, float]]
    outcomes: tuple[Outcome, ...]
    named_share: float
    adam_differences: Mapping[str, Mapping[str, float]]
    adam_chosen: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> Row:
        """A line by name."""
        return next(row for row in self.rows if row.name == name)

    def table(self) -> list[str]:
        """Aligned text."""
        lines = [f"  {'':34} {'mAP':>6}  {'95 % interval':15} {'noise seeds':22} {'Adam':>6}"]
        for row in self.rows:
            seeds = " ".join(f"{value:.1f}" for value in row.seeds) if len(row.seeds) > 1 else ""
            adam = f"{row.adam:6.1f}" if row.adam is not None else ""
            lines.append(f"  {row.name:34} {row.value:6.1f}  [{row.low:5.1f}, {row.high:5.1f}]  {seeds:22} {adam}")
        return lines

    def adam_lines(self) -> list[str]:
        """What the last column is, and its own differences: numbers by ridge and by Adam are not held against each other."""
        rates = ", ".join(f"{name} {choice_text(chosen)}" for name, chosen in self.adam_chosen.items())
        lines = [f"Adam: the paper's probes, fused by projection and addition; learning rates chosen on validation: {rates}."]
        lines += [f"  by Adam, {name}: {_said(value)}" for name, value in self.adam_differences.items()]
        return lines + [f"  note on {name}: {note}" for name, chosen in self.adam_chosen.items() for note in chosen["notes"]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "reported_on": "test",
            "selected_on": "validation",
            "rows": [{**vars(row), "value": row.value} for row in self.rows],
            "differences": {name: dict(value) for name, value in self.differences.items()},
            "notes": list(self.notes),
            "adam_differences": {name: dict(value) for name, value in self.adam_differences.items()},
            "adam_chosen": {name: dict(value) for name, value in self.adam_chosen.items()},
            "expectations": [vars(outcome) for outcome in self.outcomes],
            "named_share": self.named_share,
        }


def read_test_once(
    run: Any, finals: Mapping[str, Artifact], chosen: Chosen, latents: Artifact, search: SearchResult, over_t: Mapping[str, OverTimesteps]
) -> Findings:
    """Extract the chosen taps on every split, fit on train, choose alpha and learning rates on validation, score on test."""
    run.extract(latents, "test", "latents", dtype="fp32")
    labels = {split: multi_hot(run.scenes[split]) for split in SPLITS}
    seeds = run.plan.final_seeds
    by_seed = {seed: _stores(run, finals["image"], f"image-seed{seed}", seed) for seed in seeds}
    image = {seed: {split: _array(store, chosen.image_tap) for split, store in stores.items()} for seed, stores in by_seed.items()}
    t = chosen.image_tap.partition("/")[2]
    text = {split: _array(run.extract(finals["text"], split, "text"), chosen.text_tap) for split in SPLITS}
    random = {split: _array(store, chosen.random_tap) for split, store in _stores(run, finals["random"], "random", 0).items()}
    cached = {split: _latents(run, split) for split in SPLITS}
    words = {split: bag_of_words(run.scenes[split]) for split in SPLITS}
    shuffled = {split: text[split][_permutation(len(text[split]))] for split in SPLITS}
    kinds: dict[str, tuple[str, list[Features]]] = {
        "image": ("main", [image[seed] for seed in seeds]),
        "text": ("main", [text]),
        "fused": ("main", [_both(image[seed], text) for seed in seeds]),
        "raw pixels": ("control", [{split: raw_pixels(run.scenes[split]) for split in SPLITS}]),
        "latents": ("control", [cached]),
        "block 0": ("control", [{split: _array(store, f"b0/{t}") for split, store in by_seed[seeds[0]].items()}]),
        "random backbone, its best tap": ("control", [random]),
        "bag of words": ("control", [words]),
        "raw latents + bag of words, fused": ("control", [_both(cached, words)]),
        "fused, captions shuffled": ("control", [_both(image[seed], shuffled) for seed in seeds]),
    }
    adam = adam_scores(image[seeds[0]], text, labels)
    notes: list[str] = []
    scores = {name: [_ridge_scores(name, features, labels, notes) for features in parts] for name, (_, parts) in kinds.items()}
    rows = tuple(_row(name, kind, scores[name], labels["test"], adam.scores.get(name)) for name, (kind, _) in kinds.items())
    differences = _differences(scores, labels["test"])
    outcomes = judge(_judge(chosen, search, differences, over_t))
    share = named_share(run.scenes["test"])
    return Findings(rows, differences, tuple(outcomes), share, _adam_differences(adam, labels["test"]), adam.chosen, tuple(dict.fromkeys(notes)))


def _stores(run: Any, artifact: Artifact, name: str, seed: int) -> dict[str, Any]:
    return {split: run.extract(artifact, split, name, seed=seed, latents=run.latents(split)) for split in SPLITS}


def _array(store: Any, tap: str) -> np.ndarray:
    return np.asarray(store[tap], np.float32)


def _latents(run: Any, split: str) -> np.ndarray:
    from difffeat.runtime.store import Store

    return _array(Store.open(run.latents(split)), "latents")


def _both(first: Features, second: Features) -> Features:
    return {split: np.concatenate([first[split], second[split]], axis=1) for split in first}


def _permutation(count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(SHUFFLE_SEED)).permutation(count)


def _ridge_scores(name: str, features: Features, labels: Mapping[str, np.ndarray], notes: list[str]) -> np.ndarray:
    """Scores of the test rows; what there is to say of the choice of alpha is added to `notes`."""
    probe = fit_ridge(features["train"], labels["train"], features["validation"], labels["validation"])
    notes += [f"{name}: {note}" for note in probe.notes_]
    return probe.decision_function(features["test"])


def _row(name: str, kind: str, scores: list[np.ndarray], labels: np.ndarray, adam: np.ndarray | None) -> Row:
    interval = bootstrap_interval(labels, scores[0], rng=_rng())
    return Row(
        name,
        kind,
        tuple(percent_map(labels, one) for one in scores),
        100 * interval.low,
        100 * interval.high,
        None if adam is None else percent_map(labels, adam),
    )


COMPARISONS = {
    "image - raw pixels": ("image", "raw pixels"),
    "image - random backbone": ("image", "random backbone, its best tap"),
    "image - block 0": ("image", "block 0"),
    "text - bag of words": ("text", "bag of words"),
    "fused - image": ("fused", "image"),
    "fused - text": ("fused", "text"),
    "fused - latents and words": ("fused", "raw latents + bag of words, fused"),
    "shuffled - image": ("fused, captions shuffled", "image"),
}


def _differences(scores: Mapping[str, list[np.ndarray]], labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Paired bootstrap of the first noise seed, in points of mAP."""
    found = {}
    for name, (first, second) in COMPARISONS.items():
        found[name] = in_points(labels, scores[first][0], scores[second][0])
    return found


def _adam_differences(adam: AdamScores, labels: np.ndarray) -> dict[str, dict[str, float]]:
    return {name: in_points(labels, adam.scores[first], adam.scores[second]) for name, (first, second) in DIFFERENCES.items()}


def _judge(
    chosen: Chosen, search: SearchResult, differences: Mapping[str, Mapping[str, float]], over_t: Mapping[str, OverTimesteps]
) -> dict[str, tuple[bool, str]]:
    regret = 100 * (search.regret or 0.0)
    last = max(block for block, _ in (parse_tap(e.taps[0]) for e in search.trace if e.kind == "image"))
    image_block, image_t = parse_tap(chosen.image_tap)
    _, text_t = parse_tap(chosen.text_tap)
    return {
        "image-block-inside": (0 < image_block < last, f"block {image_block} of {last}"),
        "image-timestep-noisy": (image_t > 0, f"t = {image_t:g} in the chosen pair; {_best_alone(search, 'image')}{_flat(over_t['image'])}"),
        "text-timestep-clean": (text_t == 0, f"t = {text_t:g} in the chosen pair; {_best_alone(search, 'text')}{_flat(over_t['text'])}"),
        "image-above-pixels": _above(differences["image - raw pixels"]),
        "image-above-random": _above(differences["image - random backbone"]),
        "fused-above-image": _above(differences["fused - image"]),
        "fused-above-text": _above(differences["fused - text"]),
        "fused-above-latents-and-words": _above(differences["fused - latents and words"]),
        "shuffled-falls-back": (differences["shuffled - image"]["difference"] <= 1.0, _said(differences["shuffled - image"])),
        "search-regret-small": (regret <= 0.5, f"regret {regret:.2f} points on validation"),
    }


def _best_alone(search: SearchResult, kind: str) -> str:
    best = max((entry for entry in search.trace if entry.kind == kind), key=lambda entry: entry.value)
    return f"alone, {best.taps[0]} is best on validation, {100 * best.value:.1f}"


def _flat(over_t: OverTimesteps) -> str:
    """How far t = 0 leads, and within what interval: where that holds zero, the timesteps are not told apart."""
    if not over_t:
        return ""
    apart = "" if over_t["low"] > 0 or over_t["high"] < 0 else ": not told apart"
    return f"; {over_t['clean']} less {over_t['noisy']} {_said(over_t)}{apart}"


def _above(difference: Mapping[str, float]) -> tuple[bool, str]:
    return difference["low"] > 0, _said(difference)


def _said(difference: Mapping[str, float]) -> str:
    return f"{difference['difference']:+.1f} points [{difference['low']:+.1f}, {difference['high']:+.1f}]"


def _rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(0))
