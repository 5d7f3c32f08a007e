"""scikit-learn's logistic regression, one class against the rest: a reference that needs no learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np

from difffeat.errors import ConfigError
from difffeat.probe.base import Probe
from difffeat.probe.data import FeatureMatrix, matrix_shape, row_chunks
from difffeat.probe.standardize import Standardizer


class LogisticProbe(Probe):
    """One `LogisticRegression` (L-BFGS, L2) a class.

    **Arguments:** `c`, the inverse strength of the penalty; `max_iter`; `standardize`. A class that is always or never present in training
    gets no weights and the log-odds of its share. Holds the selected rows in float32. scikit-learn's ConvergenceWarning is left to be seen.
    """

    kind: ClassVar[str] = "logistic"

    def __init__(self, *, c: float = 1.0, max_iter: int = 1000, standardize: bool = True) -> None:
        if not (math.isfinite(c) and c > 0 and max_iter >= 1):
            raise ConfigError(f"c must be above 0 and max_iter at least 1, got {c} and {max_iter}")
        self.c, self.max_iter, self.standardize = c, max_iter, standardize
        self.link = "sigmoid"

    def fit(self, x: FeatureMatrix, y: Any, *, rows: np.ndarray | None = None, classes: Sequence[str] | None = None) -> Self:
        """Fit on the selected rows; arguments as in `LinearProbe.fit`."""
        from sklearn.linear_model import LogisticRegression

        targets, names = self._begin(x, y, rows, classes)
        width = matrix_shape(x)[1]
        self.standardizer_ = Standardizer.fit(x, rows) if self.standardize else Standardizer.identity(width)
        held = np.concatenate([self.standardizer_.transform(chunk) for _, chunk in row_chunks(x, rows)])
        self.weights_, self.bias_ = np.zeros((width, len(names)), np.float32), np.zeros(len(names), np.float32)
        for c in range(len(names)):
            present = int(targets[:, c].sum())
            if present in (0, len(targets)):
                self.bias_[c] = math.log((present + 0.5) / (len(targets) - present + 0.5))
                continue
            model = LogisticRegression(C=self.c, max_iter=self.max_iter).fit(held, targets[:, c])
            self.weights_[:, c], self.bias_[c] = model.coef_[0], model.intercept_[0]
        return self._finish(names)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"c": self.c, "max_iter": self.max_iter, "standardize": self.standardize}
