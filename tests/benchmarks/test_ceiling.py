"""The matrix rate: the best of its sizes, and never a size that a slow device would take minutes for."""

from __future__ import annotations

from typing import Any

import pytest

from difffeat.benchmarks import ceiling


def test_a_slow_device_is_not_asked_for_products_of_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def rate(_torch: Any, size: int, _device: str, _dtype: Any) -> float:
        asked.append(size)
        return 1e9  # fp16 on a CPU that has no units for it: 2048 would take 17 s a product

    monkeypatch.setattr(ceiling, "_rate", rate)
    assert ceiling.matrix_rate(1, "cpu", "fp16") == 1e9
    assert asked == [256]


def test_the_best_size_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_rate", lambda _torch, size, _device, _dtype: {256: 5e10, 1024: 9e10, 2048: 7e10}[size])
    assert ceiling.matrix_rate(1, "cpu", "fp32") == 9e10
