"""Standard data sets by name: where each is recognised, which splits it has, and which reader knows its published form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from difffeat.errors import ConfigError, SourceError
from difffeat.runtime.samples import Source
from difffeat.runtime.sources_cifar import is_cifar10, is_cifar100, read_cifar10, read_cifar100
from difffeat.runtime.sources_coco import read_coco
from difffeat.runtime.sources_imagenet import is_imagenet, is_tiny_imagenet, read_imagenet, read_tiny_imagenet
from difffeat.runtime.sources_lists import is_nus_wide, is_vg500, read_nus_wide, read_vg500
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.sources_voc import is_voc, read_voc

FOLDER = "folder"
"""The name that means: no data set, a plain folder."""


@dataclass(frozen=True)
class Dataset:
    """**Fields:** `splits` it is published in; `is_here` whether a folder is its root; `read` takes root, split, options and the source's name."""

    splits: tuple[str, ...]
    is_here: Callable[[Path], bool]
    read: Callable[[Path, str, SourceOptions, str], Source]


def _is_coco(year: int, root: Path) -> bool:
    return any((root / "annotations" / f"instances_{split}{year}.json").is_file() for split in ("train", "val"))


def _read_coco(year: int, root: Path, split: str, options: SourceOptions, name: str) -> Source:
    """COCO `annotations/instances_<split><year>.json`, with `captions_<split><year>.json` where it is there; images in `<split><year>` or
    `images/<split><year>`. All images are listed, 82 783 / 40 504 of 2014; multi-label papers leave out those without an annotation, which
    `drop_unlabelled` does: 82 081 / 40 137.
    """
    instances, captions = (root / "annotations" / f"{kind}_{split}{year}.json" for kind in ("instances", "captions"))
    if not instances.is_file():
        raise SourceError(f"{name} lacks {instances}. Unpack annotations_trainval{year}.zip there.")
    folders = [folder for folder in (root / f"{split}{year}", root / "images" / f"{split}{year}") if folder.is_dir()]
    images = str(options.images or (folders[0] if folders else root / f"{split}{year}"))
    beside = str(options.coco_captions) if options.coco_captions else str(captions) if captions.is_file() else None
    return read_coco(str(instances), images, beside, name)


DATASETS = {
    "cifar10": Dataset(("train", "test"), is_cifar10, read_cifar10),
    "cifar100": Dataset(("train", "test"), is_cifar100, read_cifar100),
    "coco2014": Dataset(("train", "val"), partial(_is_coco, 2014), partial(_read_coco, 2014)),
    "coco2017": Dataset(("train", "val"), partial(_is_coco, 2017), partial(_read_coco, 2017)),
    "imagenet": Dataset(("train", "val", "test"), is_imagenet, read_imagenet),
    "nus-wide": Dataset(("train", "test"), is_nus_wide, read_nus_wide),
    "tiny-imagenet": Dataset(("train", "val", "test"), is_tiny_imagenet, read_tiny_imagenet),
    "vg500": Dataset(("train", "test"), is_vg500, read_vg500),
    "voc2007": Dataset(("train", "val", "trainval", "test"), partial(is_voc, 2007), partial(read_voc, 2007)),
    "voc2012": Dataset(("train", "val", "trainval", "test"), partial(is_voc, 2012), partial(read_voc, 2012)),
}


def recognise(root: Path, name: str) -> str | None:
    """The data set whose root a folder is; None for a plain folder. Raises SourceError where it is several at once."""
    found = [key for key, dataset in DATASETS.items() if dataset.is_here(root)]
    if len(found) > 1:
        raise SourceError(f"{name} holds {' and '.join(found)}. Choose one with --dataset.")
    return found[0] if found else None


def read_named(root: Path, dataset: str, options: SourceOptions, name: str) -> Source:
    """Read a standard data set. Raises ConfigError for an unknown name, SourceError for a missing or unknown split, and what its reader raises."""
    if dataset not in DATASETS:
        raise ConfigError(f"--dataset must be one of {', '.join(DATASETS)}, or {FOLDER} for a plain folder; got {dataset!r}")
    known = DATASETS[dataset]
    if options.split not in known.splits:
        asked = f"is {dataset}, which has several splits" if options.split is None else f"is {dataset}, which has no split {options.split!r}"
        raise SourceError(
            f"{name} {asked}: {', '.join(known.splits)}. Choose one with --split, or as SOURCE::{known.splits[0]}. "
            f"To read it as a plain folder: --dataset {FOLDER}."
        )
    return known.read(root, options.split, options, name)
