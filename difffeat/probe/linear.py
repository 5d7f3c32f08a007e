"""The paper's linear probe: Adam with cosine annealing on BCE with logits (Diff-Feat, arXiv 2509.15553), in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from difffeat.probe.optim import loss_and_gradient
from difffeat.probe.selection import Examples
from difffeat.probe.training import Parameters, TrainedProbe


class LinearProbe(TrainedProbe):
    """One linear layer trained with Adam: a scikit-learn classifier.

        rows = store.usable
        probe = LinearProbe().fit(store["b12/t30"], store.labels[rows], rows=rows, classes=store.classes)
        probabilities = probe.predict_proba(other["b12/t30"])

    **Arguments:** `epochs`; `lr` (annealed to 0 by a cosine over all steps), None to choose it among `LRS` or several to choose among, 1e-3
    for the paper's; `batch_size`;
    `weight_decay` (added to the gradient); `standardize` per dimension; `loss` `bce` (multi-label), `softmax` (single-label) or `auto`; `seed` of
    the order of samples and of the hold-out. The paper leaves batch and standardisation open; weights start at 0, so the seed decides the order
    only.

    The choice of `lr` trains all rates side by side, in one pass over the batches: seven times the arithmetic and one reading. Without validation
    rows that is done on four fifths of the rows, and the chosen rate is then trained on all: once more. See `TrainedProbe` for what is known
    after fitting.
    """

    kind: ClassVar[str] = "linear"

    def __init__(
        self,
        *,
        epochs: int = 40,
        lr: float | Sequence[float] | None = None,
        batch_size: int = 256,
        weight_decay: float = 0.0,
        standardize: bool = True,
        loss: str = "auto",
        seed: int = 0,
    ) -> None:
        self.epochs, self.lr, self.batch_size, self.weight_decay = epochs, lr, batch_size, weight_decay
        self.standardize, self.loss, self.seed = standardize, loss, seed

    def _fit(self, examples: Examples, held: Examples | None) -> list[str]:
        parameters, notes = self._train_on(examples, held)
        self.weights_, self.bias_ = parameters["weights"], parameters["bias"]
        return notes

    def _initial(self, width: int, n_columns: int) -> Parameters:
        return {"weights": np.zeros((width, n_columns), np.float32), "bias": np.zeros(n_columns, np.float32)}

    @staticmethod
    def _logits(parameters: Mapping[str, np.ndarray], batch: np.ndarray) -> np.ndarray:
        return batch @ parameters["weights"] + parameters["bias"][..., None, :]

    def _slopes(self, parameters: Mapping[str, np.ndarray], batch: np.ndarray, truth: np.ndarray, known: np.ndarray | None) -> tuple[Any, Parameters]:
        value, slope = loss_and_gradient(self.loss_, self._logits(parameters, batch), truth, known)
        return value, {"weights": batch.T @ slope, "bias": slope.sum(axis=-2)}
