"""Pascal VOC 2007 and 2012 as classification data sets: one list of images a split, and one of labels a class."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from difffeat.errors import SourceError, SourceFormatError
from difffeat.runtime.blobs import FileBlob
from difffeat.runtime.samples import Sample, Source, broken_notes, broken_sample
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.understood import Understood

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LISTS = Path("ImageSets/Main")
YEAR = re.compile(r"VOC\d{4}")


def is_voc(year: int, root: Path) -> bool:
    """Whether a folder is this year's, or holds it, alone or in `VOCdevkit`."""
    base = _base(year, root)
    return base is not None and base.name == f"VOC{year}"


def read_voc(year: int, root: Path, split: str, options: SourceOptions, name: str) -> Source:
    """The images of `ImageSets/Main/<split>.txt`, in `JPEGImages`, with the labels of `<class>_<split>.txt`: lines of an image's name and 1, −1 or 0.

    0 says that a class is there but difficult to see: whether the sample has it is unknown, as in the devkit's own evaluation, which leaves such
    images out for that class; a note tells how many there are. Without any list of labels (the test split of 2012 was published so) the samples have
    none; a line that is none of these three sends its image to quarantine. Ids are the images' names.

    Raises SourceError (a file that is not there), SourceFormatError.
    """
    base = _base(year, root)
    if base is None:
        raise SourceError(f"{name} has no {LISTS} of VOC{year}. Unpack the data set there, or pass the folder VOCdevkit or VOC{year}.")
    names = [line[0] for line in _lines(base / LISTS / f"{split}.txt")]
    found = [label for label in CLASSES if (base / LISTS / f"{label}_{split}.txt").is_file()]
    if found and len(found) < len(CLASSES):
        missing = next(label for label in CLASSES if label not in found)
        raise SourceError(f"{base / LISTS} lacks {missing}_{split}.txt, of {len(CLASSES)} lists. Unpack the data set again.")
    labels: dict[str, list[str]] = defaultdict(list)
    problems: dict[str, str] = {}
    difficult: dict[str, list[str]] = defaultdict(list)
    for label in found:
        path = base / LISTS / f"{label}_{split}.txt"
        values = {line[0]: " ".join(line[1:]) for line in _lines(path)}
        for identity in names:
            value = values.get(identity, "no line")
            if value in ("0", "1"):
                (labels if value == "1" else difficult)[identity].append(label)
            elif value != "-1":
                problems[identity] = f"{path.name} has {value!r} for it, which is none of 1, -1 and 0. Mend the list."
    samples = [
        broken_sample(identity, f"{identity}.jpg", problems[identity])
        if identity in problems
        else Sample(
            identity,
            FileBlob(str(base / "JPEGImages"), f"{identity}.jpg"),
            f"{identity}.jpg",
            labels=tuple(labels[identity]) if found else None,
            unknown=tuple(difficult[identity]),
        )
        for identity in names
    ]
    total = sum(map(len, difficult.values()))
    noted = (f"{total} labels are marked as difficult: they are unknown, and neither trained nor scored",) if total else ()
    understood = Understood(
        form=f"VOC{year}, split {split}",
        ids=f"names in {LISTS}/{split}.txt",
        labels=f"{LISTS}/<class>_{split}.txt" if found else f"none (no {LISTS}/<class>_{split}.txt)",
        classes="VOC's 20 classes" if found else "",
    )
    return Source(name, tuple(samples), CLASSES if found else (), notes=(*noted, *broken_notes(samples)), understood=understood)


def _base(year: int, root: Path) -> Path | None:
    """The folder that holds `ImageSets` and `JPEGImages`; one that is called as another year is not it."""
    own = root.absolute()
    places = [root / "VOCdevkit" / f"VOC{year}", root / f"VOC{year}", *([own] if own.name == f"VOC{year}" or not YEAR.fullmatch(own.name) else [])]
    return next((place for place in places if (place / LISTS).is_dir()), None)


def _lines(path: Path) -> list[list[str]]:
    """The words of each line that has some."""
    try:
        return [words for line in path.read_text(encoding="utf-8").splitlines() if (words := line.split())]
    except FileNotFoundError:
        raise SourceError(f"{path} is not there. Unpack the data set again, or choose another --split.") from None
    except (OSError, ValueError) as error:
        raise SourceFormatError(f"{path} cannot be read ({error}). Unpack the data set again.") from None
