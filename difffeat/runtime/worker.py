"""A worker of a cluster: one engine in a process of its own, that computes the shards it is handed and writes them itself."""

from __future__ import annotations

import contextlib
import os
import platform
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import difffeat.errors
from difffeat.errors import ClusterError, DifffeatError
from difffeat.recipe import RunRecipe
from difffeat.runtime.batch_size import probe_batch_size
from difffeat.runtime.configuration import Configuration
from difffeat.runtime.feeding import Feeding, Opening
from difffeat.runtime.files import Files
from difffeat.runtime.job import Event, Job, Piece
from difffeat.runtime.manifest import Manifest, read_manifest
from difffeat.runtime.progress import Clock
from difffeat.runtime.samples import Sample
from difffeat.runtime.writer import ShardWriter


@dataclass(frozen=True)
class Order:
    """A shard to compute, with the digest of its samples as they will be and as the store has them now."""

    piece: Piece
    digest: str
    before: str


@dataclass(frozen=True)
class Answer:
    """What came of it: all rows and the receipt, with seconds by stage; or the error of ours that stopped it, by name."""

    event: Event | None = None
    working: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, float] = field(default_factory=dict)
    remarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: int = 0
    unknown: int = 0
    error: str = ""
    message: str = ""


class Worker:
    """Lives in a process of its own, on whatever machine Ray puts it: opens the artifact there and computes what it is handed."""

    def __init__(self, opening: Opening, run: RunRecipe, store: Path, multiple: int, num_workers: int) -> None:
        self._opening, self._run, self._store, self._multiple, self._num_workers = opening, run, store, multiple, num_workers
        self._stack = ExitStack()
        self._feeding: Feeding | None = None

    def describe(self) -> Configuration | Answer:
        """Open the engine (build it, where it must be) and say what it is."""
        try:
            engine, beside = self._opening.open(self._stack)
            self._feeding = Feeding.of(engine, self._run, multiple=self._multiple, **beside)
            return Configuration.of(engine, self._feeding.beside)
        except DifffeatError as error:
            return told(error)

    def probe(self, samples: list[Sample], largest: int) -> int | Answer:
        """The batch size of the largest rate."""
        assert self._feeding is not None
        try:
            return probe_batch_size(self._feeding, samples, largest=largest)
        except DifffeatError as error:
            return told(error)

    def compute(self, order: Order, manifest: Manifest) -> Answer:
        """Compute a shard, write it and its receipt, which is bound to this manifest."""
        assert self._feeding is not None
        clock, events, number = Clock(len(order.piece.rows), None), [], order.piece.number
        try:
            self._require_shared(manifest)
            files = Files()
            files.tag = f".{os.getpid()}"
            shards = ShardWriter(self._store, manifest, {number: order.digest}, {number: order.before}, files=files)
            Job(self._feeding, shards, clock, workers=self._num_workers).run([order.piece], events.append)
        except DifffeatError as error:
            return told(error)
        last = next(event for event in events if event.receipt is not None)
        return Answer(replace(last, rows=len(order.piece.rows)), clock.working, clock.waiting, clock.remarks, clock.tokens, clock.unknown)

    def _require_shared(self, manifest: Manifest) -> None:
        """Raises ClusterError unless the store lies here too."""
        with contextlib.suppress(DifffeatError):
            if read_manifest(self._store).configuration == manifest.configuration:
                return
        raise ClusterError(
            f"a worker on {platform.node()} does not find the store at {self._store}. Put it on a file system that all machines share, at one path."
        )


def told(error: DifffeatError) -> Answer:
    """The answer that tells of an error."""
    return Answer(error=type(error).__name__, message=str(error))


def raised(answer: Any) -> Any:
    """The answer, or the error that it tells of, as the class it was."""
    if isinstance(answer, Answer) and answer.error:
        kind = getattr(difffeat.errors, answer.error)
        raise kind.__new__(kind, answer.message)
    return answer
