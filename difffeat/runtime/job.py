"""Pieces of a store through an engine: decoding, noise, computing and writing overlap, each in threads of its own.

    pool: decode ──> feed: assemble, ask for noise ──> compute: the engine ──> write: check, shard, receipt ──> the caller's thread: progress

Channels between the stages are short, so memory stays flat whatever is slow. A stop or an error ends the stages from the first to the last: what the
engine has finished is still written, and a shard that is whole gets its receipt.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from difffeat.engines.base import Pending
from difffeat.errors import NonFiniteFeature
from difffeat.recipe import tap_name
from difffeat.runtime.batches import Batch, Failure, Prepared
from difffeat.runtime.decoding import DecodePool
from difffeat.runtime.feeding import Feeding
from difffeat.runtime.feeds import batch_noise
from difffeat.runtime.manifest import Receipt, shard_path
from difffeat.runtime.pipeline import Channel, Stages
from difffeat.runtime.preprocess import quiet_pillow
from difffeat.runtime.progress import Clock
from difffeat.runtime.samples import Sample
from difffeat.runtime.store import DIGEST_BYTES, map_shard
from difffeat.runtime.writer import ShardWriter

FP16_MAX = 65504.0
PREFETCH = 3
"""Batches that are decoded ahead, and runs that wait on either side of the engine."""
NOISE_THREADS = 2
EVENTS = 4096
"""Messages to the caller's thread that may wait there."""


@dataclass(frozen=True)
class Piece:
    """Rows of a shard that are to be computed: all of them, or, with the `receipt` of a finished shard, those to be retried.

    **Fields:** `number` of the shard and its `first_row`; `rows` counted within the shard, with the sample of each.
    """

    number: int
    first_row: int
    rows: np.ndarray
    samples: Sequence[Sample]
    receipt: Receipt | None = None


@dataclass(frozen=True)
class Event:
    """Told while a job runs: `rows` more are done; with the `receipt` of a shard when it is whole, and how many of its retried rows are still bad."""

    rows: int
    receipt: Receipt | None = None
    still_bad: int = 0


@dataclass
class _Shard:
    """A piece being filled; its batches and failures count rows within the piece."""

    piece: Piece
    arrays: dict[str, np.ndarray]
    failures: list[Failure]
    unplanned: int
    left: int


@dataclass
class _Work:
    """A batch: what was prepared of it, what that is for the engine (`clean`), and in the last stage the sum of the draws of one timestep."""

    shard: _Shard
    batch: Batch
    prepared: Prepared
    left: int
    clean: dict[str, np.ndarray] | None = None
    total: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """One run of the engine on a batch, at a timestep and with one draw of noise."""

    t: float | None
    parameters: dict[str, np.ndarray]
    draw: int
    noise: Future[np.ndarray] | None


_Ready = tuple[_Work, _Run | None]
_Finished = tuple[_Work, _Run | None, dict[str, np.ndarray]]


class Job:
    """Computes pieces with one engine.

    **Arguments:** `feeding` the engine and what it is fed; `shards` writes; `workers` threads that decode. The batch size is the manifest's.
    """

    def __init__(self, feeding: Feeding, shards: ShardWriter, clock: Clock, *, workers: int) -> None:
        self._feeding, self._engine, self._runs, self._recipe = feeding, feeding.engine, feeding.runs, feeding.run
        self._feeder = feeding.feeder(shards.manifest.batch_size)
        self._shards, self._clock, self._workers = shards, clock, workers
        self._manifest = shards.manifest

    def run(self, pieces: Iterable[Piece], tell: Callable[[Event], None]) -> None:
        """Compute and commit every piece; `tell` is called in this thread. Raises what any stage raises; all threads have ended by then."""
        ready: Channel[_Ready] = Channel(PREFETCH)
        finished: Channel[_Finished] = Channel(PREFETCH)
        told: Channel[Event] = Channel(EVENTS)
        copied_before = self._engine.copy_seconds
        with quiet_pillow(), DecodePool(self._workers) as pool, _pool(NOISE_THREADS, "noise") as noise_pool:
            stages = Stages()
            try:
                stages.start("feed", lambda: self._feed(pieces, ready, pool, noise_pool), outbound=ready)
                stages.start("compute", lambda: self._compute(ready, finished), inbound=ready, outbound=finished)
                stages.start("write", lambda: self._write(finished, told), inbound=finished, outbound=told)
                for event in told:
                    tell(event)
            except BaseException as error:
                pool.stop()
                ready.abandon()
                with _next_stop_is_final() if isinstance(error, KeyboardInterrupt) else contextlib.nullcontext():
                    stages.drain(told, tell if isinstance(error, KeyboardInterrupt) else None)
                raise
            stages.join()
            self._clock.worked("copy", copied := self._engine.copy_seconds - copied_before)
            self._clock.worked("engine", -copied)
            self._clock.waited("decode", ready.waited_to_put)
            self._clock.waited("engine", ready.waited_to_get + finished.waited_to_put)
            self._clock.waited("write", finished.waited_to_get)

    def _feed(self, pieces: Iterable[Piece], out: Channel[_Ready], pool: DecodePool, noise_pool: ThreadPoolExecutor) -> None:
        """Every batch of every piece in order, the next few already being decoded."""
        window: deque[tuple[_Shard, Batch]] = deque()
        for piece in pieces:
            for shard, batch in self._plan(piece):
                self._feeder.start(batch, pool)
                window.append((shard, batch))
                if len(window) > PREFETCH:
                    self._hand_over(*window.popleft(), out, noise_pool)
        for shard, batch in window:
            self._hand_over(shard, batch, out, noise_pool)

    def _plan(self, piece: Piece) -> Iterator[tuple[_Shard, Batch]]:
        """The batches of a piece; one without rows where there is nothing to compute."""
        since, count = time.perf_counter(), len(piece.rows)
        batches, failures = self._feeder.plan(piece.samples)
        arrays = {name: np.zeros((count, *shape), self._manifest.dtype) for name, shape in self._manifest.taps.items()}
        arrays |= {"valid": np.zeros(count, bool), "inputs": np.zeros((count, DIGEST_BYTES), np.uint8)}
        self._clock.worked("decode", time.perf_counter() - since)
        unplanned = count - sum(len(batch.rows) for batch in batches)
        batches = batches or [Batch(np.zeros(0, int), [])]
        shard = _Shard(piece, arrays, list(failures), unplanned, len(batches))
        yield from ((shard, batch) for batch in batches)

    def _hand_over(self, shard: _Shard, batch: Batch, out: Channel[_Ready], noise_pool: ThreadPoolExecutor) -> None:
        """A decoded batch, one run after the other, the noise of each on its way."""
        prepared = self._feeder.finish(batch)
        self._clock.worked("decode", prepared.seconds / self._workers)
        self._clock.remark(prepared.remarks)
        self._clock.count_tokens(prepared.tokens, prepared.unknown)
        runs = [(t, parameters, draw) for t, parameters in self._runs for draw in range(self._recipe.draws)] if prepared.good.any() else []
        work = _Work(shard, batch, prepared, len(runs))
        for t, parameters, draw in runs:
            noise = noise_pool.submit(self._noise, work, t or 0.0, draw) if "noise" in self._engine.inputs else None
            out.put((work, _Run(t, parameters, draw, noise)))
        if not runs:
            out.put((work, None))

    def _noise(self, work: _Work, t: float, draw: int) -> np.ndarray:
        since = time.perf_counter()
        ids = [sample.id for sample in work.batch.samples]
        made = batch_noise(self._engine.inputs["noise"], work.prepared.feeds, ids, seed=self._recipe.seed, t=t, draw=draw)
        self._clock.worked("noise", (time.perf_counter() - since) / NOISE_THREADS)
        return made

    def _compute(self, ready: Channel[_Ready], out: Channel[_Finished]) -> None:
        """Submit every run; results are taken in order as soon as more are under way than the engine overlaps."""
        under_way: deque[tuple[_Work, _Run, Pending]] = deque()
        for work, run in ready:
            if run is None:
                out.put((work, None, {}))
                continue
            since = time.perf_counter()
            noise = {} if run.noise is None else {"noise": run.noise.result()}
            waited = time.perf_counter()
            self._clock.waited("engine", waited - since)
            if work.clean is None:  # beside `prepared`, out of which later runs' noise is being made meanwhile
                work.clean = self._feeder.encode(work.prepared.feeds)
            under_way.append((work, run, self._engine.submit({**self._feeding.at(run.t, work.clean), **run.parameters, **noise})))
            self._clock.worked("engine", time.perf_counter() - waited)
            while len(under_way) >= self._engine.depth:
                self._collect(under_way, out)
        while under_way:
            self._collect(under_way, out)

    def _collect(self, under_way: deque[tuple[_Work, _Run, Pending]], out: Channel[_Finished]) -> None:
        since = time.perf_counter()
        work, run, pending = under_way.popleft()
        result = pending.result()
        self._clock.worked("engine", time.perf_counter() - since)
        out.put((work, run, result))

    def _write(self, finished: Channel[_Finished], told: Channel[Event]) -> None:
        """Results into their shards, and every shard that is whole to the disk."""
        for work, run, outputs in finished:
            since = time.perf_counter()
            if run is not None:
                self._keep(work, run, outputs)
            self._clock.worked("write", time.perf_counter() - since)
            if work.left == 0:
                self._close(work, told)

    def _keep(self, work: _Work, run: _Run, outputs: dict[str, np.ndarray]) -> None:
        """Sum the draws; the mean of all goes into the shard, every value checked."""
        work.left -= 1
        for name, value in outputs.items():
            work.total[name] = value if run.draw == 0 else work.total[name] + value
        if run.draw < self._recipe.draws - 1:
            return
        good = np.flatnonzero(work.prepared.good)
        for name, value in work.total.items():
            tap = name if run.t is None else tap_name(int(name[1:]), run.t)
            values = (value / np.float32(self._recipe.draws))[: len(work.batch.rows)][good]
            self._check(tap, values, [work.batch.samples[int(index)] for index in good])
            work.shard.arrays[tap][work.batch.rows[good]] = values.reshape(len(good), *self._manifest.taps[tap])

    def _check(self, tap: str, values: np.ndarray, samples: list[Sample]) -> None:
        """Every feature is finite, and fits the stored type."""
        limit = FP16_MAX if self._manifest.dtype == "float16" else np.inf
        flat = np.abs(values.reshape(len(values), -1)).max(axis=1)
        bad = np.flatnonzero(~(flat <= limit) | np.isinf(flat))
        if not len(bad):
            return
        worst, name = flat[bad[0]], samples[bad[0]].id
        if np.isfinite(worst):
            raise NonFiniteFeature(f"{tap} of sample {name!r} reaches {worst:.4g}, beyond fp16's {limit:g}. Extract with --store-dtype fp32.")
        raise NonFiniteFeature(
            f"{tap} of sample {name!r} is not finite in engine {self._engine.name} ({self._engine.precision}). "
            "Check the artifact's parity.json, and export with --dtype fp32."
        )

    def _close(self, work: _Work, told: Channel[Event]) -> None:
        """A batch is complete; with it perhaps its shard."""
        since, shard, batch, prepared = time.perf_counter(), work.shard, work.batch, work.prepared
        shard.arrays["valid"][batch.rows] = prepared.good
        shard.failures += prepared.failures
        for row, digest in zip(batch.rows, prepared.inputs, strict=True):
            if digest:
                shard.arrays["inputs"][row] = np.frombuffer(bytes.fromhex(digest), np.uint8)
        shard.left -= 1
        whole = self._commit(shard) if shard.left == 0 else None
        self._clock.worked("write", time.perf_counter() - since)
        told.put(Event(len(batch.rows)))
        if whole is not None:
            told.put(whole)

    def _commit(self, shard: _Shard) -> Event:
        piece = shard.piece
        failures = sorted(shard.failures, key=lambda failure: failure.row)
        entries = [failure.entry(piece.first_row, piece.rows) for failure in failures]
        if piece.receipt is None:
            return Event(shard.unplanned, self._shards.write(piece.number, shard.arrays, entries))
        return Event(shard.unplanned, self._heal(shard, piece.receipt, entries), len(entries))

    def _heal(self, shard: _Shard, receipt: Receipt, entries: list[dict[str, Any]]) -> Receipt:
        """Rows that are good now, into a copy of their shard; all other rows keep their bytes. Nothing is written where nothing has changed."""
        retried = {receipt.first_row + int(row) for row in shard.piece.rows}
        kept = [dict(entry) for entry in receipt.quarantined if entry["row"] not in retried]
        quarantined = sorted([*kept, *entries], key=lambda entry: entry["row"])
        good = np.flatnonzero(shard.arrays["valid"])
        if not len(good):
            return self._shards.amend(receipt, quarantined)
        path = shard_path(self._shards.path, receipt.shard, receipt.generation)
        whole = {name: np.array(array) for name, array in map_shard(path, self._manifest, receipt.rows).items()}
        for name, values in shard.arrays.items():
            whole[name][shard.piece.rows[good]] = values[good]
        return self._shards.write(receipt.shard, whole, quarantined, replacing=receipt)


@contextlib.contextmanager
def _pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool that, when left by an error, drops what nobody has begun."""
    pool = ThreadPoolExecutor(threads, name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _next_stop_is_final() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM kill the process at once; for the store that is no worse than a power cut."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is signal.default_int_handler]
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.default_int_handler)
