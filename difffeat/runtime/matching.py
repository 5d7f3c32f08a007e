"""How the rows of a store and the samples of a source belong together: going on, adding samples, or mending quarantined ones.

Each mode has its own idea of what may differ. Whatever is allowed, the configuration must be the same, and a row keeps its number and its sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from difffeat.errors import ConfigError, StoreMismatch
from difffeat.runtime.manifest import ROW_FIELDS, Manifest, Receipt, SamplesPart, require_same
from difffeat.runtime.table import COLUMNS, Columns, joint_digest, row_digests, shard_digests, take

_TOLD = 5
"""Differences of samples that are listed."""


class Mode(Enum):
    """What a run does with a store that is there."""

    RESUME = "resume"
    APPEND = "append"
    RETRY = "retry-quarantined"
    REPAIR = "repair"
    """As `APPEND`, but nothing is added."""


@dataclass(frozen=True)
class Match:
    """**Fields:** `manifest` and `columns` of the store as it will be when the run ends; `places` which sample of the source each row is, None where
    the source does not hold it; `digests` of each shard's samples; `before` the same as the store has them now (equal but for mended rows).
    """

    manifest: Manifest
    columns: Columns
    places: tuple[int | None, ...]
    digests: tuple[str, ...]
    before: tuple[str, ...]


def cut(rows: int, shard_rows: int) -> tuple[int, ...]:
    """Rows of each shard."""
    return tuple(min(shard_rows, rows - start) for start in range(0, rows, shard_rows))


def match_new(asked: Manifest, columns: Columns) -> Match:
    """A store that is not there yet."""
    digests = shard_digests(row_digests(columns), asked.shards)
    return Match(asked, columns, tuple(range(asked.rows)), digests, digests)


def match_resume(found: Manifest, stored: Columns, asked: Manifest, columns: Columns, store: Path, *, rebatch: bool) -> Match:
    """The same samples in the same order. Raises StoreMismatch naming every difference."""
    differences = list(_differences_in_order(stored, columns))
    if new := sorted(set(asked.classes) - set(found.classes)):
        differences.append(f"classes: the store has no {', '.join(map(repr, new[:_TOLD]))}")
    _require_configuration(found, asked, store, rebatch, differences)
    manifest = _rebatched(found, asked)
    digests = shard_digests(row_digests(columns), manifest.shards)
    return Match(manifest, columns, tuple(range(manifest.rows)), digests, digests)


def match_append(found: Manifest, stored: Columns, asked: Manifest, columns: Columns, store: Path, *, rebatch: bool, add: bool = True) -> Match:
    """Samples that are there must be the same; the others follow, in the source's order, or are left (`add`). Raises StoreMismatch naming the first
    difference.
    """
    _require_configuration(found, asked, store, rebatch)
    place = {name: index for index, name in enumerate(columns["id"])}
    held = [place.get(name) for name in stored["id"]]
    for row, index in enumerate(held):
        if index is not None and (difference := _difference(stored, row, columns, index)):
            raise StoreMismatch(
                f"{store}: a sample that is already there is another one in the source: {difference}. Only new samples can be added; choose another "
                "-o for changed ones, or mend quarantined ones with --retry-quarantined."
            )
    known = set(stored["id"])
    new = [index for index, name in enumerate(columns["id"]) if add and name not in known]
    added = take(columns, new)
    whole = {name: stored[name] + added[name] for name in COLUMNS}
    rows = row_digests(whole)
    manifest = _rebatched(found, asked)
    if new:
        part = SamplesPart(rows=len(new), digest=joint_digest(rows[found.rows :]))
        shards = found.shards + cut(len(new), found.shard_rows)
        manifest = replace(manifest, rows=len(rows), samples=(*manifest.samples, part), shards=shards, classes=_merged(found.classes, asked.classes))
    digests = shard_digests(rows, manifest.shards)
    return Match(manifest, whole, (*held, *new), digests, digests)


def match_retry(
    found: Manifest, stored: Columns, asked: Manifest, columns: Columns, store: Path, receipts: Sequence[Receipt | None], *, rebatch: bool
) -> Match:
    """Samples may have changed where they are in quarantine, nowhere else; the source may lack some, and hold others, which are left for --append.

    Raises StoreMismatch naming the first difference.
    """
    _require_configuration(found, asked, store, rebatch)
    row_of = {name: row for row, name in enumerate(stored["id"])}
    places: list[int | None] = [None] * found.rows
    whole = {name: list(stored[name]) for name in COLUMNS}
    for index, name in enumerate(columns["id"]):
        if name not in row_of:
            continue  # to be added with --append afterwards
        places[row_of[name]] = index
        for field in COLUMNS:
            whole[field][row_of[name]] = columns[field][index]
    if all(place is None for place in places):
        raise StoreMismatch(f"{store} has none of these samples ({columns['id'][0]!r} ...), so there is nothing to retry. Add them with --append.")
    old, new = row_digests(stored), row_digests(whole)
    before, digests = shard_digests(old, found.shards), shard_digests(new, found.shards)
    for shard, receipt in enumerate(receipts):
        if receipt is not None and receipt.samples_digest == before[shard] != digests[shard]:
            _require_quarantined(receipt, stored, whole, store)
    starts = [sum(part.rows for part in found.samples[:number]) for number in range(len(found.samples))]
    parts = [replace(p, digest=joint_digest(new[start : start + p.rows])) for start, p in zip(starts, found.samples, strict=True)]
    manifest = replace(_rebatched(found, asked), samples=tuple(parts), classes=_merged(found.classes, asked.classes))
    return Match(manifest, whole, tuple(places), digests, before)


def _require_quarantined(receipt: Receipt, stored: Columns, mended: Columns, store: Path) -> None:
    bad = {entry["row"] for entry in receipt.quarantined}
    for row in range(receipt.first_row, receipt.first_row + receipt.rows):
        if row not in bad and (difference := _difference(stored, row, mended, row)):
            raise StoreMismatch(
                f"{store}: a sample that is not in quarantine has changed: {difference}. Only quarantined ones may be mended; put this one back, or "
                "extract to another -o."
            )


def _require_configuration(found: Manifest, asked: Manifest, store: Path, rebatch: bool, samples: Sequence[str] = ()) -> None:
    free = {"rows", "samples", "classes", "shards", "earlier_batch_sizes"} | ({"batch_size"} if rebatch else set())
    assert free < set(ROW_FIELDS)
    require_same(found, asked, store, except_for=free, samples=samples)


def _rebatched(found: Manifest, asked: Manifest) -> Manifest:
    """The store's manifest with the batch size that is asked for; the ones before are kept, since shards were computed with them."""
    if found.batch_size == asked.batch_size:
        return found
    earlier = tuple(size for size in found.batch_sizes if size != asked.batch_size)
    return replace(found, batch_size=asked.batch_size, earlier_batch_sizes=earlier)


def _merged(classes: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """Columns that are there keep their number; new ones follow."""
    return (*classes, *(name for name in more if name not in set(classes)))


def _differences_in_order(stored: Columns, columns: Columns) -> Iterator[str]:
    has, asked = len(stored["id"]), len(columns["id"])
    if has != asked:
        hint = "; add samples with --append" if asked > has else ""
        yield f"samples: {has} -> {asked}{hint}"
    told = 0
    for row in range(min(has, asked)):
        if told < _TOLD and (difference := _difference(stored, row, columns, row)):
            told += 1
            yield f"samples: {difference}"
    if told and has == asked:
        yield "(quarantined samples that were mended are retried with --retry-quarantined)"


def _difference(stored: Mapping[str, list], row: int, columns: Mapping[str, list], index: int) -> str:
    """The first field in which a row of the store and a sample differ, empty when they are the same."""
    for field in COLUMNS:
        has, asked = stored[field][row], columns[field][index]
        if has != asked:
            name = "" if field == "id" else f" ({stored['id'][row]!r})"
            return f"row {row}{name}: {field} {has!r:.60} -> {asked!r:.60}"
    return ""


def one_mode(append: bool, retry_quarantined: bool) -> Mode:
    """From options to a mode. Raises ConfigError for both at once."""
    if append and retry_quarantined:
        raise ConfigError("--append and --retry-quarantined are two runs: mend what is there first, then add.")
    return Mode.APPEND if append else Mode.RETRY if retry_quarantined else Mode.RESUME
