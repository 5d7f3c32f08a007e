"""The layouts that other tools read, each as files whose bytes come in pieces: never more of a store in memory than one block of rows.

- **npy** as clip-retrieval writes and autofaiss and embedding_reader read it: `img_emb/img_emb_0.npy` (captions: `text_emb/text_emb_0.npy`) beside
  `metadata/metadata_0.parquet`, numbers padded to one width; several taps lie in a folder each.
- **parquet** as the hub lays out data sets: `data/train-00000-of-00002.parquet`, features as lists of fixed size.
- **webdataset**: `00000.tar` with `KEY.b12_t30.npy` for each tap and `KEY.json`.

No clock, user or host name is in any of them, so the same store gives the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

    from difffeat.runtime.convert import Rows

Chunks = Iterator[bytes | memoryview]


@dataclass(frozen=True)
class Part:
    """A file's share of the rows: `rows` their numbers in the store, `number` of `total` parts."""

    number: int
    total: int
    rows: np.ndarray


@dataclass(frozen=True)
class OutputFile:
    """One file to write: its path below the output folder, its size in bytes (0 when it is known only at the end) and its bytes in pieces."""

    path: str
    size: int
    chunks: Chunks


def safe_tap(tap: str) -> str:
    """A tap's name for files and columns: `b12/t30` -> `b12_t30`, `b20/t0.05` -> `b20_t0p05`."""
    return tap.replace("/", "_").replace(".", "p")


def safe_key(sample_id: str) -> str:
    """A webdataset key for an id: percent-encoded, dots too, since a key ends at the first dot and may hold no folder. `sample_id` undoes it."""
    return quote(sample_id, safe="").replace(".", "%2E")


def sample_id(key: str) -> str:
    """The inverse of `safe_key`."""
    return unquote(key)


def npy_files(rows: Rows, part: Part) -> Iterator[OutputFile]:
    """Per tap one matrix [n, D] (further axes of a tap are flattened) and the metadata of the same rows, under the same number."""
    kind = "text_emb" if rows.text else "img_emb"
    number = str(part.number).zfill(int(math.log10(part.total)) + 1)
    for tap, shape in rows.taps.items():
        folder = "" if len(rows.taps) == 1 else f"{safe_tap(tap)}/"
        header = npy_header((len(part.rows), int(np.prod(shape))), rows.dtype)
        size = len(header) + len(part.rows) * int(np.prod(shape)) * rows.dtype.itemsize
        yield OutputFile(f"{folder}{kind}/{kind}_{number}.npy", size, _npy_chunks(rows, part, tap, header))
        yield OutputFile(f"{folder}metadata/metadata_{number}.parquet", 0, _parquet_chunks(_metadata_schema(rows), _metadata_tables(rows, part)))


def parquet_files(rows: Rows, part: Part) -> Iterator[OutputFile]:
    """One table: id, captions, labels, valid, and a column of fixed-size lists for each tap."""
    path = f"data/train-{part.number:05d}-of-{part.total:05d}.parquet"
    yield OutputFile(path, 0, _parquet_chunks(_feature_schema(rows), _feature_tables(rows, part)))


def webdataset_files(rows: Rows, part: Part) -> Iterator[OutputFile]:
    """One tar, sample after sample."""
    yield OutputFile(f"{part.number:05d}.tar", 0, _tar_chunks(rows, part))


LAYOUTS: dict[str, Callable[[Rows, Part], Iterator[OutputFile]]] = {"npy": npy_files, "parquet": parquet_files, "webdataset": webdataset_files}


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """What stands before the numbers in a .npy of format 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _npy_chunks(rows: Rows, part: Part, tap: str, header: bytes) -> Chunks:
    yield header
    for _, arrays in rows.blocks(part.rows, (tap,)):
        yield arrays[tap].data.cast("B")


def _metadata_schema(rows: Rows) -> pa.Schema:
    import pyarrow as pa

    strings = pa.list_(pa.string())
    fields = [("image_path", pa.string()), ("caption", pa.string()), ("id", pa.string()), ("captions", strings)]
    fields += [(name, strings) for name in rows.label_columns]
    return pa.schema([*fields, *([("valid", pa.bool_())] if rows.keep_quarantined else [])])


def _metadata_tables(rows: Rows, part: Part) -> Iterator[pa.Table]:
    import pyarrow as pa

    schema = _metadata_schema(rows)
    for numbers in rows.cuts(part.rows):
        yield pa.table({name: rows.column(name, numbers) for name in schema.names}, schema=schema)


def _feature_schema(rows: Rows) -> pa.Schema:
    import pyarrow as pa

    strings = pa.list_(pa.string())
    fields = [("id", pa.string()), *((name, strings) for name in ("captions", *rows.label_columns)), ("valid", pa.bool_())]
    features = [(safe_tap(tap), _list_type(pa.from_numpy_dtype(rows.dtype), shape)) for tap, shape in rows.taps.items()]
    return pa.schema([*fields, *features], metadata={"difffeat": json.dumps(rows.origin, sort_keys=True)})


def _list_type(element: pa.DataType, shape: tuple[int, ...]) -> pa.DataType:
    import pyarrow as pa

    for axis in reversed(shape):
        element = pa.list_(element, axis)
    return element


def _feature_tables(rows: Rows, part: Part) -> Iterator[pa.Table]:
    import pyarrow as pa

    schema = _feature_schema(rows)
    for numbers, arrays in rows.blocks(part.rows, tuple(rows.taps)):
        columns = {name: pa.array(rows.column(name, numbers), schema.field(name).type) for name in ("id", "captions", *rows.label_columns, "valid")}
        columns |= {safe_tap(tap): _fixed_lists(array, rows.taps[tap]) for tap, array in arrays.items()}
        yield pa.table(columns, schema=schema)


def _fixed_lists(array: np.ndarray, shape: tuple[int, ...]) -> pa.Array:
    """Rows [n, *shape] as nested lists of fixed size, without a copy."""
    import pyarrow as pa

    nested: pa.Array = pa.array(array.reshape(-1))
    for axis in reversed(shape):
        nested = pa.FixedSizeListArray.from_arrays(nested, axis)
    return nested


class _Drain(io.RawIOBase):
    """What a writer of files writes to: the bytes are taken out after each block."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._pieces.append(piece)
        self._position += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._position

    def drain(self) -> bytes:
        """Everything written since the last time."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def _parquet_chunks(schema: pa.Schema, tables: Iterable[pa.Table]) -> Chunks:
    """A Parquet file, a row group for each table. Features hardly repeat, so neither dictionaries nor statistics are kept of them."""
    import pyarrow.parquet as pq

    sink = _Drain()
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            yield sink.drain()
    yield sink.drain()


def _tar_chunks(rows: Rows, part: Part) -> Chunks:
    size = 0
    for numbers, arrays in rows.blocks(part.rows, tuple(rows.taps)):
        names = {tap: f"{safe_tap(tap)}.npy" for tap in arrays}
        headers = {tap: npy_header(rows.taps[tap], rows.dtype) for tap in arrays}
        columns = {name: rows.column(name, numbers) for name in rows.sample_columns}
        pieces = []
        for index, key in enumerate(map(safe_key, rows.column("id", numbers))):
            pieces += [_tar_member(f"{key}.{names[tap]}", headers[tap] + array[index].tobytes()) for tap, array in arrays.items()]
            described = {name: column[index] for name, column in columns.items()}
            pieces.append(_tar_member(f"{key}.json", json.dumps(described, sort_keys=True).encode()))
        block = b"".join(pieces)
        size += len(block)
        yield block
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(size + end) % tarfile.RECORDSIZE)


def _tar_member(name: str, content: bytes) -> bytes:
    """A file in a tar: of no owner, at the beginning of time."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), 0o644, 0
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
