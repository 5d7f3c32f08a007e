"""Parquet and Arrow files as rows: which columns there are, what kind of images they hold, and the class names in their schema."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from difffeat.errors import SourceFormatError
from difffeat.runtime.cells import open_arrow
from difffeat.runtime.places import open_place, suffix_of
from difffeat.runtime.remote import is_url

BATCH_ROWS = 8192


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
        except (pa.ArrowException, OSError) as error:
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
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
            return "path"
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return "bytes"
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return "struct" if kind.get_field_index("path") >= 0 else "bytes"
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

    def class_names(self, column: str) -> tuple[str, ...]:
        """Names of a column that Hugging Face datasets declared as class labels, alone or in a list; none for any other."""
        feature = self.features.get(column)
        while isinstance(feature, list) and feature:
            feature = feature[0]
        while isinstance(feature, dict) and "feature" in feature:
            feature = feature["feature"]
        names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
        return tuple(map(str, names)) if isinstance(names, list) else ()


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """What Hugging Face datasets wrote into a schema about its columns; empty where it wrote nothing that can be read."""
    try:
        found = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
