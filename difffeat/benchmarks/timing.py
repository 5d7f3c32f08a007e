"""Paired timing: every candidate once a round, rounds one after the other, so that what else the machine does hits all alike.

On a card nothing sleeps: its clocks fall within milliseconds and would rise again inside the measurement. Candidates are warmed up and run back to
back.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from difffeat.engines.driver import gpu_identity

SETTLE = 0.1
"""Seconds between two candidates on a CPU."""
WARM = 0.25
"""Seconds of work before anything counts on a card."""
BACK_TO_BACK = 0.4
"""Seconds of work on a card that a figure is made of, at least."""
ROUND = 0.05
"""Seconds of one candidate in one round on a card, at least."""
LEAST = 5
"""Runs that a figure of `device_seconds` is made of, at least."""
QUEUED, MOST_QUEUED = 0.005, 64
"""Seconds of work, and runs, that are handed to a card before the host waits for it."""


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


class Stopwatch(Protocol):
    """Marks points in a device's work, and tells the time between two of them."""

    def mark(self) -> Any:
        """A point behind the work that is enqueued so far."""
        ...

    def wait(self) -> None:
        """Returns when the device has done everything that is enqueued."""
        ...

    def between(self, first: Any, last: Any) -> float:
        """Seconds from one mark to another; only after `wait`."""
        ...


class WallClock:
    """`Stopwatch` of a CPU, where work is done when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        return

    def between(self, first: float, last: float) -> float:
        return last - first


class CardClock:
    """`Stopwatch` of a card: CUDA events on torch's current stream of the device."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda: Any = torch.cuda
        self._stream: Any = torch.cuda.current_stream(device)

    def mark(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def wait(self) -> None:
        self._stream.synchronize()

    def between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1e3


def device_seconds(
    run: Callable[[], object], device: str, *, name: str = "", warm: float = WARM, seconds: float = BACK_TO_BACK, stopwatch: Stopwatch | None = None
) -> Timing:
    """Seconds that a device works on each of many runs, back to back, after `warm` seconds of the same. For kernels and modules: `run` enqueues torch
    work on the device's current stream and does not wait for it.

    On `cpu` it is wall-clock time. On a card, where `run` takes the host longer than the device, the figure is the host's.

    **Arguments:** `device` `cpu`, `cuda` or `cuda:<n>`; `seconds` of work to measure, at least `LEAST` runs; `stopwatch` in place of the device's.
    """
    watch = stopwatch or (CardClock(device) if on_card(device) else WallClock())

    def run_and_wait() -> None:
        run()
        watch.wait()

    queued = min(MOST_QUEUED, max(LEAST, math.ceil(QUEUED / warm_up(run_and_wait, warm))))
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        marks = []
        for _ in range(queued):
            first = watch.mark()
            run()
            marks.append((first, watch.mark()))
        watch.wait()
        found += [watch.between(*pair) for pair in marks]
    return Timing(name, tuple(found))


def warm_up(run: Callable[[], object], seconds: float = WARM) -> float:
    """Run again and again for so many seconds after a first run, which may compile. Returns the shortest run, in seconds, without the first."""
    run()
    shortest, since = math.inf, time.perf_counter()
    now, end = since, since + seconds
    while math.isinf(shortest) or now < end:
        run()
        since, now = now, time.perf_counter()
        shortest = min(shortest, now - since)
    return max(shortest, 1e-9)


def on_card(device: str) -> bool:
    """Whether a device is a GPU."""
    return device.partition(":")[0] != "cpu"


def compare(candidates: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, *, device: str = "cpu") -> list[Timing]:
    """Time all candidates in `repeats` rounds, in seconds a call by the wall clock: a call ends when its features are on the host.

    On a CPU every candidate is called once a round, after `warmup` untimed rounds. Between two candidates nothing runs for `SETTLE` seconds: threads
    of one runtime that still wait in a loop would slow the next. On a card (`device`) every candidate is first warmed up for `WARM` seconds; in a
    round it is called back to back for about `ROUND` seconds, so that no short call is timed alone, and nothing sleeps.
    """
    if on_card(device):
        return _compare_on_card(candidates, repeats)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(warmup + repeats):
        for name, run in candidates.items():
            time.sleep(SETTLE)
            started = time.perf_counter()
            run()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return [Timing(name, tuple(values)) for name, values in seconds.items()]


def _compare_on_card(candidates: Mapping[str, Callable[[], object]], repeats: int) -> list[Timing]:
    wanted = max(ROUND, BACK_TO_BACK / repeats)
    calls = {name: math.ceil(wanted / warm_up(run)) for name, run in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            started = time.perf_counter()
            for _ in range(calls[name]):
                run()
            seconds[name].append((time.perf_counter() - started) / calls[name])
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


def in_microseconds(timings: list[Timing], per: int, device: str = "cpu") -> bool:
    """Whether seconds per sample are written in µs: on a card, and where the fastest sample takes less than a millisecond."""
    return on_card(device) or min(timing.median for timing in timings) / per < 1e-3


def written(seconds: float, small: bool) -> str:
    """A time with its unit: in µs where it is `small`, see `in_microseconds`, else in seconds."""
    return f"{seconds * 1e6:.1f} µs" if small else f"{seconds:.3f} s"


def table(timings: list[Timing], per: int, ours: str, unit: str = "sample", *, device: str = "cpu") -> list[str]:
    """Aligned text: seconds per sample, quartiles, how much faster ours is; where `in_microseconds`, µs and samples a second."""
    faster, small = ratios(timings, ours), in_microseconds(timings, per, device)
    scale, digits, name = (1e6, 1, "µs") if small else (1.0, 4, "s")
    rate = f"{unit + 's/s':>11}  " if small else ""
    lines = [f"  {'':50} {f'{name}/{unit}':>9}  {'quartiles':>17}  {rate}{'ours is':>8}"]
    for timing in timings:
        middle, low, high = (f"{value / per * scale:.{digits}f}" for value in (timing.median, *timing.spread))
        rate = f"{per / timing.median:11.1f}  " if small else ""
        gain = f"{faster[timing.name]:6.2f} x" if timing.name in faster else "-"
        lines.append(f"  {timing.name:50} {middle:>9}  {f'[{low}, {high}]':>17}  {rate}{gain:>8}")
    return lines


def chart(result: Mapping[str, Any], path: Path) -> Path | None:
    """Bars of the median seconds per sample with quartiles, as PNG; None where matplotlib is not installed (extra `report`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    per, timings = result.get("batch_size", 1), [Timing(name, tuple(values)) for name, values in result["seconds"].items()]
    scale, unit = (1e6, "microseconds") if in_microseconds(timings, per, result.get("device", "cpu")) else (1.0, "seconds")
    names = [timing.name for timing in timings]
    quartiles = np.array([np.percentile(timing.seconds, [25, 50, 75]) for timing in timings]) / per * scale
    figure = Figure(figsize=(8, 0.5 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    errors = np.stack([quartiles[:, 1] - quartiles[:, 0], quartiles[:, 2] - quartiles[:, 1]])
    colours = ["#c45a00" if name.startswith("difffeat") else "#7f8c9b" for name in names]
    axes.barh(range(len(names)), quartiles[:, 1], xerr=errors, color=colours, height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} per sample, median and quartiles")
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
