"""The scores are the conventions' scores: each is held against scikit-learn or against its definition written out."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.metrics import (
    average_precision,
    mean_average_precision,
    multi_label_report,
    precision_recall,
    statistic,
    top_k_accuracy,
)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores with many ties."""
    n, classes = draw(st.integers(1, 25)), draw(st.integers(1, 4))
    levels = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = rng.random((n, classes)) < draw(st.floats(0.05, 1))
    labels[rng.integers(n), rng.integers(classes)] = True
    return labels, rng.integers(0, levels, (n, classes)) / levels


@settings(max_examples=200, deadline=None)
@given(scored())
def test_ap_is_scikit_learns_with_ties(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = case
    ours = average_precision(labels, scores)
    for c in range(labels.shape[1]):
        if labels[:, c].any():
            assert ours[c] == pytest.approx(average_precision_score(labels[:, c], scores[:, c]), abs=1e-12)
        else:
            assert np.isnan(ours[c])


@settings(max_examples=50, deadline=None)
@given(scored(), st.integers(0, 2**32 - 1))
def test_weights_do_what_repeating_samples_does(case: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    labels, scores = case
    rows = np.random.default_rng(seed).integers(0, len(labels), len(labels))
    weights = np.bincount(rows, minlength=len(labels))[:, None].astype(float)
    for metric, repeated in (
        ("map", lambda: mean_average_precision(labels[rows], scores[rows]).value),
        ("cf1", lambda: precision_recall(labels[rows], scores[rows]).cf1),
        ("of1", lambda: precision_recall(labels[rows], scores[rows]).of1),
    ):
        weighted = statistic(metric, labels, scores)(weights)[0]
        if labels[rows].any():
            assert weighted == pytest.approx(repeated(), abs=1e-12)
        else:
            assert np.isnan(weighted)


def test_large_float32_scores_match_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.random((3000, 6)) < 0.1, rng.normal(size=(3000, 6)).astype(np.float32)
    expected = [average_precision_score(labels[:, c], scores[:, c]) for c in range(6)]
    np.testing.assert_allclose(average_precision(labels, scores), expected, atol=1e-12)
    assert mean_average_precision(labels, scores).value == pytest.approx(np.mean(expected))


def test_empty_classes_are_skipped_or_count_zero_and_the_number_evaluated_is_told() -> None:
    labels = np.array([[1, 0, 0], [0, 0, 1], [1, 0, 0]])
    scores = np.array([[0.9, 0.5, 0.1], [0.2, 0.4, 0.8], [0.8, 0.3, 0.2]])
    skipped, zero = mean_average_precision(labels, scores), mean_average_precision(labels, scores, empty="zero")
    assert (skipped.value, skipped.evaluated) == (1.0, 2)
    assert (zero.value, zero.evaluated) == (pytest.approx(2 / 3), 3)
    assert skipped.to_dict()["per_class"] == [1.0, None, 1.0]


def test_unsigned_scores_are_ranked_like_any_other() -> None:
    labels = np.array([[1], [0], [0]])
    assert average_precision(labels, np.array([[200], [0], [3]], np.uint8))[0] == 1.0


def test_precision_and_recall_follow_their_definitions() -> None:
    rng = np.random.default_rng(1)
    labels, chances = rng.random((60, 5)) < 0.3, rng.random((60, 5))
    labels[:, 4] = False
    chances[:, 3] = 0.2
    decided = chances > 0.5
    right = [int((labels[:, c] & decided[:, c]).sum()) for c in range(5)]
    cp = sum(right[c] / max(int(decided[:, c].sum()), 1) for c in range(5)) / 5
    cr = sum(right[c] / int(labels[:, c].sum()) for c in range(4)) / 4
    got = precision_recall(labels, chances)
    assert (got.cp, got.cr, got.cf1) == pytest.approx((cp, cr, 2 * cp * cr / (cp + cr)))
    op, or_ = sum(right) / decided.sum(), sum(right) / labels.sum()
    assert (got.op, got.or_, got.of1) == pytest.approx((op, or_, 2 * op * or_ / (op + or_)))
    assert set(got.to_dict()) == {"CP", "CR", "CF1", "OP", "OR", "OF1", "threshold", "top"}


def test_cf1_is_not_the_mean_of_the_f1_of_each_class() -> None:
    labels, chances = np.array([[1, 1], [0, 1], [0, 1]]), np.array([[0.9, 0.9], [0.9, 0.1], [0.9, 0.1]])
    per_class = [2 * (1 / 3) * 1 / (1 / 3 + 1), 2 * 1 * (1 / 3) / (1 + 1 / 3)]
    got = precision_recall(labels, chances)
    assert got.cf1 == pytest.approx(2 / 3)
    assert np.mean(per_class) == pytest.approx(0.5)


def test_a_class_without_predictions_has_precision_zero() -> None:
    got = precision_recall(np.array([[1, 1], [1, 0]]), np.array([[0.9, 0.1], [0.9, 0.1]]))
    assert (got.cp, got.cr) == (0.5, 0.5)
    nothing = precision_recall(np.array([[1]]), np.array([[0.1]]))
    assert (nothing.cf1, nothing.of1) == (0, 0)


def test_top_three_must_also_be_over_the_threshold() -> None:
    labels = np.ones((1, 5), int)
    chances = np.array([[0.9, 0.8, 0.7, 0.6, 0.1]])
    assert precision_recall(labels, chances).or_ == pytest.approx(4 / 5)
    assert precision_recall(labels, chances, top=3).or_ == pytest.approx(3 / 5)
    assert precision_recall(labels, chances, top=3, threshold=0.75).or_ == pytest.approx(2 / 5)


def test_equal_probabilities_at_the_edge_of_the_top_go_to_the_earlier_class() -> None:
    labels = np.array([[0, 1, 0, 0]])
    assert precision_recall(labels, np.full((1, 4), 0.9), top=1).or_ == 0
    assert precision_recall(labels, np.full((1, 4), 0.9), top=2).or_ == 1


def test_top_k_accuracy() -> None:
    scores = np.array([[0.1, 0.5, 0.4], [0.3, 0.3, 0.4], [0.2, 0.2, 0.2]])
    assert top_k_accuracy(np.array([1, 1, 0]), scores) == pytest.approx(2 / 3)
    assert top_k_accuracy(np.array([2, 1, 2]), scores, 2) == pytest.approx(1 / 3)
    assert top_k_accuracy(np.eye(3)[[1, 1, 0]], scores) == pytest.approx(2 / 3)


def test_a_report_on_one_class_a_sample_holds_accuracies() -> None:
    rng = np.random.default_rng(0)
    labels, scores = np.eye(6, dtype=bool)[rng.integers(0, 6, 50)], rng.random((50, 6))
    report = multi_label_report(labels, scores, scores)
    assert report["accuracy"] == {"top1": top_k_accuracy(labels, scores, 1), "top5": top_k_accuracy(labels, scores, 5)}
    few = np.eye(3, dtype=bool)[rng.integers(0, 3, 50)]
    assert set(multi_label_report(few, scores[:, :3], scores[:, :3])["accuracy"]) == {"top1"}
    labels[0, :2] = True
    assert "accuracy" not in multi_label_report(labels, scores, scores)


def test_a_report_holds_plain_numbers() -> None:
    import json

    rng = np.random.default_rng(2)
    labels, chances = rng.random((40, 4)) < 0.4, rng.random((40, 4))
    report = multi_label_report(labels, chances, chances)
    assert json.loads(json.dumps(report)) == report
    assert report["all"]["threshold"] == 0.5
    assert report["top3"]["top"] == 3


BAD = [
    (np.ones((3, 2)), np.ones((3, 3)), "labels [3, 2] and scores [3, 3] differ in shape"),
    (np.ones(3), np.ones((3, 1)), "labels must be multi-hot [n, C], got shape [3]"),
    (np.full((2, 2), 2), np.ones((2, 2)), "labels must be 0 or 1; found 2"),
    (np.ones((2, 2)), np.array([[1, 2], [np.nan, 1]]), "scores hold NaN, first for sample 1 and class 0"),
    (np.zeros((4, 2)), np.ones((4, 2)), "none of the 2 classes has a positive among these 4 samples"),
]


@pytest.mark.parametrize(("labels", "scores", "message"), BAD)
def test_what_cannot_be_scored_is_said(labels: np.ndarray, scores: np.ndarray, message: str) -> None:
    with pytest.raises(ProbeError, match=re.escape(message)):
        mean_average_precision(labels, scores)


def test_decision_values_are_no_probabilities() -> None:
    with pytest.raises(ProbeError, match=r"found -2\.\.3\. Pass predict_proba"):
        precision_recall(np.array([[1, 0]]), np.array([[3.0, -2.0]]))


def test_unknown_options_are_named() -> None:
    with pytest.raises(ConfigError, match="empty must be skip or zero, got 'one'"):
        mean_average_precision(np.ones((1, 1)), np.ones((1, 1)), empty="one")
    with pytest.raises(ConfigError, match="metric must be one of map"):
        statistic("auc", np.ones((1, 1)), np.ones((1, 1)))
    with pytest.raises(ProbeError, match="top-k accuracy needs exactly one class a sample"):
        top_k_accuracy(np.ones((2, 2), int), np.ones((2, 2)))


@settings(max_examples=100, deadline=None)
@given(scored(), st.integers(0, 2**32 - 1))
def test_cells_of_unknown_labels_are_as_if_they_were_not_there(case: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    labels, scores = case
    unknown = np.random.default_rng(seed).random(labels.shape) < 0.3
    targets = np.where(unknown, -1, labels.astype(np.int8))
    if not (targets == 1).any():
        return
    ours = average_precision(targets, scores)
    for c in range(labels.shape[1]):
        kept = ~unknown[:, c]
        if (labels[kept, c]).any():
            assert ours[c] == pytest.approx(average_precision_score(labels[kept, c], scores[kept, c]), abs=1e-12)
        else:
            assert np.isnan(ours[c])
    assert statistic("map", targets, scores)(np.ones((len(targets), 1)))[0] == pytest.approx(np.nanmean(ours))


def test_decisions_on_unknown_labels_are_not_counted() -> None:
    targets, chances = np.array([[1, -1], [0, 1], [-1, 0]]), np.array([[0.9, 0.9], [0.2, 0.8], [0.7, 0.1]])
    scores = precision_recall(targets, chances)
    assert (scores.op, scores.or_, scores.of1) == (1.0, 1.0, 1.0)
    assert precision_recall(targets, chances, top=1).or_ == 1.0  # the unknown cell takes no place among the top
    assert "accuracy" not in multi_label_report(targets, chances, chances)
    assert top_k_accuracy(targets[:2], np.array([[0.1, 0.9], [0.9, 0.1]])) == 0.5  # row 0: nobody knows of class 1, so it outranks nothing
