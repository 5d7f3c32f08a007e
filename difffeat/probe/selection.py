"""How a probe chooses its penalty or learning rate: which rows are held out, how candidates are judged, and when the grid was too short.

Multi-label candidates are judged by mAP, of equal ones by the loss. Single-label ones are judged by the probe's own loss (log loss, or squared
error for ridge): ranking alone cannot tell a probe that always answers the largest class from one that is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from difffeat.errors import ProbeError
from difffeat.probe.data import FeatureMatrix, rarest_class
from difffeat.probe.labels import BINARY, MULTILABEL, Labels

HOLDOUT = 0.2
"""Share of the training rows that is held out for a choice when no validation rows are given."""

ON_HOLDOUT = f"a held-out {HOLDOUT:.0%} of the training rows"
ON_VALIDATION = "validation"

NARROW = 1e3
"""A grid that spans less than this factor says nothing of what lies beyond, where all of it ranks alike."""
EDGE_GAIN = 1e-3
"""A choice at the edge of its grid is said when it is better than its neighbour by more than this: 0.1 points of mAP, or this share of the loss."""


@dataclass(frozen=True)
class Examples:
    """Some rows of features (all when `rows` is None) and their labels."""

    x: FeatureMatrix
    rows: np.ndarray | None
    labels: Labels

    def of(self, positions: np.ndarray) -> Examples:
        """Those at some positions among the rows."""
        return Examples(self.x, positions if self.rows is None else self.rows[positions], self.labels.of(positions))


@dataclass(frozen=True)
class Judged:
    """What each candidate of an ascending grid reached on the rows that were kept for the choice; NaN where it could not be judged."""

    maps: list[float]
    losses: list[float]
    by_map: bool

    def best(self, *, last: bool) -> int:
        """The best candidate's place. Of equal mAP the smaller loss (many penalties may rank all right and answer badly), then the last or the
        first. Raises ProbeError where none could be judged.
        """
        value, second = self._goodness(), -np.asarray(self.losses)
        if np.isnan(value).all():
            raise ProbeError("none of the candidates gave finite scores: look at the features, or give the penalty or learning rate yourself")
        tied = np.flatnonzero(value >= np.nanmax(value) - 1e-12)
        if self.by_map and not np.isnan(second[tied]).all():
            tied = tied[second[tied] >= np.nanmax(second[tied])]
        return int(tied[-1 if last else 0])

    def at_an_edge(self, place: int) -> bool:
        """Whether `place` is the first or last of several and better than the one beside it by more than `EDGE_GAIN`."""
        value = self._goodness()
        if len(value) < 2 or place not in (0, len(value) - 1):
            return False
        beside = value[1 if place == 0 else place - 1]
        unit = 1.0 if self.by_map else abs(value[place])
        return bool(np.isnan(beside) or value[place] - beside > EDGE_GAIN * unit)

    def tells_nothing(self) -> bool:
        """Whether several candidates, none of them nearly perfect, are alike: the choice among them is one of chance."""
        value = np.asarray(self.maps)
        return self.by_map and len(value) > 1 and bool(np.nanmax(value) - np.nanmin(value) <= EDGE_GAIN and np.nanmax(value) < 1 - EDGE_GAIN)

    def _goodness(self) -> np.ndarray:
        return np.asarray(self.maps) if self.by_map else -np.asarray(self.losses)


def hold_out(examples: Examples, seed: int, purpose: str) -> tuple[Examples, Examples]:
    """(training, held-out) rows, seeded and nearly stratified by class. Raises ProbeError where there are too few rows."""
    labels = examples.labels
    stratum = labels.positive[:, 0].astype(int) if labels.target == BINARY else rarest_class(labels.positive)
    rng = np.random.Generator(np.random.PCG64(seed))
    keys = np.empty(len(labels))
    for value in np.unique(stratum):
        members = rng.permutation(np.flatnonzero(stratum == value))
        # Evenly spaced keys: the first fifth of the sorted rows then holds each class in its share. A class of one row is trained on.
        keys[members] = (np.arange(len(members)) + 0.5) / len(members) if len(members) > 1 else 1.0
    order = np.lexsort((rng.permutation(len(labels)), keys))
    held = max(round(HOLDOUT * len(labels)), len(np.unique(stratum)) if len(labels) < 20 else 0)
    inner, outer = np.sort(order[held:]), np.sort(order[:held])
    if held < 1 or any(len(part) == 0 or not _can_be_judged(labels.of(part)) for part in (inner, outer)):
        reason = "are too few" if len(labels) < 20 else "have too few positives"
        raise ProbeError(f"{len(labels)} rows {reason} to hold some out for choosing {purpose}: pass validation, or a single {purpose}")
    return examples.of(inner), examples.of(outer)


def judge(labels: Labels, scores: np.ndarray, loss: float) -> tuple[float, float]:
    """(mAP, loss) of one candidate, NaN for scores that are not finite."""
    return (mean_ap(labels, scores), loss) if np.isfinite(scores).all() else (float("nan"), float("nan"))


def mean_ap(labels: Labels, scores: np.ndarray) -> float:
    """Mean over the columns of `labels` that have a positive of AP, over the rows where the column is known; NaN where none has one."""
    values = column_ap(labels.positive, scores, labels.known)
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def column_ap(positive: np.ndarray, scores: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """AP of each column, uninterpolated with ties as one step, float64 [K]; NaN without a positive. One column is in memory at a time."""
    values = np.full(positive.shape[1], np.nan)
    for c in range(positive.shape[1]):
        truth, ranked = positive[:, c], scores[:, c]
        if known is not None:
            truth, ranked = truth[known[:, c]], ranked[known[:, c]]
        if truth.any():
            values[c] = _ap(truth, np.ascontiguousarray(ranked))
    return values


def _ap(truth: np.ndarray, ranked: np.ndarray) -> float:
    """AP of one column: only the scores that some positive has are sorted, and the others counted between them."""
    levels, own = np.unique(ranked[truth], return_counts=True)
    at = np.bincount(np.searchsorted(levels, ranked, side="right"), minlength=len(levels) + 1)[1:]
    above, found = np.cumsum(at[::-1])[::-1], np.cumsum(own[::-1])[::-1]
    return float((own * (found / above)).sum() / own.sum())


def edge_note(name: str, grid: Sequence[float], place: int, judged: Judged) -> list[str]:
    """A sentence where the choice lies at an edge of its grid and a wider grid might do better."""
    if judged.tells_nothing() and grid[-1] < NARROW * grid[0]:
        return [f"{name} {grid[0]:g}..{grid[-1]:g} rank alike, from edge to edge: values beyond may be better. Pass a wider grid."]
    if not judged.at_an_edge(place):
        return []
    side, where = ("lower", "smaller") if place == 0 else ("upper", "larger")
    return [
        f"{name} {grid[place]:g} was chosen at the {side} edge of {grid[0]:g}..{grid[-1]:g}, and it is better than {_beside(grid, place):g}: "
        f"{where} values may be better still. Pass a wider grid, or the value itself."
    ]


def check_validation(labels: Labels) -> None:
    """Raises ProbeError where validation labels can tell nothing about a candidate."""
    if labels.target == BINARY and not _can_be_judged(labels):
        raise ProbeError(f"the {len(labels)} validation rows are all of one class, so nothing can be chosen by them")
    if not _can_be_judged(labels):
        raise ProbeError(
            f"none of the {labels.positive.shape[1]} classes has a positive among the {len(labels)} validation rows: nothing to choose by"
        )


def by_map(labels: Labels) -> bool:
    """Whether candidates for these labels are judged by mAP."""
    return labels.target == MULTILABEL


def _can_be_judged(labels: Labels) -> bool:
    if labels.target == MULTILABEL:
        return bool(labels.positive.any())
    if labels.target == BINARY:
        return bool(labels.positive.any() and not labels.positive.all())
    return len(labels) > 0


def _beside(grid: Sequence[float], place: int) -> float:
    return grid[1] if place == 0 else grid[-2]


__all__: list[Any] = [
    "EDGE_GAIN", "HOLDOUT", "ON_HOLDOUT", "ON_VALIDATION", "Examples", "Judged", "by_map", "check_validation", "column_ap", "edge_note",
    "hold_out", "judge", "mean_ap",
]  # fmt: skip
