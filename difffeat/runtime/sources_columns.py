"""Which columns of a manifest, or keys of a JSON member, hold what, and what a row holds in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from difffeat.errors import SourceFormatError
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.sources_values import is_blank, is_null, text_list, whole

SEVERAL = "captions"
"""The column whose text holds several captions, separated by `|`, in every format; in any other one a text is one caption."""


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


def require_columns(place: str, columns: Columns, present: Iterable[str]) -> None:
    """Raises SourceFormatError for a file that has neither images nor captions."""
    present = list(present)
    if not {*columns.image, *columns.captions} & set(present):
        raise SourceFormatError(
            f"{place} has no column {columns.image[0]!r}, {' or '.join(map(repr, columns.captions[::-1]))}; its columns are: "
            f"{', '.join(present) or 'none'}. Rename the one that holds them, or name it with --image-column or --caption-column."
        )


def require_distinct(place: str, columns: Columns, present: Sequence[str]) -> None:
    """Raises SourceFormatError for a file in which a column that is read stands twice; of two others of one name nobody wants either."""
    twice = next((name for name in columns.all if present.count(name) > 1), None)
    if twice is not None:
        raise SourceFormatError(
            f"{place} has {present.count(twice)} columns called {twice!r}, of which one would hide the others. Rename or remove all but one."
        )


def first_filled(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these columns that holds something; where none does, the first that is no null (an empty list or text)."""
    return named_value(row, names)[1]


def named_value(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """The same with the name of its column, which is empty where there is none."""
    first: tuple[str, Any] = ("", None)
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if _holds(value):
            return name, value
        first = first if first[1] is not None else (name, value)
    return first


def _holds(value: Any) -> bool:
    return any(map(_holds, value)) if isinstance(value, list | tuple) else not is_null(value)


def read_captions(value: Any, column: str = "") -> tuple[tuple[str, ...], str | None, str]:
    """Captions of a cell, what is wrong with it, and how they were written where that is to be counted (`split`, `list`, `null`)."""
    if isinstance(value, str):
        return _captions_of_text(value, column)
    if is_null(value):
        return (), None, ""
    parts = value if isinstance(value, list | tuple) else [whole(value)]
    held = [part for part in parts if not is_blank(part)]
    if isinstance(value, bool | dict) or not all(isinstance(part, str | int) for part in held):
        return (), f"'captions' must be a string or a list of strings, found {str(value)[:80]}.", ""
    return tuple(str(part).strip() for part in held), None, ""


def _captions_of_text(value: str, column: str) -> tuple[tuple[str, ...], str | None, str]:
    text, kind = value.strip(), ""
    if not text:
        return (), None, ""
    if is_null(text):
        return (), None, "null"
    parts: list[Any] = [text]
    if (found := text_list(text, strict=True)) is not None:
        parts, kind = found, "list"
    elif column == SEVERAL and "|" in text:
        parts, kind = text.split("|"), "split"
    return tuple(own for part in parts if (own := part.strip())), None, kind
