"""How far an extraction is, where its time goes, and what came of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difffeat.errors import EXIT_OK, EXIT_QUARANTINE, StoreIncomplete

FIRST_IDS = 5
"""Ids that are named for each reason and remark."""
STAGES = ("decode", "noise", "copy", "engine", "write")


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

    **Fields:** `rows` in the store; `quarantined` among them; `computed` and `skipped` shards; `samples` computed in this run, in `seconds`; `stages`
    seconds that each stage worked (of stages with several threads or workers, the mean of them) and `waiting` seconds that it waited for another;
    `ignored` files the source passed over; `added` rows, and `healed` ones that were in quarantine, of `retried` (None: not
    asked to); `batch_size`; `workers` threads that decode;
    `understood` what was understood of the source (`understood_dict`); `device` and `reasons` for the words that come of it: errors in quarantine,
    with how many samples and the first ids; `remarks` the same of samples computed in this run that are good and were not plain; `tokens` of their
    captions, and how many of them are `unknown`.
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
    waiting: dict[str, float] = field(default_factory=dict)
    added: int = 0
    healed: int = 0
    retried: int | None = None
    missing: tuple[int, ...] = ()
    batch_size: int = 0
    workers: int = 1
    device: str = "cpu"
    executor: str = "local"
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    understood: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    unknown: int = 0

    @property
    def exit_code(self) -> int:
        """0; 3 with samples in quarantine; that of StoreIncomplete with shards whose samples the source does not hold."""
        return StoreIncomplete.exit_code if self.missing else EXIT_QUARANTINE if self.quarantined else EXIT_OK

    @property
    def rate(self) -> float:
        """Samples per second of what was computed in this run."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def bottleneck(self) -> str:
        """The stage that worked longest: stages overlap, so it sets the pace."""
        return max(self.stages, key=lambda name: self.stages[name])

    @property
    def advice(self) -> str:
        """What would make it faster, in one sentence."""
        return advice(self.bottleneck, self.device, self.workers)


def advice(bottleneck: str, device: str, workers: int) -> str:
    """What to do about the stage that sets the pace."""
    if bottleneck == "decode":
        return (
            f"Decoding sets the pace with {workers} threads: use more cores (--num-workers), make the images smaller, or read them once into a "
            "latent cache (--graph latents)."
        )
    if bottleneck == "engine":
        on_cpu = "a GPU (--device cuda), int8 (difffeat quantize), or bf16 where difffeat doctor finds units for it"
        faster = on_cpu if device.startswith("cpu") else "fp16, --engine trt or a second GPU"
        return f"The engine sets the pace, as it should; {faster} would be faster."
    return {
        "noise": "Making noise sets the pace: more cores help, and so does a graph with constant noise (--noising constant).",
        "copy": "Copying to the device sets the pace: --engine trt copies while it computes.",
        "write": "Writing sets the pace: use a faster disk, --store-dtype fp16, or pooled taps in place of tokens.",
    }[bottleneck]


@dataclass
class Clock:
    """Seconds by stage, from any thread, and what progress is reported from."""

    total: int
    report: Callable[[Progress], None] | None
    working: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    waiting: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    started: float = field(default_factory=time.perf_counter)
    before: int = 0
    done: int = 0
    bad: int = 0
    remarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: int = 0
    unknown: int = 0
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def worked(self, stage: str, seconds: float) -> None:
        with self._guard:
            self.working[stage] += seconds

    def waited(self, stage: str, seconds: float) -> None:
        with self._guard:
            self.waiting[stage] += seconds

    def remark(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Count what was not plain about samples: (id, remark)."""
        with self._guard:
            for sample, remark in pairs:
                known = self.remarks.setdefault(remark, {"samples": 0, "first_ids": []})
                known["samples"] += 1
                if len(known["first_ids"]) < FIRST_IDS:
                    known["first_ids"].append(sample)

    def count_tokens(self, tokens: int, unknown: int) -> None:
        with self._guard:
            self.tokens += tokens
            self.unknown += unknown

    def merge_remarks(self, others: Mapping[str, Mapping[str, Any]]) -> None:
        """Add what was remarked elsewhere."""
        with self._guard:
            for remark, other in others.items():
                known = self.remarks.setdefault(remark, {"samples": 0, "first_ids": []})
                known["samples"] += other["samples"]
                known["first_ids"] = [*known["first_ids"], *other["first_ids"]][:FIRST_IDS]

    def add(self, working: Mapping[str, float], waiting: Mapping[str, float]) -> None:
        """What was spent elsewhere."""
        for stage in STAGES:
            self.worked(stage, working[stage])
            self.waited(stage, waiting[stage])

    @property
    def stages(self) -> dict[str, float]:
        """Seconds that each stage worked; copying only where it is told apart from computing."""
        return {name: seconds for name, seconds in self.working.items() if name != "copy" or seconds}

    def tick(self, rows: int) -> None:
        self.done += rows
        if self.report is not None:
            rate = (self.done - self.before) / max(time.perf_counter() - self.started, 1e-9)
            self.report(Progress(self.done, self.total, self.bad, rate, (self.total - self.done) / rate if rate else None))
