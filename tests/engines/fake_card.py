"""A GPU for the torch engine on the CPU: uploads that happen when work is ordered behind them, downloads that happen when they are waited for.

A tensor read without `order`, or a result read without `wait`, holds what was there before. `log` tells the order of what was asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from difffeat.engines import torch_cuda, torch_engine
from difffeat.engines.driver import Gpu

GPU = Gpu("Fake 9000", (9, 0), 80 << 30)


class FakeCard:
    """`memory` bytes of the device are free; `log` holds what was asked, copies with the number of their event."""

    def __init__(self, number: int, memory: int = 1 << 40) -> None:
        self.place, self.number, self.free = torch.device("cpu"), number, memory
        self.log: list[str] = []
        self.waiting: dict[int, list[tuple[Any, Any]]] = {}
        self.captures, self.replays, self.inside = 0, 0, False
        self.fail: Exception | None = None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def pinned(self, size: int) -> Any:
        return torch.full((size,), 0xEE, dtype=torch.uint8)

    def memory(self, size: int) -> Any:
        if size > self.free:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        self.free -= size
        return torch.full((size,), 0xEE, dtype=torch.uint8)

    def upload(self, pairs: list[tuple[Any, Any]]) -> int:
        return self._later("upload", pairs)

    def download(self, pairs: list[tuple[Any, Any]]) -> int:
        if self.fail is not None:
            raise self.fail
        return self._later("download", [(target, source.clone()) for target, source in pairs])  # in the stream's order: ahead of later work

    def order(self, event: int) -> None:
        self._happen("order", event)

    def wait(self, event: int) -> None:
        self._happen("wait", event)

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        outputs = work()

        def replay() -> None:
            self.replays += 1
            for target, value in zip(outputs, work(), strict=True):
                target.copy_(value)

        return replay, outputs

    def drain(self) -> None:
        for event in list(self.waiting):
            self._happen("drain", event)

    def release(self) -> None:
        self.log.append("release")

    def _later(self, what: str, pairs: list[tuple[Any, Any]]) -> int:
        assert self.inside, "without the device being the thread's own"
        event = sum(line.startswith(("upload", "download")) for line in self.log)
        self.log.append(f"{what} {event}")
        self.waiting[event] = pairs
        return event

    def _happen(self, how: str, event: int) -> None:
        self.log.append(f"{how} {event}")
        with torch.inference_mode():
            for target, source in self.waiting.pop(event, ()):
                target.copy_(source)


def install(monkeypatch: pytest.MonkeyPatch, *, compiler: Any = "eager", memory: int = 1 << 40) -> list[FakeCard]:
    """Put fake cards in the place of real ones, in the order in which engines ask for them; `compiler` is dynamo's backend."""
    cards: list[FakeCard] = []

    def card(_: Any, number: int) -> FakeCard:
        cards.append(FakeCard(number, memory))
        return cards[-1]

    compile_module = torch_cuda.compile_module
    monkeypatch.setattr(torch_engine, "Card", card)
    monkeypatch.setattr(torch_engine, "_checked_device", lambda _, device: f"cuda:{device.partition(':')[2] or 0}" if device != "cpu" else "cpu")
    monkeypatch.setattr(torch_engine, "gpu_identity", lambda _: {"gpu": str(GPU)})
    monkeypatch.setattr(torch_engine, "_libraries", lambda *_: {"cuda": "13.0", "cudnn": "91900"})
    monkeypatch.setattr(torch_engine, "choose_attention", lambda *_: "MATH")
    if compiler != "inductor":
        monkeypatch.setattr(torch_cuda, "compile_module", lambda *given, **named: compile_module(*given, **named, backend=compiler))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return cards
