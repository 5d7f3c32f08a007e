"""Images that lie in the cells of Parquet and Arrow files, read one by one without holding a file's worth of them."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from difffeat.errors import DecodeError
from difffeat.runtime.blobs import MAX_BYTES
from difffeat.runtime.places import blob_at, suffix_of
from difffeat.runtime.remote import is_url, open_remote

OPEN_FILES = 4
BATCH_ROWS = 16
CHANGED = "it was changed since it was listed"
WINDOW_BYTES = 64 << 20
"""Cells of a Parquet file are read forward; this many bytes of them, and at least two batches, are kept for threads that come a little later."""


@dataclass(frozen=True, slots=True)
class CellBlob:
    """One cell: bytes, or a struct of `bytes` and `path` as Hugging Face datasets writes it. Its size is not known before it is read."""

    cells: Cells
    row: int

    @property
    def size(self) -> int:
        return -1

    def read(self, limit: int = MAX_BYTES) -> bytes:
        return self.cells.read(self.row, limit)


class Cells:
    """A column of images over several files. The blobs of all its rows share it; a pickled copy opens the files anew.

    **Arguments:** `files` (place, rows) in order; `column` its name; `base` where relative paths of cells without bytes start.
    """

    def __init__(self, files: Sequence[tuple[str, int]], column: str, base: str) -> None:
        self._files, self._column, self._base = tuple(files), column, base
        self._ends = list(accumulate(rows for _, rows in files))
        self._lock, self._readers = threading.Lock(), OrderedDict[int, _Reader]()

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self._files, "column": self._column, "base": self._base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def read(self, row: int, limit: int = MAX_BYTES) -> bytes:
        """Bytes of row `row`, counted over all files. Raises DecodeError."""
        number = bisect_right(self._ends, row)
        place, rows = self._files[number]
        within = row - self._ends[number] + rows
        with self._lock:
            value = self._value(number, place, within, limit)
        if isinstance(value, str):
            return blob_at(self._base, value).read(limit)
        return value

    def _value(self, number: int, place: str, row: int, limit: int) -> bytes | str:
        import pyarrow as pa

        try:
            reader = self._readers.get(number) or self._open(number, place)
            return _content(reader.cell(row), limit)
        except (pa.ArrowException, OSError, LookupError, ValueError) as error:  # ValueError: a path or a field's name that is no UTF-8
            self._readers.pop(number, None)  # what failed may have left a file half read
            raise DecodeError(f"row {row + 1} of {place} cannot be read ({error}). Get the file again.") from None

    def _open(self, number: int, place: str) -> _Reader:
        while len(self._readers) >= OPEN_FILES:
            self._readers.popitem(last=False)
        reader: _Reader = (_ArrowReader if suffix_of(place) == ".arrow" else _ParquetReader)(place, self._column)
        self._readers[number] = reader
        return reader


def _content(scalar: Any, limit: int) -> bytes | str:
    """Bytes of a cell, or the path that stands in their place."""
    import pyarrow as pa

    path = None
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    if pa.types.is_struct(scalar.type) and scalar.is_valid:
        path = scalar["path"].as_py() if "path" in scalar else None
        scalar = scalar["bytes"]
    if not scalar.is_valid:
        if isinstance(path, str) and path:
            return path
        raise DecodeError("its cell is empty. Fill it, or leave the row out of the source.")
    if not isinstance(scalar, pa.BinaryScalar):
        raise OSError(f"its column holds {scalar.type}; {CHANGED}")
    buffer = scalar.as_buffer()
    if buffer.size > limit:
        raise DecodeError(f"its cell has {buffer.size} bytes, more than the limit of {limit}.")
    return buffer.to_pybytes()


class _Reader(Protocol):
    def cell(self, row: int) -> Any: ...


class _ArrowReader:
    """Any cell of a memory-mapped Arrow file or stream; only what is asked for is read from disk."""

    def __init__(self, place: str, column: str) -> None:
        self._column = open_arrow(place).column(column)

    def cell(self, row: int) -> Any:
        if row >= len(self._column):
            raise OSError(f"it has {len(self._column)} rows; {CHANGED}")
        piece = self._column.slice(row, 1)
        piece.validate(full=True)  # offsets come from the file, and are followed in memory
        return piece[0]


def open_arrow(place: str) -> Any:
    """A memory-mapped Arrow table, from the file format or the stream format. Raises pa.ArrowException, OSError."""
    import pyarrow as pa

    source = pa.memory_map(place)
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    return (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()


class _ParquetReader:
    """Cells read forward within a row group; a step back begins the row group anew."""

    def __init__(self, place: str, column: str) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(open_remote(place) if is_url(place) else place, pre_buffer=False)
        self._column = column
        metadata = self._file.metadata
        self._ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
        self._group, self._next = -1, 0
        self._batches: Iterator[Any] = iter(())
        self._window: deque[tuple[int, Any]] = deque()

    def cell(self, row: int) -> Any:
        group = bisect_right(self._ends, row)
        if group == len(self._ends):
            raise OSError(f"it has {self._ends[-1] if self._ends else 0} rows; {CHANGED}")
        first = self._window[0][0] if self._window else self._next
        if group != self._group or row < first:
            self._begin(group)
        while row >= self._next:
            self._advance()
        start, column = next(entry for entry in reversed(self._window) if entry[0] <= row)
        return column[row - start]

    def _begin(self, group: int) -> None:
        self._group, self._next = group, self._ends[group - 1] if group else 0
        self._batches = self._file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[self._column], use_threads=False)
        self._window.clear()

    def _advance(self) -> None:
        batch = next(self._batches, None)
        if batch is None or not batch.num_rows:
            raise OSError("its row group ends too soon")
        self._window.append((self._next, batch.column(0)))
        self._next += batch.num_rows
        while len(self._window) > 2 and sum(column.nbytes for _, column in self._window) > WINDOW_BYTES:
            self._window.popleft()
