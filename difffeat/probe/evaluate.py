"""Stores in, numbers out: splits, one probe, a grid of taps, and where the numbers are written.

Results are plain JSON types with a `schema`, and each says on which split it was selected and on which it is reported.
"""

from __future__ import annotations

import itertools
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
from difffeat.probe.choices import OPTIMISTIC, TIES, choice_of, is_at_edge
from difffeat.probe.data import FeatureMatrix, FeatureStore, as_multi_hot, rarest_class
from difffeat.probe.factory import make_probe
from difffeat.probe.metrics import THRESHOLD, multi_label_report
from difffeat.probe.optim import check_seed
from difffeat.probe.output import write_fresh
from difffeat.probe.provenance import provenance
from difffeat.probe.ridge import ALPHAS, RidgeProbe, ridge_path
from difffeat.probe.sameness import left_out, require_apart, require_same, told
from difffeat.probe.search import Grid
from difffeat.recipe import parse_tap

SCHEMA = "difffeat-metrics/1"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Part:
    """Rows of a store that serve as one split. `name`: train, validation or test; `source` says in words where they are from."""

    name: str
    store: FeatureStore
    rows: np.ndarray
    source: str

    @property
    def labels(self) -> np.ndarray:
        """uint8 [m, C] of the rows."""
        if self.store.labels is None:
            raise ProbeError(f"the {self.name} store has no labels. Extract it from a source that has them.")
        return np.asarray(self.store.labels)[self.rows]

    def features(self, tap: str) -> FeatureMatrix:
        """The store's features of a tap; select `rows` from them."""
        return self.store[tap]


def usable_rows(store: FeatureStore) -> np.ndarray:
    """Rows whose sample is valid and whose labels are known, int64 [m]. Raises ProbeError when there are none, or no labels."""
    if store.labels is None:
        raise ProbeError("this store has no labels, so nothing can be probed. Extract it from a source that has them.")
    rows = np.flatnonzero(np.asarray(store.valid) & np.asarray(store.labelled))
    if len(rows) == 0:
        raise ProbeError(f"this store has no valid sample with known labels: of {len(store)}, {told(left_out(store))}. Look at difffeat store info.")
    return rows


def split_rows(labels: Any, *, fractions: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 0) -> dict[str, np.ndarray]:
    """Positions of train, validation and test, each int64 ascending; together every row once.

    Nearly stratified: rows are grouped by their rarest class, each group is shuffled by `seed` and spread evenly over the splits.
    Raises ProbeError when a split would be empty.
    """
    positive = as_multi_hot(labels)
    if len(fractions) != 3 or min(fractions) < 0 or not np.isclose(sum(fractions), 1):
        raise ConfigError(f"fractions must be three numbers that sum to 1, got {list(fractions)}")
    check_seed(seed)
    rng = np.random.Generator(np.random.PCG64(seed))
    stratum = rarest_class(positive)
    keys = np.empty(len(positive))
    for value in np.unique(stratum):
        members = rng.permutation(np.flatnonzero(stratum == value))
        # Evenly spaced keys in (0, 1): every stretch of the sorted rows then holds each group in its share.
        keys[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = np.argsort(keys, kind="stable")
    cuts = np.round(np.cumsum(fractions)[:2] * len(order)).astype(int)
    parts = {name: np.sort(part) for name, part in zip(SPLITS, np.split(order, cuts), strict=True)}
    for name, fraction in zip(SPLITS, fractions, strict=True):
        if fraction > 0 and len(parts[name]) == 0:
            raise ProbeError(f"{len(order)} rows are too few for a {name} split of {fraction:g}")
    return parts


def make_parts(
    train: FeatureStore,
    *,
    validation: FeatureStore | None = None,
    test: FeatureStore | None = None,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    allow_mixed: bool = False,
) -> dict[str, Part]:
    """Train, validation and test, each a store of its own where given, else a seeded share of the training store.

    The shares of splits that have a store of their own go to train. Raises ProbeError when stores differ in classes or, unless
    `allow_mixed`, in their recipe (such features must not meet in one probe), and when two splits share a sample.
    """
    given = {"validation": validation, "test": test}
    for name, own in given.items():
        if own is not None:
            require_same(train, own, name, allow_mixed=allow_mixed)
    rows = usable_rows(train)
    shares = [0.0 if given[name] is not None else fractions[SPLITS.index(name)] for name in SPLITS[1:]]
    positions = split_rows(np.asarray(train.labels)[rows], fractions=(1 - sum(shares), *shares), seed=seed)
    parts = {}
    for name in SPLITS:
        own = given.get(name)
        if own is None:
            whole = len(positions[name]) == len(rows)
            source = "a store of its own" if whole else f"a share of the training store, seed {seed}"
            parts[name] = Part(name, train, rows[positions[name]], source)
        else:
            parts[name] = Part(name, own, usable_rows(own), "a store of its own")
    for first, second in itertools.combinations(parts.values(), 2):
        require_apart(first.store, first.rows, second.store, second.rows, (first.name, second.name))
    return parts


@dataclass(frozen=True)
class Probed:
    """A fitted probe, its scores on the split it is reported on, and the numbers as plain JSON types."""

    probe: Probe
    labels: np.ndarray
    scores: np.ndarray
    result: dict[str, Any] = field(default_factory=dict)


def probe_store(
    store: FeatureStore,
    tap: str,
    *,
    validation: FeatureStore | None = None,
    test: FeatureStore | None = None,
    report_on: str = "test",
    method: str = "adam",
    settings: Mapping[str, Any] | None = None,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    n_resamples: int = 1000,
    allow_mixed: bool = False,
) -> Probed:
    """Fit one probe on a tap's training rows and score it on `report_on`.

    **Arguments:** splits as in `make_parts`; `method` and `settings` as in `make_probe`; `seed` of splits, training and bootstrap. Adam's learning
    rate, ridge's alpha and logistic's C are chosen on validation where `settings` does not give them; `chosen` in the result says what and where.
    """
    if report_on not in SPLITS:
        raise ConfigError(f"report_on must be one of {', '.join(SPLITS)}; got {report_on!r}")
    parts = make_parts(store, validation=validation, test=test, fractions=fractions, seed=seed, allow_mixed=allow_mixed)
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
        "left_out": {name: left_out(value.store) for name, value in parts.items() if value.store is not store or name == "train"},
        "fingerprints": {name: value.store.fingerprint for name, value in parts.items()},
        "classes": list(store.classes),
        "threshold": THRESHOLD,
        "metrics": multi_label_report(part.labels, scores, probe.probabilities(scores)),
        "interval": interval.to_dict(),
        "notes": [*probe.notes_, *interval.notes, *flattering],
    }
    if isinstance(probe, RidgeProbe):
        result["alpha"] = probe.alpha_
    return Probed(probe, part.labels, scores, result)


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

    @property
    def notes(self) -> list[str]:
        """What makes the numbers doubtful, in words."""
        edge = [edge_text(self.at_edge)] if self.at_edge else []
        return [OPTIMISTIC, *edge]

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


def edge_text(taps: Sequence[str]) -> str:
    """What is said of taps whose alpha was chosen at an edge of the grid."""
    return f"alpha was chosen at an edge of its grid at {len(taps)} taps ({', '.join(taps[:5])}{', ...' if len(taps) > 5 else ''}): pass a wider one"


def evaluate_taps(
    train: FeatureStore,
    validation: FeatureStore,
    taps: Sequence[str] | None = None,
    *,
    alphas: Sequence[float] = ALPHAS,
    max_rows: int | None = None,
    allow_mixed: bool = False,
) -> TapScores:
    """Ridge at every tap, fitted on one store and scored by mAP on the other, alpha chosen there too.

    These numbers are for choosing a tap; report the chosen one on a test split. `taps`: all of the training store when None;
    `max_rows`: use the first so many valid training rows only.
    """
    require_same(train, validation, "validation", allow_mixed=allow_mixed)
    names = tuple(train.taps) if taps is None else tuple(taps)
    grid = Grid.of_taps(names)
    rows, held = usable_rows(train)[:max_rows], usable_rows(validation)
    require_apart(train, rows, validation, held, ("train", "validation"))
    y, truth = np.asarray(train.labels)[rows], np.asarray(validation.labels)[held]
    values, chosen = (np.full((len(grid.blocks), len(grid.timesteps)), np.nan) for _ in range(2))
    at_edge = []
    for name in names:
        block, t = parse_tap(name)
        place = grid.blocks.index(block), grid.timesteps.index(t)
        chosen[place], maps = ridge_path(train[name], y, rows=rows).choose(validation[name], truth, alphas, held)
        values[place] = max(maps)
        if is_at_edge(chosen[place], alphas, maps):
            at_edge.append(name)
    evaluated = int(truth.astype(bool).any(axis=0).sum())
    return TapScores(grid, values, chosen, evaluated, {"train": len(rows), "validation": len(held)}, tuple(at_edge))


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
