"""How long a read from elsewhere may take, and how every such wait ends: by its deadline, or at once when the run is stopped."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from difffeat.errors import ConfigError
from difffeat.runtime.pipeline import Stopped

T = TypeVar("T")

LONGEST = 86_400.0
"""Seconds, at most, that an attempt or all of them may be given."""
MIN_RATE = 1 << 20
"""Bytes a second: what comes at this rate or faster is not cut off, however large it is."""
SILENT_AFTER = 3
"""Objects of a host that end without any answer, one after the other, before the host is taken for silent."""
SHORT = 3.0
"""Seconds that an object of a silent host is given, in one attempt."""
_POLL = 0.2
SPENT = 300.0
"""Seconds, added up over all threads, that a process loses to silent hosts before a host that has never answered is asked once and shortly."""


@dataclass(frozen=True)
class Patience:
    """How long one object is waited for.

    **Fields:** `timeout` seconds of an attempt, `retries` after the first one, `total` seconds of all attempts with the waits between them. What
    goes on at `MIN_RATE` gets the time that its bytes take on top of both.

    Raises ConfigError.
    """

    timeout: float = 10.0
    retries: int = 3
    total: float = 30.0

    def __post_init__(self) -> None:
        for name, value in (("--timeout", self.timeout), ("--total-timeout", self.total)):
            if not (math.isfinite(value) and 0 < value <= LONGEST):
                raise ConfigError(f"{name} must be a number of seconds above 0, at most {LONGEST:g}, got {value!r}")
        if not 0 <= self.retries <= 100:
            raise ConfigError(f"--retries must lie in 0..100, got {self.retries!r}")


_PATIENCE: ContextVar[Patience] = ContextVar("patience", default=Patience())  # noqa: B039  it is frozen


def patience() -> Patience:
    """What applies in this thread: that of the source being opened, or the default."""
    return _PATIENCE.get()


@contextlib.contextmanager
def patient(asked: Patience) -> Iterator[None]:
    """Inside, whatever is opened or named in this thread is waited for as long as this says."""
    token = _PATIENCE.set(asked)
    try:
        yield
    finally:
        _PATIENCE.reset(token)


class Stop:
    """Ends the waits of all threads that have adopted it."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._guard, self._waits = threading.Lock(), set[Future]()

    def set(self) -> None:
        """End every wait, now and from now on."""
        self._stopped.set()
        with self._guard:
            waits = list(self._waits)
        for future in waits:
            future.cancel()

    def pause(self, seconds: float) -> None:
        """Wait so long. Raises Stopped."""
        if self._stopped.wait(seconds):
            raise Stopped

    def result(self, future: Future[T], seconds: float | None = None) -> T:
        """The future's result, within `seconds`; it is cancelled where that is not had. Raises Stopped, TimeoutError, what the future raises."""
        end = math.inf if seconds is None else time.monotonic() + seconds
        with self._guard:
            self._waits.add(future)
        try:
            if self._stopped.is_set():
                raise Stopped
            while not future.done():  # waiting without end, the main thread could miss a Ctrl-C that came just before
                if (left := end - time.monotonic()) <= 0:
                    raise TimeoutError
                wait((future,), min(_POLL, left))
            return future.result()
        except CancelledError:
            raise Stopped from None
        finally:
            with self._guard:
                self._waits.discard(future)
            future.cancel()  # of no effect on one that is done


_STOP: ContextVar[Stop | None] = ContextVar("stop", default=None)


def adopt(stop: Stop) -> None:
    """From now on, this thread's waits end when `stop` is set."""
    _STOP.set(stop)


def current_stop() -> Stop:
    """What ends this thread's waits; one that nobody sets where none was adopted: Ctrl-C reaches the main thread by itself."""
    return _STOP.get() or Stop()


class Turn:
    """Lets one thread at a time hold a large object: many wait for small ones at once, and memory stays that of one large one."""

    def __init__(self) -> None:
        self._lock, self._holder = threading.Lock(), 0

    def enter(self) -> None:
        """Wait for it; nothing where this thread has it. Raises Stopped."""
        if self._holder == threading.get_ident():
            return
        while not self._lock.acquire(timeout=_POLL):
            current_stop().pause(0)
        self._holder = threading.get_ident()

    def leave(self) -> None:
        """Let the next one have it, where this thread has it."""
        if self._holder == threading.get_ident():
            self._holder = 0
            self._lock.release()


_TURN: ContextVar[Turn | None] = ContextVar("turn", default=None)


def share(stop: Stop, turn: Turn) -> None:
    """From now on, this thread's waits end when `stop` is set, and it takes its turn for what is large."""
    adopt(stop)
    _TURN.set(turn)


def current_turn() -> Turn | None:
    """None where this thread shares memory with few."""
    return _TURN.get()


def within(seconds: float, action: Callable[[], T]) -> T:
    """The result of what knows no deadline itself, in a thread that is left behind when it has none in time. Raises TimeoutError, Stopped."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            result = action()
        except BaseException as error:
            with contextlib.suppress(Exception):  # nobody waits any more
                future.set_exception(error)
        else:
            with contextlib.suppress(Exception):
                future.set_result(result)

    threading.Thread(target=work, name="remote", daemon=True).start()
    try:
        return current_stop().result(future, seconds)
    except TimeoutError:
        if future.done() and not future.cancelled():
            raise  # the action's own
        raise TimeoutError(f"no answer within {seconds:.3g} s") from None


class Hosts:
    """Remembers which hosts have answered, so that many silent addresses do not each cost the full patience."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._guard = clock, threading.Lock()
        self._silent: dict[str, int] = {}
        self._answered = set[str]()
        self._spent = 0.0

    def allow(self, host: str, asked: Patience) -> Patience:
        """The patience for one object of a host."""
        with self._guard:
            silent = self._silent.get(host, 0) >= SILENT_AFTER
            unknown = host not in self._answered and self._spent > SPENT
        if not (silent or unknown):
            return asked
        short = min(SHORT, asked.timeout)
        return Patience(short, 0, short)

    def answered(self, host: str) -> None:
        """Something came back, if only a refusal."""
        with self._guard:
            self._answered.add(host)
            self._silent.pop(host, None)

    def expired(self, host: str, seconds: float) -> None:
        """Nothing came back in so many seconds."""
        with self._guard:
            self._silent[host] = self._silent.get(host, 0) + 1
            self._spent += seconds
