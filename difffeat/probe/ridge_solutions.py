"""Closed-form ridge regression onto 0/1 labels: one eigendecomposition a feature matrix, any number of penalties.

Minimises Σ‖x·w + b - y‖²/n + alpha·‖w‖² on standardised features; the intercept is free. Dividing by n makes an alpha mean the same for
whatever number of samples. With fewer samples than dimensions the n×n form is solved instead of the D×D one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.data import FeatureMatrix, matrix_shape, one_hot, row_chunks, row_count
from difffeat.probe.labels import MULTILABEL, Labels, split_unknown
from difffeat.probe.selection import column_ap
from difffeat.probe.standardize import Standardizer

ALPHAS: tuple[float, ...] = tuple(10.0 ** (k / 2) for k in range(-16, 7))
"""1e-8 to 1e3 in half decades; mean eigenvalue of the standardised features' covariance is 1."""

LABEL_BYTES = 64 * 2**20
"""Centred labels of about this many bytes are in memory at once."""

SCORE_BYTES = 64 * 2**20
"""Scores of about this many bytes, or those of one alpha, are in memory at once while alphas are compared."""

PIECE_BYTES = 16 * 2**20
"""Scores are computed so many bytes at a time."""


class RidgeSolutions:
    """Weights and bias for every alpha. **Fields:** `standardizer`, `n_columns`."""

    standardizer: Standardizer
    n_columns: int

    def affine(self, alpha: float, columns: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Weights float64 [D, K] on standardised features and bias [K] of some columns. Raises ConfigError unless alpha is above 0."""
        raise NotImplementedError

    def solve(self, alpha: float) -> np.ndarray:
        """Weights float64 [D, C] on standardised features. Raises ConfigError unless alpha is above 0."""
        return self.affine(alpha)[0]

    def scores(self, x: FeatureMatrix, alphas: Sequence[float], rows: np.ndarray | None = None, columns: slice = slice(None)) -> np.ndarray:
        """Estimates float32 [len(alphas), n, K] of the labels of some columns, in one pass over `x`."""
        parts = [self.affine(alpha, columns) for alpha in alphas]
        weights = np.concatenate([part[0] for part in parts], axis=1).astype(np.float32)
        bias = np.stack([part[1] for part in parts]).astype(np.float32)
        n_columns = bias.shape[1]
        result = np.empty((len(alphas), row_count(x, rows), n_columns), np.float32)
        size = max(1, PIECE_BYTES // (4 * max(weights.shape)))
        for start, chunk in row_chunks(x, rows):
            for first in range(0, len(chunk), size):
                piece = self.standardizer.transform(chunk[first : first + size])
                scores = (piece @ weights).reshape(len(piece), len(alphas), n_columns) + bias
                result[:, start + first : start + first + len(piece)] = np.moveaxis(scores, 1, 0)
        return result

    def choose(self, x: FeatureMatrix, y: Any, alphas: Sequence[float] = ALPHAS, rows: np.ndarray | None = None) -> tuple[float, list[float]]:
        """(best alpha, mAP of each) on validation features and labels (-1: unknown). Of equal mAP the smaller squared
        error (many alphas may rank all right and answer badly), then the larger alpha.
        """
        if not len(alphas):
            raise ConfigError("no alpha was given to choose from")
        hot = one_hot(y, self.n_columns) if np.ndim(y) == 1 else y
        positive, known = split_unknown(hot)
        if positive.shape[1] != self.n_columns:
            raise ProbeError(f"the labels to choose alpha by are of {positive.shape[1]} classes, those of training of {self.n_columns}")
        if not positive.any():
            raise ProbeError(f"none of the {self.n_columns} classes has a positive among these {len(positive)} samples: nothing can be scored")
        ordered = sorted(alphas)
        values, errors = self.compare(x, Labels(positive, known, MULTILABEL, ()), ordered, rows)
        best = max(range(len(ordered)), key=lambda i: (values[i], -errors[i], i))
        by_alpha = dict(zip(ordered, values, strict=True))
        return float(ordered[best]), [by_alpha[alpha] for alpha in alphas]

    def compare(self, x: FeatureMatrix, labels: Labels, alphas: Sequence[float], rows: np.ndarray | None = None) -> tuple[list[float], list[float]]:
        """(mAP, mean squared error) of each alpha. Some columns at a time: memory is bounded by `SCORE_BYTES` or the scores of one alpha."""
        count = row_count(x, rows)
        if len(labels) != count:
            raise ProbeError(f"there are {count} rows of features but {len(labels)} of labels")
        precisions, errors, cells = np.full((len(alphas), self.n_columns), np.nan), np.zeros(len(alphas)), 0
        for columns in _blocks(self.n_columns, count, len(alphas)):
            truth = labels.positive[:, columns]
            known = None if labels.known is None else labels.known[:, columns]
            cells += truth.size if known is None else int(known.sum())
            for place, scores in enumerate(self.scores(x, alphas, rows, columns)):
                precisions[place, columns] = column_ap(truth, scores, known)
                errors[place] += _squares(scores, truth, known)
        found = ~np.isnan(precisions[0])
        maps = precisions[:, found].mean(axis=1) if found.any() else np.full(len(alphas), np.nan)
        return maps.tolist(), (errors / max(cells, 1)).tolist()


@dataclass(frozen=True)
class RidgePath(RidgeSolutions):
    """The solutions for every alpha: weights(alpha) = basis · diag(1/(eigenvalues + alpha)) · targets.

    **Fields:** `basis` float64 [D, r], `eigenvalues` [r], `targets` [r, C], `intercept` [C] (the labels' mean), `standardizer`; `shift` [D]: the
    mean of the standardised features of the rows that it is of, None for 0.
    """

    basis: np.ndarray
    eigenvalues: np.ndarray
    targets: np.ndarray
    intercept: np.ndarray
    standardizer: Standardizer
    shift: np.ndarray | None = None

    @property
    def n_columns(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How many classes."""
        return len(self.intercept)

    def affine(self, alpha: float, columns: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        if not (np.isfinite(alpha) and alpha > 0):
            raise ConfigError(f"alpha must be above 0, got {alpha}")
        weights = self.basis @ (self.targets[:, columns] / (self.eigenvalues + alpha)[:, None])
        bias = self.intercept[columns]
        return weights, bias if self.shift is None else bias - self.shift @ weights


@dataclass(frozen=True)
class GroupedRidgePath(RidgeSolutions):
    """Classes whose labels are known for different rows: one path for each set of rows. **Fields:** (columns, path) of each."""

    groups: tuple[tuple[np.ndarray, RidgePath | None], ...]
    standardizer: Standardizer
    n_columns: int

    def affine(self, alpha: float, columns: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.arange(self.n_columns)[columns]
        weights, bias = np.zeros((len(self.standardizer.mean), len(wanted))), np.full(len(wanted), 0.5)
        for members, path in self.groups:
            inside = np.isin(wanted, members)
            if path is not None and inside.any():
                part, shift = path.affine(alpha)
                own = np.searchsorted(members, wanted[inside])
                weights[:, inside], bias[inside] = part[:, own], shift[own]
        return weights, bias


def ridge_path(
    x: FeatureMatrix, y: Any, *, rows: np.ndarray | None = None, standardize: bool = True, known: np.ndarray | None = None
) -> RidgePath | GroupedRidgePath:
    """Decompose the selected rows once; where labels are unknown (-1 in `y`, or False in `known`), once for each set of known rows.

    **Arguments:** `x` [n, D], read in pieces; `y` 0/1 [m, C], one row for each selected row. Memory: the smaller of D×D and n×D in float64.
    A class that nobody knows in any row gets weights 0 and the estimate 0.5.
    """
    positive, unknown = split_unknown(y)
    known = unknown if known is None else known
    count, width = row_count(x, rows), matrix_shape(x)[1]
    if len(positive) != count:
        raise ProbeError(f"there are {count} rows of features but {len(positive)} of labels")
    # Without scaling the mean is still taken off, so that the intercept stays outside the penalty.
    standardizer = Standardizer.fit(x, rows)
    if not standardize:
        standardizer = Standardizer(standardizer.mean, np.ones(width, standardizer.mean.dtype))
    if known is None:
        return _path(x, rows, standardizer, positive)
    numbers, groups = np.arange(count) if rows is None else rows, list[tuple[np.ndarray, RidgePath | None]]()
    for members, inside in _groups(known):
        if not inside.any():
            groups.append((members, None))
            continue
        own = numbers[inside]
        mean = Standardizer.fit(x, own).mean
        path = _path(x, own, Standardizer(mean, standardizer.scale), positive[np.ix_(inside, members)])
        shift = (mean.astype(np.float64) - standardizer.mean) / standardizer.scale
        groups.append((members, RidgePath(path.basis, path.eigenvalues, path.targets, path.intercept, standardizer, shift)))
    return GroupedRidgePath(tuple(groups), standardizer, positive.shape[1])


def _path(x: FeatureMatrix, rows: np.ndarray | None, standardizer: Standardizer, targets: np.ndarray) -> RidgePath:
    intercept, width = targets.mean(axis=0), matrix_shape(x)[1]
    decompose = _dual if len(targets) < width else _primal
    basis, eigenvalues, moments = decompose(x, rows, standardizer, targets, intercept)
    # Directions that the features do not have come out of the decomposition as noise, which a small alpha would blow up.
    real = eigenvalues > eigenvalues.max(initial=0) * max(len(targets), width) * np.finfo(np.float64).eps
    return RidgePath(basis, np.maximum(eigenvalues, 0), moments * real[:, None], intercept, standardizer)


def _groups(known: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(columns, rows bool [n]) of the columns that are known for the same rows."""
    groups = dict[bytes, list[int]]()
    for c in range(known.shape[1]):
        groups.setdefault(np.packbits(known[:, c]).tobytes(), []).append(c)
    for members in groups.values():
        yield np.array(members), known[:, members[0]]


def _blocks(n_columns: int, count: int, n_alphas: int) -> Iterator[slice]:
    """Columns to be scored at a time."""
    size = max(1, max(SCORE_BYTES, 4 * count * n_columns) // (4 * count * n_alphas))
    for start in range(0, n_columns, size):
        yield slice(start, min(start + size, n_columns))


def _squares(scores: np.ndarray, truth: np.ndarray, known: np.ndarray | None) -> float:
    total = 0.0
    for start in range(0, len(scores), 4096):
        part = slice(start, start + 4096)
        residual = scores[part].astype(np.float64) - truth[part]
        total += float((residual**2).sum() if known is None else (residual**2)[known[part]].sum())
    return total


def _primal(
    x: FeatureMatrix, rows: np.ndarray | None, standardizer: Standardizer, targets: np.ndarray, intercept: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """XᵀX/n = V·diag(e)·Vᵀ: weights = V · 1/(e + alpha) · Vᵀ·Xᵀy/n. The labels are centred piece by piece: [n, C] in float64 may be large."""
    width, n = matrix_shape(x)[1], len(targets)
    gram, moments = np.zeros((width, width)), np.zeros((width, targets.shape[1]))
    for start, chunk in row_chunks(x, rows):
        piece = standardizer.transform(chunk).astype(np.float64)
        gram += piece.T @ piece
        moments += _times(piece, targets[start : start + len(chunk)], intercept)
    eigenvalues, vectors = np.linalg.eigh(gram / n)
    return vectors, eigenvalues, vectors.T @ (moments / n)


def _times(piece: np.ndarray, targets: np.ndarray, intercept: np.ndarray) -> np.ndarray:
    """Xᵀ·(y - mean) of a piece, float64 [D, C], with at most `LABEL_BYTES` of centred labels at a time."""
    size = max(1, LABEL_BYTES // (8 * targets.shape[1]))
    result = piece[:size].T @ (targets[:size] - intercept)
    for start in range(size, len(piece), size):
        result += piece[start : start + size].T @ (targets[start : start + size] - intercept)
    return result


def _dual(
    x: FeatureMatrix, rows: np.ndarray | None, standardizer: Standardizer, targets: np.ndarray, intercept: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """XXᵀ/n = U·diag(e)·Uᵀ: weights = Xᵀ·U · 1/(e + alpha) · Uᵀ·y/n, since n < D."""
    n = len(targets)
    held = np.concatenate([standardizer.transform(chunk).astype(np.float64) for _, chunk in row_chunks(x, rows)])
    eigenvalues, vectors = np.linalg.eigh(held @ held.T / n)
    return held.T @ vectors, eigenvalues, vectors.T @ ((targets - intercept) / n)
