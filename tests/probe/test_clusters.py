"""Cluster scores are scikit-learn's, on the samples for which clusters are defined."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from difffeat.errors import ProbeError
from difffeat.probe.clusters import cluster_scores, single_label_rows, tsne


def _blobs(spread: float, n: int = 90) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    classes = np.arange(n) % 3
    return (np.eye(3, 5)[classes] * 4 + spread * rng.normal(size=(n, 5))).astype(np.float32), classes


def test_scores_are_scikit_learns_and_tell_tight_from_loose() -> None:
    x, classes = _blobs(0.3)
    got = cluster_scores(x, classes, standardize=False)
    assert got.silhouette == pytest.approx(metrics.silhouette_score(x, classes), rel=1e-5)
    assert got.davies_bouldin == pytest.approx(metrics.davies_bouldin_score(x, classes), rel=1e-5)
    assert got.calinski_harabasz == pytest.approx(metrics.calinski_harabasz_score(x, classes), rel=1e-5)
    assert (got.samples, got.clusters) == (90, 3)
    loose = cluster_scores(_blobs(3)[0], classes)
    assert got.silhouette > loose.silhouette
    assert got.davies_bouldin < loose.davies_bouldin
    assert got.calinski_harabasz > loose.calinski_harabasz


def test_rows_select_and_many_samples_are_thinned_by_the_seed() -> None:
    x, classes = _blobs(1)
    rows = np.arange(0, 90, 2)
    assert cluster_scores(x, classes[rows], rows=rows) == cluster_scores(x[rows], classes[rows])
    first, again, other = (cluster_scores(x, classes, max_samples=40, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first.samples == 40


def test_only_samples_with_exactly_one_class_form_clusters() -> None:
    rows, classes = single_label_rows(np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]]))
    assert (rows.tolist(), classes.tolist()) == ([0, 3], [0, 2])
    with pytest.raises(ProbeError, match="no sample has exactly one class"):
        single_label_rows(np.ones((3, 2)))


def test_tsne_keeps_classes_together_and_is_the_same_twice() -> None:
    x, classes = _blobs(0.2, 45)
    points, numbers = tsne(x, classes, perplexity=8)
    again, _ = tsne(x, classes, perplexity=8)
    np.testing.assert_array_equal(points, again)
    np.testing.assert_array_equal(numbers, classes)
    assert points.shape == (45, 2)
    assert metrics.silhouette_score(points, classes) > 0.5


def test_errors_say_what_is_wrong() -> None:
    x, classes = _blobs(1)
    with pytest.raises(ProbeError, match="at least 2 classes and more samples than classes, got 1 classes and 90 samples"):
        cluster_scores(x, classes * 0)
    with pytest.raises(ProbeError, match=r"classes must be class numbers \[90\]"):
        cluster_scores(x, classes[:3])
    with pytest.raises(ProbeError, match="more samples than its perplexity 100, got 90"):
        tsne(x, classes, perplexity=100)
