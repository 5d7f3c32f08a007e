"""Paired timing: every candidate once a round, rounds one after the other, so that what else the machine does hits all alike."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines.driver import gpu_identity

SETTLE = 0.1


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
    """Time all candidates in `repeats` rounds after `warmup` untimed ones.

    Between two candidates nothing runs for `SETTLE` seconds: threads of one runtime that still wait in a loop would slow the next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(warmup + repeats):
        for name, run in candidates.items():
            time.sleep(SETTLE)
            started = time.perf_counter()
            run()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return [Timing(name, tuple(values)) for name, values in seconds.items()]


def ratios(timings: list[Timing], ours: str) -> dict[str, float]:
    """How many times faster `ours` is than each other, as the median of the rounds' ratios."""
    own = next(timing for timing in timings if timing.name == ours)
    return {t.name: float(np.median(np.array(t.seconds) / np.array(own.seconds))) for t in timings if t.name != ours}


def machine(device: str = "cpu") -> dict[str, str]:
    """What it was measured on, without names of hosts; for `cuda` and `cuda:<n>` also the card."""
    model = next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    system = {"cpu": model, "cores": str(os.cpu_count()), "python": platform.python_version(), "system": platform.system()}
    return {**gpu_identity(device), **system}


def table(timings: list[Timing], per: int, ours: str, unit: str = "sample") -> list[str]:
    """Aligned text: seconds per sample, quartiles, how much faster ours is."""
    faster = ratios(timings, ours)
    lines = [f"  {'':50} {f's/{unit}':>9}  {'quartiles':>17}  {'ours is':>8}"]
    for timing in timings:
        low, high = timing.spread
        gain = f"{faster[timing.name]:6.2f} x" if timing.name in faster else "-"
        lines.append(f"  {timing.name:50} {timing.median / per:9.4f}  [{low / per:.4f}, {high / per:.4f}]  {gain:>8}")
    return lines


def chart(result: Mapping[str, Any], path: Path) -> Path | None:
    """Bars of the median seconds per sample with quartiles, as PNG; None where matplotlib is not installed (extra `report`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    per, names = result.get("batch_size", 1), list(result["seconds"])
    quartiles = np.array([np.percentile(result["seconds"][name], [25, 50, 75]) for name in names]) / per
    figure = Figure(figsize=(8, 0.5 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    errors = np.stack([quartiles[:, 1] - quartiles[:, 0], quartiles[:, 2] - quartiles[:, 1]])
    colours = ["#c45a00" if name.startswith("difffeat") else "#7f8c9b" for name in names]
    axes.barh(range(len(names)), quartiles[:, 1], xerr=errors, color=colours, height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per sample, median and quartiles")
    axes.set_title(f"{result['benchmark']}: {result['backbone']}", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
    return path


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return file.read().splitlines()
    except OSError:
        return []
