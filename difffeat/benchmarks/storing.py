"""`difffeat bench store`: writing a store against the disk's own sequential rate, and reading it back into a probe."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.benchmarks.asking import require_counts
from difffeat.benchmarks.throughput import write_result
from difffeat.benchmarks.timing import compare, machine, ratios
from difffeat.probe.ridge_solutions import ridge_path
from difffeat.recipe import GraphRecipe, Recipe, RunRecipe
from difffeat.runtime.manifest import Manifest, SamplesPart
from difffeat.runtime.store import Features, Store
from difffeat.runtime.table import Columns, joint_digest, row_digests
from difffeat.runtime.writer import StoreWriter

RAW = "the same bytes, one file, one fsync"
STORE = "difffeat store: shards, receipts, every one of them durable"
LIMIT = 2.0
TAP = "b12/t30"
CLASSES = 10
CHUNK = 16 << 20

Say = Callable[..., None]


def run_storing(*, rows: int, width: int, shard_rows: int, repeats: int, folder: Path | None, output: Path | None, say: Say) -> dict[str, Any]:
    """Write `rows` × `width` fp16 features both ways in turn, then read the store into a ridge probe; arguments as the command's options.

    Raises ConfigError for counts below 1.
    """
    require_counts(rows=rows, width=width, shard_rows=shard_rows, repeats=repeats)
    rng = np.random.Generator(np.random.Philox(3))
    block = rng.standard_normal((shard_rows, width), dtype=np.float32).astype(np.float16)
    manifest, columns = _described(rows, width, shard_rows)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        base = Path(scratch)
        candidates = {RAW: lambda: _write_raw(base / "raw", block, rows), STORE: lambda: _write_store(base / "store", manifest, columns, block)}
        say(f"writing {rows} × {width} fp16, {rows * width * 2 / 1e9:.2f} GB, {repeats} rounds each way")
        timings = compare(candidates, repeats)
        say("reading it into a ridge probe")
        reading = _read(base / "store", width)
    ratio = ratios(timings, RAW)[STORE]
    gigabytes = rows * width * 2 / 1e9
    result: dict[str, Any] = {
        "benchmark": "store",
        "backbone": f"{rows} × {width} fp16, {shard_rows} rows a shard",
        "rows": rows,
        "width": width,
        "shard_rows": shard_rows,
        "machine": machine(),
        "seconds": {timing.name: list(timing.seconds) for timing in timings},
        "over_sequential": ratio,
        "limit": LIMIT,
        "reading": reading,
    }
    result["text"] = "\n".join(
        [
            f"{result['backbone']}, {gigabytes:.2f} GB, median of {repeats} paired rounds",
            *(f"  {t.name:62} {t.median:7.2f} s, {gigabytes / t.median:5.2f} GB/s" for t in timings),
            f"  {ratio:.2f} × the disk's sequential time (limit {LIMIT:g})",
            f"  read into a ridge probe in {reading['seconds']:.1f} s; private memory grew by {reading['private_mb']:.0f} MB, "
            f"of which the probe's own sums are {reading['sums_mb']:.0f} MB; a copy of the features would be {reading['features_mb']:.0f} MB",
        ]
    )
    if output is not None:
        write_result(result, output)
    return result


def _described(rows: int, width: int, shard_rows: int) -> tuple[Manifest, Columns]:
    """A manifest and a table of samples, as an extraction would have them."""
    graph = GraphRecipe(
        backbone="none",
        family="dit",
        architecture={},
        weights={},
        kind="from-latents",
        blocks=(12,),
        timesteps=(30.0,),
        log_snr=(4.38,),
        noising="mean",
    )
    columns: Columns = {
        "id": [f"{row:07d}" for row in range(rows)],
        "image": [f"{row:07d}.jpg" for row in range(rows)],
        "bytes": [100_000] * rows,
        "captions": [[] for _ in range(rows)],
        "labels": [[str(row % CLASSES)] for row in range(rows)],
        "unknown": [[] for _ in range(rows)],
    }
    part = SamplesPart(rows=rows, digest=joint_digest(row_digests(columns)))
    manifest = Manifest(
        recipe=Recipe(graph, RunRecipe()), graph_digest="0" * 64, engine={"name": "none", "precision": "fp32", "device": "cpu"}, batch_size=32,
        rows=rows, samples=(part,), classes=tuple(map(str, range(CLASSES))), taps={TAP: (width,)}, shard_rows=shard_rows,
        shards=tuple(min(shard_rows, rows - start) for start in range(0, rows, shard_rows)), versions={},
    )  # fmt: skip
    return manifest, columns


def _write_raw(path: Path, block: np.ndarray, rows: int) -> None:
    """What the disk can do: the same bytes written in large pieces, one fsync at the end."""
    left = rows
    with path.open("wb", buffering=0) as file:
        while left:
            count = min(left, len(block))
            view = block[:count].data.cast("B")
            for start in range(0, len(view), CHUNK):
                file.write(view[start : start + CHUNK])
            left -= count
        os.fsync(file.fileno())
    path.unlink()


def _write_store(path: Path, manifest: Manifest, columns: Columns, block: np.ndarray) -> None:
    """A whole store by the commit protocol, in place of the one before."""
    with StoreWriter(path, manifest, columns, overwrite=True) as writer:
        receipts = [writer.shards.write(number, _arrays(block[:count]), []) for number, count in enumerate(manifest.shards)]
        writer.finish(receipts)


def _arrays(values: np.ndarray) -> dict[str, np.ndarray]:
    return {TAP: values, "valid": np.ones(len(values), bool), "inputs": np.zeros((len(values), 32), np.uint8)}


def _read(path: Path, width: int) -> dict[str, float]:
    """Seconds and private memory (not counting the page cache behind the maps) of fitting a ridge probe on every row."""
    store = Store.open(path)
    labels, features = store.labels, store[TAP]
    watched, started = Watched(features), time.perf_counter()
    ridge_path(watched, labels)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "private_mb": (watched.peak - watched.before) / 1e6,
        "sums_mb": 3 * width * width * 8 / 1e6,
        "features_mb": len(features) * width * 2 / 1e6,
    }


class Watched(Features):
    """Features that look at this process's private memory whenever a piece of them is read."""

    def __init__(self, features: Features) -> None:
        super().__init__(features._parts)
        self.before = self.peak = _private_bytes()

    def __getitem__(self, key: Any) -> np.ndarray:
        found = super().__getitem__(key)
        self.peak = max(self.peak, _private_bytes())
        return found


def _private_bytes() -> int:
    """Anonymous resident memory of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))
