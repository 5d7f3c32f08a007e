"""What a campaign says: how many points it tried, which of them differed from what is promised, how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from difffeat.errors import DifffeatError

Size = Literal["short", "long"]
"""`short` runs in `make test`, `long` in `make faults`."""


@dataclass
class Outcome:
    """One row of the table.

    **Fields:** `promise`; `points` tried; `reached` of them at which the fault really struck; `differences` what was not as promised, a line each;
    `note` figures worth printing.
    """

    promise: str
    points: int = 0
    reached: int = 0
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""

    def expect(self, holds: bool, difference: str) -> None:
        """Record a difference unless the condition holds."""
        if not holds:
            self.differences.append(difference)

    @property
    def line(self) -> str:
        """For example: killed at 85 of 85 points, 0 differences."""
        note = f"; {self.note}" if self.note else ""
        return f"{self.promise}: {self.reached} of {self.points} points, {len(self.differences)} differences, {self.seconds:.1f} s{note}"


@contextmanager
def outcome(promise: str) -> Iterator[Outcome]:
    """An outcome that times itself."""
    made, started = Outcome(promise), time.perf_counter()
    try:
        yield made
    finally:
        made.seconds = time.perf_counter() - started


def told(call: Callable[[], list[str]]) -> list[str]:
    """The problems a call tells, as its result or as a typed error; any other error is a crash and passes through."""
    try:
        return call()
    except DifffeatError as error:
        return [f"{type(error).__name__}: {error}"]
