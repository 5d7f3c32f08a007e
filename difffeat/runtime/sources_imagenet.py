"""ImageNet and Tiny ImageNet in their published forms: class folders of WordNet ids, and the files that name them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from difffeat.errors import SourceError, SourceFormatError
from difffeat.runtime.blobs import FileBlob
from difffeat.runtime.listing import list_files, suffix_of_name
from difffeat.runtime.samples import IMAGE_SUFFIXES, Sample, Source
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.understood import Understood

WNID = re.compile(r"n\d{8}")
KAGGLE = Path("ILSVRC/Data/CLS-LOC")
MAPPING = "LOC_synset_mapping.txt"


def is_imagenet(root: Path) -> bool:
    """Whether this is the root of the ILSVRC2012 download with its mapping."""
    return (root / MAPPING).is_file()


def is_tiny_imagenet(root: Path) -> bool:
    """Whether this is the root of tiny-imagenet-200."""
    return (root / "wnids.txt").is_file() and (root / "val" / "val_annotations.txt").is_file()


def read_imagenet(root: Path, split: str, options: SourceOptions, name: str) -> Source:
    """ILSVRC2012 classification: `<split>/<wnid>/*.JPEG`, as torchvision and most papers lay it out, or the download with
    `ILSVRC/Data/CLS-LOC/<split>`, where `val` is one flat folder whose labels stand in `LOC_val_solution.csv`; `test` has none.

    Classes are in the order of their WordNet ids. Where `words.txt` or `LOC_synset_mapping.txt` lies in the root they are called by their words, with
    the WordNet id behind words that two classes share ("crane (n02012849)"). Ids of samples are file names without suffix.

    Raises SourceError, SourceFormatError.
    """
    folder = (root / KAGGLE if (root / KAGGLE).is_dir() else root) / split
    words = _words(root)
    files, left = _images(folder, name)
    wnids = sorted({file.partition("/")[0] for file in files if WNID.fullmatch(file.partition("/")[0])})
    known = sorted(words) if (root / MAPPING).is_file() else wnids
    solution = root / f"LOC_{split}_solution.csv"
    if wnids:
        labels = {file: file.partition("/")[0] for file in files}
    elif solution.is_file():
        labels = _solution(solution, files)
    elif split == "test":
        labels = {}
    else:
        raise SourceError(f"{folder} has no folders of WordNet ids, and {solution} is not there to name the classes. Get either.")
    understood = Understood(
        form=f"ImageNet, split {split}",
        ids="file names without suffix",
        labels="folders of WordNet ids" if wnids else solution.name if labels else "none (the test split has none)",
        classes=_named(root, words),
    )
    return _source(name, folder, files, labels, sorted({*known, *labels.values()}), words, left, understood)


def read_tiny_imagenet(root: Path, split: str, options: SourceOptions, name: str) -> Source:
    """tiny-imagenet-200: `train/<wnid>/images/*.JPEG`, `val/images/*.JPEG` with labels in `val/val_annotations.txt` (tab-separated: file, WordNet id,
    box), `test/images/*.JPEG` without labels; `wnids.txt` holds the classes, `words.txt` their words. Classes and ids as for ImageNet.

    Raises SourceError, SourceFormatError.
    """
    folder, words = root / split, _words(root)
    files, left = _images(folder, name)
    known = _lines(root / "wnids.txt")
    labels: dict[str, str] = {}
    if split == "train":
        labels = {file: file.partition("/")[0] for file in files}
    elif split == "val":
        path = folder / "val_annotations.txt"
        rows = [line.split("\t") for line in _lines(path)]
        short = next((number for number, row in enumerate(rows, 1) if len(row) < 2), None)
        if short is not None:
            raise SourceFormatError(f"{path}, line {short} is no file and WordNet id, separated by a tab.")
        labels = {f"images/{row[0]}": row[1] for row in rows}
        if not labels.keys() & set(files):  # many sort the images into folders of their classes
            labels = {file: wnid for file in files if (wnid := file.partition("/")[0]) in known}
    understood = Understood(
        form=f"Tiny ImageNet, split {split}",
        ids="file names without suffix",
        labels={"train": "folders of WordNet ids", "val": "val_annotations.txt, or folders of WordNet ids"}.get(
            split, "none (the test split has none)"
        ),
        classes=_named(root, words),
    )
    return _source(name, folder, files, labels, sorted(known), words, left, understood)


def _source(
    name: str, folder: Path, files: Sequence[str], labels: dict[str, str], wnids: Sequence[str], words: dict[str, str], left: tuple[str, ...],
    understood: Understood,
) -> Source:  # fmt: skip
    called = Counter(words.get(wnid, wnid) for wnid in wnids)
    names = {wnid: (word if called[word := words.get(wnid, wnid)] == 1 else f"{word} ({wnid})") for wnid in wnids}
    foreign = next((file for file in files if file in labels and labels[file] not in names), None)
    if foreign is not None:
        raise SourceFormatError(f"{folder / foreign} is of class {labels[foreign]}, which is none of the {len(names)} classes.")
    unlabelled = sum(file not in labels for file in files) if labels else 0
    tuples = {wnid: (label,) for wnid, label in names.items()}
    root = str(folder)
    samples = [
        Sample(os.path.splitext(os.path.basename(file))[0], FileBlob(root, file), file, labels=tuples[labels[file]] if file in labels else None)
        for file in files
    ]
    notes = [f"{unlabelled} of {len(files)} images have no label in the data set's own list"] if unlabelled else []
    if missing := len(labels.keys() - set(files)):
        notes.append(f"{missing} labels are of images that are not there")
    return Source(name, tuple(samples), tuple(names.values()) if labels else (), notes=(*left, *notes), understood=understood)


def _named(root: Path, words: dict[str, str]) -> str:
    """What names the classes, for people."""
    return ("words.txt" if (root / "words.txt").is_file() else MAPPING) if words else "WordNet ids"


def _images(folder: Path, name: str) -> tuple[list[str], tuple[str, ...]]:
    """Paths of the images below a folder, sorted, without hidden ones; and notes of what was left out. Raises SourceError where it is not there."""
    if not folder.is_dir():
        raise SourceError(f"{name} has no folder {folder}. Unpack the data set there, or choose another --split.")
    listing = list_files(str(folder), name)
    return [file for file in listing.files if suffix_of_name(file) in IMAGE_SUFFIXES], listing.notes()


def _words(root: Path) -> dict[str, str]:
    """WordNet id -> words, from whichever of the two published lists is there (`words.txt` by tab, the mapping by space); empty without."""
    for file, separator in (("words.txt", "\t"), (MAPPING, " ")):
        if (root / file).is_file():
            pairs = (line.split(separator, 1) for line in _lines(root / file))
            return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}
    return {}


def _solution(path: Path, files: Sequence[str]) -> dict[str, str]:
    """File -> WordNet id, from `ImageId,PredictionString`, whose second field begins with the id."""
    rows = dict(line.split(",", 1) for line in _lines(path)[1:] if "," in line)
    stems = {os.path.splitext(file)[0]: file for file in files}
    return {stems[key]: value.split()[0] for key, value in rows.items() if key in stems and value.split()}


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name with a zero byte
        raise SourceFormatError(f"{path} cannot be read ({error}). Unpack the data set again.") from None
