"""Closed-form ridge regression onto 0/1 labels: one eigendecomposition a feature matrix, any number of penalties.

Minimises Σ‖x·w + b - y‖²/n + alpha·‖w‖² on standardised features; the intercept is free. Dividing by n makes an alpha mean the same for
whatever number of samples. With fewer samples than dimensions the n×n form is solved instead of the D×D one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.base import Probe
from difffeat.probe.data import FeatureMatrix, as_multi_hot, matrix_shape, one_hot, row_chunks, row_count
from difffeat.probe.metrics import mean_average_precision
from difffeat.probe.optim import check_seed
from difffeat.probe.standardize import Standardizer

ALPHAS: tuple[float, ...] = tuple(10.0 ** (k / 2) for k in range(-8, 5))
"""1e-4 to 1e2 in half decades; mean eigenvalue of the standardised features' covariance is 1."""

LABEL_BYTES = 64 * 2**20
"""Centred labels of about this many bytes are in memory at once."""

HOLDOUT = 0.2
"""Share of the training rows held out to choose alpha when no validation rows are given."""


@dataclass(frozen=True)
class RidgePath:
    """The solutions for every alpha: weights(alpha) = basis · diag(1/(eigenvalues + alpha)) · targets.

    **Fields:** `basis` float64 [D, r], `eigenvalues` [r], `targets` [r, C], `intercept` [C] (the labels' mean), `standardizer`.
    """

    basis: np.ndarray
    eigenvalues: np.ndarray
    targets: np.ndarray
    intercept: np.ndarray
    standardizer: Standardizer

    def solve(self, alpha: float) -> np.ndarray:
        """Weights float64 [D, C] on standardised features. Raises ConfigError unless alpha is above 0."""
        if not (np.isfinite(alpha) and alpha > 0):
            raise ConfigError(f"alpha must be above 0, got {alpha}")
        return self.basis @ (self.targets / (self.eigenvalues + alpha)[:, None])

    def scores(self, x: FeatureMatrix, alphas: Sequence[float], rows: np.ndarray | None = None) -> np.ndarray:
        """Estimates float32 [len(alphas), n, C] of the labels, in one pass over `x`."""
        weights = np.concatenate([self.solve(alpha) for alpha in alphas], axis=1).astype(np.float32)
        n_classes = len(self.intercept)
        result = np.empty((len(alphas), row_count(x, rows), n_classes), np.float32)
        for start, chunk in row_chunks(x, rows):
            scores = (self.standardizer.transform(chunk) @ weights).reshape(len(chunk), len(alphas), n_classes)
            result[:, start : start + len(chunk)] = np.moveaxis(scores, 1, 0) + self.intercept.astype(np.float32)
        return result

    def choose(self, x: FeatureMatrix, y: Any, alphas: Sequence[float] = ALPHAS, rows: np.ndarray | None = None) -> tuple[float, list[float]]:
        """(best alpha, mAP of each) on validation features and labels. Equal mAP: the larger alpha."""
        if not alphas:
            raise ConfigError("no alpha was given to choose from")
        ordered, truth = sorted(alphas), one_hot(y, len(self.intercept))
        values = [mean_average_precision(truth, scores).value for scores in self.scores(x, ordered, rows)]
        best = max(range(len(ordered)), key=lambda i: (values[i], i))
        by_alpha = dict(zip(ordered, values, strict=True))
        return float(ordered[best]), [by_alpha[alpha] for alpha in alphas]


def ridge_path(x: FeatureMatrix, y: Any, *, rows: np.ndarray | None = None, standardize: bool = True) -> RidgePath:
    """Decompose the selected rows once.

    **Arguments:** `x` [n, D], read in pieces; `y` 0/1 [m, C], one row for each selected row. Memory: the smaller of D×D and n×D in float64.
    """
    targets = as_multi_hot(y)
    count, width = row_count(x, rows), matrix_shape(x)[1]
    if len(targets) != count:
        raise ProbeError(f"there are {count} rows of features but {len(targets)} of labels")
    # Without scaling the mean is still taken off, so that the intercept stays outside the penalty.
    standardizer = Standardizer.fit(x, rows)
    if not standardize:
        standardizer = Standardizer(standardizer.mean, np.ones(width, np.float32))
    intercept = targets.mean(axis=0)
    decompose = _dual if count < width else _primal
    basis, eigenvalues, moments = decompose(x, rows, standardizer, targets, intercept)
    return RidgePath(basis, np.maximum(eigenvalues, 0), moments, intercept, standardizer)


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


class RidgeProbe(Probe):
    """Ridge regression onto the labels, alpha chosen by mAP. `decision_function` is the estimate minus 0.5.

    **Arguments:** `alphas` to choose from (one: no choice); `standardize`; `seed` of the hold-out used when `fit` gets no validation rows.
    **Attributes after fitting:** `alpha_`, `validation_map_` (one an alpha, empty without a choice), `selected_on_`. A file keeps them; `alpha_` is
    NaN where one of an earlier version did not.
    """

    kind: ClassVar[str] = "ridge"

    def __init__(self, *, alphas: Sequence[float] = ALPHAS, standardize: bool = True, seed: int = 0) -> None:
        self.alphas = tuple(float(alpha) for alpha in alphas)
        if not self.alphas or any(not (np.isfinite(alpha) and alpha > 0) for alpha in self.alphas):
            raise ConfigError(f"alphas must be numbers above 0, got {list(alphas)}")
        check_seed(seed)
        self.standardize, self.seed = standardize, seed
        self.link = "clip"
        self.alpha_, self.validation_map_, self.selected_on_ = self.alphas[0], list[float](), ""

    def fit(
        self,
        x: FeatureMatrix,
        y: Any,
        *,
        rows: np.ndarray | None = None,
        classes: Sequence[str] | None = None,
        validation: tuple[FeatureMatrix, Any] | tuple[FeatureMatrix, Any, np.ndarray | None] | None = None,
    ) -> Self:
        """Solve on the selected rows.

        **Arguments:** `x`, `y`, `rows`, `classes` as in `LinearProbe.fit`; `validation` (features, labels) or (features, labels, rows) to
        choose alpha on. Without it a seeded fifth of the training rows is held out for the choice, and the solution is then computed on all
        of them.
        """
        targets, names = self._begin(x, y, rows, classes)
        if len(self.alphas) == 1:
            self.alpha_, self.validation_map_, self.selected_on_ = self.alphas[0], [], "nothing: alpha was given"
            path = ridge_path(x, targets, rows=rows, standardize=self.standardize)
        elif validation is None:
            self._choose_on_holdout(x, targets, rows)
            path = ridge_path(x, targets, rows=rows, standardize=self.standardize)
        else:
            path = ridge_path(x, targets, rows=rows, standardize=self.standardize)
            self.alpha_, self.validation_map_ = path.choose(validation[0], validation[1], self.alphas, *validation[2:])
            self.selected_on_ = "validation"
        self.standardizer_ = path.standardizer
        self.weights_ = path.solve(self.alpha_).astype(np.float32)
        self.bias_ = (path.intercept - 0.5).astype(np.float32)
        return self._finish(names)

    def _choose_on_holdout(self, x: FeatureMatrix, targets: np.ndarray, rows: np.ndarray | None) -> None:
        count = len(targets)
        order = np.random.Generator(np.random.PCG64(self.seed)).permutation(count)
        held = round(HOLDOUT * count)
        if held < 1 or not targets[order[:held]].any() or not targets[order[held:]].any():
            raise ProbeError(f"{count} rows are too few to hold some out for choosing alpha: pass validation, or a single alpha")
        inner, outer = np.sort(order[held:]), np.sort(order[:held])
        numbers = np.arange(count) if rows is None else rows
        path = ridge_path(x, targets[inner], rows=numbers[inner], standardize=self.standardize)
        self.alpha_, self.validation_map_ = path.choose(x, targets[outer], self.alphas, numbers[outer])
        self.selected_on_ = f"a held-out {HOLDOUT:.0%} of the training rows"

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"alphas": list(self.alphas), "standardize": self.standardize, "seed": self.seed}

    def _facts(self) -> dict[str, Any]:
        alpha = self.alpha_ if np.isfinite(self.alpha_) else None
        return {"alpha": alpha, "validation_map": [float(value) for value in self.validation_map_], "selected_on": self.selected_on_}

    def _recall(self, facts: Mapping[str, Any]) -> None:
        given = self.alphas[0] if len(self.alphas) == 1 else None
        alpha = facts.get("alpha", given)
        self.alpha_ = float("nan") if alpha is None else float(alpha)
        self.validation_map_ = [float(value) for value in facts.get("validation_map", ())]
        self.selected_on_ = str(facts.get("selected_on", "not known: the file is of an earlier version"))
