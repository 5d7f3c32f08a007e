"""Per-dimension standardisation: (x - mean) / scale, with moments gathered in float64 over pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from difffeat.errors import ProbeError
from difffeat.probe.data import FeatureMatrix, matrix_shape, row_chunks, take
from difffeat.probe.inputs import numbers

_CONSTANT = {4: (1e-6, 1e-30), 8: (1e-12, 1e-290)}
"""By the bytes of a feature: a dimension whose deviation is below this part of its mean, or this, is constant. The type cannot tell more."""


@dataclass(frozen=True)
class Standardizer:
    """**Fields:** `mean` and `scale` [D], float32, or float64 for features of such a type; `scale` is 1 for constant dimensions, so that they
    become 0 rather than infinite.
    """

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, x: FeatureMatrix, rows: np.ndarray | None = None) -> Standardizer:
        """Mean and population standard deviation of the selected rows. Raises ProbeError on NaN or infinity."""
        mean, variance = moments(x, rows)
        deviation, kind = np.sqrt(variance), take(x, np.zeros(1, np.int64)).dtype
        if not np.isfinite(deviation).all():
            raise ProbeError("features of 1e150 and more cannot be standardised: divide them by a constant first")
        share, least = _CONSTANT[kind.itemsize]
        # Below `least`, 1 / scale leaves the type.
        constant = deviation <= np.maximum(share * np.abs(mean), least)
        return cls(mean.astype(kind), np.where(constant, 1.0, deviation).astype(kind))

    @classmethod
    def identity(cls, width: int) -> Standardizer:
        """Leaves features as they are."""
        return cls(np.zeros(width, np.float32), np.ones(width, np.float32))

    def transform(self, x: np.ndarray) -> np.ndarray:
        """[m, D] -> standardised float32 [m, D]. Raises ProbeError on another width."""
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ProbeError(f"this probe was fitted on {len(self.mean)} dimensions, these features have shape {list(x.shape)}")
        if x.dtype == np.float32 and self.mean.dtype == np.float32:
            return (x - self.mean) / self.scale
        with np.errstate(over="ignore"):
            result = ((numbers(x) - self.mean) / self.scale).astype(np.float32)
        if not np.isfinite(result).all():
            raise ProbeError("a feature is too large to be read as float32: standardise the features, or divide them by a constant")
        return result

    def fold(self, weights: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights [D, C] and bias [C] on standardised features -> float64 matrix and bias that give the same on raw features."""
        matrix = weights.astype(np.float64) / self.scale.astype(np.float64)[:, None]
        return matrix, bias.astype(np.float64) - self.mean.astype(np.float64) @ matrix


def moments(x: FeatureMatrix, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population variance of each dimension, float64 [D], by merging the moments of pieces (Chan, Golub and LeVeque 1979)."""
    _, width = matrix_shape(x)
    count, mean, squares = 0, np.zeros(width), np.zeros(width)
    for _, chunk in row_chunks(x, rows):
        piece = chunk.astype(np.float64)
        total = count + len(piece)
        with np.errstate(over="ignore", invalid="ignore"):
            piece_mean = piece.mean(axis=0)
            delta = piece_mean - mean
            squares += ((piece - piece_mean) ** 2).sum(axis=0) + delta**2 * (count * len(piece) / total)
            mean += delta * (len(piece) / total)
        count = total
    return mean, squares / count
