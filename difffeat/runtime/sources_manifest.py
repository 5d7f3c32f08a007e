"""Manifests: CSV, TSV, JSONL, Parquet and Arrow files with the columns id, image, caption or captions, label or labels."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from difffeat.errors import SampleError, SourceFormatError
from difffeat.runtime.blobs import Blob
from difffeat.runtime.cells import CellBlob, Cells
from difffeat.runtime.places import blob_at, open_place, parent, suffix_of
from difffeat.runtime.remote import is_url, locate
from difffeat.runtime.samples import IMAGE_SUFFIXES, Sample, Source, broken_notes, broken_sample, multi_hot_classes
from difffeat.runtime.sources_labels import LabelReader
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.sources_tables import Table

TABLES = (".parquet", ".arrow")
SEPARATED = (".csv", ".tsv")
LINES = (".jsonl", ".ndjson")
MANIFEST_SUFFIXES = (*SEPARATED, *LINES, *TABLES)
LOOKED_AT = 1000
"""Rows whose labels decide whether lists of numbers are 0/1 vectors."""

Row = dict[str, Any] | SampleError


@dataclass(frozen=True)
class Columns:
    """Where each role may stand, by preference; `asked` those that the user named."""

    image: tuple[str, ...]
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    id: tuple[str, ...]
    vector: tuple[str, ...]
    asked: tuple[str, ...]

    @classmethod
    def of(cls, options: SourceOptions) -> Columns:
        """From the options, with the usual names where nothing was asked for."""
        several = tuple(part.strip() for part in (options.label_column or "").split(","))
        vector = several if len(several) > 1 else ()
        asked = [name for name in (options.image_column, options.caption_column, options.id_column) if name is not None]
        return cls(
            image=(options.image_column or "image",),
            captions=("captions", "caption") if options.caption_column is None else (options.caption_column,),
            labels=() if vector else ("labels", "label") if options.label_column is None else (options.label_column,),
            id=(options.id_column or "id",),
            vector=vector,
            asked=(*asked, *(several if options.label_column else ())),
        )

    @property
    def all(self) -> tuple[str, ...]:
        """Every name, once."""
        return tuple(dict.fromkeys((*self.image, *self.captions, *self.labels, *self.id, *self.vector)))


def read_manifest(places: Sequence[str], base: str | None, options: SourceOptions, name: str) -> Source:
    """Samples of one or several files of one kind; relative image paths are taken from `base` (None: where the file lies).

    In CSV and TSV several labels of a cell are separated by `|` or `;`, captions by `|`. An image is a path or URL, or, in Parquet and Arrow, bytes
    or a struct of `bytes` and `path`. Without an `id` column the id is the image's path without its suffix; for images in cells, and for captions
    alone, it is the row number over all files. A row that cannot be read becomes a sample with its problem.

    Raises SourceFormatError naming columns, or the file and row, where no row at all can be read or the file is damaged.
    """
    kinds = {suffix_of(place) for place in places}
    if len(kinds) > 1:
        raise SourceFormatError(f"{name} names files of several kinds ({', '.join(sorted(kinds))}). Give those of one kind.")
    reader = _Tables(places, base, options) if kinds & set(TABLES) else _Rows(places, base, options)
    return _listed(reader, options, name)


class _Rows:
    """CSV, TSV and JSONL: each row brings its own columns."""

    def __init__(self, places: Sequence[str], base: str | None, options: SourceOptions) -> None:
        self.columns, self.separated = Columns.of(options), suffix_of(places[0]) in SEPARATED
        self.classes: tuple[str, ...] = ()
        self._places, self._bases = places, {place: parent(place) if base is None else base for place in places}

    def rows(self) -> Iterator[tuple[str, int, Row]]:
        """(file, number in it from 1, row) of everything."""
        for place in self._places:
            for number, row in enumerate(_separated(place) if self.separated else _lines(place), 1):
                yield place, number, row

    def image(self, place: str, number: int, index: int, value: Any) -> tuple[Blob | None, str | None]:
        """Where the image of a row lies (its number in the file from 1, over all files from 0), and its name. Raises SampleError."""
        if value is None or value == "":
            return None, None
        if not isinstance(value, str):
            raise SampleError(f"'image' must be a path, found {type(value).__name__}.")
        return blob_at(self._bases[place], value), value


class _Tables:
    """Parquet and Arrow: columns are known beforehand, images may lie in cells."""

    separated = False

    def __init__(self, places: Sequence[str], base: str | None, options: SourceOptions) -> None:
        self._tables = [Table(place) for place in places]
        first, columns = self._tables[0], Columns.of(options)
        declared = first.image_features()
        if options.image_column is None and "image" not in first.schema.names and len(declared) == 1:
            columns = replace(columns, image=(declared[0],))
        self.columns, self._bases = columns, {place: parent(place) if base is None else base for place in places}
        names = next((name for name in columns.labels if name in first.schema.names), "")
        self.classes = first.class_names(names)
        self._kind = first.image_kind(columns.image[0]) if columns.image[0] in first.schema.names else None
        files = [(table.place, table.count) for table in self._tables]
        self._cells = Cells(files, columns.image[0], self._bases[places[0]]) if self._kind in ("bytes", "struct") else None

    def rows(self) -> Iterator[tuple[str, int, Row]]:
        """(file, number in it from 1, row) of everything."""
        for table in self._tables:
            names = [name for name in self.columns.all if name in table.schema.names]
            _require_columns(table.place, self.columns, table.schema.names)
            if self._kind is not None and table.image_kind(self.columns.image[0]) != self._kind:
                raise SourceFormatError(f"{table.place}: column {self.columns.image[0]!r} has another type than in {self._tables[0].place}.")
            plain = [name for name in names if self._cells is None or name != self.columns.image[0]]
            structs = [self.columns.image[0]] if self._kind == "struct" else []
            for number, row in enumerate(table.rows(plain, structs), 1):
                if self._kind == "bytes":
                    row[self.columns.image[0]] = None
                yield table.place, number, row

    def image(self, place: str, number: int, index: int, value: Any) -> tuple[Blob | None, str | None]:
        """Where the image of a row lies (its number in the file from 1, over all files from 0), and its name. Raises SampleError."""
        if self._cells is None:
            return (blob_at(self._bases[place], value), value) if value else (None, None)
        return CellBlob(self._cells, index), value or f"{os.path.basename(place)}#{number}"


@dataclass
class _Listing:
    """Samples under way, and what is learnt while they are read."""

    samples: list[Sample] = field(default_factory=list)
    protocols: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    first_problem: str = ""
    broken: int = 0


def _label_reader(reader: _Rows | _Tables, options: SourceOptions) -> LabelReader:
    """By columns of 0 and 1 where several were named; else by the classes of the options, or those that a schema declares for its numbers."""
    if reader.columns.vector:
        return LabelReader(reader.columns.vector, multi_hot=True)
    multi_hot = False if reader.classes and options.multi_hot is None else options.multi_hot
    return LabelReader(options.class_names() or reader.classes, multi_hot=multi_hot, separated=reader.separated)


def _listed(reader: _Rows | _Tables, options: SourceOptions, name: str) -> Source:
    columns, labels = reader.columns, _label_reader(reader, options)
    rows, listing = reader.rows(), _Listing()
    head = list(islice(rows, LOOKED_AT))
    labels.look([_value(row, columns.labels) for _, _, row in head if isinstance(row, dict)], name)
    for part in (head, rows):
        for place, number, row in part:
            _add(listing, reader, labels, place, number, row)
    if listing.broken and listing.broken == len(listing.samples):
        raise SourceFormatError(listing.first_problem)
    _require_asked(name, columns, listing)
    has_labels = any(sample.labels is not None for sample in listing.samples)
    classes = (labels.classes or multi_hot_classes(listing.samples)) if has_labels else ()
    return Source(name, tuple(listing.samples), classes, notes=broken_notes(listing.samples))


def _add(listing: _Listing, reader: _Rows | _Tables, labels: LabelReader, place: str, number: int, row: Row) -> None:
    """One row's sample; what is wrong with it becomes its problem."""
    total = len(listing.samples)
    try:
        if isinstance(row, SampleError):
            raise row
        if total == listing.broken and not listing.seen:
            _require_columns(place, reader.columns, row)
        listing.seen.update(row)
        listing.samples.append(_sample(listing, reader, labels, place, number, row))
    except SampleError as error:
        listing.first_problem = listing.first_problem or (str(error) if str(error).startswith(place) else f"{place}, row {number}: {error}")
        listing.broken += 1
        name = _value(row, reader.columns.id) if isinstance(row, dict) else None
        listing.samples.append(broken_sample(f"{total:09d}" if name in (None, "") else str(name), f"{os.path.basename(place)}#{number}", str(error)))


def _sample(listing: _Listing, reader: _Rows | _Tables, labels: LabelReader, place: str, number: int, row: Mapping[str, Any]) -> Sample:
    columns, where = reader.columns, f"{place}, row {number}"
    image, locator = reader.image(place, number, len(listing.samples), row.get(columns.image[0]))
    _require_protocol(listing, locator)
    captions, problem = read_captions(_value(row, columns.captions), reader.separated)
    if problem is not None and image is None:
        raise SampleError(problem)
    cell = [row.get(name) for name in columns.vector] if columns.vector else _value(row, columns.labels)
    name = _value(row, columns.id)
    if name not in (None, ""):
        identity = str(name)
    elif locator is not None and not isinstance(image, CellBlob):
        identity = without_suffix(locator)
    else:
        identity = f"{len(listing.samples):09d}"
    return Sample(identity, image, locator, captions, labels.read(cell, where), problem)


def _require_protocol(listing: _Listing, locator: str | None) -> None:
    """A protocol whose package is missing is told before anything runs. Raises MissingExtra, ConfigError."""
    if locator is not None and "://" in locator and is_url(locator):
        protocol = locator.partition("://")[0]
        if protocol not in listing.protocols:
            locate(locator)
            listing.protocols.add(protocol)


def without_suffix(path: str) -> str:
    """A path or URL without the suffix of its image, written with single slashes: the id of a sample that has no other."""
    stem, suffix = os.path.splitext(path)
    if suffix.lower() in IMAGE_SUFFIXES and ("://" in path or ("//" not in path and "./" not in path)):
        return stem
    return path if is_url(path) else Path(path).with_suffix("").as_posix() if Path(path).name else path


def _value(row: Any, names: Sequence[str]) -> Any:
    for name in names:
        if name in row:
            return row[name]
    return None


def read_captions(value: Any, separated: bool = False) -> tuple[tuple[str, ...], str | None]:
    """Captions of a cell, and what is wrong with it; `separated`: by `|`."""
    if value is None:
        return (), None
    if isinstance(value, str) and not (separated and "|" in value):
        text = value.strip()
        return ((text,) if text else ()), None
    parts = value.split("|") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str | int) for part in parts):
        return (), f"'captions' must be a string or a list of strings, found {str(value)[:80]}."
    return tuple(text for part in parts if (text := str(part).strip())), None


def _require_columns(place: str, columns: Columns, present: Any) -> None:
    if not {*columns.image, *columns.captions} & set(present):
        names = ", ".join(map(str, present)) or "none"
        raise SourceFormatError(
            f"{place} has no column {columns.image[0]!r}, {' or '.join(map(repr, columns.captions[::-1]))}; its columns are: {names}. "
            "Rename the one that holds them, or name it with --image-column or --caption-column."
        )


def _require_asked(name: str, columns: Columns, listing: _Listing) -> None:
    missing = [column for column in columns.asked if column not in listing.seen]
    if missing and listing.samples:
        raise SourceFormatError(f"{name} has no column {missing[0]!r}; its columns that are read here: {', '.join(sorted(listing.seen))}.")


def _separated(place: str) -> Iterator[Row]:
    """Rows of a CSV or TSV file with a header. Raises SourceFormatError where the file cannot be read any further."""
    reader = None
    try:
        with open_place(place) as binary:
            file = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            reader = csv.reader(file, delimiter="\t" if suffix_of(place) == ".tsv" else ",", strict=True)
            header = next(reader, [])
            for row in reader:
                if len(row) == len(header):
                    yield dict(zip(header, row, strict=True))
                elif row:  # empty lines are passed over
                    yield SampleError(f"{place}, line {reader.line_num}: the row has another number of fields than the header.")
    except UnicodeDecodeError:
        raise SourceFormatError(f"{place} is not UTF-8 ({_undecodable(place)}). Save it as UTF-8.") from None
    except csv.Error as error:
        raise SourceFormatError(f"{place}, line {reader.line_num if reader else 1} is no well-formed CSV: {error}.") from None
    except OSError as error:
        raise SourceFormatError(f"{place} cannot be read ({error}).") from None


def _undecodable(place: str) -> str:
    """Where the first byte lies that is no UTF-8; a decoder of pieces cannot tell."""
    at = 0
    with open_place(place) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {at + error.start}"
            at += len(line)
    return "at its end"


def _lines(place: str) -> Iterator[Row]:
    """Objects of a JSONL file; empty lines are passed over. Raises SourceFormatError where the file cannot be read any further."""
    try:
        with open_place(place) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(place, number, line)
    except OSError as error:
        raise SourceFormatError(f"{place} cannot be read ({error}).") from None


def _object(place: str, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return SampleError(f"{place}, line {number} is not JSON ({error}).")
    return row if isinstance(row, dict) else SampleError(f"{place}, line {number} is not a JSON object.")
