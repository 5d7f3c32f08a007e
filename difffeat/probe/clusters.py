"""How tightly features cluster by class: silhouette, Davies-Bouldin, Calinski-Harabasz, and a t-SNE picture (scikit-learn)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from difffeat.errors import ProbeError
from difffeat.probe.data import FeatureMatrix, as_multi_hot, row_chunks, row_count
from difffeat.probe.standardize import Standardizer

MAX_SAMPLES = 5000
"""Silhouette and t-SNE take time and memory by the square of the samples; more than this are thinned out at random."""


@dataclass(frozen=True)
class ClusterScores:
    """`silhouette` in -1..1 and `calinski_harabasz` are better when higher, `davies_bouldin` when lower; of `samples` rows in `clusters`
    classes.
    """

    silhouette: float
    davies_bouldin: float
    calinski_harabasz: float
    samples: int
    clusters: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def single_label_rows(labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """(rows, class numbers) of the samples with exactly one positive class, int64 [m] each; clusters are defined on these only."""
    positive = as_multi_hot(labels)
    rows = np.flatnonzero(positive.sum(axis=1) == 1)
    if len(rows) == 0:
        raise ProbeError("no sample has exactly one class, so there are no clusters to score")
    return rows, positive[rows].argmax(axis=1)


def cluster_scores(
    x: FeatureMatrix,
    classes: Any,
    *,
    rows: np.ndarray | None = None,
    standardize: bool = True,
    max_samples: int = MAX_SAMPLES,
    seed: int = 0,
) -> ClusterScores:
    """Scores of the selected rows under `classes` int [m] (one a selected row), at most `max_samples` of them chosen by `seed`.

    Raises ProbeError unless there are at least two classes and more samples than classes.
    """
    from sklearn import metrics

    held, numbers = _sample(x, classes, rows, standardize, max_samples, seed)
    clusters = len(np.unique(numbers))
    if not 2 <= clusters < len(held):
        raise ProbeError(f"cluster scores need at least 2 classes and more samples than classes, got {clusters} classes and {len(held)} samples")
    return ClusterScores(
        float(metrics.silhouette_score(held, numbers)),
        float(metrics.davies_bouldin_score(held, numbers)),
        float(metrics.calinski_harabasz_score(held, numbers)),
        len(held),
        clusters,
    )


def tsne(
    x: FeatureMatrix,
    classes: Any,
    *,
    rows: np.ndarray | None = None,
    perplexity: float = 30.0,
    standardize: bool = True,
    max_samples: int = MAX_SAMPLES,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(coordinates float32 [m, 2], class numbers [m]) of a t-SNE picture, begun from the first two principal components."""
    from sklearn.manifold import TSNE

    held, numbers = _sample(x, classes, rows, standardize, max_samples, seed)
    if len(held) <= perplexity:
        raise ProbeError(f"t-SNE needs more samples than its perplexity {perplexity:g}, got {len(held)}. Pass a smaller perplexity.")
    embedding = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(held)
    return np.asarray(embedding, np.float32), numbers


def _sample(x: FeatureMatrix, classes: Any, rows: np.ndarray | None, standardize: bool, max_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    count, numbers = row_count(x, rows), np.asarray(classes)
    if numbers.shape != (count,) or not np.issubdtype(numbers.dtype, np.integer):
        raise ProbeError(f"classes must be class numbers [{count}], one for each row, got {numbers.dtype} of shape {list(numbers.shape)}")
    chosen = np.arange(count) if rows is None else rows
    if count > max_samples:
        kept = np.sort(np.random.Generator(np.random.PCG64(seed)).choice(count, max_samples, replace=False))
        chosen, numbers = chosen[kept], numbers[kept]
    held = np.concatenate([chunk for _, chunk in row_chunks(x, chosen)])
    return Standardizer.fit(held).transform(held) if standardize else held, numbers
