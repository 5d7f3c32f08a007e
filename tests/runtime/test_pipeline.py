"""Stages hold each other back, end together, and never hang, whoever fails first."""

from __future__ import annotations

import threading
import time
from itertools import count

import pytest

from difffeat.runtime.pipeline import Channel, Stages, Stopped


def chain(source: Channel[int], middle: Channel[int], *, fail: str = "", total: int = 20) -> tuple[Stages, list[int]]:
    """Three stages that count, double and collect; one of them fails at 7."""
    out: list[int] = []
    stages = Stages()

    def produce() -> None:
        for n in range(total):
            if fail == "first" and n == 7:
                raise ValueError("first")
            source.put(n)

    def double() -> None:
        for n in source:
            if fail == "second" and n == 7:
                raise ValueError("second")
            middle.put(2 * n)

    def collect() -> None:
        for n in middle:
            if fail == "third" and n == 14:
                raise ValueError("third")
            out.append(n)

    stages.start("first", produce, outbound=source)
    stages.start("second", double, inbound=source, outbound=middle)
    stages.start("third", collect, inbound=middle)
    return stages, out


def test_everything_arrives_in_order() -> None:
    stages, out = chain(Channel(2), Channel(2))
    stages.join()
    assert out == [2 * n for n in range(20)]


@pytest.mark.parametrize("fail", ["first", "second", "third"])
@pytest.mark.timeout(20)
def test_whoever_fails_all_end_and_its_error_is_the_one_that_is_raised(fail: str) -> None:
    before = threading.active_count()
    stages, out = chain(Channel(1), Channel(1), fail=fail, total=10_000)
    with pytest.raises(ValueError, match=fail):
        stages.join()
    assert out == [2 * n for n in range(7)]
    assert threading.active_count() == before


def test_a_slow_stage_holds_back_a_fast_one() -> None:
    channel: Channel[int] = Channel(3)
    made: list[int] = []

    def produce() -> None:
        for n in range(100):
            channel.put(n)
            made.append(n)

    stages = Stages()
    stages.start("first", produce, outbound=channel)
    items = iter(channel)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    time.sleep(0.05)
    assert len(made) <= 5 + 3
    channel.abandon()
    stages.join()


def test_a_channel_that_nobody_reads_any_more_stops_its_writer() -> None:
    channel: Channel[int] = Channel(1)
    channel.put(1)
    channel.abandon()
    with pytest.raises(Stopped):
        channel.put(2)
    assert list(channel) == []


def test_waiting_is_counted_on_the_side_that_waits() -> None:
    channel: Channel[int] = Channel(1)
    stages = Stages()

    def produce() -> None:
        for n in range(3):
            time.sleep(0.03)
            channel.put(n)

    stages.start("first", produce, outbound=channel)
    assert list(channel) == [0, 1, 2]
    stages.join()
    assert channel.waited_to_get > 0.06
    assert channel.waited_to_put < 0.02


@pytest.mark.timeout(20)
def test_after_the_first_channel_is_abandoned_the_rest_drains() -> None:
    first: Channel[int] = Channel(2)
    last: Channel[int] = Channel(100)

    def produce() -> None:
        for n in count():
            first.put(n)

    def copy() -> None:
        for n in first:
            last.put(n)

    stages = Stages()
    stages.start("first", produce, outbound=first)
    stages.start("second", copy, inbound=first, outbound=last)
    items = iter(last)
    seen = [next(items) for _ in range(3)]
    first.abandon()
    stages.drain(last, seen.append)
    assert seen == list(range(len(seen)))


@pytest.mark.timeout(20)
def test_draining_ends_even_where_a_stage_was_never_started() -> None:
    first: Channel[int] = Channel(1)
    last: Channel[int] = Channel(1)
    ended = threading.Event()

    def produce() -> None:
        try:
            for n in count():
                first.put(n)
        finally:
            ended.set()

    stages = Stages()
    stages.start("first", produce, outbound=first)
    first.abandon()
    stages.drain(last, None)
    assert ended.is_set()
