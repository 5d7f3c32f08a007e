"""A store into the layouts that other tools read: streamed, under a staging name until it is whole, the same bytes each time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import ConfigError, NonFiniteFeature, StoreCorrupt, StoreWriteError
from difffeat.runtime.check import BESIDE, check
from difffeat.runtime.files import LOCK, TEMPORARY, Files, Lock
from difffeat.runtime.layouts import LAYOUTS, Part, safe_tap
from difffeat.runtime.manifest import DTYPES
from difffeat.runtime.store import Store

FORMAT = "difffeat-converted/1"
DESCRIPTION = "difffeat.json"
BLOCK_BYTES = 16 << 20
"""How much of a store's features is in memory at once, roughly."""
ROWS_PER_FILE = 100_000


@dataclass(frozen=True)
class Converted:
    """What was written: `files` relative path -> {bytes, sha256}; `left_out` how many quarantined rows are not in it; `taps` -> name, row shape."""

    path: Path
    layout: str
    rows: int
    left_out: int
    dtype: str
    taps: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(entry["bytes"] for entry in self.files.values())


class Rows:
    """The rows of a store that are asked for, in order, in blocks that fit in memory."""

    def __init__(self, store: Store, taps: Sequence[str], dtype: str, *, keep_quarantined: bool = False) -> None:
        shapes = {name: tuple(shape) for name, shape in store.manifest["taps"].items()}
        self.taps = {tap: shapes[tap] for tap in taps}
        self.dtype = np.dtype(DTYPES[dtype]).newbyteorder("<")
        self.keep_quarantined = keep_quarantined
        self.numbers = np.arange(len(store)) if keep_quarantined else np.flatnonzero(store.valid)
        self.text = store.recipe.graph.family == "plaid"
        self.origin = {"format": FORMAT, "fingerprint": store.fingerprint, "recipe": store.recipe.to_dict(), "taps": list(taps)}
        self.label_columns = ("labels", *(("unknown",) if any(store.unknown_names) else ()))
        self.sample_columns = ("id", "image", "captions", *self.label_columns, *(("valid",) if keep_quarantined else ()))
        self._store = store
        row_bytes = sum(int(np.prod(shape)) for shape in self.taps.values()) * self.dtype.itemsize
        self._block = max(1, BLOCK_BYTES // row_bytes)

    def cuts(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """Row numbers in pieces of a block."""
        for start in range(0, len(numbers), self._block):
            yield numbers[start : start + self._block]

    def blocks(self, numbers: np.ndarray, taps: Sequence[str]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """(row numbers, features by tap [rows, ...]) for ascending row numbers; shard by shard, never more than a block."""
        for first, arrays in self._store.shards(int(numbers[0]), int(numbers[-1]) + 1):
            last = first + len(arrays["valid"])
            here = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, last)]
            for cut in self.cuts(here):
                yield cut, {tap: self._typed(tap, arrays[tap][cut - first], cut) for tap in taps}

    def column(self, name: str, numbers: np.ndarray) -> list[Any]:
        """What is known of these rows: id, image (also image_path), caption (as the recipe joins them), captions, labels, unknown, valid."""
        if name == "valid":
            return self._store.valid[numbers].tolist()
        if name == "caption":
            first = self._store.recipe.run.captions == "first"
            return [" ".join(own[:1] if first else own) for own in self.column("captions", numbers)]
        store = self._store
        values = {"id": store.ids, "captions": store.captions, "labels": store.label_names, "unknown": store.unknown_names}.get(name, store.images)
        return [values[number] for number in numbers.tolist()]

    def _typed(self, tap: str, values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """In the asked type. Raises NonFiniteFeature where fp16 cannot hold a value."""
        with np.errstate(over="ignore"):
            typed = np.ascontiguousarray(values, self.dtype)
        beyond = np.flatnonzero(~np.isfinite(typed.reshape(len(typed), -1)).all(axis=1))
        if len(beyond):
            name = self._store.ids[numbers[beyond[0]]]
            raise NonFiniteFeature(f"{tap} of sample {name!r} does not fit {self.dtype.name}. Convert with --dtype fp32.")
        return typed


def convert(
    path: str | Path,
    out: str | Path,
    layout: str,
    *,
    taps: Sequence[str] | None = None,
    dtype: str | None = None,
    rows_per_file: int = ROWS_PER_FILE,
    keep_quarantined: bool = False,
    files: Files | None = None,
) -> Converted:
    """Write a store in another layout; its own bytes are hashed first, so that no damage is passed on.

    **Arguments:** `layout` npy, parquet or webdataset; `taps` all by default; `dtype` fp16 or fp32, by default the store's own;
    `keep_quarantined` keeps rows that failed (their features are zeros), with a column `valid`.

    Raises StoreError with its subclasses, ConfigError (options, an output folder that holds something, nothing to write), NonFiniteFeature.
    """
    store, out, files = Store.open(path), Path(out), files or Files()
    chosen = _chosen_taps(store, taps)
    kind = dtype or store.recipe.run.store_dtype
    if layout not in LAYOUTS or kind not in DTYPES or rows_per_file < 1:
        raise ConfigError(
            f"--to takes {', '.join(LAYOUTS)}, --dtype fp16 or fp32, --rows-per-file at least 1; got {layout!r}, {kind!r}, {rows_per_file}"
        )
    _check_place(Path(path), out)
    if problems := [str(problem) for problem in check(path) if problem.kind not in BESIDE]:
        raise StoreCorrupt("\n  ".join([f"{path} is damaged and was not converted:", *problems]))
    rows = Rows(store, chosen, kind, keep_quarantined=keep_quarantined)
    if not len(rows.numbers):
        raise ConfigError(f"every row of {path} is in quarantine: there is nothing to convert. The reasons stand in its quarantine.jsonl.")
    with _staged(out, files) as staging:
        written = _write_parts(rows, layout, rows_per_file, staging, files)
        named = {tap: {"name": safe_tap(tap), "shape": list(shape)} for tap, shape in rows.taps.items()}
        result = Converted(out, layout, len(rows.numbers), len(store) - len(rows.numbers), kind, named, written)
        files.commit_json(staging / DESCRIPTION, describe(result, rows))
    return result


def describe(result: Converted, rows: Rows) -> dict[str, Any]:
    """What `difffeat.json` beside the files says of them."""
    own = {"layout": result.layout, "rows": result.rows, "left_out": result.left_out, "dtype": result.dtype, "files": result.files}
    return {**rows.origin, **own, "taps": result.taps, "keys": "percent-encoded ids" if result.layout == "webdataset" else None}


def _chosen_taps(store: Store, taps: Sequence[str] | None) -> tuple[str, ...]:
    for tap in taps or ():
        if tap not in store.taps:
            raise ConfigError(f"{store.path} has no tap {tap!r}; it has {', '.join(store.taps)}")
    return tuple(dict.fromkeys(taps or store.taps))


def _write_parts(rows: Rows, layout: str, rows_per_file: int, staging: Path, files: Files) -> dict[str, dict[str, Any]]:
    total = -(-len(rows.numbers) // rows_per_file)
    written = {}
    for number in range(total):
        part = Part(number, total, rows.numbers[number * rows_per_file : (number + 1) * rows_per_file])
        for file in LAYOUTS[layout](rows, part):
            target = staging / file.path
            files.make_folder(target.parent)
            written[file.path] = vars(files.commit(target, file.chunks, file.size))
    return written


@contextlib.contextmanager
def _staged(out: Path, files: Files) -> Iterator[Path]:
    """A folder `OUT.partial` that becomes `OUT` when all went well. A killed run's is taken over, anybody else's is not touched.

    Raises ConfigError, StoreLocked (another conversion is writing there), StoreWriteError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; choose another -o, or remove it.")
    staging = out.absolute().with_name(f"{out.absolute().name}.partial")
    if staging.exists() and not _ours(staging):
        raise ConfigError(f"{staging}, where {out} would be prepared, holds something else; choose another -o, or move it away.")
    try:
        files.make_folder(staging)
        with Lock(staging, files):
            try:
                _empty(staging, files)
                files.commit_json(staging / DESCRIPTION, {"format": FORMAT, "finished": False})
                yield staging
            except BaseException:
                _empty(staging, files)
                files.remove_tree(staging)
                raise
            for folder in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
                files.fsync(folder)
        files.rename(staging, out)
        files.fsync(staging.parent)
    except OSError as error:
        if isinstance(error, StoreWriteError):
            raise
        raise StoreWriteError(
            f"writing {out} failed: {error.strerror or error}. Nothing has that name yet; free space or mend the disk, then run the same command "
            "again."
        ) from error


def _check_place(store: Path, out: Path) -> None:
    """Raises ConfigError for an output that would lie within the store, hold it, or take the place of the current folder or of one above it."""
    source, target, here = store.resolve(), out.resolve(), Path.cwd().resolve()
    if target == source or source in target.parents or target in source.parents:
        raise ConfigError(f"{out} is within {store}, or holds it: its own files must stay as they are. Choose another -o.")
    if target == here or target in here.parents:
        raise ConfigError(f"{out} is the current folder, or one above it, and cannot be replaced. Name a new folder below it with -o.")


def _ours(staging: Path) -> bool:
    """Whether a conversion that was stopped left this folder: nothing is in it, or what we write first."""
    if not staging.is_dir():
        return False
    return any((staging / name).is_file() for name in (LOCK, DESCRIPTION)) or all(path.name.endswith(TEMPORARY) for path in staging.iterdir())


def _empty(staging: Path, files: Files) -> None:
    """Remove what an earlier or failed conversion wrote; what tells that the folder is ours goes last."""
    for path in sorted(staging.iterdir(), key=lambda path: path.name == DESCRIPTION):
        if path.is_dir():
            files.remove_tree(path)
        elif path.name != LOCK:
            files.remove(path)
