"""Writing a feature store by the commit protocol: manifest first, then shards, each followed by its receipt.

A finished shard is rewritten as a file of the next generation; its receipt, replaced in one step, says which one counts; then the old file goes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from difffeat.errors import ConfigError, StoreCorrupt, StoreNotFound, StoreWriteError
from difffeat.runtime.files import LOCK, Files, Lock, Written, iter_chunks, sweep_temporaries
from difffeat.runtime.manifest import (
    MANIFEST,
    QUARANTINE,
    SAMPLES,
    Manifest,
    Receipt,
    read_manifest,
    read_receipt,
    receipt_path,
    shard_of,
    shard_path,
    signed,
)
from difffeat.runtime.matching import Match, Mode, match_append, match_new, match_resume, match_retry
from difffeat.runtime.origin import ORIGIN, Origin, readable_origin
from difffeat.runtime.table import Columns, encode_part, joint_digest, part_path, read_table, restored_table, take

Digests = Sequence[str] | Mapping[int, str]
"""Of the samples of each shard, by its number."""
SUMMARY_JSON, SUMMARY_HTML = "summary.json", "summary.html"
"""What a run took and what came of it; nobody reads them but people."""


class ShardWriter:
    """Writes shards, each followed by its receipt, into a store that somebody holds the lock of: this process, or the driver of this worker.

    **Arguments:** `digests` of the samples of each shard, as the store will list them at the end; `before` as it lists them now, when that differs.
    """

    def __init__(self, path: Path, manifest: Manifest, digests: Digests, before: Digests | None = None, *, files: Files | None = None) -> None:
        self.path, self.manifest = path, manifest
        self._digests, self._before = digests, digests if before is None else before
        self._files = files or Files()

    def receipt(self, shard: int) -> Receipt | None:
        """The receipt of a finished shard whose file has the size it states; None where it must be computed (again)."""
        try:
            receipt = read_receipt(self.path, self.manifest, shard)
        except StoreCorrupt:
            return None
        if receipt is None or receipt.samples_digest not in (self._digests[shard], self._before[shard]):
            return None
        path = shard_path(self.path, shard, receipt.generation)
        return receipt if path.is_file() and path.stat().st_size == receipt.bytes else None

    def write(
        self, shard: int, arrays: Mapping[str, np.ndarray], quarantined: Sequence[Mapping[str, Any]], replacing: Receipt | None = None
    ) -> Receipt:
        """Commit a shard, then its receipt; then remove the file that it replaces, if any.

        A receipt that is there already is of other samples, or of bytes that are gone: it goes first, lest it be taken for this shard's.
        """
        from safetensors.numpy import save

        generation = 0 if replacing is None else replacing.generation + 1
        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        with writing(self.path):
            if replacing is None and (stale := receipt_path(self.path, shard)).exists():
                self._files.remove(stale)
                self._files.fsync(stale.parent)
            written: Written = self._files.commit(shard_path(self.path, shard, generation), iter_chunks(content), len(content))
        receipt = self._receipt(shard, written, quarantined, generation)
        with writing(self.path):
            self._files.commit_json(receipt_path(self.path, shard), signed(receipt.to_dict()))
            if replacing is not None:
                old = shard_path(self.path, shard, replacing.generation)
                self._files.remove(old)
                self._files.fsync(old.parent)
        return receipt

    def amend(self, receipt: Receipt, quarantined: Sequence[Mapping[str, Any]]) -> Receipt:
        """A receipt with other reasons for its quarantined rows; its shard keeps its bytes. Written only where something differs."""
        amended = self._receipt(receipt.shard, Written(receipt.bytes, receipt.sha256), quarantined, receipt.generation)
        if (amended.samples_digest, amended.quarantined) == (receipt.samples_digest, receipt.quarantined):
            return receipt
        with writing(self.path):
            self._files.commit_json(receipt_path(self.path, receipt.shard), signed(amended.to_dict()))
        return amended

    def _receipt(self, shard: int, written: Written, quarantined: Sequence[Mapping[str, Any]], generation: int) -> Receipt:
        now, before = self._digests[shard], self._before[shard]
        return Receipt(
            shard=shard,
            bytes=written.bytes,
            sha256=written.sha256,
            rows=self.manifest.shards[shard],
            first_row=self.manifest.first_rows[shard],
            nonfinite=0,
            quarantined=tuple(quarantined),
            configuration=self.manifest.configuration,
            samples_digest=now,
            batch_size=self.manifest.batch_size,
            healed_from="" if before == now else before,
            generation=generation,
        )


class StoreWriter:
    """One writer of one store; a context manager that holds the store's lock. Inside, `match` says which sample each row is, `shards` writes them.

    **Arguments:** `manifest` of the run as if the store were new; `columns` of the source's samples; `mode` what to do with a store that is there;
    `rebatch` whether it may go on with another batch size.

    Raises StoreLocked, StoreNotFound (a mode that needs a store), StoreMismatch (another configuration, or other samples than the mode allows),
    ConfigError (the folder holds something else), StoreCorrupt, StoreWriteError.
    """

    match: Match
    shards: ShardWriter

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        columns: Columns,
        *,
        mode: Mode = Mode.RESUME,
        overwrite: bool = False,
        rebatch: bool = False,
        origin: Origin | None = None,
        files: Files | None = None,
    ) -> None:
        self.path, self._asked, self._columns = path, manifest, columns
        self._mode, self._overwrite, self._rebatch, self._origin = mode, overwrite, rebatch, origin
        self._files = files or Files()
        self._lock = Lock(path, self._files)
        self._on_disk: Manifest = manifest
        self._settled: Manifest = manifest

    @property
    def manifest(self) -> Manifest:
        """The store's manifest as it will be when the run ends."""
        return self.match.manifest

    @property
    def added(self) -> int:
        """Rows that the store did not have before."""
        return self.match.manifest.rows - self._settled.rows

    def __enter__(self) -> Self:
        _refuse_foreign(self.path)
        if self._mode is not Mode.RESUME:
            read_manifest(self.path)
        with writing(self.path):
            self._files.make_folder(self.path)
            self._lock.__enter__()
        try:
            with writing(self.path):
                self._begin()
        except BaseException as error:
            self._lock.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with writing(self.path):
            self._lock.__exit__(kind, error, trace)

    def _begin(self) -> None:
        if self._overwrite:
            self._clear()
        sweep_temporaries(self.path, self._files)
        try:
            self._on_disk = read_manifest(self.path)
        except StoreNotFound:
            self._begin_anew()
        else:
            self._go_on()
        self.shards = ShardWriter(self.path, self.match.manifest, self.match.digests, self.match.before, files=self._files)

    def _begin_anew(self) -> None:
        self.match = match_new(self._asked, self._columns)
        for folder in ("shards", "receipts"):
            self._files.make_folder(self.path / folder)
        self._files.fsync(self.path)
        self._write_part(0)
        if self._origin is not None:
            self._origin.write(self.path, self._files)
        self._files.commit_json(self.path / MANIFEST, signed(self.match.manifest.to_dict()))
        self._files.fsync(self.path.parent)

    def _go_on(self) -> None:
        for folder in ("shards", "receipts"):
            self._files.make_folder(self.path / folder)
        stored, digests = self._stored()
        self._settled = _settled(self._on_disk, digests)
        arguments = (self._settled, stored, self._asked, self._columns, self.path)
        if self._mode in (Mode.APPEND, Mode.REPAIR):
            self.match = match_append(*arguments, rebatch=self._rebatch, add=self._mode is Mode.APPEND)
        elif self._mode is Mode.RETRY:
            receipts = [_readable_receipt(self.path, self._on_disk, shard) for shard in range(len(self._on_disk.shards))]
            self.match = match_retry(*arguments, receipts, rebatch=self._rebatch)
        else:
            self.match = match_resume(*arguments, rebatch=self._rebatch)
        self._sweep_generations()
        if self.match.manifest.batch_sizes != self._on_disk.batch_sizes:
            final = self.match.manifest
            self._commit_manifest(replace(self._on_disk, batch_size=final.batch_size, earlier_batch_sizes=final.earlier_batch_sizes))

    def _stored(self) -> tuple[Columns, list[bytes]]:
        """The samples table that is there. Parts that are damaged are written again where the source's samples are the very ones they held."""
        try:
            return read_table(self.path, self._on_disk)
        except StoreCorrupt:
            columns, rows, mended = restored_table(self.path, self._on_disk, self._columns)
            for number, part in mended.items():
                self._commit_part(number, part)
            return columns, rows

    def _clear(self) -> None:
        """Delete an older store; its manifest first, so that a kill midway leaves no store rather than half of one."""
        beside = [self.path / name for name in (QUARANTINE, ORIGIN, SUMMARY_JSON, SUMMARY_HTML)]
        for path in (self.path / MANIFEST, *sorted(self.path.glob("samples*.parquet")), *beside):
            if path.exists():
                self._files.remove(path)
                self._files.fsync(self.path)
        for folder in ("receipts", "shards"):
            if (self.path / folder).exists():
                self._files.remove_tree(self.path / folder)

    def _sweep_generations(self) -> None:
        """Remove files that a killed rewrite left: of a shard with several, all but the one that its receipt names."""
        found: dict[int, list[int]] = {}
        for path in sorted((self.path / "shards").iterdir()):
            if (named := shard_of(path)) is not None:
                found.setdefault(named[0], []).append(named[1])
        for shard, generations in found.items():
            if shard >= len(self.manifest.shards):
                if not receipt_path(self.path, shard).is_file():  # of an append that was stopped: one with its receipt is kept for going on
                    self._remove_shard(shard, generations)
                continue
            if generations == [0]:
                continue
            receipt = _readable_receipt(self.path, self._on_disk, shard)
            for generation in generations:
                if generation != (receipt.generation if receipt is not None else 0):
                    self._files.remove(shard_path(self.path, shard, generation))
                    self._files.fsync(self.path / "shards")

    def sweep(self) -> None:
        """Remove what workers left that died while they were writing. None may be at work."""
        with writing(self.path):
            sweep_temporaries(self.path, self._files)
            self._sweep_generations()

    def _remove_shard(self, shard: int, generations: Sequence[int]) -> None:
        for generation in generations:
            self._files.remove(shard_path(self.path, shard, generation))
        self._files.fsync(self.path / "shards")

    def finish(self, receipts: Sequence[Receipt]) -> None:
        """Bring samples and manifest to what the run has made true, and render quarantine.jsonl from the receipts (no file where nothing was set
        aside).
        """
        with writing(self.path):
            self._sweep_generations()  # a retry that was killed, then followed by a run of the old samples, leaves its shards behind
            self._note_origin()
            self._commit_samples()
            render_quarantine(self.path, receipts, self._files)

    def _note_origin(self) -> None:
        """Where added samples came from, ahead of the manifest that lists them: killed in between, the same run notes the same again."""
        part = len(self._settled.samples)
        if self._origin is None or self.added == 0 or (known := readable_origin(self.path)) is None:
            return
        if (noted := known.with_part(part, self._origin)) != known:
            noted.write(self.path, self._files)

    def _commit_samples(self) -> None:
        """Parts that changed are announced in the manifest, then replaced; new parts are written; the manifest says last that all is done."""
        final, now = self.match.manifest, self._settled
        changed = [number for number, part in enumerate(now.samples) if part.digest != final.samples[number].digest]
        if changed:
            parts = [replace(part, becoming=final.samples[number].digest) if number in changed else part for number, part in enumerate(now.samples)]
            self._commit_manifest(replace(self._on_disk, samples=tuple(parts), classes=final.classes))
        for number in (*changed, *range(len(now.samples), len(final.samples))):
            self._write_part(number)
        if final != self._on_disk:
            self._commit_manifest(final)

    def _commit_manifest(self, manifest: Manifest) -> None:
        self._files.commit_json(self.path / MANIFEST, signed(manifest.to_dict()))
        self._on_disk = manifest

    def _write_part(self, number: int) -> None:
        parts = self.match.manifest.samples
        start = sum(part.rows for part in parts[:number])
        self._commit_part(number, take(self.match.columns, range(start, start + parts[number].rows)))

    def _commit_part(self, number: int, columns: Columns) -> None:
        content = encode_part(columns)
        self._files.commit(part_path(self.path, number), iter_chunks(content), content.nbytes)


def quarantine_lines(receipts: Iterable[Receipt]) -> bytes:
    """What quarantine.jsonl holds: an entry on each line, in the order of the rows."""
    return "".join(json.dumps(dict(entry), sort_keys=True) + "\n" for receipt in receipts for entry in receipt.quarantined).encode()


def render_quarantine(store: Path, receipts: Iterable[Receipt], files: Files) -> None:
    """Write quarantine.jsonl; no file where nothing was set aside."""
    path, content = store / QUARANTINE, quarantine_lines(receipts)
    if content:
        files.commit(path, [content], len(content))
    elif path.exists():
        files.remove(path)
        files.fsync(store)


@contextlib.contextmanager
def writing(store: Path) -> Iterator[None]:
    """What the operating system refuses becomes an error that says what was kept and how to go on."""
    try:
        yield
    except OSError as error:
        raise StoreWriteError(
            f"writing to {store} failed: {error.strerror or error}. Finished shards are kept; free space or mend the disk, then run the same "
            f"command again."
        ) from error


def _settled(manifest: Manifest, digests: Sequence[bytes]) -> Manifest:
    """The manifest with the parts of the samples table that are really there, whether an announced change has come about or not."""
    parts, start = [], 0
    for part in manifest.samples:
        parts.append(replace(part, digest=joint_digest(digests[start : start + part.rows]), becoming=""))
        start += part.rows
    return replace(manifest, samples=tuple(parts))


def _readable_receipt(store: Path, manifest: Manifest, shard: int) -> Receipt | None:
    try:
        return read_receipt(store, manifest, shard)
    except StoreCorrupt:
        return None


def _refuse_foreign(path: Path) -> None:
    """Never write into, and above all never clear, a folder that holds something else."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; choose another -o.")
    foreign = sorted(entry.name for entry in path.iterdir() if not _is_own(entry.name))
    if foreign:
        raise ConfigError(f"{path} holds files that are no store's ({', '.join(foreign[:4])}); choose another -o.")


def _is_own(name: str) -> bool:
    if name in {MANIFEST, SAMPLES, QUARANTINE, ORIGIN, SUMMARY_JSON, SUMMARY_HTML, "shards", "receipts", LOCK} or name.endswith(".tmp"):
        return True
    return name.startswith("samples-") and name.endswith(".parquet") and name[len("samples-") : -len(".parquet")].isdigit()
