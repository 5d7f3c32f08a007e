"""Samples through an engine into a store: exact through any number of stops, and never idle while there is something to decode."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines.base import Engine, Pending
from difffeat.errors import ConfigError, Interrupted, NonFiniteFeature, SourceFormatError, StoreIncomplete, TooManyBadSamples
from difffeat.recipe import Recipe, RunRecipe, tap_name
from difffeat.runtime.batches import Batch, Failure, Feeder, Prepared, make_feeder, per_timestep, tap_shapes
from difffeat.runtime.feeds import batch_noise, open_captions
from difffeat.runtime.files import Files
from difffeat.runtime.inversion import Inversion
from difffeat.runtime.latents import LatentCache
from difffeat.runtime.manifest import Manifest, Receipt, SamplesPart, shard_path
from difffeat.runtime.matching import Mode, cut
from difffeat.runtime.origin import Origin
from difffeat.runtime.preprocess import quiet_pillow
from difffeat.runtime.progress import Clock, Progress, Summary
from difffeat.runtime.samples import Sample, Source
from difffeat.runtime.store import DIGEST_BYTES, map_shard
from difffeat.runtime.table import Columns, sample_columns, samples_digest
from difffeat.runtime.writer import StoreWriter

SHARD_BYTES = 256 << 20
FP16_MAX = 65504.0
MAX_BAD_FRACTION = 0.5
PREFETCH = 3
"""Batches that are prepared while the engine works on another."""


def extract(
    engine: Engine,
    source: Source,
    out: str | Path,
    *,
    run: RunRecipe | None = None,
    latents_engine: Engine | None = None,
    latent_cache: Path | None = None,
    table: Mapping[str, np.ndarray] | None = None,
    tokenizer: Path | None = None,
    invert: Inversion | None = None,
    batch_size: int = 32,
    shard_size: int = 1024,
    num_workers: int | None = None,
    length_multiple: int = 8,
    overwrite: bool = False,
    mode: Mode = Mode.RESUME,
    rebatch: bool = False,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    progress: Callable[[Progress], None] | None = None,
    origin: Origin | None = None,
    files: Files | None = None,
) -> Summary:
    """Extract every sample of a source into the store `out`; begun before, it goes on where it was.

    **Arguments:** `engine` open; `run` seed, draws, preprocessing, captions, stored type; `latents_engine` the artifact's VAE graph, `latent_cache`
    a store of latents in its place; `table` of a sweep graph; `tokenizer` of a text graph; `invert` where samples go through the denoiser first;
    `batch_size` and `shard_size` are part of the store's identity, `num_workers` is not; `mode` whether to add the samples that the store lacks, or
    to retry those in quarantine; `rebatch` lets a store go on with another batch size; `origin` where artifact and source lie, kept beside the
    manifest of a new store.

    Raises SourceFormatError (a modality is missing), StoreMismatch, StoreLocked, StoreWriteError, TooManyBadSamples, NonFiniteFeature, EngineError,
    Interrupted.
    """
    _check_options(engine, source, batch_size, shard_size, table, invert)
    run = run or RunRecipe()
    out, recipe = Path(out), engine.recipe
    cache = LatentCache(latent_cache, recipe, run) if latent_cache is not None else None
    captions = open_captions(recipe, run, tokenizer) if recipe.family == "plaid" else None
    feeder = make_feeder(
        engine,
        batch_size=batch_size,
        preprocessing=run.preprocessing,
        latents_engine=latents_engine,
        cache=cache,
        captions=captions,
        multiple=length_multiple,
    )
    columns = sample_columns(source.samples)
    manifest = _manifest(engine, source, run, columns, batch_size, shard_size, {"length_multiple": length_multiple} if captions else {}, cache)
    workers = num_workers or os.cpu_count() or 1
    with (
        quiet_pillow(),
        StoreWriter(out, manifest, columns, mode=mode, overwrite=overwrite, rebatch=rebatch, origin=origin, files=files) as writer,
        ThreadPoolExecutor(workers, "decode") as pool,
    ):
        clock = Clock(writer.manifest.rows, progress)
        job = _Job(engine, source.samples, run, writer, feeder, per_timestep(engine, table), invert, max_bad_fraction, clock, mode is Mode.RETRY)
        receipts = job.run(pool)
        writer.finish(receipts)
    return job.summary(receipts, source)


@dataclass
class _Job:
    """One extraction under way."""

    engine: Engine
    samples: Sequence[Sample]
    recipe: RunRecipe
    writer: StoreWriter
    feeder: Feeder
    runs: list[tuple[float | None, dict[str, np.ndarray]]]
    invert: Inversion | None
    max_bad_fraction: float
    clock: Clock
    retry: bool = False
    retried: int = 0
    failed_again: int = 0
    skipped: int = 0
    under_way: deque[tuple[_Work, float | None, int, Pending]] = field(default_factory=deque)
    receipts: dict[int, Receipt | None] = field(default_factory=dict)

    @property
    def manifest(self) -> Manifest:
        """The store's manifest as it will be."""
        return self.writer.manifest

    def run(self, pool: ThreadPoolExecutor) -> list[Receipt]:
        """All receipts in order. Raises Interrupted when the user stops it."""
        try:
            return self._run(pool)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise Interrupted(
                f"stopped after {self.clock.done} of {self.clock.total} samples; finished shards are kept in {self.writer.path}. "
                "Run the same command again to go on."
            ) from None

    def _run(self, pool: ThreadPoolExecutor) -> list[Receipt]:
        self.receipts = {number: self.writer.shards.receipt(number) for number in range(len(self.manifest.shards))}
        pending = [piece for number, receipt in self.receipts.items() if (piece := self._piece(number, receipt)) is not None]
        self.skipped = len(self.receipts) - len(pending)
        self._require_few_bad()
        for shard, batch in self._prefetched(pending, pool):
            if batch is None:
                self._commit_if_full(shard)
            else:
                self._compute(shard, batch)
        while self.under_way:
            self._collect()
        return [receipt for _, receipt in sorted(self.receipts.items()) if receipt is not None]

    def _piece(self, number: int, receipt: Receipt | None) -> _Piece | None:
        """What is to be done about a shard: all of it, its quarantined rows, or nothing. Counts what is done."""
        rows = np.arange(self.manifest.shards[number])
        first = self.manifest.first_rows[number]
        if receipt is not None:
            bad = np.array([entry["row"] - first for entry in receipt.quarantined if self.writer.match.places[entry["row"]] is not None], int)
            rows = bad if self.retry else rows[:0]
            done = receipt.rows - len(rows)
            self.clock.before += done
            self.clock.done += done
            self.clock.bad += len(receipt.quarantined) - len(rows)
            self.retried += len(rows)
            return _Piece(number, rows, receipt) if len(rows) else None
        if any(self.writer.match.places[first + int(row)] is None for row in rows):
            raise StoreIncomplete(
                f"shard {number} of {self.writer.path} must be computed, and the source does not hold all of its samples. Pass the whole source."
            )
        return _Piece(number, rows, None)

    def _commit_if_full(self, shard: _Shard) -> None:
        if shard.left == 0:
            self.receipts[shard.number] = self._commit(shard)

    def _prefetched(self, pending: list[_Piece], pool: ThreadPoolExecutor) -> Iterator[tuple[_Shard, Batch | None]]:
        """Every batch of every pending shard in order, the next few already being decoded. A shard without any batch comes as None, once."""
        window: deque[tuple[_Shard, Batch | None]] = deque()
        for piece in pending:
            shard = self._plan(piece)
            for batch in shard.batches or [None]:
                if batch is not None:
                    self.feeder.start(batch, pool)
                window.append((shard, batch))
                if len(window) > PREFETCH:
                    yield window.popleft()
        yield from window

    def _plan(self, piece: _Piece) -> _Shard:
        first, count = self.manifest.first_rows[piece.number], len(piece.rows)
        places = (self.writer.match.places[first + int(row)] for row in piece.rows)
        batches, failures = self.feeder.plan([self.samples[place] for place in places if place is not None])
        arrays = {name: np.zeros((count, *shape), self.manifest.dtype) for name, shape in self.manifest.taps.items()}
        arrays |= {"valid": np.zeros(count, bool), "inputs": np.zeros((count, DIGEST_BYTES), np.uint8)}
        return _Shard(piece, first, batches, arrays, list(failures), len(batches))

    def _compute(self, shard: _Shard, batch: Batch) -> None:
        """Submit every timestep and draw of a batch. Results are taken in order as soon as more are under way than the engine overlaps."""
        now = time.perf_counter()
        prepared = self.feeder.finish(batch)
        now = self.clock.spend("decode", now)
        runs = [(t, parameters, draw) for t, parameters in self.runs for draw in range(self.recipe.draws)] if prepared.good.any() else []
        work = _Work(shard, batch, prepared, len(runs))
        for t, parameters, draw in runs:
            feeds = {**(prepared.feeds if self.invert is None else self.invert(prepared.feeds, t or 0.0)), **parameters}
            now = self.clock.spend("engine", now)
            if "noise" in self.engine.inputs:
                ids = [sample.id for sample in batch.samples]
                feeds["noise"] = batch_noise(self.engine.inputs["noise"], prepared.feeds, ids, seed=self.recipe.seed, t=t or 0.0, draw=draw)
            now = self.clock.spend("noise", now)
            self.under_way.append((work, t, draw, self.engine.submit(feeds)))
            now = self.clock.spend("engine", now)
            while len(self.under_way) >= self.engine.depth:
                self._collect()
                now = time.perf_counter()
        if not runs:
            self._close(work)

    def _collect(self) -> None:
        """The oldest result under way, into its shard."""
        now = time.perf_counter()
        work, t, draw, pending = self.under_way.popleft()
        for name, value in pending.result().items():
            work.total[name] = value if draw == 0 else work.total[name] + value
        now = self.clock.spend("engine", now)
        work.left -= 1
        if draw == self.recipe.draws - 1:
            self._keep(work.shard, work.batch, work.prepared, t, {name: value / np.float32(self.recipe.draws) for name, value in work.total.items()})
            self.clock.spend("write", now)
        if work.left == 0:
            self._close(work)

    def _close(self, work: _Work) -> None:
        """A batch is complete; with it perhaps its shard."""
        shard, batch, prepared = work.shard, work.batch, work.prepared
        now = time.perf_counter()
        shard.arrays["valid"][batch.rows] = prepared.good
        shard.failures += prepared.failures
        for row, digest in zip(batch.rows, prepared.inputs, strict=True):
            if digest:
                shard.arrays["inputs"][row] = np.frombuffer(bytes.fromhex(digest), np.uint8)
        shard.left -= 1
        self.clock.spend("write", now)
        self.clock.tick(len(batch.rows))
        self._commit_if_full(shard)

    def _keep(self, shard: _Shard, batch: Batch, prepared: Prepared, t: float | None, outputs: dict[str, np.ndarray]) -> None:
        good = np.flatnonzero(prepared.good)
        for name, value in outputs.items():
            tap = name if t is None else tap_name(int(name[1:]), t)
            values = value[: len(batch.rows)][good]
            self._check(tap, values, [batch.samples[int(index)] for index in good])
            shard.arrays[tap][batch.rows[good]] = values.reshape(len(good), *self.manifest.taps[tap])

    def _check(self, tap: str, values: np.ndarray, samples: list[Sample]) -> None:
        """Every feature is finite, and fits the stored type."""
        limit = FP16_MAX if self.manifest.dtype == "float16" else np.inf
        flat = np.abs(values.reshape(len(values), -1)).max(axis=1)
        bad = np.flatnonzero(~(flat <= limit) | np.isinf(flat))
        if not len(bad):
            return
        worst, name = flat[bad[0]], samples[bad[0]].id
        if np.isfinite(worst):
            raise NonFiniteFeature(f"{tap} of sample {name!r} reaches {worst:.4g}, beyond fp16's {limit:g}. Extract with --store-dtype fp32.")
        raise NonFiniteFeature(
            f"{tap} of sample {name!r} is not finite in engine {self.engine.name} ({self.engine.precision}). "
            "Check the artifact's parity.json, and export with --dtype fp32."
        )

    def _commit(self, shard: _Shard) -> Receipt:
        now = time.perf_counter()
        failures = sorted(shard.failures, key=lambda failure: failure.row)
        entries = [failure.entry(shard.first_row, shard.piece.rows) for failure in failures]
        if shard.piece.receipt is None:
            receipt = self.writer.shards.write(shard.number, shard.arrays, entries)
        else:
            receipt = self._heal(shard, shard.piece.receipt, entries)
        self.clock.spend("write", now)
        self.clock.bad += len(entries)
        self.clock.tick(len(shard.piece.rows) - int(sum(len(batch.rows) for batch in shard.batches)))
        self._require_few_bad()
        return receipt

    def _heal(self, shard: _Shard, receipt: Receipt, entries: list[dict[str, Any]]) -> Receipt:
        """Rows that are good now, into a copy of their shard; all other rows keep their bytes. Nothing is written where nothing has changed."""
        retried = {shard.first_row + int(row) for row in shard.piece.rows}
        kept = [dict(entry) for entry in receipt.quarantined if entry["row"] not in retried]
        quarantined = sorted([*kept, *entries], key=lambda entry: entry["row"])
        good = np.flatnonzero(shard.arrays["valid"])
        self.failed_again += len(entries)
        if not len(good):
            return self.writer.shards.amend(receipt, quarantined)
        path = shard_path(self.writer.path, shard.number, receipt.generation)
        whole = {name: np.array(array) for name, array in map_shard(path, self.manifest, receipt.rows).items()}
        for name, values in shard.arrays.items():
            whole[name][shard.piece.rows[good]] = values[good]
        return self.writer.shards.write(shard.number, whole, quarantined, replacing=receipt)

    def summary(self, receipts: list[Receipt], source: Source) -> Summary:
        """What came of it."""
        clock, bad = self.clock, sum(len(receipt.quarantined) for receipt in receipts)
        seconds = time.perf_counter() - clock.started
        computed = len(receipts) - self.skipped
        healed = self.retried - self.failed_again
        return Summary(
            self.writer.path, self.manifest.rows, bad, computed, self.skipped, clock.done - clock.before, seconds, clock.stages, dict(source.ignored),
            self.writer.added, healed,
        )  # fmt: skip

    def _require_few_bad(self) -> None:
        total = self.manifest.rows
        if self.clock.bad > self.max_bad_fraction * total or self.clock.bad == total:
            raise TooManyBadSamples(
                f"{self.clock.bad} of {total} samples are in quarantine, more than --max-bad-fraction {self.max_bad_fraction:g} allows. The "
                f"receipts in "
                f"{self.writer.path / 'receipts'} say why each; mend the source and pass --overwrite, or raise the limit and run again to go on."
            )


@dataclass(frozen=True)
class _Piece:
    """Rows of a shard that are to be computed: all of them, or, with the `receipt` of a finished shard, those to be retried."""

    number: int
    rows: np.ndarray
    receipt: Receipt | None


@dataclass
class _Shard:
    """A piece being filled; its batches and failures count rows within the piece."""

    piece: _Piece
    first_row: int
    batches: list[Batch]
    arrays: dict[str, np.ndarray]
    failures: list[Failure]
    left: int

    @property
    def number(self) -> int:
        """Of the shard."""
        return self.piece.number


@dataclass
class _Work:
    """A batch whose runs are under way: `left` of them are, `total` sums the draws of one timestep."""

    shard: _Shard
    batch: Batch
    prepared: Prepared
    left: int
    total: dict[str, np.ndarray] = field(default_factory=dict)


def _check_options(
    engine: Engine, source: Source, batch_size: int, shard_size: int, table: Mapping[str, np.ndarray] | None, invert: Inversion | None
) -> None:
    if batch_size < 1 or shard_size < 1:
        raise ConfigError(f"batch size and shard size must be at least 1, got {batch_size} and {shard_size}")
    if engine.recipe.family == "plaid":
        if not source.has_captions:
            raise SourceFormatError(
                f"{source.name} has no captions, and this is a text graph. Put NAME.txt beside NAME.jpg, or use a manifest with 'caption'."
            )
    elif not source.has_images:
        raise SourceFormatError(
            f"{source.name} has no images, and this is an image graph. Use a folder of images, or a manifest with a column 'image'."
        )
    if engine.recipe.noised_outside and invert is None:
        raise ConfigError("samples of this graph go through its denoiser first: pass invert=open_inversion(artifact, stack, engine).")
    if engine.recipe.kind.endswith("sweep") and table is None:
        raise ConfigError("a sweep graph needs its table.safetensors; the artifact has lost it. Export it again.")


def _manifest(
    engine: Engine,
    source: Source,
    run: RunRecipe,
    columns: Columns,
    batch_size: int,
    shard_size: int,
    options: dict[str, Any],
    cache: LatentCache | None,
) -> Manifest:
    taps = tap_shapes(engine)
    row_bytes = sum(int(np.prod(shape)) for shape in taps.values()) * (2 if run.store_dtype == "fp16" else 4)
    rows = max(1, min(shard_size, SHARD_BYTES // max(1, row_bytes)))
    total = len(source)
    return Manifest(
        recipe=Recipe(engine.recipe, run),
        graph_digest=engine.digest,
        engine={"name": engine.name, "precision": engine.precision, "device": engine.device.partition(":")[0]},
        batch_size=batch_size,
        rows=total,
        samples=(SamplesPart(rows=total, digest=samples_digest(columns)),),
        classes=source.classes,
        taps=taps,
        shards=cut(total, rows),
        shard_rows=rows,
        versions=_versions(engine),
        options=options | ({"latent_cache": cache.fingerprint} if cache is not None else {}),
    )


def _versions(engine: Engine) -> dict[str, str]:
    """Versions of the libraries that a feature's bytes depend on."""
    runtime = {"ort": ("onnxruntime", "onnxruntime-gpu"), "torch": ("torch",), "trt": ("tensorrt",), "rtx": ("tensorrt-rtx",)}.get(engine.name, ())
    found = {}
    for name in ("difffeat", "numpy", "pillow", "tokenizers", *runtime):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
