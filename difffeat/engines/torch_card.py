"""One GPU as the torch engine uses it: memory on both sides, a stream of its own for uploads, events, captured CUDA graphs.

Everything the engine does with CUDA goes through a `Card`, so that its order of copies and work can be tested without a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


class Card:
    """The GPU `number`. Work is put into the calling thread's current stream, uploads into a stream beside it.

    **Fields:** `place` the torch device that modules and tensors go to.
    """

    def __init__(self, torch: Any, number: int) -> None:
        self._torch, self._number = torch, number
        self.place = torch.device("cuda", number)
        self._uploads, self._beside = torch.cuda.Stream(self.place), torch.cuda.Stream(self.place)
        self._pool: Any = None

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, it is the calling thread's device: each stage of an extraction runs in a thread of its own."""
        return self._torch.cuda.device(self._number)

    def pinned(self, size: int) -> Any:
        """`size` bytes of host memory that the GPU copies without a detour, uint8."""
        return self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True)

    def memory(self, size: int) -> Any:
        """`size` bytes on the GPU that uploads go to, uint8.

        Of the stream of uploads: what the work before has freed, and other work may still use, is not among them.
        """
        with self._torch.cuda.stream(self._uploads):
            return self._torch.empty(size, dtype=self._torch.uint8, device=self.place)

    def upload(self, pairs: list[tuple[Any, Any]]) -> Any:
        """Copy (to, from) pairs of tensors in the stream of uploads; the event that says they are there."""
        with self._torch.cuda.stream(self._uploads):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._event(self._uploads)

    def download(self, pairs: list[tuple[Any, Any]]) -> Any:
        """Copy (to, from) pairs of tensors after the work so far; the event that says they are there."""
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        return self._event(self._torch.cuda.current_stream(self.place))

    def order(self, event: Any) -> None:
        """Work put in from now on begins after the event."""
        self._torch.cuda.current_stream(self.place).wait_event(event)

    def wait(self, event: Any) -> None:
        """Until the event has happened, without Python's lock and without burning a core."""
        event.synchronize()

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record what `work` puts in as a CUDA graph: what replays it, and its outputs, which every replay overwrites.

        The graphs of a card share their memory: they run one after the other. `work` runs twice before, since first runs allocate and choose.
        """
        torch, now = self._torch, self._torch.cuda.current_stream(self.place)
        self._beside.wait_stream(now)
        with torch.cuda.stream(self._beside):
            work()
            work()
        now.wait_stream(self._beside)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = work()
        return graph.replay, outputs

    def drain(self) -> None:
        """Until everything is done."""
        self._torch.cuda.synchronize(self.place)

    def release(self) -> None:
        """Give memory back that torch keeps for later; graphs that are captured from now on have memory of their own."""
        self._pool = None
        self._torch.cuda.empty_cache()

    def _event(self, stream: Any) -> Any:
        event = self._torch.cuda.Event(blocking=True)
        event.record(stream)
        return event
