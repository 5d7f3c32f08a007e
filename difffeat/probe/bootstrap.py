"""Bootstrap over samples: how sure a score is, and whether one system beats another.

A resample is a column of multiplicities (how often each sample was drawn), so scores are ranked once and never sorted again. In a paired
bootstrap both systems see the same resamples; "A is above B" means that the interval of A - B lies above zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.metrics import Statistic, statistic

_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Interval:
    """A score with its percentile interval. `resamples`: how many could be scored (one without any positive cannot)."""

    metric: str
    value: float
    low: float
    high: float
    level: float
    resamples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class PairedDifference:
    """first - second on the same samples, with the percentile interval of that difference."""

    metric: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    level: float
    resamples: int

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
        return {**asdict(self), "above": self.above}


def bootstrap_interval(
    labels: Any, scores: Any, *, rng: np.random.Generator, metric: str = "map", n_resamples: int = 1000, level: float = 0.95, **options: Any
) -> Interval:
    """The score of one system with its interval.

    **Arguments:** `labels`, `scores` [n, C] as for the metric; `metric` and `options` as in `metrics.statistic`.
    """
    score = statistic(metric, labels, scores, **options)
    low, high, used = _percentiles(_resampled(len(labels), n_resamples, rng, score)[0], level)
    return Interval(metric, _point(score, len(labels)), low, high, level, used)


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
    low, high, used = _percentiles(values[0] - values[1], level)
    a, b = _point(scores[0], n), _point(scores[1], n)
    return PairedDifference(metric, a, b, a - b, low, high, level, used)


def multiplicities(n: int, n_resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Blocks of resamples, float64 [n, r]: how often each sample was drawn. Every column sums to n."""
    block = max(1, _BLOCK_BYTES // (8 * n))
    for start in range(0, n_resamples, block):
        drawn = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(min(block, n_resamples - start))]
        yield np.stack(drawn, axis=1).astype(np.float64)


def _resampled(n: int, n_resamples: int, rng: np.random.Generator, *scores: Statistic) -> np.ndarray:
    """Scores of all resamples, float64 [systems, n_resamples]."""
    if n_resamples < 1:
        raise ConfigError(f"n_resamples must be at least 1, got {n_resamples}")
    blocks = [np.stack([score(weights) for score in scores]) for weights in multiplicities(n, n_resamples, rng)]
    return np.concatenate(blocks, axis=1)


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float, int]:
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, got {level}")
    values = values[~np.isnan(values)]
    if len(values) == 0:
        raise ProbeError("no resample holds a positive; these are too few samples for an interval")
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high), len(values)


def _point(score: Statistic, n: int) -> float:
    return float(score(np.ones((n, 1)))[0])
