"""Stages in threads of their own, joined by bounded channels: what is slow holds back what is fast, and an error anywhere ends all of them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

POLL = 0.2
"""Seconds after which a wait is begun anew."""


class Stopped(Exception):
    """Raised in a stage whose successor has ended: there is nobody left to work for. Never leaves the pipeline."""


class Channel(Generic[T]):
    """A queue of at most `size` items between two stages.

    The earlier stage puts and at last closes it; the later one iterates over it and, when it ends for whatever reason, abandons it. `waited_to_put`
    and `waited_to_get` are the seconds that either stage has spent waiting for the other.
    """

    def __init__(self, size: int) -> None:
        self._items: deque[T] = deque()
        self._size, self._closed, self._abandoned = size, False, False
        self._changed = threading.Condition()
        self.waited_to_put = self.waited_to_get = 0.0

    def put(self, item: T) -> None:
        """Wait for room. Raises Stopped when the later stage has ended."""
        with self._changed:
            since = time.perf_counter()
            self._changed.wait_for(lambda: self._abandoned or len(self._items) < self._size)
            self.waited_to_put += time.perf_counter() - since
            if self._abandoned:
                raise Stopped
            self._items.append(item)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                since = time.perf_counter()
                while not self._changed.wait_for(lambda: self._abandoned or self._closed or bool(self._items), POLL):
                    pass  # the main thread notices a Ctrl-C that came just before it began to wait
                self.waited_to_get += time.perf_counter() - since
                if self._abandoned or not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item

    def close(self) -> None:
        """Nothing more will be put; what is there will still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nothing more will be taken; what is there is dropped."""
        with self._changed:
            self._abandoned = True
            self._items.clear()
            self._changed.notify_all()


class Stages:
    """Threads, each with what it takes from and what it puts into. The first error of any of them is raised by `join`."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._channels: list[Channel] = []
        self._guard = threading.Lock()
        self._error: BaseException | None = None

    def start(self, name: str, work: Callable[[], None], *, inbound: Channel | None = None, outbound: Channel | None = None) -> None:
        """Run `work` in a thread; when it ends, its channels are abandoned and closed."""

        def run() -> None:
            try:
                work()
            except Stopped:
                pass  # the stage that ended first has told why
            except BaseException as error:
                with self._guard:
                    self._error = self._error or error
            finally:
                if inbound is not None:
                    inbound.abandon()
                if outbound is not None:
                    outbound.close()

        self._channels += [channel for channel in (inbound, outbound) if channel is not None]
        thread = threading.Thread(target=run, name=name)
        self._threads.append(thread)
        thread.start()

    def join(self) -> None:
        """Wait for all stages. Raises the first error of any of them."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        if self._error is not None:
            raise self._error

    def drain(self, last: Channel[T], take: Callable[[T], None] | None) -> None:
        """Wait for all stages after the first channel was abandoned, taking from the last one what still comes. A stage that was never started
        closes nothing, so then all channels are abandoned. Errors are left to who has abandoned the first.
        """
        if any(thread.ident is None for thread in self._threads) or last not in self._channels:
            for channel in (*self._channels, last):
                channel.abandon()
        for item in last:
            if take is not None:
                take(item)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
