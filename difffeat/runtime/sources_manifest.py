"""Manifests: CSV, TSV, JSONL, Parquet and Arrow files with the columns id, image, caption or captions, label or labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from difffeat.errors import DuplicateSample, EmptySource, SampleError, SourceFormatError
from difffeat.runtime.blobs import Blob, UnreadableBlob
from difffeat.runtime.cells import CellBlob
from difffeat.runtime.file_names import FileNames
from difffeat.runtime.places import parent, suffix_of
from difffeat.runtime.remote import is_url, locate
from difffeat.runtime.samples import IMAGE_SUFFIXES, Sample, Source, broken_notes, broken_sample, multi_hot_classes
from difffeat.runtime.sources_columns import Columns, first_filled, named_value, read_captions, require_columns
from difffeat.runtime.sources_labels import LabelReader, label_notes
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.sources_tables import Tables
from difffeat.runtime.sources_text import Row, TextNotes, json_rows, separated_rows
from difffeat.runtime.sources_values import is_blank
from difffeat.runtime.understood import Understood

TABLES = (".parquet", ".arrow")
SEPARATED = (".csv", ".tsv")
LINES = (".jsonl", ".ndjson")
MANIFEST_SUFFIXES = (*SEPARATED, *LINES, *TABLES)
LOOKED_AT = 1000
"""Rows whose labels decide whether lists of numbers are 0/1 vectors."""
FORMS = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSON Lines", ".ndjson": "JSON Lines", ".parquet": "Parquet", ".arrow": "Arrow"}


def read_manifest(places: Sequence[str], base: str | None, options: SourceOptions, name: str) -> Source:
    """Samples of one or several files of one kind; relative image paths are taken from `base` (None: where the file lies).

    A text in a column of labels holds several where `|` or `;` separates them or where it spells a list (`['cat', 'dog']`, `[3 0 7]`); one in the
    column `captions` where `|` separates them; any other text is one caption, unless it spells a list of quoted texts. Of `captions` and `caption`,
    of `labels` and `label`, the first that holds something is taken. Numbers of labels mean the class names that their own file declares, if it does.
    An image is a path or URL, or, in Parquet and Arrow, bytes or a struct of `bytes` and `path`. Without an `id` column the id is the image's path
    without its suffix; for images in cells, and for captions alone, it is the row number over all files. Rows of one id and image whose labels are
    the same are one sample with the captions of all. A row that cannot be read becomes a sample with its problem, and with the id that it has once it
    is mended, as far as that can be read.

    Raises EmptySource; SourceFormatError naming columns (missing, or there twice), or the file and row, where no row at all can be read or the file
    is damaged.
    """
    kinds = {suffix_of(place) for place in places}
    if len(kinds) > 1:
        raise SourceFormatError(f"{name} names files of several kinds ({', '.join(sorted(kinds))}). Give those of one kind.")
    reader = Tables(places, base, options) if kinds & set(TABLES) else _Rows(places, base, options)
    return _listed(reader, options, name)


class _Rows:
    """CSV, TSV and JSONL: each row brings its own columns."""

    def __init__(self, places: Sequence[str], base: str | None, options: SourceOptions) -> None:
        self.columns, self.names, self._texts = Columns.of(options), FileNames(), TextNotes()
        self._options, self._places, self._bases = options, places, {place: parent(place) if base is None else base for place in places}
        self.present: dict[str, None] = {}

    @property
    def form(self) -> str:
        """What the files are, for people."""
        return f"{FORMS[suffix_of(self._places[0])]}{f' ({len(self._places)} files)' if len(self._places) > 1 else ''}"

    def label_readers(self) -> dict[str, LabelReader]:
        """How the labels of each file are read: all alike."""
        if self.columns.vector:
            labels = LabelReader(self.columns.vector, multi_hot=True, named="the columns' names", columns=True)
        else:
            labels = LabelReader(self._options.class_names(), multi_hot=self._options.multi_hot, named=self._options.classes_named())
        return dict.fromkeys(self._places, labels)

    def rows(self) -> Iterator[tuple[str, int, Row]]:
        """(file, number in it from 1, row) of everything."""
        for place in self._places:
            separated = suffix_of(place) in SEPARATED
            for number, row in enumerate(separated_rows(place, self.columns, self._texts) if separated else json_rows(place), 1):
                if not isinstance(row, SampleError) and (not separated or number == 1):
                    self.present.update(dict.fromkeys(row))
                yield place, number, row

    def image(self, place: str, number: int, index: int, value: Any) -> tuple[Blob | None, str | None]:
        """Where the image of a row lies (its number in the file from 1, over all files from 0), and its name. Raises SampleError."""
        if is_blank(value):
            return None, None
        if not isinstance(value, str):
            raise SampleError(f"'image' must be a path, found {type(value).__name__}.")
        return self.names.image(self._bases[place], value)

    def notes(self) -> list[str]:
        """What is known of the files once they are read."""
        return [*self._texts.notes(), *self.names.notes()]


@dataclass
class _Listing:
    """Samples under way, and what is learnt while they are read."""

    samples: list[Sample] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    """Where the first sample of each id stands."""
    protocols: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    ids: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    """Columns that captions were found in, and under `|` and names of kinds how they were written."""
    first_problem: str = ""
    rows: int = 0
    broken: int = 0
    joined: int = 0

    def add(self, sample: Sample, where: str) -> None:
        """One more sample, or captions of one that is there. Raises DuplicateSample where rows of one image cannot be joined."""
        place = self.places.setdefault(sample.id, len(self.samples))
        if place == len(self.samples):
            self.samples.append(sample)
            return
        self.samples[place] = _joined(self.samples[place], sample, where)
        self.joined += 1


def _joined(one: Sample, other: Sample, where: str) -> Sample:
    """One sample of two rows of the same id and image, with the captions of both. Raises DuplicateSample naming what keeps them apart."""
    cells = isinstance(one.image, CellBlob | UnreadableBlob) or isinstance(other.image, CellBlob | UnreadableBlob)
    reason = (
        f"of other images ({one.locator}, {other.locator})"
        if cells or one.locator != other.locator
        else "with other labels. Give each image one row, with its labels separated by |"
        if (one.labels, one.unknown) != (other.labels, other.unknown)
        else "without captions to join"
        if not one.captions or not other.captions
        else ""
    )
    if reason:
        raise DuplicateSample(
            f"{where}: the id {one.id!r} occurs more than once, in rows {reason}. Leave one row for each id, or name a column that tells rows apart "
            "with --id-column."
        )
    return replace(one, captions=(*one.captions, *other.captions), problem=one.problem or other.problem)


def _listed(reader: _Rows | Tables, options: SourceOptions, name: str) -> Source:
    columns, labels = reader.columns, reader.label_readers()
    readers = list(dict.fromkeys(labels.values()))
    rows, listing = reader.rows(), _Listing()
    head = list(islice(rows, LOOKED_AT))
    for each in readers:
        each.look([_label_cell(columns, row) for place, _, row in head if isinstance(row, dict) and labels[place] is each], name)
    for part in (head, rows):
        for place, number, row in part:
            _add(listing, reader, labels[place], place, number, row)
    if not listing.samples:
        raise EmptySource(f"{name} holds no samples: it is {reader.form} without a row. Look whether it was written to its end.")
    if listing.broken and listing.broken == len(listing.samples):
        raise SourceFormatError(listing.first_problem)
    _require_asked(name, columns, listing)
    classes: tuple[str, ...] = ()
    if any(sample.labels is not None for sample in listing.samples):
        classes = tuple(dict.fromkeys(name for each in readers for name in each.classes)) or multi_hot_classes(listing.samples)
    notes = (*broken_notes(listing.samples), *label_notes(readers, classes, name), *_caption_notes(listing), *reader.notes())
    return Source(name, tuple(listing.samples), classes, notes=notes, understood=_understood(reader, readers, listing))


def _label_cell(columns: Columns, row: Mapping[str, Any]) -> Any:
    return [row.get(name) for name in columns.vector] if columns.vector else first_filled(row, columns.labels)


def _add(listing: _Listing, reader: _Rows | Tables, labels: LabelReader, place: str, number: int, row: Row) -> None:
    """One row's sample; what is wrong with it becomes its problem."""
    total, where = listing.rows, f"{place}, row {number}"
    listing.rows += 1
    try:
        if isinstance(row, SampleError):
            raise row
        if total == listing.broken and not listing.seen:
            require_columns(place, reader.columns, row)
        listing.seen.update(row)
        sample = _sample(listing, reader, labels, place, number, total, row)
    except SampleError as error:
        listing.first_problem = listing.first_problem or (str(error) if str(error).startswith(place) else f"{where}: {error}")
        listing.broken += 1
        identity = _identity_of_broken(reader, place, number, total, row)
        sample = broken_sample(identity, f"{os.path.basename(place)}#{number}", str(error))
    listing.add(sample, where)


def _sample(listing: _Listing, reader: _Rows | Tables, labels: LabelReader, place: str, number: int, total: int, row: Mapping[str, Any]) -> Sample:
    columns, where = reader.columns, f"{place}, row {number}"
    image, locator = reader.image(place, number, total, row.get(columns.image[0]))
    _require_protocol(listing, locator)
    column, value = named_value(row, columns.captions)
    captions, problem, written = read_captions(value, column)
    if problem is not None and image is None:
        raise SampleError(problem)
    names, unknown = labels.read(_label_cell(columns, row), where)
    identity, origin = _identity(columns, row, image, locator, total)
    listing.ids[origin] += 1
    if captions:
        listing.captions[f"column {column!r}"] += 1
    if written:
        listing.captions[written] += 1
    return Sample(identity, image, locator, captions, names, problem, unknown)


def _identity(columns: Columns, row: Mapping[str, Any], image: Blob | None, locator: str | None, total: int) -> tuple[str, str]:
    """What a row calls itself, else its image's path, else its number over all files; and which of the three it is."""
    name = row.get(columns.id[0])
    if not is_blank(name):
        return str(name).strip(), f"column {columns.id[0]!r}"
    if locator is None or isinstance(image, CellBlob):
        return f"{total:09d}", "row numbers"
    return without_suffix(locator), "image paths without their suffix"


def _identity_of_broken(reader: _Rows | Tables, place: str, number: int, total: int, row: Row) -> str:
    """The id that a row has when it is mended, wherever what makes it can be read: else it could not be healed in its place."""
    if isinstance(row, SampleError):
        return f"{total:09d}"
    try:
        image, locator = reader.image(place, number, total, row.get(reader.columns.image[0]))
    except SampleError:
        image, locator = None, None
    return _identity(reader.columns, row, image, locator, total)[0]


def _caption_notes(listing: _Listing) -> list[str]:
    told = {
        "split": "cells of captions are separated at |",
        "list": "cells of captions are lists written as text, and read as lists",
        "null": "captions are written as nothing (nan, None, NULL ...), and read as none",
    }
    notes = [f"{listing.captions[kind]} {words}" for kind, words in told.items() if listing.captions[kind]]
    if listing.joined:
        notes.append(f"{listing.rows} rows are {len(listing.samples)} samples: rows of one id and image are joined, with a caption from each")
    return notes


def _understood(reader: _Rows | Tables, readers: Sequence[LabelReader], listing: _Listing) -> Understood:
    columns, present = reader.columns, reader.present
    lacking = "" if columns.id[0] in present else f"no column {columns.id[0]!r}: "
    held = [name for name in columns.labels if name in present]
    origin = f"columns {', '.join(columns.vector[:4])}{' ...' if len(columns.vector) > 4 else ''}, each a class" if columns.vector else ""
    origin = origin or (f"column {' or '.join(map(repr, held))}" if held else f"none (no column {' or '.join(map(repr, columns.labels))})")
    form = next((reader.form for reader in readers if reader.form), "")
    captions = [kind for kind in listing.captions if kind.startswith("column")]
    none = f"none (no column {' or '.join(map(repr, columns.captions))})" if not {*columns.captions} & {*present} else "none"
    return Understood(
        form=reader.form,
        ids=f"{lacking}{' or '.join(listing.ids) or 'row numbers'}",
        labels=f"{origin}{f', as {form}' if form and held else ''}",
        classes=next((reader.named for reader in readers if reader.named), "the labels as they are written, sorted"),
        captions=" or ".join(captions) or none,
        unread=tuple(name or "one without a name" for name in present if name not in columns.all),
    )


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
