"""Every file of a store against what manifest and receipts promise: what is wrong, where, and the command that mends it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difffeat.errors import StoreCorrupt
from difffeat.recognise import quoted
from difffeat.runtime.files import LOCK, TEMPORARY, Written, hash_file
from difffeat.runtime.manifest import (
    MANIFEST,
    QUARANTINE,
    Manifest,
    Receipt,
    read_manifest,
    read_own_receipt,
    read_receipt,
    receipt_path,
    shard_of,
    shard_path,
)
from difffeat.runtime.origin import ORIGIN, extract_commands, read_origin, readable_origin
from difffeat.runtime.store import map_shard
from difffeat.runtime.table import joint_digest, part_path, read_table
from difffeat.runtime.writer import SUMMARY_HTML, SUMMARY_JSON, quarantine_lines

RECOMPUTED = (
    "missing-shard", "wrong-size", "wrong-bytes", "swapped", "wrong-content", "wrong-rows", "wrong-samples", "damaged-receipt", "stale-receipt",
)  # fmt: skip
"""Kinds of damage of a shard that computing it again mends."""
UNFINISHED = ("unfinished", "missing-receipt")
"""Kinds of shards that the extraction has not got to yet."""
REMOVED = ("leftover", "orphan")
"""Kinds of files that belong to nothing and can go."""
BESIDE = (*REMOVED, "foreign", "origin", "quarantine")
"""Kinds of problems that touch neither features nor samples."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    **Fields:** `file` below the store; `kind` a word for programs; `message` for people; `fix` the command to type next; `shard` whose it is, if any.
    """

    file: str
    kind: str
    message: str
    fix: str
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.message}. Next: {self.fix}"


def check(store: str | Path) -> list[Problem]:
    """Read and hash everything; empty when all is well. Raises StoreNotFound and StoreCorrupt when the manifest itself cannot be read."""
    folder = Path(store)
    return _Check(folder, read_manifest(folder)).run()


@dataclass(frozen=True)
class _Table:
    """The samples table as it was found."""

    ids: list[str]
    digests: list[bytes]


class _Check:
    """One look at a whole store."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._repair = f"difffeat store repair {quoted(folder)}"
        self._origin = readable_origin(folder)
        self._numbers = range(len(manifest.shards))
        self._receipts: dict[int, Receipt] = {}
        self._hashes: dict[int, Written] = {}
        self._problems: list[Problem] = []

    def run(self) -> list[Problem]:
        for shard in self._numbers:
            self._read_receipt(shard)
        for shard, receipt in self._receipts.items():
            path = self._shard_file(receipt)
            if path.is_file():
                self._hashes[shard] = hash_file(path)
        table = self._read_table()
        for receipt in self._receipts.values():
            self._check_shard(receipt, table)
        self._check_quarantine()
        self._check_origin()
        self._find_strays()
        return sorted(self._problems, key=lambda problem: (problem.shard is None, problem.shard or 0))

    def _add(self, path: Path, kind: str, what: str, *, fix: str | None = None, shard: int | None = None) -> None:
        self._problems.append(Problem(path.relative_to(self._folder).as_posix(), kind, f"{path} {what}", fix or self._repair, shard))

    def _shard_file(self, receipt: Receipt) -> Path:
        return shard_path(self._folder, receipt.shard, receipt.generation)

    def _read_receipt(self, shard: int) -> None:
        path = receipt_path(self._folder, shard)
        try:
            receipt = read_receipt(self._folder, self._manifest, shard)
        except StoreCorrupt:
            self._bad_receipt(path, shard)
            return
        if receipt is not None:
            self._receipts[shard] = receipt
        elif files := shard_files(self._folder, shard):
            self._add(files[0], "missing-receipt", "has no receipt, so it does not count", shard=shard)
        else:
            resume = extract_commands(self._folder, self._manifest, self._origin, [shard])[0]
            self._add(shard_path(self._folder, shard), "unfinished", "has not been computed yet", fix=resume, shard=shard)

    def _bad_receipt(self, path: Path, shard: int) -> None:
        """Damaged, or whole but of another shard or another configuration."""
        try:
            read_own_receipt(path)
        except StoreCorrupt:
            self._add(path, "damaged-receipt", "is damaged: it is no receipt, or was altered", shard=shard)
        else:
            self._add(path, "stale-receipt", "belongs to another shard or store", shard=shard)

    def _check_shard(self, receipt: Receipt, table: _Table | None) -> None:
        path, shard, found = self._shard_file(receipt), receipt.shard, self._hashes.get(receipt.shard)
        if found is None:
            self._add(path, "missing-shard", "is missing although its receipt is there", shard=shard)
        elif found.sha256 != receipt.sha256:
            self._add(path, *self._wrong_bytes(receipt, found), shard=shard)
        elif table is not None and self._samples_of(receipt, table) not in (receipt.samples_digest, receipt.healed_from):
            what = "was computed from other samples than the store lists for its rows"
            self._add(receipt_path(self._folder, shard), "wrong-samples", what, shard=shard)
        else:
            self._check_content(path, receipt, table)

    def _wrong_bytes(self, receipt: Receipt, found: Written) -> tuple[str, str]:
        """Kind and words for a shard that does not hash to what its receipt says."""
        owner = next((other for other, own in self._receipts.items() if own.sha256 == found.sha256), None)
        if owner is not None:
            return "swapped", f"is corrupt: its SHA-256 is not the receipt's; it holds shard {owner}"
        if found.bytes != receipt.bytes:
            return "wrong-size", f"is corrupt: it has {found.bytes} bytes, its receipt says {receipt.bytes}"
        return "wrong-bytes", "is corrupt: its SHA-256 is not the receipt's"

    def _samples_of(self, receipt: Receipt, table: _Table) -> str:
        return joint_digest(table.digests[receipt.first_row : receipt.first_row + receipt.rows])

    def _check_content(self, path: Path, receipt: Receipt, table: _Table | None) -> None:
        """Valid rows and quarantined rows together are the rows of the source: each once, under its own id."""
        try:
            valid = map_shard(path, self._manifest, receipt.rows)["valid"]
        except StoreCorrupt as error:
            reason = str(error).removeprefix(f"{path}").partition(". ")[0].strip(" :")
            self._add(path, "wrong-content", f"is what its receipt says, but not what the manifest says: it {reason}", shard=receipt.shard)
            return
        aside = sorted((entry["row"], entry["id"]) for entry in receipt.quarantined)
        marked = [int(row) for row in receipt.first_row + np.flatnonzero(~valid)]
        if [row for row, _ in aside] != marked:
            what = f"has {len(marked)} rows that are not valid, its receipt sets {len(aside)} aside; they must be the same rows"
            self._add(path, "wrong-rows", what, shard=receipt.shard)
        elif table is not None and any(table.ids[row] != name for row, name in aside):
            what = "sets samples aside under ids that are not theirs"
            self._add(receipt_path(self._folder, receipt.shard), "wrong-rows", what, shard=receipt.shard)

    def _read_table(self) -> _Table | None:
        try:
            columns, digests = read_table(self._folder, self._manifest)
        except StoreCorrupt as error:
            parts = [part_path(self._folder, number) for number in range(len(self._manifest.samples))]
            path = next((path for path in parts if str(error).startswith(f"{path} ")), parts[0])
            what = str(error).removeprefix(f"{path} ").partition(". ")[0] if path.is_file() else "is missing"
            self._add(path, "samples", what, fix=f"{self._repair} ARTIFACT SOURCE")
            return None
        return _Table(columns["id"], digests)

    def _check_quarantine(self) -> None:
        """quarantine.jsonl says what the receipts say; looked at once they are all there."""
        if len(self._receipts) < len(self._numbers):
            return
        path, expected = self._folder / QUARANTINE, quarantine_lines(self._receipts[shard] for shard in self._numbers)
        if (path.read_bytes() if path.is_file() else b"") != expected:
            self._add(path, "quarantine", "does not say what the receipts say")

    def _check_origin(self) -> None:
        try:
            read_origin(self._folder)
        except StoreCorrupt:
            self._add(self._folder / ORIGIN, "origin", "is damaged; it only says where artifact and source were")

    def _under_way(self) -> set[Path]:
        """Finished shards of samples that are being added: the manifest lists them when all are there, and a run with --append goes on from them."""
        found: set[Path] = set()
        for path in sorted((self._folder / "receipts").glob("*.json")):
            try:
                receipt = read_own_receipt(path)
            except StoreCorrupt:
                continue
            if receipt.shard not in self._numbers and path == receipt_path(self._folder, receipt.shard) and self._is_ours(receipt):
                found |= {path, self._shard_file(receipt)}
        return found

    def _is_ours(self, receipt: Receipt) -> bool:
        file = self._shard_file(receipt)
        return receipt.configuration == self._manifest.configuration and file.is_file() and file.stat().st_size == receipt.bytes

    def _find_strays(self) -> None:
        """Files that are no part of the store: left half-written, of shards that no receipt names, or somebody else's."""
        shards, receipts = self._folder / "shards", self._folder / "receipts"
        own = {self._folder / name for name in (MANIFEST, QUARANTINE, ORIGIN, SUMMARY_JSON, SUMMARY_HTML, LOCK)}
        own |= {part_path(self._folder, number) for number in range(len(self._manifest.samples))}
        own |= {receipt_path(self._folder, shard) for shard in self._numbers} | {self._shard_file(receipt) for receipt in self._receipts.values()}
        own |= self._under_way()
        unsettled = set(self._numbers) - self._receipts.keys()
        for path in sorted(self._folder.rglob("*")):
            if path in own or (path.is_dir() and not path.is_symlink()):
                continue
            named = shard_of(path) if path.parent == shards else None
            if path.name.endswith(TEMPORARY):
                self._add(path, "leftover", "was left half-written by a run that was stopped")
            elif named is not None and named[0] in unsettled:
                continue  # told as missing-receipt, damaged-receipt or stale-receipt
            elif named is not None or (path.parent == receipts and path.suffix == ".json"):
                self._add(path, "orphan", "is of no shard that manifest and receipts name")
            else:
                away = f"mv {shlex.quote(str(path))} {shlex.quote(str(self._folder.absolute().parent))}"
                self._add(path, "foreign", "is no part of a store", fix=away)


def shard_files(store: Path, shard: int) -> list[Path]:
    """Every file of a shard, of whatever generation."""
    return sorted(path for path in (store / "shards").glob(f"{shard:05d}*") if (named := shard_of(path)) is not None and named[0] == shard)
