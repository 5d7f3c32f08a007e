"""Labels as a source writes them (names, class numbers, 0/1 vectors) to class names."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from difffeat.errors import SampleError, SourceFormatError
from difffeat.runtime.samples import NO_TEXT, is_number, is_text
from difffeat.runtime.sources_values import bit, is_null, text_list, whole
from difffeat.runtime.sources_voc import CLASSES

SEPARATORS = "|;"
NONE = "-1"
"""How test sets without labels write that there is none."""
VOC = frozenset(CLASSES)
"""The classes whose tables hold −1 where a class is absent and 0 where it is difficult to see."""

Names = tuple[str, ...]
Read = tuple[Names | None, Names]
"""Names of the classes that a row has, None where nobody knows; and of those of which alone nobody knows."""


class LabelReader:
    """Turns label cells into tuples of class names; equal tuples are one object, so that a million rows stay small.

    **Arguments:** `classes` names in the order of their numbers, empty where nobody knows them; `multi_hot` whether lists of numbers are 0/1 vectors,
    None to let `look` decide; `named` what named the classes, for people; `columns` whether each class has a column of its own.
    """

    def __init__(self, classes: Sequence[str] = (), *, multi_hot: bool | None = None, named: str = "", columns: bool = False) -> None:
        self.classes = tuple(unicodedata.normalize("NFC", name) for name in classes)
        self._multi_hot, self.named, self._columns = multi_hot, named, columns
        self._known, self._doubtful = frozenset(self.classes), False
        self._absent = 0
        """What a vector holds where a class is absent: 0, or −1 in tables of VOC and of −1 and 1 alone."""
        self._cells, self._open = 0, 0
        self.counts: Counter[str] = Counter()
        """How many cells were −1 (`unknown`), nothing (`empty`), texts that mean nothing (`null`), split at a separator, or lists in text."""
        self.nulls: Counter[str] = Counter()
        self._same: dict[Read, Read] = {}
        self._texts: dict[str, tuple[Read, str]] = {}

    def look(self, cells: Sequence[Any], where: str = "the source") -> None:
        """Decide by the first rows of a column whether its lists are 0/1 vectors: all as long as there are classes, of 0, 1 and −1 (unknown) alone.
        Where vectors were said to be there, but no classes, the classes are called by their numbers, 0 to one less than the vectors are long.

        Raises SourceFormatError naming `where`, for such vectors of several lengths.
        """
        lists = [parts for cell in cells if (parts := self._looked_at(cell))]
        lengths = {len(parts) for parts in lists}
        if self._multi_hot and not self.classes and lists:
            self._number_classes(lengths, where)
        if self._columns:
            self._look_at_signs(lists)
        if self._multi_hot is not None:
            return
        bits = len(lengths) == 1 and max(lengths) > 1 and all(bit(part) is not None for parts in lists for part in parts)
        self._multi_hot = bits and lengths == {len(self.classes)}
        self._doubtful = not self._multi_hot and (bool(self.classes) or bits or not lists or (len(lengths) == 1 and _hold_shares(lists)))

    def _looked_at(self, cell: Any) -> list[Any]:
        if self._is_none(cell):
            return []
        try:
            return self._parts(cell)[0]
        except SampleError:
            return []  # told when its row is read

    def _look_at_signs(self, lists: Sequence[Sequence[Any]]) -> None:
        """Whether −1 in columns of classes means that a class is absent: in tables of VOC's classes, and where there is nothing but 1 and −1."""
        values = [part for parts in lists for part in parts]
        signs = Counter(sign for part in values if not is_null(part) and (sign := bit(part)) is not None)
        voc = self._known >= VOC and signs[-1] > signs[0]
        if signs[-1] and signs[1] and (voc or signs[-1] + signs[1] == len(values)):
            self._absent = -1

    def _number_classes(self, lengths: set[int], where: str) -> None:
        if len(lengths) > 1:
            raise SourceFormatError(
                f"{where}: with --multi-hot its labels are 0/1 vectors, and their lengths are {', '.join(map(str, sorted(lengths)[:4]))}. "
                "Give them one length, or name the classes with --classes FILE."
            )
        self.classes, self.named = tuple(map(str, range(max(lengths)))), "their places in the 0/1 vectors"
        self._known = frozenset(self.classes)

    def read(self, cell: Any, where: str) -> Read:
        """Names of a cell, and names of classes of which alone nobody knows.

        The names are None for no cell, for what data frames write for nothing, and for −1 as a number or text (as published test sets without labels
        write it).

        Raises SampleError for what is no label, SourceFormatError for one that the classes do not have, and for a list that can only be a 0/1 vector
        where it would be read as class numbers: where the first rows are none; and where they are all of one length and of 0 and 1 alone, and nobody
        named the classes.
        """
        if isinstance(cell, str) and cell in self._texts:
            read, kind = self._texts[cell]
        else:
            read, kind = self._read(cell, where)
            read = self._same.setdefault(read, read)
            if isinstance(cell, str):
                self._texts[cell] = read, kind
        if kind:
            self.counts[kind] += 1
            if kind == "null":
                self.nulls[_told(cell)] += 1
        if self._multi_hot and read[0] is not None:
            self._cells += len(self.classes)
            self._open += len(read[1])
        return read

    def _read(self, cell: Any, where: str) -> tuple[Read, str]:
        if self._is_none(cell):
            return (None, ()), "" if cell is None else "unknown" if not is_null(_alone(cell)) else "null" if _told(cell) else "empty"
        parts, kind = self._parts(cell)
        if self._multi_hot and not self.classes and parts:
            self._number_classes({len(parts)}, where)
        self._refuse_vector(parts, where)
        if self._multi_hot:
            return self._from_vector(parts, where), kind
        names = (self._name(part, where) for part in parts if not is_null(part) or part in self._known)
        return (tuple(dict.fromkeys(names)), ()), kind

    def _is_none(self, cell: Any) -> bool:
        """Whether a cell says that nobody knows its labels: nothing, or −1 alone, where no class is called so."""
        alone = _alone(cell)
        if isinstance(alone, list | tuple | dict) or (isinstance(alone, str) and alone.strip() in self._known):
            return False
        return is_null(alone) or (not isinstance(alone, bool) and str(whole(alone)) == NONE and NONE not in self._known)

    def _refuse_vector(self, parts: list[Any], where: str) -> None:
        """What can only be a 0/1 vector must not be read as class numbers, whatever the first rows were."""
        if not self._doubtful or len(parts) < 2 or None in (bits := list(map(bit, parts))):
            return
        distinct = len(set(bits)) == len(bits)  # as class numbers no list has one twice
        if not self.classes and not (distinct and -1 in bits):
            raise SourceFormatError(
                f"{where}: its labels look like 0/1 vectors, and nobody names their {len(parts)} classes. Name them with --classes FILE, one a line; "
                f"or say --multi-hot to call them 0 to {len(parts) - 1}, --no-multi-hot if the numbers are classes."
            )
        if len(parts) == len(self.classes) and not distinct:
            raise SourceFormatError(
                f"{where}: its labels look like a 0/1 vector, which those of earlier rows do not. Say what they are: --multi-hot or --no-multi-hot."
            )

    def _parts(self, cell: Any) -> tuple[list[Any], str]:
        """The labels of a cell, and what is counted of how they were written."""
        if isinstance(cell, bytes):
            cell = cell.decode("utf-8", "surrogateescape")
        if isinstance(cell, str):
            text = _composed(cell)
            if text in self._known:
                return [text], ""
            if text[:2] in ("b'", 'b"') and text[-1:] == text[1]:
                return [text[2:-1]], ""  # bytes that Python wrote as text
            if (found := text_list(text)) is not None:
                return found, "list"
            pieces = text.replace(SEPARATORS[1], SEPARATORS[0]).split(SEPARATORS[0])
            return [part for piece in pieces if (part := piece.strip())], "split" if len(pieces) > 1 else ""
        return (list(cell) if isinstance(cell, list | tuple | set) else [cell]), ""

    def _from_vector(self, parts: list[Any], where: str) -> Read:
        if parts and len(parts) != len(self.classes):
            raise SampleError(f"its labels are a vector of {len(parts)} numbers, and there are {len(self.classes)} classes.")
        bits = [bit(part) for part in parts]
        if None in bits:
            raise SampleError(f"its label vector holds {parts[bits.index(None)]!r}, neither 0 nor 1.")
        if self._absent == -1 and self._known >= VOC:  # 0 is what is difficult to see
            bits = [own if own == 1 else -1 if own == 0 or is_null(part) else 0 for own, part in zip(bits, parts, strict=True)]
        elif self._absent == -1:
            if 0 in bits:
                raise SourceFormatError(
                    f"{where}: {self.classes[bits.index(0)]!r} is 0, and in earlier rows the classes are 1 and -1 alone. Write 0 for absent, "
                    "-1 or nothing where nobody knows."
                )
            bits = [-1 if is_null(part) else max(own or 0, 0) for own, part in zip(bits, parts, strict=True)]
        if bits and set(bits) == {-1}:
            return None, ()
        paired = list(zip(self.classes, bits, strict=False))
        return tuple(name for name, own in paired if own == 1), tuple(name for name, own in paired if own == -1)

    def _name(self, part: Any, where: str) -> str:
        if isinstance(part, str):
            part = _composed(part)
            if part in self._known:
                return part
        part = whole(part.decode("utf-8", "surrogateescape") if isinstance(part, bytes) else part)
        if not isinstance(part, str | int):
            raise SampleError(f"'labels' must be names or class numbers, found {part!r}.")
        text = str(part)
        if text in self._known:
            return text
        if not is_text(text):
            raise SampleError(f"its label {text!r} {NO_TEXT}. Save it as UTF-8.")
        if not self.classes:
            if text == NONE:
                raise SampleError("its labels hold -1, which means that there are none, beside others. Leave out one or the other.")
            return text
        number = {"True": "1", "False": "0"}.get(text, text)
        if is_number(number) and int(number) < len(self.classes):
            return self.classes[int(number)]
        raise SourceFormatError(
            f"{where}: label {text[:80]!r} is none of the {len(self.classes)} classes ({', '.join(self.classes[:4])} ...). "
            "Mend it, or pass --classes FILE with all names."
        )

    def notes(self) -> list[str]:
        """What people should know of how the cells were read, each a sentence."""
        counts, notes = self.counts, []
        if self.nulls:
            spelt = ", ".join(f"{text!r}" for text, _ in self.nulls.most_common(4))
            notes.append(
                f"{counts['null']} labels are written as nothing ({spelt}) and read as unknown; a class of that name is named with --classes FILE"
            )
        if counts["empty"]:
            notes.append(f"{counts['empty']} empty labels are read as unknown; write [] where a row has none of the classes")
        if counts["split"]:
            notes.append(f"{counts['split']} labels are separated at | or ;")
        if counts["list"]:
            notes.append(f"{counts['list']} labels are lists written as text, and read as lists")
        if self._absent == -1:
            meant = "0 is difficult to see, and left open" if self._known >= VOC else "there is no 0"
            notes.append(f"-1 says that a class is absent, as in tables of {'VOC' if self._known >= VOC else '1 and -1'}: {meant}")
        if self._open:
            notes.append(
                f"{self._open} of {self._cells} cells of the label vectors are unknown, each for its class alone: no probe trains or scores on them"
            )
        return notes

    @property
    def form(self) -> str:
        """How the cells are read, as words that follow where they stand; empty for plain names."""
        return "0/1 vectors" if self._multi_hot and not self._columns else ""


def _composed(text: str) -> str:
    """Without spaces at the ends, in the one Unicode form that ids and classes have."""
    text = text.strip()
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _alone(cell: Any) -> Any:
    """The one value of a cell, whether it stands in a list or not."""
    return cell[0] if isinstance(cell, list | tuple) and len(cell) == 1 else cell


def _hold_shares(lists: Iterable[Sequence[Any]]) -> bool:
    """Whether numbers with a fraction are among them: shares or scores of classes, beside which 0 and 1 are no class numbers."""
    return any(isinstance(part, float) and not is_null(part) and whole(part) is part for parts in lists for part in parts)


def _told(cell: Any) -> str:
    """A text that means nothing, as it was written; empty for what is nothing."""
    alone = _alone(cell)
    return alone.strip() if isinstance(alone, str) else "" if alone is None else str(alone)


def label_notes(readers: Iterable[LabelReader], classes: Sequence[str], name: str) -> tuple[str, ...]:
    """Sentences of how labels were read; one counts the labels −1 that were read as none.

    Raises SourceFormatError where 1 is the only other label and nobody named the classes: then −1 is more likely one than none.
    """
    listed = list(readers)
    unknown, named = sum(reader.counts["unknown"] for reader in listed), any(reader.classes for reader in listed)
    notes = tuple(dict.fromkeys(note for reader in listed for note in reader.notes()))
    if not unknown:
        return notes
    if tuple(classes) == ("1",) and not named:
        raise SourceFormatError(
            f"{name}: its labels are 1 and -1, and -1 alone means that nobody knows a label. If they are two classes, name both with --classes FILE "
            "(a line with -1, a line with 1); if there is one, name that."
        )
    return (f"{unknown} labels -1 are read as unknown, as published test sets write it; a class of that name is named with --classes FILE", *notes)
