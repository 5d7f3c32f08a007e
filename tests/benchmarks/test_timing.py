"""How runs are timed: paired rounds on a CPU with rests between, back to back after a warm-up on a card, and what the tables say of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from difffeat.benchmarks import timing
from difffeat.benchmarks.timing import CardClock, Timing, chart, compare, device_seconds, in_microseconds, machine, ratios, table, warm_up
from difffeat.engines import driver
from difffeat.engines.driver import Driver, Gpu


@dataclass
class Time:
    """A clock that only work moves: what was run, and whether anything slept."""

    now: float = 0.0
    ran: list[str] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)

    def work(self, name: str, seconds: float, first: float = 0.0) -> Callable[[], None]:
        """A run of so many seconds; the first takes `first` more."""

        def run() -> None:
            self.now += seconds + (first if name not in self.ran else 0.0)
            self.ran.append(name)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(time, "sleep", made.slept.append)
    return made


def test_on_a_cpu_every_round_runs_every_candidate_once_with_a_rest_before(clock: Time) -> None:
    timings = compare({"a": clock.work("a", 0.002), "b": clock.work("b", 3.0)}, repeats=3, warmup=2)
    assert clock.ran == ["a", "b"] * 5
    assert clock.slept == [timing.SETTLE] * 10
    assert [(t.name, len(t.seconds)) for t in timings] == [("a", 3), ("b", 3)]
    assert timings[1].seconds == pytest.approx((3.0, 3.0, 3.0))


def test_on_a_card_short_calls_are_warmed_up_and_run_back_to_back_without_sleep(clock: Time) -> None:
    timings = compare({"short": clock.work("short", 0.002, first=60.0), "long": clock.work("long", 1.0)}, repeats=10, device="cuda:1")
    assert clock.slept == []
    warm = clock.ran.index("long")
    assert warm * 0.002 >= timing.WARM  # the first call compiles: it says nothing of the others, and warms up nothing
    assert clock.ran[warm:].count("short") * 0.002 >= timing.BACK_TO_BACK
    rounds = "".join(name[0] for name in clock.ran[warm:]).lstrip("l")
    assert rounds == ("s" * 25 + "l") * 10
    assert timings[0].seconds == pytest.approx([0.002] * 10)
    assert timings[1].seconds == pytest.approx([1.0] * 10)


def test_few_rounds_on_a_card_are_longer(clock: Time) -> None:
    compare({"a": clock.work("a", 0.004)}, repeats=2, device="cuda")
    assert len(clock.ran) * 0.004 >= timing.WARM + timing.BACK_TO_BACK


def test_a_warm_up_tells_the_shortest_call_but_never_the_first(clock: Time) -> None:
    assert warm_up(clock.work("a", 0.1, first=5.0), 0.25) == pytest.approx(0.1)
    assert len(clock.ran) == 4
    assert warm_up(clock.work("b", 0.1, first=-0.05), 0.0) == pytest.approx(0.1)


@dataclass
class Card:
    """A device that works off what is enqueued when it is waited for; the host needs no time."""

    clock: Time
    queue: list[float] = field(default_factory=list)
    longest: int = 0
    marks: int = 0

    def run(self, seconds: float) -> Callable[[], None]:
        return lambda: self.queue.append(seconds)

    def mark(self) -> float:
        self.marks += 1
        return self.clock.now + sum(self.queue)

    def wait(self) -> None:
        self.longest = max(self.longest, len(self.queue))
        self.clock.now += sum(self.queue)
        self.queue.clear()

    def between(self, first: float, last: float) -> float:
        assert not self.queue, "read before the device was waited for"
        return last - first


@pytest.mark.parametrize(("seconds", "queued"), [(1e-5, timing.MOST_QUEUED), (4e-4, 13), (0.1, timing.LEAST)])
def test_a_devices_own_time_is_told_run_by_run_with_the_host_ahead(clock: Time, seconds: float, queued: int) -> None:
    card = Card(clock)
    found = device_seconds(card.run(seconds), "cuda", name="kernel", stopwatch=card)
    assert found.name == "kernel"
    assert found.seconds == pytest.approx([seconds] * len(found.seconds))
    assert card.longest == queued
    assert len(found.seconds) >= timing.LEAST
    assert sum(found.seconds) >= min(timing.BACK_TO_BACK, timing.LEAST * seconds) * 0.99
    assert clock.now >= timing.WARM + timing.BACK_TO_BACK
    assert clock.slept == []


def test_on_a_cpu_it_is_the_wall_clocks() -> None:
    found = device_seconds(lambda: time.sleep(0.002), "cpu", warm=0.0, seconds=0.01)
    assert len(found.seconds) >= timing.LEAST
    assert 0.002 <= found.median < 0.05


def test_a_cards_clock_takes_events_on_the_devices_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class Stream:
        def synchronize(self) -> None:
            done.append("waited")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            done.append(("recorded", type(stream)))

        def elapsed_time(self, last: Any) -> float:
            assert isinstance(last, Event)
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: done.append(device) or Stream())
    watch = CardClock("cuda:1")
    first, last = watch.mark(), watch.mark()
    watch.wait()
    assert watch.between(first, last) == 0.25
    assert done == ["cuda:1", ("recorded", Stream), ("recorded", Stream), "waited"]


def test_ratios_are_medians_of_the_rounds_own_ratios() -> None:
    timings = [Timing("theirs", (2.0, 8.0, 3.0)), Timing("ours", (1.0, 2.0, 3.0))]
    assert ratios(timings, "ours") == {"theirs": 2.0}
    assert timings[0].median == 3.0
    assert timings[0].spread == (2.5, 5.5)


def test_the_table_states_seconds_per_sample() -> None:
    lines = table([Timing("theirs", (4.0,)), Timing("ours", (1.0,))], per=2, ours="ours")
    assert "s/sample" in lines[0]
    assert "samples/s" not in lines[0]
    assert "2.0000" in lines[1]
    assert "4.00 x" in lines[1]
    assert lines[2].rstrip().endswith("-")


@pytest.mark.parametrize(("seconds", "device"), [((0.4, 0.01, 0.02), "cuda"), ((0.008, 0.0008, 0.0016), "cpu")])
def test_the_table_states_microseconds_and_samples_a_second_on_a_card_and_of_what_is_fast(seconds: tuple[float, ...], device: str) -> None:
    slow, fast, middle = seconds
    timings = [Timing("theirs", (slow,)), Timing("ours", (fast, middle, middle))]
    header, _, ours = table(timings, per=4, ours="ours", unit="image", device=device)
    assert in_microseconds(timings, 4, device)
    assert header.split() == ["µs/image", "quartiles", "images/s", "ours", "is"]
    low = (fast + middle) / 2
    assert ours.split() == ["ours", f"{middle / 4e-6:.1f}", f"[{low / 4e-6:.1f},", f"{middle / 4e-6:.1f}]", f"{4 / middle:.1f}", "-"]


def test_the_chart_is_in_the_tables_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    labels: list[str] = []
    monkeypatch.setattr(Axes, "set_xlabel", lambda _, text: labels.append(text))
    for device, seconds in (("cuda", 0.5), ("cpu", 0.5), ("cpu", 0.001)):
        result = {"benchmark": "b", "backbone": "x", "batch_size": 4, "device": device, "seconds": {"ours": [seconds] * 3}}
        assert chart(json.loads(json.dumps(result)), tmp_path / "c.png") is not None
    assert [label.split()[0] for label in labels] == ["microseconds", "seconds", "microseconds"]


def test_a_gpus_figures_name_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "probe_driver", lambda: Driver((13, 0), (Gpu("NVIDIA H100", (9, 0), 80 << 30),), None))
    assert machine("cuda")["gpu"] == "NVIDIA H100, compute capability 9.0"
    assert "gpu" not in machine()
