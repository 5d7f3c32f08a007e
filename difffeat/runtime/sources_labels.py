"""Labels as a source writes them (names, class numbers, 0/1 vectors) to class names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from difffeat.errors import SampleError, SourceFormatError

SEPARATORS = "|;"


class LabelReader:
    """Turns label cells into tuples of class names; equal tuples are one object, so that a million rows stay small.

    **Arguments:** `classes` names in the order of their numbers, empty where nobody knows them; `multi_hot` whether lists of numbers are 0/1 vectors,
    None to let `look` decide; `separated` whether a string holds several labels, separated by `|` or `;`.
    """

    def __init__(self, classes: Sequence[str] = (), *, multi_hot: bool | None = None, separated: bool = False) -> None:
        self.classes, self._multi_hot, self._separated = tuple(classes), multi_hot, separated
        self._known, self._guessed = frozenset(self.classes), False
        self._same: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._texts: dict[str, tuple[str, ...]] = {}

    def look(self, cells: Sequence[Any]) -> None:
        """Decide by the first rows of a column whether its lists are 0/1 vectors: all as long as there are classes, of 0 and 1 alone."""
        if self._multi_hot is None:
            lists = [parts for cell in cells if cell is not None and (parts := self._parts(cell))]
            bits = all(len(parts) == len(self.classes) and all(_bit(part) is not None for part in parts) for parts in lists)
            self._multi_hot, self._guessed = bool(lists) and len(self.classes) > 1 and bits, True

    def read(self, cell: Any, where: str) -> tuple[str, ...] | None:
        """Names of a cell; None for no cell, and for −1 (as published test sets without labels write it).

        Raises SampleError for what is no label, SourceFormatError for one that the classes do not have.
        """
        if cell is None or (cell == -1 and isinstance(cell, int)):
            return None
        if isinstance(cell, str) and cell in self._texts:
            return self._texts[cell]
        parts = self._parts(cell)
        if self._guessed and not self._multi_hot:
            self._refuse_vector(parts, where)
        names = self._from_vector(parts) if self._multi_hot else tuple(dict.fromkeys(self._name(part, where) for part in parts))
        names = self._same.setdefault(names, names)
        if isinstance(cell, str):
            self._texts[cell] = names
        return names

    def _refuse_vector(self, parts: list[Any], where: str) -> None:
        """The first rows were no vectors of 0 and 1; what can only be one must not be read as class numbers."""
        if len(parts) == len(self.classes) > len(set(map(str, parts))) and all(_bit(part) is not None for part in parts):
            raise SourceFormatError(
                f"{where}: its labels look like a 0/1 vector, which those of earlier rows do not. Say what they are: --multi-hot or --no-multi-hot."
            )

    def _parts(self, cell: Any) -> list[Any]:
        if isinstance(cell, str):
            if not self._separated:
                return [cell] if cell.strip() else []
            return [part for text in cell.replace(SEPARATORS[1], SEPARATORS[0]).split(SEPARATORS[0]) if (part := text.strip())]
        return list(cell) if isinstance(cell, list | tuple) else [cell]

    def _from_vector(self, parts: list[Any]) -> tuple[str, ...]:
        if parts and len(parts) != len(self.classes):
            raise SampleError(f"its labels are a vector of {len(parts)} numbers, and there are {len(self.classes)} classes.")
        bits = [_bit(part) for part in parts]
        if None in bits:
            raise SampleError(f"its label vector holds {parts[bits.index(None)]!r}, neither 0 nor 1.")
        return tuple(name for name, bit in zip(self.classes, bits, strict=False) if bit)

    def _name(self, part: Any, where: str) -> str:
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise SampleError(f"'labels' must be names or class numbers, found {part!r}.")
        text = str(part).strip()
        if not self.classes or text in self._known:
            return text
        if text.isdecimal() and int(text) < len(self.classes):
            return self.classes[int(text)]
        raise SourceFormatError(
            f"{where}: label {text!r} is none of the {len(self.classes)} classes ({', '.join(self.classes[:4])} ...). "
            "Mend it, or pass --classes FILE with all names."
        )


def _bit(value: Any) -> bool | None:
    """True or False for 1 and 0 of any type, None for all else."""
    if isinstance(value, str):
        return {"0": False, "1": True}.get(value.strip())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None
