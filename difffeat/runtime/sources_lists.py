"""Multi-label data sets that are published as lists: Visual Genome 500 and NUS-WIDE."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

from difffeat.errors import SourceError, SourceFormatError
from difffeat.runtime.blobs import FileBlob
from difffeat.runtime.samples import Sample, Source, broken_notes, broken_sample
from difffeat.runtime.sources_labels import LabelReader
from difffeat.runtime.sources_manifest import without_suffix
from difffeat.runtime.sources_options import SourceOptions, read_class_names
from difffeat.runtime.understood import Understood

VG_LABELS = "vg_category_500_labels_index.json"
VG_CLASSES = 500
VG_PARTS = (".", "ssgrl_partition", "annotations")
VG_IMAGES = ("VG_100K", "VG_100K_2", "images", ".")
NUS_CONCEPTS = ("Concepts81.txt", "ConceptsList/Concepts81.txt", "Groundtruth/Concepts81.txt")
NUS_IMAGES = ("Flickr", "images", "Images")


def is_vg500(root: Path) -> bool:
    """Whether the labels of Visual Genome 500 lie here."""
    return _first(root, [f"{part}/{VG_LABELS}" for part in VG_PARTS]) is not None


def read_vg500(root: Path, split: str, options: SourceOptions, name: str) -> Source:
    """Visual Genome 500 as its papers share it since SSGRL: `train_list_500.txt` and `test_list_500.txt`, an image's file name a line, and
    `vg_category_500_labels_index.json`, an object of file name -> list of class numbers; in the root or in `ssgrl_partition`. Images in `VG_100K`,
    `VG_100K_2` (as downloaded) or `images`.

    No names of the 500 classes are published with it: they are called 0 to 499, unless `--classes FILE` names them.

    Raises SourceError, SourceFormatError.
    """
    labels_path = _first(root, [f"{part}/{VG_LABELS}" for part in VG_PARTS])
    list_path = _first(root, [f"{part}/{split}_list_500.txt" for part in VG_PARTS])
    if labels_path is None or list_path is None:
        raise SourceError(f"{name} lacks {VG_LABELS if labels_path is None else f'{split}_list_500.txt'}. Put it into {root}.")
    numbers = _indices(labels_path)
    total = 1 + max((number for row in numbers.values() for number in row), default=-1)
    labels = LabelReader(options.class_names() or [str(number) for number in range(total)], multi_hot=False, named=options.classes_named())
    folders = {file: folder for folder in reversed(VG_IMAGES) for file in _files(root / folder)}
    samples = []
    for row, file in enumerate(_lines(list_path), 1):
        where = f"{list_path}, line {row}"
        if file not in numbers:
            samples.append(broken_sample(without_suffix(file), file, f"{labels_path.name} has no entry for {file}."))
            continue
        blob = FileBlob(str(root / folders.get(file, VG_IMAGES[0])), file)
        samples.append(Sample(without_suffix(file), blob, file, labels=labels.read(numbers[file], where)[0]))
    understood = Understood(
        form=f"Visual Genome 500, split {split}",
        ids="file names without suffix",
        labels=labels_path.name,
        classes=labels.named or "their numbers, since no names are published",
    )
    return Source(name, tuple(samples), labels.classes, notes=broken_notes(samples), understood=understood)


def _indices(path: Path) -> dict[str, list[int]]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceFormatError(f"{path} cannot be read ({error}).") from None
    if not isinstance(data, dict):
        raise SourceFormatError(f"{path} must be an object of file name -> list of class numbers.")
    bad = next((key for key, row in data.items() if not isinstance(row, list) or not all(map(_is_class, row))), None)
    if bad is not None:
        raise SourceFormatError(f"{path}: the entry {bad!r} is no list of class numbers, 0 to {VG_CLASSES - 1}: {str(data[bad])[:80]}")
    return data


def _is_class(number: object) -> bool:
    return type(number) is int and 0 <= number < VG_CLASSES


def is_nus_wide(root: Path) -> bool:
    """Whether NUS-WIDE's image lists lie here."""
    return (root / "ImageList" / "TrainImagelist.txt").is_file()


def read_nus_wide(root: Path, split: str, options: SourceOptions, name: str) -> Source:
    """NUS-WIDE as published: `ImageList/TrainImagelist.txt` and `TestImagelist.txt` (paths with backslashes), the 81 concepts in `Concepts81.txt`,
    and `TrainTestLabels/Labels_<concept>_<Train|Test>.txt` with 0 or 1 a line (also below `Groundtruth`). Images in `Flickr` or `images`.

    A line that is neither 0 nor 1 (the published `Labels_lake_Train.txt` has one) sends its image to quarantine.

    Raises SourceError, SourceFormatError.
    """
    part = split.capitalize()
    concepts_path = _first(root, NUS_CONCEPTS)
    labels_folder = _first(root, ("Groundtruth/TrainTestLabels", "TrainTestLabels"))
    if concepts_path is None or labels_folder is None:
        raise SourceError(
            f"{name} lacks {'Concepts81.txt' if concepts_path is None else 'TrainTestLabels'}. Unpack all of NUS-WIDE's lists into {root}."
        )
    concepts = read_class_names(concepts_path)
    files = [line.replace("\\", "/") for line in _lines(root / "ImageList" / f"{part}Imagelist.txt")]
    names: dict[int, list[str]] = defaultdict(list)
    problems: dict[int, str] = {}
    for concept in concepts:
        path = labels_folder / f"Labels_{concept}_{part}.txt"
        bits = _lines(path)
        if len(bits) != len(files):
            raise SourceFormatError(f"{path} has {len(bits)} lines for {len(files)} images. Unpack NUS-WIDE's lists again.")
        for row, bit in enumerate(bits):
            if bit == "1":
                names[row].append(concept)
            elif bit != "0":
                problems[row] = f"{path.name}, line {row + 1} holds {bit!r}, neither 0 nor 1. Mend the label."
    base = str(_first(root, NUS_IMAGES) or root / NUS_IMAGES[0])
    samples = [
        broken_sample(without_suffix(file), file, problems[row])
        if row in problems
        else Sample(without_suffix(file), FileBlob(base, file), file, labels=tuple(names[row]))
        for row, file in enumerate(files)
    ]
    understood = Understood(
        form=f"NUS-WIDE, split {split}", ids="paths in the image list, without suffix", labels=f"{labels_folder.name}/Labels_*_{part}.txt",
        classes=concepts_path.name,
    )  # fmt: skip
    return Source(name, tuple(samples), concepts, notes=broken_notes(samples), understood=understood)


def _first(root: Path, names: tuple[str, ...] | list[str]) -> Path | None:
    return next((root / name for name in names if (root / name).exists()), None)


def _files(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder) if entry.is_file()] if folder.is_dir() else []


def _lines(path: Path) -> list[str]:
    try:
        return [text for line in path.read_text(encoding="utf-8").splitlines() if (text := line.strip())]
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name with a zero byte
        raise SourceFormatError(f"{path} cannot be read ({error}).") from None
