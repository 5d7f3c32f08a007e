"""How far an extraction is, where its time goes, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from difffeat.errors import EXIT_OK, EXIT_QUARANTINE


@dataclass(frozen=True)
class Progress:
    """How far an extraction is. `rate` in samples/s of this run; `eta` in seconds, None before the first batch."""

    done: int
    total: int
    quarantined: int
    rate: float
    eta: float | None


@dataclass
class Summary:
    """What came of an extraction.

    **Fields:** `rows` in the store; `quarantined` among them; `computed` and `skipped` shards; `added` rows, and `healed` ones that were in
    quarantine; `seconds` in all; `stages` seconds the main loop
    spent waiting for decoding, making noise, in the engine, and writing; `ignored` files the source passed over.
    """

    path: Path
    rows: int
    quarantined: int
    computed: int
    skipped: int
    samples: int
    seconds: float
    stages: dict[str, float]
    ignored: dict[str, int]
    added: int = 0
    healed: int = 0

    @property
    def exit_code(self) -> int:
        """0, or 3 with samples in quarantine."""
        return EXIT_QUARANTINE if self.quarantined else EXIT_OK

    @property
    def rate(self) -> float:
        """Samples per second of what was computed in this run."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def bottleneck(self) -> str:
        """The stage that took longest."""
        return max(self.stages, key=lambda name: self.stages[name])


@dataclass
class Clock:
    """Seconds by stage, and what progress is reported from."""

    total: int
    report: Callable[[Progress], None] | None
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("decode", "noise", "engine", "write"), 0.0))
    started: float = field(default_factory=time.perf_counter)
    before: int = 0
    done: int = 0
    bad: int = 0

    def spend(self, stage: str, since: float) -> float:
        now = time.perf_counter()
        self.stages[stage] += now - since
        return now

    def tick(self, rows: int) -> None:
        self.done += rows
        if self.report is not None:
            rate = (self.done - self.before) / max(time.perf_counter() - self.started, 1e-9)
            self.report(Progress(self.done, self.total, self.bad, rate, (self.total - self.done) / rate if rate else None))
