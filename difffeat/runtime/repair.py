"""Taking a store back to where an extraction can go on: what is damaged goes, what is whole is not touched, not even its time stamp."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difffeat.errors import StoreCorrupt, StoreMismatch
from difffeat.runtime.check import RECOMPUTED, REMOVED, UNFINISHED, Problem, check, shard_files
from difffeat.runtime.files import Files, Lock, sweep_temporaries
from difffeat.runtime.manifest import Manifest, read_manifest, read_receipt, receipt_path
from difffeat.runtime.samples import Source
from difffeat.runtime.store import map_shard
from difffeat.runtime.table import Columns, joint_digest, restored_table, row_digests, sample_columns
from difffeat.runtime.witness import require_same_images
from difffeat.runtime.writer import render_quarantine, writing

_UNTOUCHED = "Nothing was touched; give the source as it was."


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


def mendable(store: Path, manifest: Manifest, source: Source, found: Diagnosis) -> tuple[int, ...]:
    """Those of the missing shards (`found.shards` and `found.unfinished`) whose samples a source lists; nothing has been touched then.

    Raises StoreMismatch where it lists other samples than the store was made from, other images, or none that are missing. Of a store that was never
    added to it must list all; of one that was, the samples of any part will do.
    """
    if len(manifest.samples) == 1:
        require_samples(store, manifest, source)
    columns = sample_columns(source.samples)
    place = {name: index for index, name in enumerate(columns["id"])}
    stored, rows = _table(store, manifest, source, columns)
    given = row_digests(columns)
    places = [place.get(name) for name in stored["id"]]
    for name, row, index in zip(stored["id"], rows, places, strict=True):
        if index is not None and given[index] != row:
            raise StoreMismatch(f"{source.name} lists {name!r} with another place, size, captions or labels than {store} has. {_UNTOUCHED}")
    ends = [first + count for first, count in zip(manifest.first_rows, manifest.shards, strict=True)]
    missing = sorted({*found.shards, *found.unfinished})
    here = tuple(shard for shard in missing if None not in places[manifest.first_rows[shard] : ends[shard]])
    if missing and not here:
        raise StoreMismatch(f"{source.name} does not hold the samples that {store} lacks (shards: {', '.join(map(str, missing))}). {_UNTOUCHED}")
    whole = [receipt for shard in range(len(ends)) if shard not in missing and (receipt := read_receipt(store, manifest, shard)) is not None]
    require_same_images(store, manifest, whole, source.samples, places)
    return here


def _table(store: Path, manifest: Manifest, source: Source, columns: Columns) -> tuple[Columns, list[bytes]]:
    """The samples table, as it is or as this source restores it."""
    try:
        return restored_table(store, manifest, columns)[:2]
    except StoreCorrupt as error:
        raise StoreMismatch(f"{source.name} does not restore the samples table of {store}: {error} {_UNTOUCHED}") from None


def require_samples(store: Path, manifest: Manifest, source: Source) -> None:
    """Raises StoreMismatch unless a source lists the samples that a store was made from, in their order; nothing has been touched then."""
    if joint_digest(row_digests(sample_columns(source.samples))) not in (manifest.samples[0].digest, manifest.samples[0].becoming):
        raise StoreMismatch(
            f"{source.name} lists other samples than {store} was made from: {len(source)} now, {manifest.rows} then, or other places, sizes, "
            f"captions or labels. {_UNTOUCHED}"
        )


def inputs_of(store: Path, manifest: Manifest, shards: Sequence[int]) -> dict[int, np.ndarray]:
    """For each of these shards the SHA-256 of what was read for its rows, uint8 [n, 32]; those whose file cannot be read are left out.

    Of a damaged shard they may be damaged too.
    """
    found = {}
    for shard in shards:
        for path in shard_files(store, shard):
            with contextlib.suppress(StoreCorrupt):
                found[shard] = np.array(map_shard(path, manifest, manifest.shards[shard])["inputs"])
    return found


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


def set_aside(store: Path, found: Diagnosis, files: Files | None = None, *, shards: Sequence[int] | None = None) -> list[str]:
    """Remove what is damaged, each receipt ahead of its shard, and render what needs no engine; the names of the removed files.

    **Arguments:** `shards` those of the damaged ones to set aside (None: all).

    Stopped midway, the store only lacks shards, and the same repair goes on. Raises StoreLocked, StoreWriteError.
    """
    files = files or Files()
    removed: list[str] = []
    with writing(store), Lock(store, files):
        for shard in found.shards if shards is None else shards:
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
