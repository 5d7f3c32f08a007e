"""How a source is to be read: what the command line and `open_source` take besides the place itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from difffeat.errors import SourceFormatError
from difffeat.runtime.patience import Patience


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Everything about a source but its place. Defaults suit a folder, and files whose columns are called as ours.

    **Fields:**
    `images` folder or URL of the images of COCO annotations, or the base of relative paths in a manifest (default: where the file lies);
    `coco_captions` COCO captions JSON to join to instances;
    `class_folders` whether subfolders name classes (None: when every image lies one folder deep in two or more folders);
    `image_column`, `caption_column`, `label_column`, `id_column` names in a manifest, in Parquet or Arrow, in the JSON members of a tar
    (None: image; captions or caption; labels or label; id, and in a tar the key). `id_column` may be `shard/key` or `folder/shard/key` for tars whose
    keys repeat. `label_column` may be several, separated by commas: each then holds 0 or 1, and its name
    is a class;
    `classes` file with one class name a line: the order of the classes, and the names of labels given as numbers or as 0/1 vectors;
    `multi_hot` whether lists of numbers are 0/1 vectors (None: when the first rows are all as long as there are classes, and hold only 0 and 1);
    with it, and without `classes`, the classes are called by their numbers;
    `dataset` reads a root folder in the published form of a standard data set (None: when it is unmistakable);
    `split` its part, or that of a saved Hugging Face dataset, or of Karpathy's `dataset_coco.json` (there several, joined by `+`);
    `drop_unlabelled` leaves out samples without any label;
    `timeout` seconds of an attempt to read a URL, `retries` after the first one, `total_timeout` seconds of all attempts: see `Patience`.
    """

    images: str | Path | None = None
    coco_captions: str | Path | None = None
    class_folders: bool | None = None
    image_column: str | None = None
    caption_column: str | None = None
    label_column: str | None = None
    id_column: str | None = None
    classes: str | Path | None = None
    multi_hot: bool | None = None
    dataset: str | None = None
    split: str | None = None
    drop_unlabelled: bool = False
    timeout: float = Patience.timeout
    retries: int = Patience.retries
    total_timeout: float = Patience.total

    @property
    def patience(self) -> Patience:
        """How long whatever the source names by URL is waited for. Raises ConfigError."""
        return Patience(self.timeout, self.retries, self.total_timeout)

    def classes_named(self) -> str:
        """What names the classes, for people; empty where nobody was asked to."""
        return "" if self.classes is None else f"--classes {self.classes}"

    def class_names(self) -> tuple[str, ...]:
        """The names in the file `classes`; none without one. Raises SourceFormatError."""
        return () if self.classes is None else read_class_names(self.classes)


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """One class name a line, empty lines passed over; or, in `.json`, a list of names, or an object of number -> name (`id2label`), or of name ->
    number (`label2id`), counted from 0 without gaps.

    Raises SourceFormatError: not there, not UTF-8, empty, a name twice, JSON of another shape.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceFormatError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise SourceFormatError(f"{path} cannot be read ({error.strerror or error}). It should hold one class name a line.") from None
    names = _names_in_json(text, path) if Path(path).suffix.lower() == ".json" else [line.strip() for line in text.splitlines() if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if not names or twice:
        raise SourceFormatError(f"{path} holds {f'{twice[0]!r} twice' if twice else 'no class names'}. Write one name a line, each once.")
    return tuple(names)


def _names_in_json(text: str, path: str | Path) -> list[str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceFormatError(f"{path} is not JSON ({error}). Write a list of class names, or one a line into a .txt.") from None
    if isinstance(found, dict) and all(isinstance(value, int) for value in found.values()):
        found = {str(number): name for name, number in found.items()}
    listed = [found.get(str(number)) for number in range(len(found))] if isinstance(found, dict) else found if isinstance(found, list) else []
    names = [name.strip() for name in listed if isinstance(name, str) and name.strip()]
    if not names or len(names) != len(listed):
        raise SourceFormatError(f"{path} holds neither a list of class names nor an object of number -> name, counted from 0 without gaps.")
    return names
