"""Paired timing: every candidate once a round, rounds one after the other, so that what else the machine does hits all alike."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate by round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over rounds."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(low), float(high)


def compare(candidates: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> list[Timing]:
    """Time all candidates in `repeats` rounds after `warmup` untimed ones."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(warmup + repeats):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return [Timing(name, tuple(values)) for name, values in seconds.items()]


def ratios(timings: list[Timing], ours: str) -> dict[str, float]:
    """How many times faster `ours` is than each other, as the median of the rounds' ratios."""
    own = next(timing for timing in timings if timing.name == ours)
    return {t.name: float(np.median(np.array(t.seconds) / np.array(own.seconds))) for t in timings if t.name != ours}


def machine() -> dict[str, str]:
    """What it was measured on, without names."""
    model = next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": str(os.cpu_count()), "python": platform.python_version(), "system": platform.system()}


def table(timings: list[Timing], per: int, ours: str, unit: str = "sample") -> list[str]:
    """Aligned text: seconds per sample, quartiles, how much faster ours is."""
    faster = ratios(timings, ours)
    lines = [f"  {'':44} {f's/{unit}':>9}  {'quartiles':>17}  {'ours is':>8}"]
    for timing in timings:
        low, high = timing.spread
        gain = f"{faster[timing.name]:6.2f} x" if timing.name in faster else "-"
        lines.append(f"  {timing.name:44} {timing.median / per:9.4f}  [{low / per:.4f}, {high / per:.4f}]  {gain:>8}")
    return lines


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return file.read().splitlines()
    except OSError:
        return []
