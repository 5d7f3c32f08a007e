"""Intervals come from resampling samples, the same for both systems, by the generator that is given."""

from __future__ import annotations

import numpy as np
import pytest

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.bootstrap import bootstrap_interval, multiplicities, paired_bootstrap
from difffeat.probe.metrics import mean_average_precision


def _systems(n: int = 400, gain: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.random((n, 3)) < 0.3
    better, worse = (labels * signal + rng.normal(size=labels.shape) for signal in (1 + gain, 1.0))
    return labels, better, worse


def test_it_equals_resampling_rows_and_scoring_again() -> None:
    labels, better, worse = _systems(60)
    columns = np.concatenate(list(multiplicities(60, 25, np.random.default_rng(5))), axis=1)
    slow = []
    for column in columns.T.astype(int):
        rows = np.repeat(np.arange(60), column)
        scores = [mean_average_precision(labels[rows], system[rows]).value for system in (better, worse)]
        slow.append(scores[0] - scores[1])
    got = paired_bootstrap(labels, better, worse, rng=np.random.default_rng(5), n_resamples=25)
    assert (got.low, got.high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=1e-12)
    assert got.difference == pytest.approx(mean_average_precision(labels, better).value - mean_average_precision(labels, worse).value)


def test_every_resample_has_as_many_samples() -> None:
    blocks = list(multiplicities(50_000, 100, np.random.default_rng(0)))
    assert len(blocks) > 1
    columns = np.concatenate(blocks, axis=1)
    assert columns.shape == (50_000, 100)
    assert (columns.sum(axis=0) == 50_000).all()


def test_a_clear_gain_is_above_and_a_system_is_not_above_itself() -> None:
    labels, better, worse = _systems()
    assert paired_bootstrap(labels, better, worse, rng=np.random.default_rng(0), n_resamples=200).above
    assert paired_bootstrap(labels, worse, better, rng=np.random.default_rng(0), n_resamples=200).below
    same = paired_bootstrap(labels, better, better, rng=np.random.default_rng(0), n_resamples=200)
    assert (same.difference, same.low, same.high, same.above) == (0, 0, 0, False)


def test_pairing_is_narrower_than_the_two_intervals_apart() -> None:
    labels, better, _ = _systems()
    close = better + 0.05 * np.random.default_rng(1).normal(size=better.shape)
    paired = paired_bootstrap(labels, better, close, rng=np.random.default_rng(0), n_resamples=300)
    alone = bootstrap_interval(labels, better, rng=np.random.default_rng(0), n_resamples=300)
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)


def test_the_same_seed_gives_the_same_interval() -> None:
    labels, better, _ = _systems(100)
    first, again, other = (bootstrap_interval(labels, better, rng=np.random.default_rng(seed), n_resamples=50) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.low < first.value < first.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Top-1 of a coin: the 90 % interval of 120 repetitions must cover one half in most of them."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(120):
        truth, scores = rng.integers(0, 2, 100), rng.random((100, 2))
        interval = bootstrap_interval(truth, scores, rng=rng, metric="top1", n_resamples=200, level=0.9)
        covered += interval.low <= 0.5 <= interval.high
    assert 97 <= covered <= 118


def test_resamples_without_a_positive_are_left_out_and_counted() -> None:
    labels, scores = np.array([[1], [0], [0], [0]]), np.array([[0.9], [0.8], [0.1], [0.2]])
    got = bootstrap_interval(labels, scores, rng=np.random.default_rng(0), n_resamples=500)
    assert 250 < got.resamples < 450  # (1 - 3⁴/4⁴) of 500 is 342


def test_f1_takes_its_options() -> None:
    rng = np.random.default_rng(0)
    labels, chances = rng.random((80, 5)) < 0.4, rng.random((80, 5))
    loose = bootstrap_interval(labels, chances, rng=np.random.default_rng(0), metric="of1", n_resamples=20, threshold=0.1)
    strict = bootstrap_interval(labels, chances, rng=np.random.default_rng(0), metric="of1", n_resamples=20, threshold=0.9)
    assert loose.value > strict.value


def test_errors_say_what_is_wrong() -> None:
    labels, better, worse = _systems(20)
    with pytest.raises(ProbeError, match=r"must score the same samples and classes, got \[20, 3\] and \[10, 3\]"):
        paired_bootstrap(labels, better, worse[:10], rng=np.random.default_rng(0))
    with pytest.raises(ConfigError, match="n_resamples must be at least 1, got 0"):
        bootstrap_interval(labels, better, rng=np.random.default_rng(0), n_resamples=0)
    with pytest.raises(ConfigError, match="level must lie between 0 and 1, got 95"):
        bootstrap_interval(labels, better, rng=np.random.default_rng(0), n_resamples=5, level=95)
