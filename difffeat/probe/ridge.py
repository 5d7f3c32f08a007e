"""The ridge probe: least squares onto the labels in closed form, its penalty chosen on rows that were kept for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from difffeat.errors import ConfigError
from difffeat.probe.base import Probe
from difffeat.probe.optim import candidates, check_seed, is_choice
from difffeat.probe.ridge_solutions import ALPHAS, RidgeSolutions, ridge_path
from difffeat.probe.selection import ON_HOLDOUT, ON_VALIDATION, Examples, Judged, by_map, edge_note, hold_out


class RidgeProbe(Probe):
    """Ridge regression onto the labels, in closed form: a scikit-learn classifier. `decision_function` is the estimate minus 0.5.

    **Arguments:** `alphas` to choose from (one: no choice); `standardize`; `seed` of the hold-out used when `fit` gets no validation rows.

    **Attributes after fitting:** besides those of `Probe`: `alpha_`. Multi-label alphas are chosen by mAP, of equal ones the larger;
    single-label ones by squared error. Labels of -1 are unknown: each class is then fitted on the rows where it is known, by a decomposition
    for each different set of rows. A file keeps all of it; `alpha_` is NaN where one of an earlier version did not.

    Probabilities are the estimates cut to 0..1 (multi-label), the nearest ones that sum to 1 (several classes), or a logistic curve through the
    estimate (two classes). None of them is calibrated: use `sklearn.calibration.CalibratedClassifierCV`, or `LogisticProbe`.
    """

    kind: ClassVar[str] = "ridge"
    alpha_: float

    def __init__(self, *, alphas: Sequence[float] = ALPHAS, standardize: bool = True, seed: int = 0) -> None:
        self.alphas, self.standardize, self.seed = alphas, standardize, seed

    def check_settings(self) -> None:
        if self.alphas is None or not hasattr(self.alphas, "__len__") or not is_choice(self.alphas):
            given = list(self.alphas) if hasattr(self.alphas, "__len__") and not isinstance(self.alphas, str) else self.alphas
            raise ConfigError(f"alphas must be numbers above 0, got {given!r}")
        check_seed(self.seed)

    def _fit(self, examples: Examples, held: Examples | None) -> list[str]:
        alphas = candidates(self.alphas, ALPHAS)
        self.validation_map_, self.validation_loss_, notes = [], [], list[str]()
        path = None if held is None and len(alphas) > 1 else self._path(examples)
        if len(alphas) == 1:
            self.alpha_, self.selected_on_ = alphas[0], "nothing: alpha was given"
        elif path is not None and held is not None:
            self.selected_on_ = ON_VALIDATION
            notes = self._choose(path, held, alphas)
        else:
            inner, outer = hold_out(examples, self.seed, "alpha")
            self.selected_on_ = ON_HOLDOUT
            notes = self._choose(self._path(inner), outer, alphas)
        path = path or self._path(examples)
        weights, bias = path.affine(self.alpha_)
        self.standardizer_, self.weights_, self.bias_ = path.standardizer, weights.astype(np.float32), (bias - 0.5).astype(np.float32)
        return notes

    def _path(self, examples: Examples) -> RidgeSolutions:
        labels = examples.labels
        return ridge_path(examples.x, labels.positive, rows=examples.rows, standardize=self.standardize, known=labels.known)

    def _choose(self, path: RidgeSolutions, held: Examples, alphas: list[float]) -> list[str]:
        """Set alpha and what each reached, in the order of `self.alphas`; what should be said about it."""
        maps, losses = path.compare(held.x, held.labels, alphas, held.rows)
        judged = Judged(maps, losses, by_map(held.labels))
        place = judged.best(last=True)
        self.alpha_ = alphas[place]
        places = [alphas.index(float(alpha)) for alpha in self.alphas]
        self.validation_map_, self.validation_loss_ = [maps[p] for p in places], [losses[p] for p in places]
        return edge_note("alpha", alphas, place, judged)

    def _link(self, target: str) -> str:
        return "clip"

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"alpha": self.alpha_ if np.isfinite(self.alpha_) else None}

    def _recall(self, facts: Mapping[str, Any]) -> None:
        super()._recall(facts)
        given = self.alphas[0] if len(self.alphas) == 1 else None
        alpha = facts.get("alpha", given)
        self.alpha_ = float("nan") if alpha is None else float(alpha)
