"""Samples through an engine into a store: exact through any number of stops, and never idle while there is something to decode."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from difffeat.engines.base import Engine
from difffeat.errors import ConfigError, Interrupted, OutOfMemory, SourceFormatError, StoreNotFound
from difffeat.recipe import GraphRecipe, RunRecipe
from difffeat.runtime.batch_size import LARGEST, probe_batch_size
from difffeat.runtime.configuration import Configuration
from difffeat.runtime.feeding import Feeding
from difffeat.runtime.files import Files
from difffeat.runtime.inversion import Inversion
from difffeat.runtime.job import Job
from difffeat.runtime.ledger import Ledger
from difffeat.runtime.manifest import read_manifest
from difffeat.runtime.matching import Mode
from difffeat.runtime.origin import Origin
from difffeat.runtime.progress import Clock, Progress, Summary
from difffeat.runtime.samples import Source
from difffeat.runtime.summary import write_summary
from difffeat.runtime.table import sample_columns
from difffeat.runtime.tokens import require_few_unknown, require_known
from difffeat.runtime.writer import StoreWriter

MAX_BAD_FRACTION = 0.5
MOST_BATCH = 1 << 16
"""Samples of a batch, beyond which its arrays would fill a machine's memory before anything runs."""


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
    batch_size: int | None = 32,
    largest_batch: int = LARGEST,
    shard_size: int = 1024,
    num_workers: int | None = None,
    length_multiple: int = 8,
    overwrite: bool = False,
    mode: Mode = Mode.RESUME,
    rebatch: bool = False,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    allow_unknown: bool = False,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
    origin: Origin | None = None,
    files: Files | None = None,
) -> Summary:
    """Extract every sample of a source into the store `out`; begun before, it goes on where it was.

    **Arguments:** `engine` open; `run` seed, draws, preprocessing, captions, stored type; `latents_engine` the artifact's VAE graph, `latent_cache`
    a store of latents in its place; `table` of a sweep graph; `tokenizer` of a text graph; `invert` where samples go through the denoiser first;
    `batch_size` and `shard_size` are part of the store's identity, `num_workers` is not; None for either is our choice, for the batch size the
    store's own or what a short run of doubling sizes up to `largest_batch` finds; `mode` whether to add the samples that the store lacks, or to retry
    those in quarantine; `rebatch` lets a store go on with another batch size;
    `allow_unknown` takes captions most of whose words the tokenizer does not know; `origin` where artifact and source lie, for a new store.

    Raises SourceFormatError (a modality is missing), UnknownTokens, StoreMismatch, StoreLocked, StoreWriteError, TooManyBadSamples,
    NonFiniteFeature, EngineError, OutOfMemory (resumable), Interrupted, StoreIncomplete (shards are missing whose samples the source does not hold;
    the others are done).
    """
    check_source(engine.recipe, source, batch_size, shard_size, max_bad_fraction)
    run, out = run or RunRecipe(), Path(out)
    workers = decode_workers(num_workers)
    beside = {"latents_engine": latents_engine, "latent_cache": latent_cache, "table": table, "tokenizer": tokenizer, "invert": invert}
    feeding = Feeding.of(engine, run, multiple=length_multiple, **beside)
    if feeding.captions is not None:
        require_known(feeding.captions, source.samples, allow=allow_unknown, say=say)
    columns = sample_columns(source.samples)
    if feeding.cache is not None:
        feeding.cache.require_same_images(source.samples, columns["bytes"])
    size = batch_size or (None if overwrite else stored_batch_size(out)) or probe_batch_size(feeding, source.samples, largest=largest_batch, say=say)
    known = Configuration.of(engine, feeding.beside)
    manifest = known.manifest(source, columns, run, batch_size=size, shard_size=shard_size, options=feeding.options)
    with StoreWriter(out, manifest, columns, mode=mode, overwrite=overwrite, rebatch=rebatch, origin=origin, files=files) as writer:
        clock = Clock(writer.manifest.rows, progress)
        ledger = Ledger(writer, source.samples, clock, retry=mode is Mode.RETRY, max_bad_fraction=max_bad_fraction)
        with resumable(writer, ledger):
            Job(feeding, writer.shards, clock, workers=workers).run(ledger.pieces(), ledger.take)
            writer.finish(ledger.receipts)
        summary = ledger.summary(source, device=engine.device, workers=workers)
        write_summary(summary, files)
        ledger.require_whole()
    if not allow_unknown:
        require_few_unknown(summary.tokens, summary.unknown, summary.samples, f"in {out}, which is finished,")
    return summary


def check_source(recipe: GraphRecipe, source: Source, batch_size: int | None, shard_size: int, max_bad_fraction: float) -> None:
    """Raises ConfigError and SourceFormatError for what could only fail later."""
    if shard_size < 1 or (batch_size is not None and batch_size < 1):
        raise ConfigError(f"batch size and shard size must be at least 1, got {batch_size} and {shard_size}")
    if batch_size is not None and batch_size > MOST_BATCH:
        raise ConfigError(f"--batch-size {batch_size} is more than an engine holds in memory at once; the most is {MOST_BATCH}")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction must lie in 0..1, got {max_bad_fraction:g}")
    if recipe.takes_text:
        if not source.has_captions:
            raise SourceFormatError(
                f"{source.name} has no captions, and this is a text graph. Put NAME.txt beside NAME.jpg, or use a manifest with 'caption'."
            )
    elif not source.has_images:
        raise SourceFormatError(
            f"{source.name} has no images, and this is an image graph. Use a folder of images, or a manifest with a column 'image'."
        )


def stored_batch_size(out: Path) -> int | None:
    """The batch size that a store was begun with, None where there is no store."""
    try:
        return read_manifest(out).batch_size
    except StoreNotFound:
        return None


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_workers(asked: int | None, cores: int | None = None) -> int:
    """Threads that decode. Left to us (None): one for every core. Queues are bounded: where the engine sets the pace, they wait."""
    if asked is not None:
        if asked < 1:
            raise ConfigError(f"the number of workers must be at least 1, got {asked}; leave it at auto for our choice")
        return asked
    return cores or cpu_cores()


@contextlib.contextmanager
def resumable(writer: StoreWriter, ledger: Ledger) -> Iterator[None]:
    """A stop by the user, and a device without memory, become errors that say what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped after {ledger.clock.done} of {ledger.clock.total} samples; finished shards are kept in {writer.path}. "
            "Run the same command again to go on."
        ) from None
    except OutOfMemory as error:
        size, shards = writer.manifest.batch_size, len(writer.manifest.shards)
        way = f"with --batch-size {size // 2} --allow-rebatch" if size > 1 else "on a larger device"
        raise OutOfMemory(
            f"the device ran out of memory at batch size {size}; {len(ledger.receipts)} of {shards} shards are finished and kept in {writer.path}. "
            f"To go on, run the same command {way}."
        ) from error
