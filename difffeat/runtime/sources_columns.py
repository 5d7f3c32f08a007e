"""Which columns of a manifest, or keys of a JSON member, hold what, and what a row holds in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from difffeat.errors import SourceFormatError
from difffeat.runtime.sources_options import SourceOptions


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
    found = [value for name in names if (value := row.get(name)) is not None]
    return next(filter(_holds, found), found[0] if found else None)


def _holds(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isspace() and value != ""
    return any(map(_holds, value)) if isinstance(value, list | tuple) else value is not None


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
