"""Manifests: CSV, TSV, JSONL and Parquet files with the columns id, image, caption or captions, labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from difffeat.errors import SourceFormatError
from difffeat.runtime.samples import Sample, Source, multi_hot_classes

COLUMNS = ("id", "image", "caption", "captions", "labels")
SEPARATORS = "|;"


def read_manifest(path: Path, base: Path) -> Source:
    """Samples of a manifest; relative image paths are taken from `base`.

    In CSV and TSV several labels or captions of a cell are separated by `|` or `;` (captions by `|` only). Without an `id` column the id is the
    image's path without its suffix, or the row number.

    Raises SourceFormatError naming columns or the row.
    """
    suffix = path.suffix.lower()
    reader = {".parquet": _parquet, ".jsonl": _jsonl, ".ndjson": _jsonl}.get(suffix, _table)
    samples = []
    for number, row in enumerate(reader(path)):
        if number == 0:
            _check_columns(path, row)
        samples.append(_sample(path, base, number, row))
    has_labels = any(sample.labels is not None for sample in samples)
    return Source(str(path), tuple(samples), multi_hot_classes(samples) if has_labels else ())


def _check_columns(path: Path, row: Mapping[str, Any]) -> None:
    if not {"image", "caption", "captions"} & set(row):
        present = ", ".join(map(str, row)) or "none"
        raise SourceFormatError(f"{path} has no column 'image', 'caption' or 'captions'; its columns are: {present}. Rename the one that holds them.")


def _sample(path: Path, base: Path, number: int, row: Mapping[str, Any]) -> Sample:
    where = f"{path}, row {number + 1}"
    image = row.get("image")
    if image is not None and not isinstance(image, str):
        raise SourceFormatError(f"{where}: 'image' must be a path, found {type(image).__name__}.")
    captions = _strings(row.get("captions", row.get("caption")), where, "captions", "|" if _is_table(path) else "")
    labels = _strings(row["labels"], where, "labels", SEPARATORS if _is_table(path) else "") if row.get("labels") is not None else None
    name = row.get("id")
    identity = str(name) if name not in (None, "") else (Path(image).with_suffix("").as_posix() if image else f"{number:09d}")
    return Sample(identity, base / image if image else None, image or None, captions, labels)


def _strings(value: Any, where: str, column: str, separators: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        for separator in separators[1:]:
            value = value.replace(separator, separators[0])
        parts: Sequence[Any] = value.split(separators[0]) if separators else [value]
    else:
        parts = value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str | int) for part in parts):
        raise SourceFormatError(f"{where}: '{column}' must be a string or a list of strings, found {value!r}.")
    return tuple(text for part in parts if (text := str(part).strip()))


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".tsv")


def _table(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise SourceFormatError(f"{path}, line {reader.line_num}: the row has another number of fields than the header.")
                yield row
    except UnicodeDecodeError as error:
        raise SourceFormatError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    except csv.Error as error:
        raise SourceFormatError(f"{path} is no well-formed CSV: {error}.") from None


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SourceFormatError(f"{path}, line {number} is not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise SourceFormatError(f"{path}, line {number} is not a JSON object.")
            yield row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name in COLUMNS]
        if not columns:
            _check_columns(path, dict.fromkeys(file.schema_arrow.names))
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise SourceFormatError(f"{path} is no readable Parquet file: {error}.") from None
