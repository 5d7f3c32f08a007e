"""The matrix rate: the best of its sizes and repeats, and never a size that a slow device would take minutes for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from difffeat.benchmarks import ceiling
from difffeat.benchmarks.timing import Timing
from difffeat.export import layers


def test_a_slow_device_is_not_asked_for_products_of_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def rate(_torch: Any, size: int, _device: str, _dtype: Any) -> float:
        asked.append(size)
        return 1e9  # fp16 on a CPU that has no units for it: 2048 would take 17 s a product

    monkeypatch.setattr(ceiling, "_rate", rate)
    monkeypatch.setattr(layers, "CPU_TYPES", frozenset({torch.float32}))
    assert ceiling.matrix_rate(1, "cpu", "fp16") == 1e9
    assert asked == [256]
    asked.clear()
    assert ceiling.matrix_rate(1, "cpu", "fp32") == 1e9  # a busy machine is no slow one: what it can do shows in the larger sizes
    assert asked == [256, 1024, 2048]


def test_products_that_something_else_slowed_do_not_lower_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    took = iter([9.0, 9.0, 4.0, 90.0, 2.0, 90.0, 90.0, 90.0, 90.0])
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += next(took) if next(ticks) % 2 else 0.0
        return now

    monkeypatch.setattr(time, "perf_counter", clock)
    assert ceiling._rate(torch, 8, "cpu", torch.float32) == 2 * 8**3 / 2.0


def test_a_card_is_warmed_up_and_its_median_counts_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def seconds(run: Callable[[], Any], device: str) -> Timing:
        asked.append(device)
        assert run().shape == (8, 8)
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        return Timing("", (1.0, 2.0, 9.0))

    monkeypatch.setattr(ceiling, "device_seconds", seconds)
    monkeypatch.setattr(ceiling, "SIZES", {"cuda": (8,)})
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    monkeypatch.setattr(torch, "randn", lambda *size, generator, device: torch.ones(*size))
    assert ceiling.matrix_rate(1, "cuda:1") == 2 * 8**3 / 2.0
    assert asked == ["cuda:1"]


def test_the_best_size_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_rate", lambda _torch, size, _device, _dtype: {256: 5e10, 1024: 9e10, 2048: 7e10}[size])
    assert ceiling.matrix_rate(1, "cpu", "fp32") == 9e10
