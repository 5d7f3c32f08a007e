"""Bootstrap over samples: how sure a score is, and whether one system beats another.

A resample is a column of multiplicities (how often each sample was drawn), so scores are ranked once and never sorted again.

A resample of a ranking is not just another test set: it holds positives twice, which raises their precision, and rare classes lose theirs. The mean
of its scores therefore lies beside the score of the sample itself, and percentiles of it are shifted (for mAP upwards, by more than their width where
classes are rare). So the interval of one system is centred: score + (percentile of the resamples - mean of the resamples), cut to 0..1.

Resamples of k positives also vary only (k - 1)/k as much (in variance) as k new positives would: in mAP the AP of each class is spread about its mean
by sqrt(k/(k - 1)), which tells where classes are rare. The interval is one of the *mean score over test sets of this size and kind*;
`difffeat bench intervals` checks that by simulation.

In a paired bootstrap both systems see the same resamples, whose shift falls out of the difference; its percentiles are left as they are. "A is above
B" means that the interval of A - B lies above zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.data import positive_cells
from difffeat.probe.metrics import Statistic, class_precisions, mean_over_classes, statistic

_BLOCK_BYTES = 32 * 2**20
RARE = 10
"""A class with fewer positives than this among the scored samples is rare: its AP is that of a handful of samples."""
FEW_SAMPLES = 100
"""With fewer samples than this an interval is too narrow, and that is said."""
PER_CLASS = ("map", "cp", "cr", "cf1")
"""Metrics that are means over classes, in which a rare class counts as much as any other."""
OF = "the mean over test sets of this size"
NAMED = 5


@dataclass(frozen=True)
class Interval:
    """A score with its centred bootstrap interval, which always holds it.

    **Fields:** `resamples`: how many could be scored (one without any positive cannot); `shift`: the mean of the resamples less the score, which is
    taken off; `of` what it is an interval of; `rare` positives of classes with fewer than `RARE` of them, by name; `notes` what makes it doubtful.
    """

    metric: str
    value: float
    low: float
    high: float
    level: float
    resamples: int
    shift: float = 0.0
    of: str = OF
    rare: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "notes": list(self.notes)}


@dataclass(frozen=True)
class PairedDifference:
    """first - second on the same samples, with the percentile interval of that difference. `notes`: what makes it doubtful."""

    metric: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    level: float
    resamples: int
    notes: tuple[str, ...] = ()

    @property
    def above(self) -> bool:
        """Whether the first is above the second: the whole interval lies above zero."""
        return self.low > 0

    @property
    def below(self) -> bool:
        """Whether the first is below the second."""
        return self.high < 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with `above`."""
        return {**asdict(self), "notes": list(self.notes), "above": self.above}


def bootstrap_interval(
    labels: Any,
    scores: Any,
    *,
    rng: np.random.Generator,
    metric: str = "map",
    n_resamples: int = 1000,
    level: float = 0.95,
    classes: Sequence[str] | None = None,
    **options: Any,
) -> Interval:
    """The score of one system with its interval: of the mean over test sets of this size, centred on the score.

    **Arguments:** `labels`, `scores` [n, C] as for the metric; `classes` names for `rare` and `notes` (their numbers when None); `metric` and
    `options` as in `metrics.statistic`.
    """
    score, n = statistic(metric, labels, scores, **options), len(labels)
    value = _point(score, n)
    resampled = _resampled(n, n_resamples, rng, score)[0] if metric != "map" else _resampled_map(labels, scores, n_resamples, rng, **options)
    low, high, mean, used = _percentiles(resampled, level)
    # A skewed resampling may have its mean beyond a percentile: the score stays inside its own interval.
    ends = max(0.0, min(value, value + low - mean)), min(1.0, max(value, value + high - mean))
    rare = rare_classes(labels, classes) if metric in PER_CLASS else {}
    notes = (*_notes(n, ends), *_level_notes(scores), *((rare_text(rare),) if rare else ()))
    return Interval(metric, value, *ends, level, used, mean - value, rare=rare, notes=notes)


def rare_classes(labels: Any, classes: Sequence[str] | None = None) -> dict[str, int]:
    """Positives of the classes that have some but fewer than `RARE`, rarest first."""
    counts = positive_cells(labels).sum(axis=0)
    names = [str(number) for number in range(len(counts))] if classes is None else list(classes)
    return {names[c]: int(counts[c]) for c in np.argsort(counts, kind="stable") if 0 < counts[c] < RARE}


def rare_text(rare: Mapping[str, int]) -> str:
    """What rare classes mean for a mean over classes, in words."""
    shown = ", ".join(f"{name} {count}" for name, count in list(rare.items())[:NAMED])
    more = f" and {len(rare) - NAMED} more" if len(rare) > NAMED else ""
    one = len(rare) == 1
    return (
        f"{len(rare)} class{' has' if one else 'es have'} fewer than {RARE} positives among these samples ({shown}{more}): "
        f"{'its' if one else 'their'} AP rests on a handful of them, and other test sets of this size may hold none"
    )


def _notes(n: int, ends: tuple[float, float]) -> list[str]:
    """What makes an interval doubtful whatever its metric."""
    found = [f"{n} samples are few: the interval is narrower than it should be"] if n < FEW_SAMPLES else []
    if ends[0] == ends[1]:
        found.append("every resample scores the same: the interval has no width and says nothing of other samples")
    return found


def _level_notes(scores: Any) -> list[str]:
    """Where a system gives all samples one score."""
    spread = np.ptp(np.asarray(scores), axis=0)
    level, total = int((spread == 0).sum()), np.size(spread)
    which = "every class" if level == total else f"{level} of {total} classes"
    return [f"all samples have the same score in {which}: these features are constant, or nothing was learned from them"] if level else []


def paired_bootstrap(
    labels: Any,
    first: Any,
    second: Any,
    *,
    rng: np.random.Generator,
    metric: str = "map",
    n_resamples: int = 1000,
    level: float = 0.95,
    **options: Any,
) -> PairedDifference:
    """The difference of two systems' scores on the same samples, with its interval.

    **Arguments:** `labels`, `first`, `second` [n, C] in the same order of samples; `metric` and `options` as in `metrics.statistic`.
    """
    if np.shape(first) != np.shape(second):
        raise ProbeError(f"both systems must score the same samples and classes, got {list(np.shape(first))} and {list(np.shape(second))}")
    n, scores = len(labels), [statistic(metric, labels, system, **options) for system in (first, second)]
    values = _resampled(n, n_resamples, rng, *scores)
    low, high, _, used = _percentiles(values[0] - values[1], level)
    a, b = _point(scores[0], n), _point(scores[1], n)
    return PairedDifference(metric, a, b, a - b, low, high, level, used, tuple(_notes(n, (low, high))))


def multiplicities(n: int, n_resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Blocks of resamples, float64 [n, r]: how often each sample was drawn. Every column sums to n."""
    block = max(1, _BLOCK_BYTES // (8 * n))
    for start in range(0, n_resamples, block):
        drawn = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(min(block, n_resamples - start))]
        yield np.stack(drawn, axis=1).astype(np.float64)


def _resampled(n: int, n_resamples: int, rng: np.random.Generator, *scores: Statistic) -> np.ndarray:
    """Scores of all resamples, float64 [systems, n_resamples]."""
    _check_resamples(n_resamples)
    blocks = [np.stack([score(weights) for score in scores]) for weights in multiplicities(n, n_resamples, rng)]
    return np.concatenate(blocks, axis=1)


def _resampled_map(labels: Any, scores: Any, n_resamples: int, rng: np.random.Generator, *, empty: str = "skip", **_: Any) -> np.ndarray:
    """MAP of all resamples, float64 [n_resamples], the AP of each class spread to what as many new positives would give."""
    _check_resamples(n_resamples)
    per_class = class_precisions(labels, scores)
    values = np.concatenate([per_class(weights) for weights in multiplicities(len(labels), n_resamples, rng)], axis=1)
    counts = positive_cells(labels).sum(axis=0)
    spread = np.sqrt(counts / np.maximum(counts - 1, 0.5))  # one positive says nothing of how others would vary: as two would
    for c in np.flatnonzero(counts):
        found = ~np.isnan(values[c])
        if found.any():
            mean = values[c, found].mean()
            values[c, found] = mean + spread[c] * (values[c, found] - mean)
    return mean_over_classes(values, empty)


def _check_resamples(n_resamples: int) -> None:
    if n_resamples < 1:
        raise ConfigError(f"n_resamples must be at least 1, got {n_resamples}")


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float, float, int]:
    """(lower, upper, mean, how many) of the resamples that could be scored."""
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, got {level}")
    values = values[~np.isnan(values)]
    if len(values) == 0:
        raise ProbeError("no resample holds a positive; these are too few samples for an interval")
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high), float(values.mean()), len(values)


def _point(score: Statistic, n: int) -> float:
    return float(score(np.ones((n, 1)))[0])
