"""Taking a store back to where an extraction can go on: what is damaged goes, what is whole is not touched, not even its time stamp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from difffeat.errors import StoreCorrupt, StoreMismatch
from difffeat.runtime.check import RECOMPUTED, REMOVED, UNFINISHED, Problem, check, shard_files
from difffeat.runtime.files import Files, Lock, sweep_temporaries
from difffeat.runtime.manifest import Manifest, read_manifest, read_receipt, receipt_path
from difffeat.runtime.samples import Source
from difffeat.runtime.table import joint_digest, row_digests, sample_columns
from difffeat.runtime.writer import render_quarantine, writing


@dataclass(frozen=True)
class Diagnosis:
    """What `check` found, sorted by what it takes.

    **Fields:** `shards` to compute again; `unfinished` shards that never were; `remove` files that belong to nothing; `samples` whether the samples
    table must be written again; `quarantine` whether quarantine.jsonl must; `foreign` files that are left alone.
    """

    problems: tuple[Problem, ...]
    shards: tuple[int, ...]
    unfinished: tuple[int, ...]
    remove: tuple[str, ...]
    samples: bool
    quarantine: bool
    foreign: tuple[str, ...]

    @property
    def needs_extraction(self) -> bool:
        """Whether it takes artifact and source."""
        return bool(self.shards or self.unfinished or self.samples)


def diagnose(store: Path) -> Diagnosis:
    """Read and hash everything. Raises StoreNotFound and StoreCorrupt when the manifest itself cannot be read."""
    problems = check(store)

    def of(kinds: tuple[str, ...]) -> list[Problem]:
        return [problem for problem in problems if problem.kind in kinds]

    return Diagnosis(
        problems=tuple(problems),
        shards=tuple(sorted({problem.shard for problem in of(RECOMPUTED) if problem.shard is not None})),
        unfinished=tuple(sorted({problem.shard for problem in of(UNFINISHED) if problem.shard is not None})),
        remove=tuple(problem.file for problem in of((*REMOVED, "origin"))),
        samples=bool(of(("samples",))),
        quarantine=bool(of(("quarantine",))),
        foreign=tuple(problem.file for problem in of(("foreign",))),
    )


def require_samples(store: Path, manifest: Manifest, source: Source) -> None:
    """Raises StoreMismatch unless a source lists the samples that a store was made from; nothing has been touched then.

    Where samples were added to the store, the source may have another order, and the writer compares sample by sample later.
    """
    columns = sample_columns(source.samples)
    if len(source) < manifest.rows or (len(manifest.samples) == 1 and joint_digest(row_digests(columns)) != manifest.samples[0].digest):
        raise StoreMismatch(
            f"{source.name} lists other samples than {store} was made from: {len(source)} now, {manifest.rows} then, or other places, sizes, "
            "captions or labels. Nothing was touched; give the source as it was."
        )


def shard_digests_of(store: Path, manifest: Manifest, shards: Sequence[int]) -> dict[int, str]:
    """The SHA-256 that each of these shards' receipts states; those without a readable receipt are left out."""
    digests = {}
    for shard in shards:
        try:
            receipt = read_receipt(store, manifest, shard)
        except StoreCorrupt:
            continue
        if receipt is not None:
            digests[shard] = receipt.sha256
    return digests


def set_aside(store: Path, found: Diagnosis, files: Files | None = None) -> list[str]:
    """Remove what is damaged, each receipt ahead of its shard, and render what needs no engine; the names of the removed files.

    Stopped midway, the store only lacks shards, and the same repair goes on. Raises StoreLocked, StoreWriteError.
    """
    files = files or Files()
    removed: list[str] = []
    with writing(store), Lock(store, files):
        for shard in found.shards:
            for path in (receipt_path(store, shard), *shard_files(store, shard)):
                removed += _remove(path, store, files)
        for name in found.remove:
            removed += _remove(store / name, store, files)
        sweep_temporaries(store, files)
        if found.quarantine and not found.needs_extraction:
            manifest = read_manifest(store)
            receipts = (read_receipt(store, manifest, shard) for shard in range(len(manifest.shards)))
            render_quarantine(store, [receipt for receipt in receipts if receipt is not None], files)
    return removed


def _remove(path: Path, store: Path, files: Files) -> list[str]:
    if not path.is_file():
        return []
    files.remove(path)
    files.fsync(path.parent)
    return [path.relative_to(store).as_posix()]
