"""What the torch engine asks of `torch.cuda` exists there, with those arguments: every call is held to the real signature, without a GPU."""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from difffeat.engines.torch_card import Card


class Recorder:
    """`torch` whose CUDA does nothing: each call is bound to the real function's signature, and noted."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.uint8, self.device, self.inside = torch.uint8, torch.device, "compute"
        self.cuda = SimpleNamespace(
            Stream=self._bound(
                "Stream", torch.cuda.Stream.__new__, lambda *_, **__: SimpleNamespace(name="beside", wait_stream=self._noted("wait_stream"))
            ),
            Event=self._bound("Event", torch.cuda.Event.__new__, self._event),
            CUDAGraph=lambda: SimpleNamespace(replay=self._noted("replay")),
            graph_pool_handle=self._bound("graph_pool_handle", torch.cuda.graph_pool_handle, lambda: (1, 0)),
            graph=self._bound("graph", torch.cuda.graph.__init__, self._within("graph")),
            stream=self._bound("stream", torch.cuda.stream, self._within("stream")),
            device=self._bound("device", torch.cuda.device.__init__, self._within("device")),
            current_stream=self._bound("current_stream", torch.cuda.current_stream, self._current),
            synchronize=self._bound("synchronize", torch.cuda.synchronize, lambda *_: None),
            empty_cache=self._bound("empty_cache", torch.cuda.empty_cache, lambda: None),
        )

    def empty(self, size: int, **given: Any) -> Any:
        assert set(given) <= {"dtype", "device", "pin_memory"}
        self.log.append(f"empty {size} {'pinned' if given.get('pin_memory') else given['device']}")
        return SimpleNamespace(copy_=lambda other, non_blocking: self.log.append(f"copy {'without waiting' if non_blocking else 'waiting'}"))

    def _bound(self, name: str, real: Any, instead: Any) -> Any:
        signature = inspect.signature(real)
        methods = next(iter(signature.parameters), "") in ("self", "cls")

        def call(*given: Any, **named: Any) -> Any:
            signature.bind(*([None] if methods else []), *given, **named)
            self.log.append(name)
            return instead(*given, **named)

        return call

    def _noted(self, name: str) -> Any:
        return lambda *_: self.log.append(name)

    def _event(self, **given: Any) -> Any:
        assert given == {"blocking": True}
        return SimpleNamespace(record=self._noted("record"), synchronize=self._noted("wait"))

    def _current(self, *_: Any) -> Any:
        return SimpleNamespace(name="now", wait_event=self._noted("wait_event"), wait_stream=self._noted("wait_stream"))

    def _within(self, name: str) -> Any:
        @contextlib.contextmanager
        def inside(*_: Any, **__: Any) -> Any:
            yield
            self.log.append(f"end of {name}")

        return inside


@pytest.fixture
def asked() -> Recorder:
    return Recorder()


def test_copies_run_in_a_stream_of_their_own_and_do_not_wait(asked: Recorder) -> None:
    card = Card(asked, 1)
    host, device = card.pinned(8), card.memory(16)
    with card.current():
        card.order(card.upload([(device, host)]))
        card.wait(card.download([(host, device)]))
    card.drain()
    card.release()
    assert asked.log == [
        "Stream", "Stream", "empty 8 pinned", "stream", "empty 16 cuda:1", "end of stream", "device",
        "stream", "copy without waiting", "Event", "record", "end of stream", "current_stream", "wait_event",
        "copy without waiting", "current_stream", "Event", "record", "wait",
        "end of device", "synchronize", "empty_cache",
    ]  # fmt: skip


def test_a_graph_is_captured_after_two_runs_beside_and_shares_its_memory_with_the_next(asked: Recorder) -> None:
    card, runs = Card(asked, 0), list[str]()
    asked.log.clear()
    replay, outputs = card.capture(lambda: runs.append("ran") or len(runs))
    assert outputs == 3
    replay()
    card.capture(lambda: None)
    assert asked.log[:9] == [
        "current_stream", "wait_stream", "stream", "end of stream", "wait_stream", "graph_pool_handle", "graph", "end of graph", "replay",
    ]  # fmt: skip
    assert asked.log.count("graph_pool_handle") == 1
    card.release()
    card.capture(lambda: None)
    assert asked.log.count("graph_pool_handle") == 2
    assert len(runs) == 3


def test_events_know_the_methods_that_are_used() -> None:
    for kind, names in (
        (torch.cuda.Event, ("record", "synchronize")),
        (torch.cuda.Stream, ("wait_event", "wait_stream")),
        (torch.cuda.CUDAGraph, ("replay",)),
    ):
        assert all(hasattr(kind, name) for name in names)
