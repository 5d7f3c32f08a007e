"""Adam with cosine annealing, and the losses of the probes, in NumPy.

Kingma and Ba 2015, with weight decay added to the gradient (as `torch.optim.Adam` does). The rate falls with every step:
lr·(1 + cos(π·step/steps))/2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from difffeat.errors import ConfigError

LOSSES = ("bce", "softmax")


def cosine(lr: float, step: int, steps: int) -> float:
    """The rate at `step` (from 0) of `steps`."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


class Adam:
    """Updates arrays in place. `betas` (0.9, 0.999) and `eps` 1e-8 as in the paper."""

    def __init__(self, parameters: Mapping[str, np.ndarray], *, lr: float, steps: int, weight_decay: float = 0.0) -> None:
        self._parameters = parameters
        self._lr, self._steps, self._weight_decay = lr, steps, weight_decay
        self._first = {name: np.zeros_like(value) for name, value in parameters.items()}
        self._second = {name: np.zeros_like(value) for name, value in parameters.items()}
        self._step = 0

    def step(self, gradients: Mapping[str, np.ndarray]) -> None:
        """One step against `gradients`, named and shaped as the parameters."""
        rate = cosine(self._lr, self._step, self._steps)
        self._step += 1
        correction, root = 1 - 0.9**self._step, math.sqrt(1 - 0.999**self._step)
        for name, value in self._parameters.items():
            gradient = gradients[name] + self._weight_decay * value if self._weight_decay else gradients[name]
            first, second = self._first[name], self._second[name]
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient * gradient - second)
            value -= (rate / correction) * first / (np.sqrt(second) / root + 1e-8)


def batches(n: int, *, epochs: int, batch_size: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, positions int64 [<= batch_size]); every epoch visits each of the n once, in an order seeded by `seed`.

    Positions within a batch ascend: the sum does not care, and a memory map is read forwards.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    for epoch in range(epochs):
        order = rng.permutation(n)
        for start in range(0, n, batch_size):
            yield epoch, np.sort(order[start : start + batch_size])


def steps_of(n: int, *, epochs: int, batch_size: int) -> int:
    """How many batches `batches` gives."""
    return epochs * -(-n // batch_size)


def check_seed(seed: int) -> None:
    """Raises ConfigError unless `seed` is a whole number from 0 to 2^63-1, as for an extraction."""
    if not is_whole(seed) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed must lie in 0..2^63-1, got {seed!r}")


def is_whole(value: Any) -> bool:
    """Whether a setting is a whole number, NumPy's included."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_training(*, epochs: int, lr: float, batch_size: int, weight_decay: float, loss: str, seed: int) -> None:
    """Raises ConfigError when the settings of a training make no sense."""
    check_seed(seed)
    if not (is_whole(epochs) and is_whole(batch_size)) or epochs < 1 or batch_size < 1:
        raise ConfigError(f"epochs and batch_size must be whole numbers of at least 1, got {epochs!r} and {batch_size!r}")
    if not (math.isfinite(lr) and lr > 0 and math.isfinite(weight_decay) and weight_decay >= 0):
        raise ConfigError(f"lr must be above 0 and weight_decay at least 0, got {lr} and {weight_decay}")
    if loss not in LOSSES:
        raise ConfigError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) without overflow."""
    return (0.5 * (1 + np.tanh(0.5 * logits))).astype(logits.dtype)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Rows that sum to one."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def loss_and_gradient(loss: str, logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean loss, and its gradient by the logits [m, C]. `bce`: mean over samples and classes; `softmax`: over samples."""
    if loss == "bce":
        # max(x, 0) - x·y + log(1 + e^-|x|) is BCE with logits without overflow.
        values = np.maximum(logits, 0) - logits * targets + np.log1p(np.exp(-np.abs(logits)))
        return float(values.mean()), (sigmoid(logits) - targets) / logits.dtype.type(logits.size)
    chances = softmax(logits)
    own = (chances * targets).sum(axis=1)
    value = float(-np.log(np.maximum(own, np.finfo(own.dtype).tiny)).mean())
    return value, (chances - targets) / logits.dtype.type(len(logits))
