"""Threads that read and decode samples: as many as there are cores for decoding, and more for waiting on what comes from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from difffeat.runtime.patience import Stop, Turn, adopt, share

T = TypeVar("T")

FETCHES = 32
"""Objects behind URLs that are waited for at once: a silent address then holds up one of these and no decoding."""


class DecodePool:
    """Left by an error, it ends every wait for another machine at once, and drops what nobody has begun.

    **Arguments:** `threads` that decode. Those that fetch are started when the first URL comes.
    """

    def __init__(self, threads: int) -> None:
        self._stop = Stop()
        self._decode = ThreadPoolExecutor(threads, "decode", initializer=adopt, initargs=(self._stop,))
        self._turn = Turn()
        self._fetch = ThreadPoolExecutor(FETCHES, "fetch", initializer=share, initargs=(self._stop, self._turn))

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run what computes, or reads this machine's disks."""
        return self._decode.submit(work, *arguments)

    def fetch(self, read: Callable[..., T], *arguments: Any, then: Callable[[T], Any]) -> Future[Any]:
        """Run what waits for another machine, and with its result what computes."""

        def work() -> Any:
            try:
                return self._decode.submit(then, read(*arguments)).result()
            finally:
                self._turn.leave()

        return self._fetch.submit(work)

    def stop(self) -> None:
        """End every wait for another machine, now and from now on: it raises Stopped."""
        self._stop.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.stop()
        self._fetch.shutdown(cancel_futures=True)
        self._decode.shutdown(cancel_futures=True)
