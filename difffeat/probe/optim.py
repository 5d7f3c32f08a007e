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
AUTO = "auto"
"""The loss is softmax where each sample has one of several classes, else bce."""

LRS: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
"""Learning rates to choose from; the paper's is the first."""


def cosine(lr: float, step: int, steps: int) -> float:
    """The rate at `step` (from 0) of `steps`."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


def spent(step: float, steps: int) -> float:
    """The rates summed over all steps before `step`, as a share of the first rate times `steps`."""
    return step / steps / 2 + math.sin(math.pi * step / steps) / (2 * math.pi)


class Adam:
    """Updates arrays in place. `betas` (0.9, 0.999) and `eps` 1e-8 as in the paper.

    `lr` is one rate, or several [R] for parameters that hold R trainings side by side in their first axis.
    """

    def __init__(self, parameters: Mapping[str, np.ndarray], *, lr: float | np.ndarray, steps: int, weight_decay: float = 0.0) -> None:
        self._parameters = parameters
        self._steps, self._weight_decay = steps, weight_decay
        rates = np.asarray(lr)
        self._lr = {name: rates.reshape(*rates.shape, *[1] * (value.ndim - rates.ndim)) for name, value in parameters.items()}
        self._first = {name: np.zeros_like(value) for name, value in parameters.items()}
        self._second = {name: np.zeros_like(value) for name, value in parameters.items()}
        self._step = 0

    def step(self, gradients: Mapping[str, np.ndarray]) -> None:
        """One step against `gradients`, named and shaped as the parameters."""
        fall = cosine(1.0, self._step, self._steps)
        self._step += 1
        correction, root = 1 - 0.9**self._step, math.sqrt(1 - 0.999**self._step)
        for name, value in self._parameters.items():
            gradient = gradients[name] + self._weight_decay * value if self._weight_decay else gradients[name]
            first, second = self._first[name], self._second[name]
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient * gradient - second)
            rate = (self._lr[name] * (fall / correction)).astype(value.dtype)
            value -= rate * first / (np.sqrt(second) / root + 1e-8)


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


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number, NumPy's included."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return bool(real and abs(value) < 1e300 and math.isfinite(value))


def candidates(value: Any, grid: tuple[float, ...]) -> list[float]:
    """The ascending values to choose a setting from: `grid` for None, else what was given, one or several."""
    if value is None:
        return list(grid)
    return sorted({float(part) for part in value}) if hasattr(value, "__len__") else [float(value)]


def is_choice(value: Any) -> bool:
    """Whether a setting is None, a number above 0, or several of those."""
    if isinstance(value, str | bytes | dict):
        return False
    parts = list(value) if hasattr(value, "__len__") else [] if value is None else [value]
    return (value is None or len(parts) > 0) and all(is_number(part) and part > 0 for part in parts)


def check_training(*, epochs: int, lr: Any, batch_size: int, weight_decay: float, loss: str, seed: int) -> None:
    """Raises ConfigError when the settings of a training make no sense."""
    check_seed(seed)
    if not (is_whole(epochs) and is_whole(batch_size)) or epochs < 1 or batch_size < 1:
        raise ConfigError(f"epochs and batch_size must be whole numbers of at least 1, got {epochs!r} and {batch_size!r}")
    if not (is_choice(lr) and is_number(weight_decay) and weight_decay >= 0):
        raise ConfigError(f"lr must be above 0 and weight_decay at least 0, got {lr!r} and {weight_decay!r}")
    if loss not in LOSSES and loss != AUTO:
        raise ConfigError(f"loss must be one of {', '.join((AUTO, *LOSSES))}; got {loss!r}")


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) without overflow, and as exact near 0 as near 1."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, small).astype(logits.dtype) / (1 + small)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Rows (along the last axis) that sum to one."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def simplex(estimates: np.ndarray) -> np.ndarray:
    """The nearest rows [n, C] that are at least 0 and sum to one (Duchi et al. 2008)."""
    falling = -np.sort(-estimates, axis=1)
    count = np.arange(1, estimates.shape[1] + 1)
    excess = (np.cumsum(falling, axis=1) - 1) / count
    last = (falling > excess).sum(axis=1) - 1
    return np.maximum(estimates - excess[np.arange(len(estimates)), last][:, None], 0)


def loss_and_gradient(loss: str, logits: np.ndarray, targets: np.ndarray, known: np.ndarray | None = None) -> tuple[Any, np.ndarray]:
    """Mean loss, and its gradient by the logits [m, C]. `bce`: mean over samples and classes, over the known ones where `known` [m, C] says which;
    `softmax`: over samples. Logits [R, m, C] of R trainings give R losses.
    """
    if loss == "bce":
        count = logits.dtype.type(max(int(known.sum()), 1) if known is not None else logits.shape[-1] * logits.shape[-2])
        # max(x, 0) - x·y + log(1 + e^-|x|) is BCE with logits without overflow.
        values = np.maximum(logits, 0) - logits * targets + np.log1p(np.exp(-np.abs(logits)))
        slope = (sigmoid(logits) - targets) / count
        if known is not None:
            values, slope = values * known, slope * known
        return _scalar(values.sum(axis=(-2, -1)) / count), slope
    chances = softmax(logits)
    own = (chances * targets).sum(axis=-1)
    value = -np.log(np.maximum(own, np.finfo(own.dtype).tiny)).mean(axis=-1)
    return _scalar(value), (chances - targets) / logits.dtype.type(logits.shape[-2])


def _scalar(value: Any) -> Any:
    """A float of a single loss; the losses of several trainings as they are."""
    return float(value) if np.ndim(value) == 0 else value
