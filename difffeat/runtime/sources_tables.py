"""Parquet and Arrow files as rows: which columns there are, what kind of images they hold, and the class names in their schema."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from difffeat.errors import SourceFormatError
from difffeat.runtime.blobs import Blob
from difffeat.runtime.cells import CellBlob, Cells, open_arrow
from difffeat.runtime.file_names import FileNames
from difffeat.runtime.places import open_place, parent, suffix_of
from difffeat.runtime.remote import is_url
from difffeat.runtime.sources_columns import Columns, require_columns, require_distinct
from difffeat.runtime.sources_labels import LabelReader
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.sources_values import is_blank

BATCH_ROWS = 8192


class Tables:
    """Several files as one source: their columns are known beforehand, images may lie in cells.

    Raises SourceFormatError for a file that cannot be read or names a column twice, and for files that differ in the type of their images.
    """

    def __init__(self, places: Sequence[str], base: str | None, options: SourceOptions) -> None:
        self._tables, self._options = [Table(place) for place in places], options
        self.columns, self.names = _columns(self._tables, options), FileNames()
        self.present = dict.fromkeys(name for table in self._tables for name in table.schema.names)
        self._bases = {place: parent(place) if base is None else base for place in places}
        self._image = self.columns.image[0]
        for table in self._tables:
            require_distinct(table.place, self.columns, table.schema.names)
        self._holders = {table.place for table in self._tables if self._image in table.schema.names}
        self._kind = _one_kind([table for table in self._tables if table.place in self._holders], self._image)
        files = [(table.place, table.count) for table in self._tables]
        self._cells = Cells(files, self._image, self._bases[places[0]]) if self._kind in ("bytes", "struct") else None

    @property
    def form(self) -> str:
        """What the files are, for people."""
        kind = "Arrow" if suffix_of(self._tables[0].place) == ".arrow" else "Parquet"
        return f"{kind}{f' ({len(self._tables)} files)' if len(self._tables) > 1 else ''}"

    def notes(self) -> list[str]:
        """What is known of the files once they are read."""
        return self.names.notes()

    def label_readers(self) -> dict[str, LabelReader]:
        """How the labels of each file are read: by the classes of the options; else numbers mean the names that their own file declares.

        Raises SourceFormatError where files declare different names and the options others still, or one declares none for its numbers.
        """
        options, columns = self._options, self.columns
        places = [table.place for table in self._tables]
        if columns.vector:
            return dict.fromkeys(places, LabelReader(columns.vector, multi_hot=True, named="the columns' names", columns=True))
        declared = {table.place: next((names for name in columns.labels if (names := table.class_names(name))), ()) for table in self._tables}
        distinct = list(dict.fromkeys(names for names in declared.values() if names))
        if len(distinct) > 1 and options.classes is not None:
            first, second = (next(place for place in places if declared[place] == names) for names in distinct[:2])
            raise SourceFormatError(
                f"{first} and {second} declare different class names, so that a number does not mean one line of --classes. Leave out --classes: "
                "each file's own names are used."
            )
        if len(set(declared.values())) == 1 or options.classes is not None:
            names, multi_hot = options.class_names() or (distinct or [()])[0], options.multi_hot
            named = options.classes_named() or ("the file's own schema" if distinct else "")
            labels = LabelReader(names, multi_hot=False if distinct and multi_hot is None else multi_hot, named=named)
            return dict.fromkeys(places, labels)
        return self._own_readers(declared)

    def _own_readers(self, declared: dict[str, tuple[str, ...]]) -> dict[str, LabelReader]:
        """A reader for each list of names; files without one may hold any of all names, as text."""
        multi_hot = self._options.multi_hot or False
        having = next(place for place, names in declared.items() if names)
        unnamed = next((t.place for t in self._tables if not declared[t.place] and any(map(t.holds_numbers, self.columns.labels))), None)
        if unnamed is not None:
            raise SourceFormatError(
                f"{unnamed} declares no names for the numbers of its labels, and {having} does. Save both with the same class names, or pass "
                "--classes FILE."
            )
        everything = tuple(dict.fromkeys(name for names in declared.values() for name in names))
        named = "the files' own schemas"
        readers = {names: LabelReader(names or everything, multi_hot=multi_hot, named=named) for names in set(declared.values())}
        return {place: readers[names] for place, names in declared.items()}

    def rows(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """(file, number in it from 1, row) of everything."""
        for table in self._tables:
            names = [name for name in self.columns.all if name in table.schema.names]
            require_columns(table.place, self.columns, table.schema.names)
            plain = [name for name in names if self._cells is None or name != self._image]
            structs = [self._image] if self._kind == "struct" and table.place in self._holders else []
            for number, row in enumerate(table.rows(plain, structs), 1):
                if self._kind == "bytes" and table.place in self._holders:
                    row[self._image] = None
                yield table.place, number, row

    def image(self, place: str, number: int, index: int, value: Any) -> tuple[Blob | None, str | None]:
        """Where the image of a row lies (its number in the file from 1, over all files from 0), and its name."""
        if place not in self._holders:
            return None, None
        if self._cells is None:
            return (None, None) if is_blank(value) else self.names.image(self._bases[place], value)
        return CellBlob(self._cells, index), value or f"{os.path.basename(place)}#{number}"


def _columns(tables: Sequence[Table], options: SourceOptions) -> Columns:
    """The columns that are asked for; where no file has one called `image`, that of images is the one that a schema declares."""
    columns = Columns.of(options)
    if options.image_column is None and not any("image" in table.schema.names for table in tables):
        declared = {name for table in tables for name in table.image_features()}
        if len(declared) == 1:
            return replace(columns, image=(declared.pop(),))
    return columns


def _one_kind(tables: Sequence[Table], column: str) -> str | None:
    """The kind of images in a column that all these files have; None where there are no files. Raises SourceFormatError naming two that differ."""
    kinds = [table.image_kind(column) for table in tables]
    other = next((table for table, kind in zip(tables, kinds, strict=True) if kind != kinds[0]), None)
    if other is not None:
        raise SourceFormatError(f"{other.place}: column {column!r} has another type than in {tables[0].place}.")
    return kinds[0] if kinds else None


class Table:
    """The schema and the rows of one file; images in cells are not read here.

    Raises SourceFormatError when the file cannot be read.
    """

    def __init__(self, place: str) -> None:
        import pyarrow as pa

        self.place = place
        if suffix_of(place) == ".arrow" and is_url(place):
            raise SourceFormatError(f"{place}: an Arrow file behind a URL cannot be read row by row. Copy it to this disk, or save it as Parquet.")
        try:
            self._open()
            _ = self.schema.names  # they are decoded when they are asked for
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is no UTF-8
            raise SourceFormatError(f"{place} is no readable {'Arrow' if suffix_of(place) == '.arrow' else 'Parquet'} file: {error}.") from None
        self.features = _features(self.schema.metadata)

    def _open(self) -> None:
        import pyarrow.parquet as pq

        if suffix_of(self.place) == ".arrow":
            table = open_arrow(self.place)
            self.schema, self.count = table.schema, table.num_rows
        else:
            with open_place(self.place) as file:
                metadata = pq.ParquetFile(file)
                self.schema, self.count = metadata.schema_arrow, metadata.metadata.num_rows

    def image_kind(self, column: str) -> str:
        """`path` for a column of text, `bytes` for one of images, `struct` for images with a path. Raises SourceFormatError for any other."""
        import pyarrow as pa

        kind = self.schema.field(column).type
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
        kind = kind.value_type if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind) else kind

        def is_path(of: Any) -> bool:
            return pa.types.is_string(of) or pa.types.is_large_string(of) or pa.types.is_string_view(of) or pa.types.is_null(of)

        if is_path(kind):
            return "path"
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
            return "bytes"
        place = kind.get_field_index("path") if pa.types.is_struct(kind) else -1
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and (place < 0 or is_path(kind.field(place).type)):
            return "bytes" if place < 0 else "struct"
        raise SourceFormatError(
            f"{self.place}: column {column!r} must be a path, image bytes or a struct of 'bytes' and 'path', found {kind}. See --image-column."
        )

    def rows(self, columns: Sequence[str], structs: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Each row's values of `columns`, and of `structs` their `path` alone. Raises SourceFormatError naming the row that was reached."""
        import pyarrow as pa

        number = 0
        try:
            for batch in self._batches(columns, structs):
                for row in batch:
                    yield row
                    number += 1
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is no UTF-8
            raise SourceFormatError(f"{self.place}, row {number + 1} or soon after cannot be read: {error}.") from None

    def _batches(self, columns: Sequence[str], structs: Sequence[str]) -> Iterator[Iterable[dict[str, Any]]]:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        if not columns and not structs:
            yield ({} for _ in range(self.count))
            return
        if suffix_of(self.place) != ".arrow":
            with open_place(self.place) as file:
                for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=[*columns, *(f"{name}.path" for name in structs)]):
                    yield (row | {name: (row[name] or {}).get("path") for name in structs} for row in batch.to_pylist())
            return
        for batch in open_arrow(self.place).select([*columns, *structs]).to_batches(BATCH_ROWS):
            batch.validate(full=True)  # offsets come from the file, and are followed in memory
            values = [batch.column(name).to_pylist() for name in columns]
            values += [pc.struct_field(batch.column(name), "path").to_pylist() for name in structs]  # type: ignore[attr-defined]
            yield (dict(zip((*columns, *structs), row, strict=True)) for row in zip(*values, strict=True))

    def image_features(self) -> list[str]:
        """Columns that Hugging Face datasets declared as images."""
        return [name for name, feature in self.features.items() if isinstance(feature, dict) and feature.get("_type") == "Image"]

    def holds_numbers(self, column: str) -> bool:
        """Whether a column is there and holds whole numbers, alone or in lists."""
        import pyarrow as pa

        kind = self.schema.field(column).type if column in self.schema.names else pa.null()
        while (pa.types.is_nested(kind) and hasattr(kind, "value_type")) or pa.types.is_dictionary(kind):
            kind = kind.value_type
        return pa.types.is_integer(kind)

    def class_names(self, column: str) -> tuple[str, ...]:
        """Names of a column that Hugging Face datasets declared as class labels, alone or in a list; none for any other.

        Raises SourceFormatError for a name that stands there twice.
        """
        feature = self.features.get(column)
        while isinstance(feature, list) and feature:
            feature = feature[0]
        while isinstance(feature, dict) and "feature" in feature:
            feature = feature["feature"]
        names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
        found = tuple(map(str, names)) if isinstance(names, list) else ()
        if len(set(found)) < len(found):
            twice = next(name for name in found if found.count(name) > 1)
            raise SourceFormatError(
                f"{self.place} declares {twice!r} twice among the class names of column {column!r}: two numbers would be one class. "
                "Write the data set anew with each name once."
            )
        return found


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """What Hugging Face datasets wrote into a schema about its columns; empty where it wrote nothing that can be read."""
    try:
        found = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
