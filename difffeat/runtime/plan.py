"""What an extraction will take: measured on a few batches of the real samples through the real engine, then counted up."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines.base import Engine
from difffeat.errors import TooManyBadSamples
from difffeat.recipe import RunRecipe
from difffeat.runtime.batch_size import LARGEST, probe_batch_size
from difffeat.runtime.configuration import Configuration
from difffeat.runtime.extract import check_source, extract, stored_batch_size
from difffeat.runtime.feeding import Feeding
from difffeat.runtime.manifest import read_manifest
from difffeat.runtime.progress import Progress, Summary
from difffeat.runtime.samples import Sample, Source
from difffeat.runtime.store import DIGEST_BYTES

WARM_BATCHES, LEAST_BATCHES = 2, 4
LOW, HIGH = 10, 90
"""Percentiles of the rates over stretches of the run that are told as their spread."""
STRETCHES = 10
FED = ("latents_engine", "latent_cache", "table", "tokenizer", "invert")
"""Keywords of `extract` that are `Feeding.of`'s too."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """**Fields:** `samples` and `shards` of the whole run; `measured` samples in `seconds`, at `batch_size` with `num_workers` threads; `rate` in
    samples/s with the `low` and `high` of stretches of it; `shares` of the time that each stage worked; `disk_bytes` of the store and `free_bytes`
    where it will lie; `peak_bytes` of this process; `quarantined` of the measured samples; `workers` and the rate that so many would reach.
    """

    samples: int
    shards: int
    measured: int
    seconds: float
    batch_size: int
    num_workers: int
    rate: float
    low: float
    high: float
    shares: dict[str, float]
    bottleneck: str
    advice: str
    disk_bytes: int
    free_bytes: int
    peak_bytes: int
    quarantined: int
    workers: int
    workers_rate: float

    @property
    def hours(self) -> float:
        """Of the whole run with one worker."""
        return self.samples / self.rate / 3600

    @property
    def workers_hours(self) -> float:
        """Of the whole run with all workers."""
        return self.samples / self.workers_rate / 3600

    @property
    def fits(self) -> bool:
        """Whether the disk has room."""
        return self.disk_bytes <= self.free_bytes


def make_plan(
    engine: Engine,
    source: Source,
    out: Path,
    *,
    run: RunRecipe,
    batch_size: int | None,
    shard_size: int,
    num_workers: int | None,
    workers: int = 1,
    seconds: float = 10.0,
    progress: Callable[[Progress], None] = lambda _: None,
    say: Callable[..., None] = lambda *_: None,
    **beside: Any,
) -> Plan:
    """Extract a few samples, evenly spread: one to see what it takes, some to warm up, then for about `seconds`. The stores lie beside `out` while
    that lasts. Where one sample takes long, batches are smaller and fewer than asked, so that both together still end about then.

    **Arguments:** `workers` engines, each on a machine or GPU of its own; `beside` and errors as for `extract`.
    """
    options: dict[str, Any] = {"say": say, "run": run, "shard_size": shard_size, "num_workers": num_workers, "max_bad_fraction": 1.0, **beside}
    options["allow_unknown"] = True  # what is measured is time
    check_source(engine.recipe, source, batch_size, shard_size, 1.0)
    place = _existing(out)
    with _without_good_samples(source), tempfile.TemporaryDirectory(prefix=".difffeat-plan-", dir=place) as folder:
        one = _seconds_of_one(engine, source, Path(folder), options)
        fits = max(1, int(seconds / one) // 2)  # a batch to warm up and one to measure
        asked = batch_size or stored_batch_size(out)
        size = min(asked, fits) if asked else _probed(engine, source, run, options, fits)
        if asked and size < asked:
            say(f"a batch of {asked} would take about {asked * one:.0f} s: measuring in batches of {size}, to hold --seconds")
        warming = min(WARM_BATCHES * size, max(1, int(seconds / one)))
        say(f"one sample takes {one:.2g} s; warming up on {min(warming, len(source))} samples")
        warm = extract(engine, _spread(source, warming), Path(folder, "warm"), batch_size=size, progress=progress, **options)
        wanted = max(min(LEAST_BATCHES * size, max(1, int(seconds / one))), int(warm.rate * seconds) // size * size)
        say(f"measuring on {min(wanted, len(source))} samples, about {min(wanted, len(source)) / warm.rate:.0f} s")
        ticks: list[tuple[float, int]] = []

        def show(state: Progress) -> None:
            ticks.append(_tick(state))
            progress(state)

        measured = extract(engine, _spread(source, wanted), Path(folder, "run"), batch_size=size, progress=show, **options)
        row_bytes = Configuration.of(engine).row_bytes(run) + DIGEST_BYTES + 1
        disk = _disk_bytes(_Size.of(warm.path), _Size.of(measured.path), row_bytes, len(source))
    rate, low, high = _rates(ticks, measured)
    shares = {stage: spent / measured.seconds for stage, spent in measured.stages.items()}
    written = shares["write"] / rate if shares["write"] else 0.0
    return Plan(
        samples=len(source),
        shards=disk[1],
        measured=measured.samples,
        seconds=measured.seconds,
        batch_size=size,
        num_workers=measured.workers,
        rate=rate,
        low=low,
        high=high,
        shares=shares,
        bottleneck=measured.bottleneck,
        advice=measured.advice,
        disk_bytes=disk[0],
        free_bytes=shutil.disk_usage(place).free,
        peak_bytes=peak_memory(),
        quarantined=measured.quarantined,
        workers=workers,
        workers_rate=min(workers * rate, 1 / written) if written else workers * rate,
    )


def _seconds_of_one(engine: Engine, source: Source, folder: Path, options: dict[str, Any]) -> float:
    """What one sample alone takes, from reading it to its features. The second of two: the first loads and compiles."""
    extract(engine, _spread(source, 1), folder / "first", batch_size=1, **options)
    stages = extract(engine, _spread(source, 1), folder / "second", batch_size=1, **options).stages
    return max(sum(spent for stage, spent in stages.items() if stage != "write"), 1e-4)


def _probed(engine: Engine, source: Source, run: RunRecipe, options: dict[str, Any], most: int) -> int:
    """The batch size of at most `most` that an extraction would find, on samples from everywhere."""
    beside = {name: options[name] for name in FED if name in options}
    feeding, told = Feeding.of(engine, run, **beside), {"say": options["say"]} if "say" in options else {}
    return probe_batch_size(feeding, _spread(source, LARGEST).samples, largest=min(options.get("largest_batch", LARGEST), most), **told)


@contextlib.contextmanager
def _without_good_samples(source: Source) -> Iterator[None]:
    """The error of a store that lasts for a moment becomes one of the source."""
    try:
        yield
    except TooManyBadSamples as error:
        raise TooManyBadSamples(
            f"none of the samples of {source.name} that were tried can be read, so nothing can be measured. difffeat extract would set all aside and "
            "say why each; look at the source first."
        ) from error


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _tick(state: Progress) -> tuple[float, int]:
    return time.perf_counter(), state.done


def _rates(ticks: list[tuple[float, int]], summary: Summary) -> tuple[float, float, float]:
    """Samples/s once the stages are full (from the first batch's end to the last's), and the spread over stretches of that time."""
    if len(ticks) < 2 or ticks[-1][0] <= ticks[0][0]:
        return summary.rate, summary.rate, summary.rate
    moments, done = np.array([moment for moment, _ in ticks]), np.array([float(done) for _, done in ticks])
    edges = np.linspace(moments[0], moments[-1], min(STRETCHES, len(ticks) - 1) + 1)
    rates = np.diff(np.interp(edges, moments, done)) / np.diff(edges)  # batches are told in bursts: their own intervals would say nothing
    low, high = np.percentile(rates, [LOW, HIGH])
    return float((done[-1] - done[0]) / (moments[-1] - moments[0])), float(low), float(high)


def _spread(source: Source, count: int) -> Source:
    """At most `count` samples, evenly spread over the source."""
    rows = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))
    samples: list[Sample] = [source.samples[int(row)] for row in rows]
    return Source(source.name, tuple(samples), source.classes)


@dataclass(frozen=True)
class _Size:
    """Of a small store: rows, rows of a shard, shards; bytes of the samples table and of shards with their receipts."""

    rows: int
    shard_rows: int
    shards: int
    table: int
    parts: int

    @classmethod
    def of(cls, store: Path) -> _Size:
        manifest = read_manifest(store)
        table = sum(path.stat().st_size for path in store.glob("samples*.parquet"))
        parts = sum(path.stat().st_size for folder in ("shards", "receipts") for path in (store / folder).iterdir())
        return cls(manifest.rows, manifest.shard_rows, len(manifest.shards), table, parts)


def _disk_bytes(warm: _Size, measured: _Size, row_bytes: int, rows: int) -> tuple[int, int]:
    """(bytes of the whole store, its shards): rows as the format has them, headers and receipts as a small store has them, the samples table along
    the line through two small ones.
    """
    shards = -(-rows // measured.shard_rows)
    beside = (measured.parts - measured.rows * row_bytes) / measured.shards
    further = measured.rows - warm.rows
    slope = (measured.table - warm.table) / further if further > 0 else measured.table / measured.rows
    return int(rows * row_bytes + shards * beside + measured.table + max(0.0, slope) * (rows - measured.rows)), shards


def _existing(path: Path) -> Path:
    """The folder nearest to a path that is there already."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
