"""A sample and a source: what every reader of sources makes, and all that the extraction knows of them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from difffeat.errors import DuplicateSample, EmptySource, SourceFormatError
from difffeat.runtime.blobs import Blob, UnreadableBlob
from difffeat.runtime.understood import Understood, passed_over

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
NO_TEXT = "cannot be written as UTF-8 (lone surrogates, or bytes of another encoding)"
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample. A million of them take about half a gigabyte; they can be pickled, and so sent to a worker.

    **Fields:** `id` unique in its source; `image` where its bytes lie, or None; `locator` that place as a person would name it; `captions`;
    `labels` class names, None where the source has none; `unknown` names of classes of which alone nobody knows whether the sample has them (never
    those of `labels`); `problem` what is wrong with its captions, told in quarantine when they are needed (what is
    wrong with its image, `image` tells when it is read).
    """

    id: str
    image: Blob | None = None
    locator: str | None = None
    captions: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    problem: str | None = None
    unknown: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the image; −1 where there is none, or where nobody knows before it is read (URLs, cells of a table)."""
        return -1 if self.image is None else self.image.size


def broken_sample(identity: str, locator: str, reason: str) -> Sample:
    """A row that cannot be read: it keeps its place, and goes to quarantine with this reason in an image store and in a text store."""
    return Sample(identity, UnreadableBlob(reason), locator, problem=reason)


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8. File names that are not UTF-8 cannot, nor can halves of JSON's surrogate pairs."""
    return value.isascii() or _SURROGATE.search(value) is None


def escaped(value: str) -> str:
    """The string with each lone surrogate written out, as a backslash, `u` and four digits."""
    return value if is_text(value) else value.encode("utf-8", "backslashreplace").decode()


def storable(sample: Sample) -> Sample:
    """The sample itself where all its texts can be written as UTF-8. Captions that cannot become its problem; an id, a place or a label that cannot
    make it a broken sample, whose id is the old one escaped, with a digest that keeps it apart from an id that is written so.
    """
    if is_text(f"{sample.id}{sample.locator}{sample.problem}{''.join(sample.captions)}{''.join(sample.labels or ())}{''.join(sample.unknown)}"):
        return sample
    texts = {"id": (sample.id,), "image's name": (sample.locator or "",), "label": (*(sample.labels or ()), *sample.unknown)}
    spoiled = [name for name, values in texts.items() if not all(map(is_text, values))]
    if not spoiled:
        captions = sample.captions if all(map(is_text, sample.captions)) else ()
        return replace(sample, captions=captions, problem=escaped(sample.problem or f"its captions {NO_TEXT}. Save them as UTF-8."))
    identity = sample.id
    if not is_text(identity):
        identity = f"{escaped(identity)}~{hashlib.sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    reason = sample.problem if isinstance(sample.image, UnreadableBlob) else None
    reason = reason or f"its {' and its '.join(spoiled)} {NO_TEXT}. Rename the file, or mend the row."
    return broken_sample(identity, escaped(sample.locator or sample.id), escaped(reason))


def composed(sample: Sample) -> Sample:
    """The sample itself where its id and labels are composed Unicode (NFC); else one whose are: file systems write the same name in several forms."""
    texts = (sample.id, *(sample.labels or ()), *sample.unknown)
    if all(text.isascii() or unicodedata.is_normalized("NFC", text) for text in texts):
        return sample
    identity, *names = (unicodedata.normalize("NFC", text) for text in texts)
    count = len(sample.labels or ())
    labels = None if sample.labels is None else tuple(dict.fromkeys(names[:count]))
    return replace(sample, id=identity, labels=labels, unknown=tuple(names[count:]))


def broken_notes(samples: Iterable[Sample]) -> tuple[str, ...]:
    """A sentence that counts the rows that cannot be read and gives the first one's reason; none where all can."""
    broken = [sample for sample in samples if isinstance(sample.image, UnreadableBlob)]
    if not broken:
        return ()
    return (f"{len(broken)} rows cannot be read and will be in quarantine; the first is {broken[0].locator}: {broken[0].problem}",)


@dataclass(frozen=True)
class Source:
    """All samples in order.

    **Fields:** `name` what the user gave; `samples`; `classes` of the labels, in the order of the multi-hot columns (empty without labels);
    `ignored` how many files of each suffix were passed over, and hidden ones; `notes` what else a reader wants known about the listing, each a
    sentence; `understood` where ids, labels, classes and captions come from.

    Samples whose texts cannot be written as UTF-8 are taken as `storable` makes them, and counted in a note.

    Raises EmptySource, DuplicateSample, SourceFormatError (a class name that cannot be written as UTF-8).
    """

    name: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...] = ()
    ignored: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()
    understood: Understood = field(default_factory=Understood)

    def __post_init__(self) -> None:
        if not self.samples:
            passed = f" (passed over: {passed_over(self.ignored)})" if self.ignored else ""
            raise EmptySource("; ".join((f"{self.name} holds no samples{passed}", *self.notes)) + f". Accepted images: {', '.join(IMAGE_SUFFIXES)}.")
        self._make_storable()
        object.__setattr__(self, "samples", tuple(map(composed, self.samples)))
        if len(set(self.classes)) < len(self.classes):
            name = next(name for name, count in Counter(self.classes).items() if count > 1)
            raise SourceFormatError(f"{self.name}: two classes are called {name!r}. Rename one of them, or make them one class.")
        object.__setattr__(self, "classes", tuple(dict.fromkeys(unicodedata.normalize("NFC", name) for name in self.classes)))
        if len({sample.id for sample in self.samples}) < len(self.samples):
            counts = Counter(sample.id for sample in self.samples)
            twice = [name for name, count in counts.items() if count > 1]
            where = ", ".join(s.locator or "(no image)" for s in self.samples if s.id == twice[0])
            where = where if len(where) < 400 else f"{where[:400]} ..."
            raise DuplicateSample(
                f"{self.name}: {len(twice)} ids occur more than once, the first is {twice[0]!r} ({where}). Rename the files or give ids."
            )

    def _make_storable(self) -> None:
        samples = tuple(map(storable, self.samples))
        changed = [new for old, new in zip(self.samples, samples, strict=True) if new is not old]
        if changed:
            note = f"the texts of {len(changed)} samples cannot be written as UTF-8; the first is {changed[0].id}: {changed[0].problem}"
            object.__setattr__(self, "samples", samples)
            object.__setattr__(self, "notes", (*map(escaped, self.notes), note))
        if (spoiled := next((name for name in self.classes if not is_text(name)), None)) is not None:
            raise SourceFormatError(f"{self.name}: the class name {spoiled!r} {NO_TEXT}. Mend it where the classes are named.")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def has_images(self) -> bool:
        """Whether any sample has an image; rows that could not be read do not count."""
        return any(sample.image is not None and not isinstance(sample.image, UnreadableBlob) for sample in self.samples)

    @property
    def has_captions(self) -> bool:
        """Whether any sample has a caption, or one that cannot be read; rows that could not be read as a whole do not count."""
        return any(sample.captions or (sample.problem and not isinstance(sample.image, UnreadableBlob)) for sample in self.samples)


def multi_hot_classes(samples: Iterable[Sample]) -> tuple[str, ...]:
    """All class names that occur, sorted (numbers as numbers); empty where no sample has labels."""
    found = {unicodedata.normalize("NFC", label) for sample in samples for label in (*(sample.labels or ()), *sample.unknown)}
    return tuple(sorted(found, key=(lambda name: (int(name), name)) if all(map(is_number, found)) else None))


def is_number(name: str) -> bool:
    """Whether a label's text can be a class number: Python refuses to read numbers of thousands of digits."""
    return name.isdecimal() and len(name) < 20
