"""A feature store in memory, and small problems with a known answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest


class ReadInPieces:
    """Features that can only be read by slices and integer arrays, as a memory map's wrapper; counts the rows of the largest read."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.largest = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values.shape

    @property
    def dtype(self) -> np.dtype:
        return self._values.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        taken = np.array(self._values[index])
        self.largest = max(self.largest, len(taken))
        return taken

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise AssertionError("a probe asked for the whole matrix at once")


@dataclass
class MemoryStore:
    """The attributes of a Store that probes read."""

    tensors: dict[str, np.ndarray]
    labels: np.ndarray | None
    ids: list[str]
    valid: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str = "0" * 64
    captions: list[list[str]] | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    labelled: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    inputs: np.ndarray = field(default_factory=lambda: np.zeros((0, 32), np.uint8))

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, tap: str) -> ReadInPieces:
        return ReadInPieces(self.tensors[tap])


@dataclass(frozen=True)
class Problem:
    """Features and multi-hot labels that a linear classifier can tell apart, noise aside."""

    x: np.ndarray
    y: np.ndarray


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    def make(n: int = 300, width: int = 12, classes: int = 4, noise: float = 0.5, seed: int = 0, truth: int = 7) -> Problem:
        rng = np.random.default_rng(seed)
        directions = np.random.default_rng(truth).normal(size=(width, classes))
        x = rng.normal(size=(n, width))
        y = x @ directions + noise * rng.normal(size=(n, classes)) > 1.5
        scale, shift = np.linspace(0.1, 20, width), np.linspace(-5, 5, width)
        return Problem((x * scale + shift).astype(np.float32), y.astype(np.uint8))

    return make


@pytest.fixture
def make_store() -> Callable[..., MemoryStore]:
    def make(
        tensors: dict[str, np.ndarray],
        labels: np.ndarray | None,
        *,
        ids: list[str] | None = None,
        invalid: tuple[int, ...] = (),
        classes: tuple[str, ...] | None = None,
        fingerprint: str = "0" * 64,
    ) -> MemoryStore:
        n = len(next(iter(tensors.values())))
        valid = np.ones(n, bool)
        valid[list(invalid)] = False
        names = classes if classes is not None else tuple(f"class-{c}" for c in range(0 if labels is None else labels.shape[1]))
        store = MemoryStore(tensors, labels, ids or [f"s{row:04d}" for row in range(n)], valid, names, fingerprint)
        store.labelled = np.full(n, labels is not None)
        read = next(iter(tensors.values()))  # other features are another sample, whatever its id
        store.inputs = np.stack([np.frombuffer(hashlib.sha256(row.tobytes()).digest(), np.uint8) for row in read])
        return store

    return make


@pytest.fixture
def read_in_pieces() -> type[ReadInPieces]:
    return ReadInPieces
