"""The paper's linear probe: Adam with cosine annealing on BCE with logits (Diff-Feat, arXiv 2509.15553), in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from difffeat.errors import ProbeError
from difffeat.probe.base import Probe
from difffeat.probe.data import FeatureMatrix, matrix_shape, row_chunks, row_count, take
from difffeat.probe.optim import Adam, batches, check_training, loss_and_gradient, steps_of
from difffeat.probe.standardize import Standardizer

CACHE_BYTES = 2**30
"""Standardised features up to this size are held in memory during a training; larger ones are read batch by batch."""


class LinearProbe(Probe):
    """One linear layer trained with Adam, in scikit-learn's shape.

        rows = store.usable
        probe = LinearProbe().fit(store["b12/t30"], store.labels[rows], rows=rows)
        probabilities = probe.predict_proba(other["b12/t30"])

    **Arguments:** `epochs`, `lr` (annealed to 0 by a cosine over all steps), `batch_size`, `weight_decay` (added to the gradient),
    `standardize` per dimension, `loss` `bce` (multi-label) or `softmax` (single-label), `seed` of the order of samples. The paper leaves
    batch and standardisation open; weights start at 0, so the seed decides the order only.

    The paper's settings suit data of its size. Below some ten thousand samples 40 epochs are too few steps at this rate: raise `lr` or
    `epochs`, or use `RidgeProbe`.
    """

    kind: ClassVar[str] = "linear"

    def __init__(
        self,
        *,
        epochs: int = 40,
        lr: float = 1e-3,
        batch_size: int = 256,
        weight_decay: float = 0.0,
        standardize: bool = True,
        loss: str = "bce",
        seed: int = 0,
    ) -> None:
        check_training(epochs=epochs, lr=lr, batch_size=batch_size, weight_decay=weight_decay, loss=loss, seed=seed)
        self.epochs, self.lr, self.batch_size, self.weight_decay = epochs, lr, batch_size, weight_decay
        self.standardize, self.loss, self.seed = standardize, loss, seed
        self.link = "softmax" if loss == "softmax" else "sigmoid"
        self.history_: list[float] = []

    def fit(self, x: FeatureMatrix, y: Any, *, rows: np.ndarray | None = None, classes: Sequence[str] | None = None) -> Self:
        """Train on the selected rows.

        **Arguments:** `x` [n, D], an array or a store's features (read in pieces, never held in float64); `y` one row for each selected
        row, multi-hot [m, C] or class numbers [m]; `classes` their names. `history_` keeps the mean loss of each epoch.
        Raises ProbeError when they do not fit, when a feature is not finite, or when the loss runs away.
        """
        targets, names = self._begin(x, y, rows, classes)
        width = matrix_shape(x)[1]
        self.standardizer_ = Standardizer.fit(x, rows) if self.standardize else Standardizer.identity(width)
        self.weights_, self.bias_ = np.zeros((width, len(names)), np.float32), np.zeros(len(names), np.float32)
        read = standardised_reader(x, rows, self.standardizer_)

        def gradients(batch: np.ndarray, truth: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
            value, slope = loss_and_gradient(self.loss, self._scores(batch), truth)
            return value, {"weights": batch.T @ slope, "bias": slope.sum(axis=0)}

        self.history_ = train(
            {"weights": self.weights_, "bias": self.bias_},
            gradients,
            read,
            targets,
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            seed=self.seed,
        )
        return self._finish(names)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("epochs", "lr", "batch_size", "weight_decay", "standardize", "loss", "seed")
        return {name: getattr(self, name) for name in names}

    def _facts(self) -> dict[str, Any]:
        return {"history": self.history_}

    def _recall(self, facts: Mapping[str, Any]) -> None:
        self.history_ = [float(value) for value in facts.get("history", ())]


Reader = Callable[[np.ndarray], np.ndarray]
"""Positions among the selected rows -> standardised float32 [m, D]."""


def standardised_reader(x: FeatureMatrix, rows: np.ndarray | None, standardizer: Standardizer, cache_bytes: int = CACHE_BYTES) -> Reader:
    """Reads batches from memory when all of it is at most `cache_bytes`, else from `x` each time; the values are the same."""
    count, width = row_count(x, rows), matrix_shape(x)[1]
    if 4 * count * width > cache_bytes:
        return lambda positions: standardizer.transform(take(x, positions if rows is None else rows[positions]))
    held = np.empty((count, width), np.float32)
    for start, chunk in row_chunks(x, rows):
        held[start : start + len(chunk)] = standardizer.transform(chunk)
    return lambda positions: held[positions]


def train(
    parameters: dict[str, np.ndarray],
    gradients: Callable[[np.ndarray, np.ndarray], tuple[float, dict[str, np.ndarray]]],
    read: Reader,
    targets: np.ndarray,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    weight_decay: float,
    seed: int,
) -> list[float]:
    """Train `parameters` in place and return the mean loss of each epoch.

    `gradients(batch [m, D], truth float32 [m, C])` gives the batch's loss and the gradient of each parameter.
    """
    n = len(targets)
    adam = Adam(parameters, lr=lr, steps=steps_of(n, epochs=epochs, batch_size=batch_size), weight_decay=weight_decay)
    losses = [0.0] * epochs
    for epoch, positions in batches(n, epochs=epochs, batch_size=batch_size, seed=seed):
        value, slopes = gradients(read(positions), targets[positions].astype(np.float32))
        if not np.isfinite(value):
            raise ProbeError(f"the loss became {value} in epoch {epoch + 1}. Lower lr, or turn standardisation on.")
        adam.step(slopes)
        losses[epoch] += value * len(positions) / n
    return losses
