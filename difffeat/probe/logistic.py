"""scikit-learn's logistic regression: one class against the rest for multi-label, softmax for single labels. A reference without a learning rate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from difffeat.errors import ConfigError
from difffeat.probe.base import Probe
from difffeat.probe.data import matrix_shape, row_chunks
from difffeat.probe.labels import MULTICLASS, Labels
from difffeat.probe.optim import candidates, check_seed, is_choice, is_whole
from difffeat.probe.selection import ON_HOLDOUT, ON_VALIDATION, Examples, Judged, by_map, edge_note, hold_out, judge
from difffeat.probe.standardize import Standardizer
from difffeat.probe.training import log_loss

CS: tuple[float, ...] = tuple(10.0**k for k in range(-6, 5))
"""1e-6 to 1e4 in decades: scikit-learn's C, the inverse strength of the penalty."""


@dataclass(frozen=True)
class _Fitted:
    """One C's weights [D, K] and bias [K]; iterations of the slowest class, and how many classes ran out of them."""

    weights: np.ndarray
    bias: np.ndarray
    iterations: int
    unfinished: int


class LogisticProbe(Probe):
    """`LogisticRegression` (L-BFGS, L2): one a class for multi-label, one softmax for single labels. A scikit-learn classifier.

    **Arguments:** `c`, the inverse strength of the penalty, None to choose it among `CS`, or several to choose among
    (one for all classes); `max_iter`; `standardize`; `seed`
    of the hold-out used when `fit` gets no validation rows. A class that is always or never present in training gets no weights and the log-odds
    of its share. Labels of -1 are unknown: each class is fitted on the rows where it is known. Holds the selected rows in float32.

    The choice fits every C from the smallest on, each started where the last ended; without validation rows one more fit on all rows follows.

    **Attributes after fitting:** besides those of `Probe`: `c_`, `n_iter_`. scikit-learn's ConvergenceWarning is given where the chosen fit ran
    out of iterations.
    """

    kind: ClassVar[str] = "logistic"
    c_: float
    n_iter_: int

    def __init__(self, *, c: float | Sequence[float] | None = None, max_iter: int = 1000, standardize: bool = True, seed: int = 0) -> None:
        self.c, self.max_iter, self.standardize, self.seed = c, max_iter, standardize, seed

    def check_settings(self) -> None:
        if not (is_choice(self.c) and is_whole(self.max_iter) and self.max_iter >= 1):
            raise ConfigError(f"c must be above 0 and max_iter at least 1, got {self.c!r} and {self.max_iter!r}")
        check_seed(self.seed)

    def _fit(self, examples: Examples, held: Examples | None) -> list[str]:
        notes = list[str]()
        self.target_, self.validation_map_, self.validation_loss_ = examples.labels.target, [], []
        cs = candidates(self.c, CS)
        if len(cs) == 1:
            self.c_, self.selected_on_ = cs[0], "nothing: c was given"
            self.standardizer_, (fitted,) = self._fits(examples, [self.c_])
        else:
            inner, outer = (examples, held) if held is not None else hold_out(examples, self.seed, "c")
            standardizer, fits = self._fits(inner, cs)
            judged = self._judge(fits, standardizer, outer)
            place = judged.best(last=False)
            self.c_, self.selected_on_ = cs[place], ON_VALIDATION if held is not None else ON_HOLDOUT
            self.validation_map_, self.validation_loss_ = judged.maps, judged.losses
            notes = edge_note("c", cs, place, judged)
            self.standardizer_, fitted = standardizer, fits[place]
            if held is None:
                self.standardizer_, (fitted,) = self._fits(examples, [self.c_])
        self.weights_, self.bias_, self.n_iter_ = fitted.weights, fitted.bias, fitted.iterations
        if fitted.unfinished:
            self._say_unfinished(fitted.unfinished)
        return notes

    def _fits(self, examples: Examples, cs: Sequence[float]) -> tuple[Standardizer, list[_Fitted]]:
        """The standardisation, and a fit for each of the ascending `cs`."""
        x, rows, labels = examples.x, examples.rows, examples.labels
        width, n_columns = matrix_shape(x)[1], labels.positive.shape[1]
        standardizer = Standardizer.fit(x, rows) if self.standardize else Standardizer.identity(width)
        held = np.concatenate([standardizer.transform(chunk) for _, chunk in row_chunks(x, rows)])
        weights, bias = np.zeros((len(cs), width, n_columns), np.float32), np.zeros((len(cs), n_columns), np.float32)
        iterations, unfinished = np.ones(len(cs), int), np.zeros(len(cs), int)
        jobs = [(slice(None), held, labels.positive.argmax(axis=1))] if labels.target == MULTICLASS else _columns(held, labels)
        for columns, features, truth in jobs:
            present = int(truth.sum())
            if isinstance(columns, int) and present in (0, len(truth)):
                bias[:, columns] = math.log((present + 0.5) / (len(truth) - present + 0.5))
                continue
            for place, (coefficients, intercept, count, cut) in enumerate(self._path(features, truth, cs)):
                weights[place][:, columns], bias[place, columns] = coefficients, intercept
                iterations[place], unfinished[place] = max(iterations[place], count), unfinished[place] + cut
        parts = zip(weights, bias, iterations.tolist(), unfinished.tolist(), strict=True)
        return standardizer, [_Fitted(*part) for part in parts]

    def _path(self, features: np.ndarray, truth: np.ndarray, cs: Sequence[float]) -> Any:
        """(weights, intercept, iterations, whether it ran out of them) for each C, each started where the last ended."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        model: Any = LogisticRegression(max_iter=self.max_iter, warm_start=True)
        for c in cs:
            model.set_params(C=c)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConvergenceWarning)
                model.fit(features, truth)
            single = len(model.coef_) == 1
            cut = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
            yield model.coef_[0] if single else model.coef_.T, model.intercept_[0] if single else model.intercept_, int(np.max(model.n_iter_)), cut

    def _judge(self, fits: Sequence[_Fitted], standardizer: Standardizer, held: Examples) -> Judged:
        maps, losses, loss = list[float](), list[float](), "softmax" if self.link == "softmax" else "bce"
        for one in fits:
            scores = np.concatenate([standardizer.transform(chunk) @ one.weights + one.bias for _, chunk in row_chunks(held.x, held.rows)])
            value, cost = judge(held.labels, scores, log_loss(loss, held.labels, scores))
            maps.append(value)
            losses.append(cost)
        return Judged(maps, losses, by_map(held.labels))

    def _say_unfinished(self, count: int) -> None:
        from sklearn.exceptions import ConvergenceWarning

        which = "the fit" if self.target_ == MULTICLASS else f"{count} of {self.weights_.shape[1]} classes"
        warnings.warn(f"{which} ran out of iterations at max_iter={self.max_iter}, c={self.c_:g}: raise max_iter", ConvergenceWarning, stacklevel=3)

    def _link(self, target: str) -> str:
        return "softmax" if target == MULTICLASS else "sigmoid"

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"c": self.c_, "iterations": self.n_iter_}

    def _recall(self, facts: Mapping[str, Any]) -> None:
        super()._recall(facts)
        self.c_ = float(facts.get("c", 1.0 if self.c is None else candidates(self.c, CS)[0]))  # 1: what earlier versions took
        self.n_iter_ = int(facts.get("iterations", 0))


def _columns(held: np.ndarray, labels: Labels) -> Any:
    """(column, features and labels of the rows where it is known)."""
    for c in range(labels.positive.shape[1]):
        if labels.known is None:
            yield c, held, labels.positive[:, c]
        else:
            inside = labels.known[:, c]
            yield c, held[inside], labels.positive[inside, c]
