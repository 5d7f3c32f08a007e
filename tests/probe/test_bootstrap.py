"""Intervals come from resampling samples, the same for both systems, by the generator that is given."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.bootstrap import bootstrap_interval, multiplicities, paired_bootstrap
from difffeat.probe.metrics import mean_average_precision, precision_recall


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


def _rare(rng: np.random.Generator, n: int = 400, classes: int = 60) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.random((n, classes)) < 0.0125
    return labels, 1.5 * labels + rng.normal(size=labels.shape)


def test_of_rare_classes_the_interval_holds_its_score_and_the_mean_over_test_sets() -> None:
    """What is added to it here is most of its width: left uncentred it holds the mean far less often."""
    rng = np.random.default_rng(0)
    truth = np.mean([mean_average_precision(*_rare(rng)).value for _ in range(200)])
    covered = shifted = 0
    for _ in range(60):
        labels, scores = _rare(rng)
        got = bootstrap_interval(labels, scores, rng=rng, n_resamples=100)
        assert got.low <= got.value <= got.high
        covered += got.low <= truth <= got.high
        shifted += got.low + got.shift <= truth <= got.high + got.shift
    assert covered >= 52
    assert shifted < 50


def test_centring_is_by_the_mean_of_the_resamples() -> None:
    labels, scores, _ = _systems(200)
    columns = np.concatenate(list(multiplicities(200, 60, np.random.default_rng(5))), axis=1)
    plain = [top_of1(labels, scores, column) for column in columns.T]
    got = bootstrap_interval(labels, 1 / (1 + np.exp(-scores)), rng=np.random.default_rng(5), metric="of1", n_resamples=60)
    low, high = np.percentile(plain, [2.5, 97.5])
    assert (got.low, got.high) == pytest.approx((got.value + low - np.mean(plain), got.value + high - np.mean(plain)), abs=1e-12)
    assert got.shift == pytest.approx(np.mean(plain) - got.value)


def top_of1(labels: np.ndarray, scores: np.ndarray, column: np.ndarray) -> float:
    """OF1 of a resample, its rows repeated."""
    rows = np.repeat(np.arange(len(labels)), column.astype(int))
    return precision_recall(labels[rows], 1 / (1 + np.exp(-scores[rows]))).of1


@pytest.mark.parametrize(
    ("name", "scores"),
    [("perfect", lambda y: y.astype(float)), ("constant", lambda y: np.zeros(y.shape)), ("backwards", lambda y: -y.astype(float))],
)
@pytest.mark.parametrize("metric", ["map", "cf1", "of1"])
def test_whatever_the_scores_the_interval_lies_in_0_to_1_and_holds_them(name: str, scores, metric: str) -> None:
    for n in (2, 7, 60):
        labels = np.random.default_rng(n).random((n, 3)) < 0.4
        labels[0] = True
        shown = scores(labels)
        got = bootstrap_interval(
            labels, shown if metric == "map" else np.clip(shown, 0, 1), rng=np.random.default_rng(0), metric=metric, n_resamples=50
        )
        assert 0 <= got.low <= got.value <= got.high <= 1
        assert f"{n} samples are few: the interval is narrower than it should be" in got.notes
        if name == "perfect":
            assert (got.low, got.high) == (1, 1) or metric != "map"


def test_an_interval_without_width_says_so() -> None:
    labels = np.eye(3)[np.arange(300) % 3]
    got = bootstrap_interval(labels, labels, rng=np.random.default_rng(0), n_resamples=50)
    assert (got.low, got.value, got.high) == (1, 1, 1)
    assert got.notes == ("every resample scores the same: the interval has no width and says nothing of other samples",)
    same = paired_bootstrap(labels, labels, labels, rng=np.random.default_rng(0), n_resamples=50)
    assert same.to_dict()["notes"] == list(got.notes)


def test_rare_classes_are_named_with_their_positives() -> None:
    labels = np.zeros((200, 4), int)
    labels[:100, 0], labels[:3, 1], labels[50:59, 2] = 1, 1, 1
    scores = labels + np.random.default_rng(0).normal(size=labels.shape)
    options: dict[str, Any] = {"rng": np.random.default_rng(0), "n_resamples": 20}
    got = bootstrap_interval(labels, scores, classes=["cat", "toaster", "dryer", "none"], **options)
    assert dict(got.rare) == {"toaster": 3, "dryer": 9}
    assert got.notes[0].startswith("2 classes have fewer than 10 positives among these samples (toaster 3, dryer 9): their AP rests on a handful")
    assert bootstrap_interval(labels, np.clip(scores, 0, 1), metric="of1", **options).rare == {}
    labels[:, 1] = np.where(np.arange(200) < 150, -1, labels[:, 1])
    labels[195, 1] = 1
    unknown = bootstrap_interval(labels, scores, **options)
    assert dict(unknown.rare) == {"1": 1, "2": 9}
    assert len({len(note) for note in unknown.notes}) == 1
    assert json.loads(json.dumps(unknown.to_dict()))["of"] == "the mean over test sets of this size"
