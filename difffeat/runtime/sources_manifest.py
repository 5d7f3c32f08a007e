"""Manifests: CSV, TSV, JSONL, Parquet and Arrow files with the columns id, image, caption or captions, label or labels."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from difffeat.errors import SampleError, SourceFormatError
from difffeat.runtime.blobs import Blob
from difffeat.runtime.cells import CellBlob
from difffeat.runtime.places import blob_at, open_place, parent, suffix_of
from difffeat.runtime.remote import is_url, locate
from difffeat.runtime.samples import IMAGE_SUFFIXES, Sample, Source, broken_notes, broken_sample, multi_hot_classes
from difffeat.runtime.sources_columns import Columns, first_filled, read_captions, require_columns, require_distinct
from difffeat.runtime.sources_labels import LabelReader, unknown_notes
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.sources_tables import Tables

TABLES = (".parquet", ".arrow")
SEPARATED = (".csv", ".tsv")
LINES = (".jsonl", ".ndjson")
MANIFEST_SUFFIXES = (*SEPARATED, *LINES, *TABLES)
LOOKED_AT = 1000
"""Rows whose labels decide whether lists of numbers are 0/1 vectors."""

Row = dict[str, Any] | SampleError


def read_manifest(places: Sequence[str], base: str | None, options: SourceOptions, name: str) -> Source:
    """Samples of one or several files of one kind; relative image paths are taken from `base` (None: where the file lies).

    In CSV and TSV several labels of a cell are separated by `|` or `;`, captions by `|`. Of `captions` and `caption`, of `labels` and `label`, the
    first that holds something is taken. Numbers of labels mean the class names that their own file declares, if it does. An image is a path or URL,
    or, in Parquet and Arrow, bytes or a struct of `bytes` and `path`. Without an `id` column the id is the image's path without its suffix; for
    images in cells, and for captions alone, it is the row number over all files. A row that cannot be read becomes a sample with its problem, and
    with the id that it has once it is mended, as far as that can be read.

    Raises SourceFormatError naming columns (missing, or there twice), or the file and row, where no row at all can be read or the file is damaged.
    """
    kinds = {suffix_of(place) for place in places}
    if len(kinds) > 1:
        raise SourceFormatError(f"{name} names files of several kinds ({', '.join(sorted(kinds))}). Give those of one kind.")
    reader = Tables(places, base, options) if kinds & set(TABLES) else _Rows(places, base, options)
    return _listed(reader, options, name)


class _Rows:
    """CSV, TSV and JSONL: each row brings its own columns."""

    def __init__(self, places: Sequence[str], base: str | None, options: SourceOptions) -> None:
        self.columns, self.separated = Columns.of(options), suffix_of(places[0]) in SEPARATED
        self._options, self._places, self._bases = options, places, {place: parent(place) if base is None else base for place in places}

    def label_readers(self) -> dict[str, LabelReader]:
        """How the labels of each file are read: all alike."""
        if self.columns.vector:
            labels = LabelReader(self.columns.vector, multi_hot=True)
        else:
            labels = LabelReader(self._options.class_names(), multi_hot=self._options.multi_hot, separated=self.separated)
        return dict.fromkeys(self._places, labels)

    def rows(self) -> Iterator[tuple[str, int, Row]]:
        """(file, number in it from 1, row) of everything."""
        for place in self._places:
            for number, row in enumerate(_separated(place, self.columns) if self.separated else _lines(place), 1):
                yield place, number, row

    def image(self, place: str, number: int, index: int, value: Any) -> tuple[Blob | None, str | None]:
        """Where the image of a row lies (its number in the file from 1, over all files from 0), and its name. Raises SampleError."""
        if value is None or value == "":
            return None, None
        if not isinstance(value, str):
            raise SampleError(f"'image' must be a path, found {type(value).__name__}.")
        return blob_at(self._bases[place], value), value


@dataclass
class _Listing:
    """Samples under way, and what is learnt while they are read."""

    samples: list[Sample] = field(default_factory=list)
    protocols: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    first_problem: str = ""
    broken: int = 0


def _listed(reader: _Rows | Tables, options: SourceOptions, name: str) -> Source:
    columns, labels = reader.columns, reader.label_readers()
    readers = list(dict.fromkeys(labels.values()))
    rows, listing = reader.rows(), _Listing()
    head = list(islice(rows, LOOKED_AT))
    for each in readers:
        each.look([first_filled(row, columns.labels) for place, _, row in head if isinstance(row, dict) and labels[place] is each], name)
    for part in (head, rows):
        for place, number, row in part:
            _add(listing, reader, labels[place], place, number, row)
    if listing.broken and listing.broken == len(listing.samples):
        raise SourceFormatError(listing.first_problem)
    _require_asked(name, columns, listing)
    classes: tuple[str, ...] = ()
    if any(sample.labels is not None for sample in listing.samples):
        classes = tuple(dict.fromkeys(name for each in readers for name in each.classes)) or multi_hot_classes(listing.samples)
    notes = (*broken_notes(listing.samples), *unknown_notes(readers, classes, name))
    return Source(name, tuple(listing.samples), classes, notes=notes)


def _add(listing: _Listing, reader: _Rows | Tables, labels: LabelReader, place: str, number: int, row: Row) -> None:
    """One row's sample; what is wrong with it becomes its problem."""
    total = len(listing.samples)
    try:
        if isinstance(row, SampleError):
            raise row
        if total == listing.broken and not listing.seen:
            require_columns(place, reader.columns, row)
        listing.seen.update(row)
        listing.samples.append(_sample(listing, reader, labels, place, number, row))
    except SampleError as error:
        listing.first_problem = listing.first_problem or (str(error) if str(error).startswith(place) else f"{place}, row {number}: {error}")
        listing.broken += 1
        identity = _identity_of_broken(reader, place, number, total, row)
        listing.samples.append(broken_sample(identity, f"{os.path.basename(place)}#{number}", str(error)))


def _sample(listing: _Listing, reader: _Rows | Tables, labels: LabelReader, place: str, number: int, row: Mapping[str, Any]) -> Sample:
    columns, where, total = reader.columns, f"{place}, row {number}", len(listing.samples)
    image, locator = reader.image(place, number, total, row.get(columns.image[0]))
    _require_protocol(listing, locator)
    captions, problem = read_captions(first_filled(row, columns.captions), reader.separated)
    if problem is not None and image is None:
        raise SampleError(problem)
    cell = [row.get(name) for name in columns.vector] if columns.vector else first_filled(row, columns.labels)
    return Sample(_identity(columns, row, image, locator, total), image, locator, captions, labels.read(cell, where), problem)


def _identity(columns: Columns, row: Mapping[str, Any], image: Blob | None, locator: str | None, total: int) -> str:
    """What a row calls itself, else its image's path, else its number over all files."""
    name = row.get(columns.id[0])
    if name not in (None, ""):
        return str(name)
    return f"{total:09d}" if locator is None or isinstance(image, CellBlob) else without_suffix(locator)


def _identity_of_broken(reader: _Rows | Tables, place: str, number: int, total: int, row: Row) -> str:
    """The id that a row has when it is mended, wherever what makes it can be read: else it could not be healed in its place."""
    if isinstance(row, SampleError):
        return f"{total:09d}"
    try:
        image, locator = reader.image(place, number, total, row.get(reader.columns.image[0]))
    except SampleError:
        image, locator = None, None
    return _identity(reader.columns, row, image, locator, total)


def _require_protocol(listing: _Listing, locator: str | None) -> None:
    """A protocol whose package is missing is told before anything runs. Raises MissingExtra, ConfigError."""
    if locator is not None and "://" in locator and is_url(locator):
        protocol = locator.partition("://")[0]
        if protocol not in listing.protocols:
            with suppress(OSError):  # a server that does not answer now is told, row by row, when images are read
                locate(locator)
            listing.protocols.add(protocol)


def without_suffix(path: str) -> str:
    """A path or URL without the suffix of its image, written with single slashes: the id of a sample that has no other."""
    stem, suffix = os.path.splitext(path)
    if suffix.lower() in IMAGE_SUFFIXES and ("://" in path or ("//" not in path and "./" not in path)):
        return stem
    return path if is_url(path) else Path(path).with_suffix("").as_posix() if Path(path).name else path


def _require_asked(name: str, columns: Columns, listing: _Listing) -> None:
    missing = [column for column in columns.asked if column not in listing.seen]
    if missing and listing.samples:
        raise SourceFormatError(f"{name} has no column {missing[0]!r}; its columns that are read here: {', '.join(sorted(listing.seen))}.")


def _separated(place: str, columns: Columns) -> Iterator[Row]:
    """Rows of a CSV or TSV file with a header. Raises SourceFormatError where the file cannot be read any further, or names a column twice."""
    reader = None
    try:
        with open_place(place) as binary:
            file = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            reader = csv.reader(file, delimiter="\t" if suffix_of(place) == ".tsv" else ",", strict=True)
            header = next(reader, [])
            require_distinct(place, columns, header)
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
