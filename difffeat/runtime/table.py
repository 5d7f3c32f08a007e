"""The samples table of a store: its columns, their digests, and the Parquet parts it lies in (one more for each time that samples were added)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from difffeat.errors import StoreCorrupt
from difffeat.recipe import canonical_json
from difffeat.runtime.manifest import SAMPLES, Manifest, Receipt, SamplesPart
from difffeat.runtime.samples import Sample

Columns = dict[str, list[Any]]
COLUMNS = ("id", "image", "bytes", "captions", "labels", "unknown")
LISTS = ("captions", "labels", "unknown")
OPTIONAL = "unknown"
"""A column of lists that is written, and part of a row's digest, only where it holds something: what lacks it has the bytes it always had."""
_RESTORE = "Run the extraction of those very samples again (with --append where they were added): it writes them anew."


def sample_columns(samples: Iterable[Sample]) -> Columns:
    """What the samples table holds: id, image (locator), bytes, captions, labels, and classes of which nobody knows whether the sample has them."""
    listed = list(samples)
    return {
        "id": [sample.id for sample in listed],
        "image": [sample.locator for sample in listed],
        "bytes": [sample.size for sample in listed],
        "captions": [list(sample.captions) for sample in listed],
        "labels": [None if sample.labels is None else list(sample.labels) for sample in listed],
        "unknown": [list(sample.unknown) for sample in listed],
    }


def take(columns: Columns, rows: Iterable[int]) -> Columns:
    """Some rows of a table, in the order asked for."""
    picked = list(rows)
    return {name: [columns[name][row] for row in picked] for name in COLUMNS}


def row_digests(columns: Columns) -> list[bytes]:
    """SHA-256 of each row's canonical JSON, a list of its values in the order of `COLUMNS`; `unknown` is in it only where it names some class."""
    required = [name for name in COLUMNS if name != OPTIONAL]
    texts = [_lists_as_json(columns[name]) if name in LISTS else _values_as_json(columns[name]) for name in required]
    last = [f",{text}" if own else "" for own, text in zip(columns[OPTIONAL], _lists_as_json(columns[OPTIONAL]), strict=True)]
    return [hashlib.sha256(f"[{','.join(row)}{more}]".encode()).digest() for *row, more in zip(*texts, last, strict=True)]


def _values_as_json(values: Sequence[Any]) -> list[str]:
    """Canonical JSON of each of many strings or numbers, in one call: a million calls take longer than writing a million rows."""
    text = canonical_json(list(values), between="\n")  # in JSON no string holds a bare line feed
    return text[1:-1].split("\n") if values else []


def _lists_as_json(lists: Sequence[Sequence[Any] | None]) -> list[str]:
    """The same of lists of strings, and of None. Labels are few, and each is encoded once."""
    keys = [None if own is None else tuple(own) for own in lists]
    distinct = list(dict.fromkeys(keys))
    items = iter(_values_as_json([item for own in distinct if own is not None for item in own]))
    texts = {own: "null" if own is None else f"[{','.join(islice(items, len(own)))}]" for own in distinct}
    return [texts[key] for key in keys]


def renamed(columns: Columns, known: int, places: Sequence[int | None]) -> list[tuple[int, int]]:
    """Rows from `known` on that look like an older row which the source does not list any more (`places`): the same image by name and size, captions
    and labels, under another id. Names that say little (cells of a table, URLs) have no size, and are not looked at.

    **Returns:** pairs of (older row, row).
    """
    alike = ("image", "bytes", "captions", *LISTS[1:])

    def key(row: int) -> str:
        return canonical_json([columns[name][row] for name in alike])

    gone = {key(row): row for row in range(known) if places[row] is None and columns["bytes"][row] >= 0}
    return [(gone[own], row) for row in range(known, len(columns["id"])) if gone and (own := key(row)) in gone]


def joint_digest(rows: Sequence[bytes]) -> str:
    """SHA-256 over the digests of rows in order: of a part of the table, or of a shard's samples."""
    return hashlib.sha256(b"".join(rows)).hexdigest()


def samples_digest(columns: Columns) -> str:
    """SHA-256 of a whole table."""
    return joint_digest(row_digests(columns))


def shard_digests(rows: Sequence[bytes], shards: Sequence[int]) -> tuple[str, ...]:
    """The digest of each shard's samples, given the rows of the whole table."""
    ends = _ends(shards)
    return tuple(joint_digest(rows[end - count : end]) for end, count in zip(ends, shards, strict=True))


def part_path(store: Path, part: int) -> Path:
    """`samples.parquet`, then `samples-00001.parquet` for the samples that were added first, and so on."""
    return store / (SAMPLES if part == 0 else f"samples-{part:05d}.parquet")


def encode_part(columns: Columns) -> memoryview:
    """A Parquet file's bytes. Labels, captions and unknown classes are lists; a sample without labels has null there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    strings = pa.list_(pa.string())
    types = {"id": pa.string(), "image": pa.string(), "bytes": pa.int64()} | dict.fromkeys(LISTS, strings)
    schema = pa.schema([(name, types[name]) for name in COLUMNS if name != OPTIONAL or any(columns[name])])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: columns[name] for name in schema.names}, schema=schema), sink, compression="zstd", store_schema=False)
    return memoryview(sink.getvalue())


def read_samples(store: Path, manifest: Manifest, receipts: Iterable[Receipt | None] = ()) -> Columns:
    """The whole table, by row. Raises StoreCorrupt when a part is damaged or not the manifest's, or a receipt is of a shard of other samples."""
    columns, rows = read_table(store, manifest)
    for receipt in receipts:
        if receipt is None:
            continue
        found = joint_digest(rows[receipt.first_row : receipt.first_row + receipt.rows])
        if found not in (receipt.samples_digest, receipt.healed_from):
            raise StoreCorrupt(
                f"{store}: shard {receipt.shard} was computed from other samples than the store lists for its rows. Run the extraction again: it "
                "recomputes this shard only."
            )
    return columns


def read_table(store: Path, manifest: Manifest) -> tuple[Columns, list[bytes]]:
    """The whole table and the digest of each row. Raises StoreCorrupt when a part is damaged or not the manifest's."""
    columns: Columns = {name: [] for name in COLUMNS}
    rows: list[bytes] = []
    for number, part in enumerate(manifest.samples):
        found, digests = _checked_part(part_path(store, number), part)
        rows += digests
        for name in COLUMNS:
            columns[name] += found[name]
    return columns, rows


def restored_table(store: Path, manifest: Manifest, source: Columns) -> tuple[Columns, list[bytes], dict[int, Columns]]:
    """The whole table and the digest of each row, with damaged parts out of a source that lists the very samples they held; those parts by number.

    The source may list one part's samples, those of all parts in their order, or, as a folder that was added to, the part's in between others.
    Raises StoreCorrupt where it does none of these.
    """
    given, readable, damaged = row_digests(source), dict[int, Columns](), dict[int, StoreCorrupt]()
    for number, part in enumerate(manifest.samples):
        try:
            readable[number] = _checked_part(part_path(store, number), part)[0]
        except StoreCorrupt as error:
            damaged[number] = error
    known = {name for columns in readable.values() for name in columns["id"]}
    left = [row for row, name in enumerate(source["id"]) if name not in known]
    mended: dict[int, Columns] = {}
    start = 0
    for number, part in enumerate(manifest.samples):
        if number in damaged:
            candidates = (range(start, start + part.rows), range(part.rows), left[: part.rows])
            rows = next((rows for rows in candidates if _is_part([given[row] for row in rows if row < len(given)], part)), None)
            if rows is None:
                raise damaged[number]
            mended[number] = take(source, rows)
            taken = set(rows)
            left = [row for row in left if row not in taken]
        start += part.rows
    parts = [mended.get(number) or readable[number] for number in range(len(manifest.samples))]
    columns = {name: [value for part in parts for value in part[name]] for name in COLUMNS}
    return columns, row_digests(columns), mended


def _is_part(digests: Sequence[bytes], part: SamplesPart) -> bool:
    return joint_digest(digests) in (part.digest, part.becoming)


def _checked_part(path: Path, part: SamplesPart) -> tuple[Columns, list[bytes]]:
    found = _read_part(path, part.rows)
    digests = row_digests(found)
    if not _is_part(digests, part):
        raise StoreCorrupt(f"{path} is not the one the manifest was written with. {_RESTORE}")
    return found, digests


def _read_part(path: Path, rows: int) -> Columns:
    """Rows are counted before any is read: a few kilobytes of Parquet can hold millions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows != rows:
                raise ValueError(f"it has {file.metadata.num_rows} rows, the manifest says {rows}")
            table = {OPTIONAL: [[]] * rows, **file.read().to_pydict()}
        return {name: table[name] for name in COLUMNS}
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise StoreCorrupt(f"{path} is damaged ({error}). {_RESTORE}") from None


def _ends(counts: Sequence[int]) -> list[int]:
    ends, row = [], 0
    for count in counts:
        row += count
        ends.append(row)
    return ends
