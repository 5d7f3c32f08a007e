"""Labels as a source writes them (names, class numbers, 0/1 vectors) to class names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from difffeat.errors import SampleError, SourceFormatError
from difffeat.runtime.samples import NO_TEXT, is_number, is_text

SEPARATORS = "|;"
NONE = "-1"
"""How test sets without labels write that there is none."""


class LabelReader:
    """Turns label cells into tuples of class names; equal tuples are one object, so that a million rows stay small.

    **Arguments:** `classes` names in the order of their numbers, empty where nobody knows them; `multi_hot` whether lists of numbers are 0/1 vectors,
    None to let `look` decide; `separated` whether a string holds several labels, separated by `|` or `;`.
    """

    def __init__(self, classes: Sequence[str] = (), *, multi_hot: bool | None = None, separated: bool = False) -> None:
        self.classes, self._multi_hot, self._separated = tuple(classes), multi_hot, separated
        self._known, self._doubtful, self.unknown = frozenset(self.classes), False, 0
        self._same: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._texts: dict[str, tuple[str, ...]] = {}

    def look(self, cells: Sequence[Any], where: str = "the source") -> None:
        """Decide by the first rows of a column whether its lists are 0/1 vectors: all as long as there are classes, of 0 and 1 alone. Where vectors
        were said to be there, but no classes, the classes are called by their numbers, 0 to one less than the vectors are long.

        Raises SourceFormatError naming `where`, for such vectors of several lengths.
        """
        lists = [parts for cell in cells if not self._is_none(cell) and (parts := self._parts(cell))]
        lengths = {len(parts) for parts in lists}
        if self._multi_hot and not self.classes and lists:
            self._number_classes(lengths, where)
        if self._multi_hot is not None:
            return
        bits = len(lengths) == 1 and max(lengths) > 1 and all(_bit(part) is not None for parts in lists for part in parts)
        self._multi_hot = bits and lengths == {len(self.classes)}
        self._doubtful = not self._multi_hot and (bool(self.classes) or bits or not lists)

    def _number_classes(self, lengths: set[int], where: str) -> None:
        if len(lengths) > 1:
            raise SourceFormatError(
                f"{where}: with --multi-hot its labels are 0/1 vectors, and their lengths are {', '.join(map(str, sorted(lengths)[:4]))}. "
                "Give them one length, or name the classes with --classes FILE."
            )
        self.classes = tuple(map(str, range(max(lengths))))
        self._known = frozenset(self.classes)

    def read(self, cell: Any, where: str) -> tuple[str, ...] | None:
        """Names of a cell; None for no cell, and for −1 as a number or text (as published test sets without labels write it).

        Raises SampleError for what is no label, SourceFormatError for one that the classes do not have, and for a list that can only be a 0/1 vector
        where it would be read as class numbers: where the first rows are none; and where they are all of one length and of 0 and 1 alone, one of them
        has a value twice, and nobody named the classes.
        """
        if isinstance(cell, str) and cell in self._texts:
            return self._texts[cell]
        if self._is_none(cell):
            self.unknown += cell is not None
            return None
        parts = self._parts(cell)
        if self._multi_hot and not self.classes and parts:
            self._number_classes({len(parts)}, where)
        self._refuse_vector(parts, where)
        names = self._from_vector(parts) if self._multi_hot else tuple(dict.fromkeys(self._name(part, where) for part in parts))
        names = self._same.setdefault(names, names)
        if isinstance(cell, str):
            self._texts[cell] = names
        return names

    def _is_none(self, cell: Any) -> bool:
        """Whether a cell says that nobody knows its labels: nothing, or −1 alone where no class is called so."""
        alone = cell[0] if isinstance(cell, list | tuple) and len(cell) == 1 else cell
        return cell is None or (isinstance(alone, int | str) and str(alone).strip() == NONE and NONE not in self._known)

    def _refuse_vector(self, parts: list[Any], where: str) -> None:
        """What can only be a 0/1 vector must not be read as class numbers, whatever the first rows were."""
        if not self._doubtful or not 1 < len(parts) > len(set(map(str, parts))) or None in map(_bit, parts):
            return
        if not self.classes:
            raise SourceFormatError(
                f"{where}: its labels look like 0/1 vectors, and nobody names their {len(parts)} classes. Name them with --classes FILE, one a line; "
                f"or say --multi-hot to call them 0 to {len(parts) - 1}, --no-multi-hot if the numbers are classes."
            )
        if len(parts) == len(self.classes):
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
        if text in self._known:
            return text
        if not is_text(text):
            raise SampleError(f"its label {text!r} {NO_TEXT}. Save it as UTF-8.")
        if not self.classes:
            if text == NONE:
                raise SampleError("its labels hold -1, which means that there are none, beside others. Leave out one or the other.")
            return text
        if is_number(text) and int(text) < len(self.classes):
            return self.classes[int(text)]
        raise SourceFormatError(
            f"{where}: label {text[:80]!r} is none of the {len(self.classes)} classes ({', '.join(self.classes[:4])} ...). "
            "Mend it, or pass --classes FILE with all names."
        )


def unknown_notes(readers: Iterable[LabelReader], classes: Sequence[str], name: str) -> tuple[str, ...]:
    """A sentence that counts the labels −1 that were read as none; no sentence without any.

    Raises SourceFormatError where 1 is the only other label and nobody named the classes: then −1 is more likely one than none.
    """
    unknown, named = sum(reader.unknown for reader in readers), any(reader.classes for reader in readers)
    if not unknown:
        return ()
    if tuple(classes) == ("1",) and not named:
        raise SourceFormatError(
            f"{name}: its labels are 1 and -1, and -1 alone means that nobody knows a label. If they are two classes, name both with --classes FILE "
            "(a line with -1, a line with 1); if there is one, name that."
        )
    return (f"{unknown} labels -1 are read as unknown, as published test sets write it; a class of that name is named with --classes FILE",)


def _bit(value: Any) -> bool | None:
    """True or False for 1 and 0 of any type, None for all else."""
    if isinstance(value, str):
        return {"0": False, "1": True}.get(value.strip())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None
