"""Rows of text files: CSV, TSV and JSON Lines as spreadsheets, data frames and data sets write them."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from difffeat.errors import SampleError, SourceFormatError
from difffeat.runtime.places import open_place, suffix_of
from difffeat.runtime.sources_columns import Columns, require_distinct

Row = dict[str, Any] | SampleError
MAX_FIELD = 1 << 28
"""Largest field of a CSV file, in characters; Python's own limit is 2^17, which a vector of 50 000 labels exceeds."""
DELIMITERS = (",", ";", "\t", "|")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


@dataclass
class TextNotes:
    """What is learnt of text files while they are read, for people."""

    delimiters: dict[str, str] = field(default_factory=dict)
    unquoted: int = 0
    spanning: int = 0
    first_span: str = ""

    def notes(self) -> list[str]:
        """Sentences."""
        notes = [f"{place} is separated by {'tabs' if sign == chr(9) else sign}" for place, sign in self.delimiters.items()]
        if self.unquoted:
            notes.append(f"{self.unquoted} fields of TSV are quoted as CSV writes them, with doubled quotes inside, and were unquoted")
        if self.spanning:
            notes.append(f"{self.spanning} rows go over several lines, since a quoted field holds line breaks; the first is {self.first_span}")
        return notes


def separated_rows(place: str, columns: Columns, notes: TextNotes) -> Iterator[Row]:
    """Rows of a CSV or TSV file with a header. In TSV quotes are text, unless every name of the header is quoted. A CSV file whose header has none of
    the columns is tried with `;`, tabs and `|`; a first line `sep=;` is obeyed.

    Raises SourceFormatError where the file cannot be read any further, or names a column twice.
    """
    reader = None
    try:
        with open_place(place) as binary, _wide_fields():
            file = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            first = file.readline()
            if (match := re.fullmatch(r"sep=(.)\s*", first)) is not None:
                sign, first = match[1], file.readline()
            else:
                sign = "\t" if suffix_of(place) == ".tsv" else _delimiter(first, columns)
            if sign != ("\t" if suffix_of(place) == ".tsv" else ","):
                notes.delimiters[place] = sign
            bare = sign == "\t" and not _all_quoted(first, sign)
            reader = csv.reader(chain([first], file), delimiter=sign, strict=True, quoting=csv.QUOTE_NONE if bare else csv.QUOTE_MINIMAL)
            header = [name.strip() for name in next(reader, [])]
            require_distinct(place, columns, header)
            yield from _rows(place, reader, header, bare, notes)
    except UnicodeDecodeError:
        raise SourceFormatError(f"{place} is not UTF-8 ({undecodable(place)}). Save it as UTF-8.") from None
    except csv.Error as error:
        raise SourceFormatError(f"{place}, line {reader.line_num if reader else 1} is no well-formed CSV: {error}.") from None
    except OSError as error:
        raise SourceFormatError(f"{place} cannot be read ({error}).") from None


def _rows(place: str, reader: Any, header: Sequence[str], bare: bool, notes: TextNotes) -> Iterator[Row]:
    before = reader.line_num
    for row in reader:
        if reader.line_num > before + 1 and not bare:
            notes.spanning += 1
            notes.first_span = notes.first_span or f"line {before + 1} to {reader.line_num} of {place}"
        before = reader.line_num
        if bare:
            row = [_unquoted(value, notes) if value[:1] == '"' else value for value in row]
        if len(row) == len(header):
            yield dict(zip(header, row, strict=True))
        elif row and any(row):  # empty lines are passed over
            yield SampleError(f"{place}, line {reader.line_num}: the row has another number of fields than the header.")


def _unquoted(value: str, notes: TextNotes) -> str:
    """A field that only a writer of CSV can have made: quoted, with doubled quotes inside."""
    if _QUOTED.fullmatch(value) is None:
        return value
    notes.unquoted += 1
    return value[1:-1].replace('""', '"')


def _delimiter(first: str, columns: Columns) -> str:
    wanted = {*columns.image, *columns.captions}
    for sign in DELIMITERS:
        if wanted & {name.strip().strip('"').strip() for name in first.rstrip("\r\n").split(sign)}:
            return sign
    return ","


def _all_quoted(first: str, sign: str) -> bool:
    names = first.rstrip("\r\n").split(sign)
    return all(len(name) > 1 and name[0] == name[-1] == '"' for name in names)


@contextmanager
def _wide_fields() -> Iterator[None]:
    """The csv module's limit is of the whole process: it is raised while a file is read, and put back."""
    before = csv.field_size_limit(MAX_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def undecodable(place: str) -> str:
    """Where the first byte lies that is no UTF-8; a decoder of pieces cannot tell."""
    at = 0
    with open_place(place) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(UTF_16):
                return "it is UTF-16, as spreadsheets' 'Unicode text' is"
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {at + error.start}"
            at += len(line)
    return "at its end"


def json_rows(place: str) -> Iterator[Row]:
    """Objects of a JSON Lines file; empty lines are passed over. Raises SourceFormatError where the file cannot be read any further."""
    try:
        with open_place(place) as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(UTF_16):
                    raise SourceFormatError(f"{place} is UTF-16. Save it as UTF-8.")
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
