"""Writing a feature store by the commit protocol: manifest first, then shards, each followed by its receipt."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from difffeat.errors import ConfigError, StoreCorrupt, StoreNotFound, StoreWriteError
from difffeat.recipe import canonical_json
from difffeat.runtime.files import Files, Lock, Written, iter_chunks, sweep_temporaries
from difffeat.runtime.manifest import (
    MANIFEST,
    QUARANTINE,
    SAMPLES,
    Manifest,
    Receipt,
    read_manifest,
    read_receipt,
    receipt_path,
    require_same,
    shard_path,
)
from difffeat.runtime.origin import ORIGIN, Origin
from difffeat.runtime.samples import Sample

Columns = dict[str, list[Any]]


def sample_columns(samples: tuple[Sample, ...]) -> Columns:
    """What samples.parquet holds: id, image (locator), bytes, captions, labels."""
    return {
        "id": [sample.id for sample in samples],
        "image": [sample.locator for sample in samples],
        "bytes": [sample.size for sample in samples],
        "captions": [list(sample.captions) for sample in samples],
        "labels": [None if sample.labels is None else list(sample.labels) for sample in samples],
    }


def samples_digest(columns: Columns) -> str:
    """SHA-256 over all rows in order."""
    total = hashlib.sha256()
    for row in zip(*(columns[name] for name in ("id", "image", "bytes", "captions", "labels")), strict=True):
        total.update(canonical_json(list(row)).encode())
    return total.hexdigest()


class StoreWriter:
    """One writer of one store; a context manager that holds the store's lock.

    Raises StoreLocked, StoreMismatch (resume with another configuration), ConfigError (the folder holds something else), StoreWriteError.
    """

    def __init__(
        self, path: Path, manifest: Manifest, columns: Columns, *, overwrite: bool = False, origin: Origin | None = None, files: Files | None = None
    ) -> None:
        self.path, self.manifest, self._columns, self._overwrite, self._origin = path, manifest, columns, overwrite, origin
        self._files = files or Files()
        self._lock = Lock(path, self._files)
        self._manifest_digest = manifest.digest

    def __enter__(self) -> Self:
        _refuse_foreign(self.path)
        with _writing(self.path):
            self._files.make_folder(self.path)
            self._lock.__enter__()
        try:
            with _writing(self.path):
                self._begin()
        except BaseException as error:
            self._lock.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _writing(self.path):
            self._lock.__exit__(kind, error, trace)

    def _begin(self) -> None:
        if self._overwrite:
            self._clear()
        sweep_temporaries(self.path, self._files)
        try:
            require_same(read_manifest(self.path), self.manifest, self.path)
        except StoreNotFound:
            for folder in ("shards", "receipts"):
                self._files.make_folder(self.path / folder)
            self._files.fsync(self.path)
            self._write_samples()
            if self._origin is not None:
                self._origin.write(self.path, self._files)
            self._files.commit_json(self.path / MANIFEST, self.manifest.to_dict())
            self._files.fsync(self.path.parent)

    def _clear(self) -> None:
        """Delete an older store; its manifest first, so that a kill midway leaves no store rather than half of one."""
        for name in (MANIFEST, SAMPLES, QUARANTINE, ORIGIN):
            if (self.path / name).exists():
                self._files.remove(self.path / name)
                self._files.fsync(self.path)
        for folder in ("receipts", "shards"):
            if (self.path / folder).exists():
                self._files.remove_tree(self.path / folder)

    def _write_samples(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        strings = pa.list_(pa.string())
        schema = pa.schema([("id", pa.string()), ("image", pa.string()), ("bytes", pa.int64()), ("captions", strings), ("labels", strings)])
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(self._columns, schema=schema), sink, compression="zstd", store_schema=False)
        content = sink.getvalue()
        self._files.commit(self.path / SAMPLES, iter_chunks(memoryview(content)), content.size)

    def receipt(self, shard: int) -> Receipt | None:
        """The receipt of a finished shard whose file has the size it states; None where it must be computed (again)."""
        try:
            receipt = read_receipt(self.path, self.manifest, shard)
        except StoreCorrupt:
            return None
        path = shard_path(self.path, shard)
        return receipt if receipt is not None and path.is_file() and path.stat().st_size == receipt.bytes else None

    def write_shard(self, shard: int, arrays: Mapping[str, np.ndarray], quarantined: list[dict[str, Any]], inputs_sha256: str) -> Receipt:
        """Commit a shard, then its receipt."""
        from safetensors.numpy import save

        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        with _writing(self.path):
            written: Written = self._files.commit(shard_path(self.path, shard), iter_chunks(content), len(content))
        receipt = Receipt(
            shard=shard,
            bytes=written.bytes,
            sha256=written.sha256,
            rows=self.manifest.shards[shard],
            first_row=self.manifest.first_rows[shard],
            nonfinite=0,
            quarantined=tuple(quarantined),
            inputs_sha256=inputs_sha256,
            manifest=self._manifest_digest,
        )
        with _writing(self.path):
            self._files.commit_json(receipt_path(self.path, shard), receipt.to_dict())
        return receipt

    def finish(self, receipts: list[Receipt]) -> None:
        """Render quarantine.jsonl from the receipts; no file where nothing was set aside."""
        lines = [json.dumps(entry, sort_keys=True) + "\n" for receipt in receipts for entry in map(dict, receipt.quarantined)]
        path, content = self.path / QUARANTINE, "".join(lines).encode()
        with _writing(self.path):
            if content:
                self._files.commit(path, [content], len(content))
            elif path.exists():
                self._files.remove(path)


@contextlib.contextmanager
def _writing(store: Path) -> Iterator[None]:
    """What the operating system refuses becomes an error that says what was kept and how to go on."""
    try:
        yield
    except OSError as error:
        raise StoreWriteError(
            f"writing to {store} failed: {error.strerror or error}. Finished shards are kept; free space or mend the disk, then run the same "
            f"command again."
        ) from error


def _refuse_foreign(path: Path) -> None:
    """Never write into, and above all never clear, a folder that holds something else."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; choose another -o.")
    own = {MANIFEST, SAMPLES, QUARANTINE, ORIGIN, "shards", "receipts", "lock"}
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in own and not entry.name.endswith(".tmp"))
    if foreign:
        raise ConfigError(f"{path} holds files that are no store's ({', '.join(foreign[:4])}); choose another -o.")
