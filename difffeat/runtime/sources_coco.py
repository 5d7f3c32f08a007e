"""COCO annotations: instances, keypoints or panoptic (labels) and captions, joined by image id."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from difffeat.errors import SourceFormatError
from difffeat.runtime.file_names import FileNames
from difffeat.runtime.places import open_place, parent
from difffeat.runtime.samples import Sample, Source
from difffeat.runtime.sources_manifest import without_suffix
from difffeat.runtime.understood import Understood


@dataclass
class _Labels:
    """Class names in the order of their ids; the names of each image, and those that only regions to be ignored say; and what is to be told."""

    names: tuple[str, ...] = ()
    of: dict[Any, set[str]] = field(default_factory=lambda: defaultdict(set))
    ignored: dict[Any, set[str]] = field(default_factory=lambda: defaultdict(set))
    crowds: int = 0
    notes: list[str] = field(default_factory=list)


def read_coco(path: str, images: str | None, captions: str | None, name: str | None = None, content: Any = None) -> Source:
    """Every image of an annotation file, in the file's order.

    **Arguments:** `path` instances, keypoints, panoptic or captions JSON, a path or URL; `images` their folder (None: the folder that `path` lies
    in); `captions` captions JSON to join to instances; `name` of the source; `content` of `path`, where it was read already. Labels are the names of
    all categories annotated, crowd regions included; a class that only regions marked `ignore` show is unknown for their image. An image without any
    has none set. Categories of one name are one class. The id is the file name without its suffix. Ids of images and categories may be text.

    Annotations of images that are not listed are counted in a note. Raises SourceFormatError: two images or categories of one id, an annotation of a
    category that is not listed, a field that is not there.
    """
    main = _annotations(read_json(path) if content is None else content, path)
    caption_data = _annotations(read_json(captions), captions) if captions else main
    listed = _images(main, path)
    labels = _labels(main, path)
    texts, unlisted = _captions(caption_data, captions or path, listed)
    base, files = images if images is not None else parent(path), FileNames()
    samples = []
    for key, place in listed.items():
        blob, tidy = files.image(base, place)
        own = tuple(label for label in labels.names if label in labels.of[key]) if labels.names else None
        hidden = tuple(label for label in labels.names if label in labels.ignored[key] - labels.of[key])
        samples.append(Sample(without_suffix(_own_name(main, tidy)), blob, tidy, tuple(texts[key]), own, unknown=hidden))
    twice = len(main["images"]) - len(listed)
    repeated = [f"{twice} entries of images stand twice in the file, and count once"] if twice else []
    notes = [*labels.notes, *repeated, *_strays(main, path, listed), *unlisted, *files.notes()]
    crowds = f", {labels.crowds} crowd regions among them" if labels.crowds else ""
    understood = Understood(
        form="COCO annotations",
        ids="file names without suffix",
        labels=f"categories of the annotations{crowds}" if labels.names else "none (no categories)",
        classes="the categories, in the order of their ids" if labels.names else "",
        captions=f"annotations of {captions or 'the same file'}" if any(texts.values()) else "none",
    )
    return Source(name or path, tuple(samples), labels.names, notes=tuple(notes), understood=understood)


def _images(data: dict[str, Any], path: str) -> dict[Any, str]:
    """Id -> file name. Raises SourceFormatError where one id is of two images."""
    found: dict[Any, str] = {}
    for entry in data["images"]:
        key = _id(entry, "id", path)
        file = _file_name(entry, path)
        if found.setdefault(key, file) != file:
            raise SourceFormatError(
                f"{path}: two images have the id {key}: {found[key]} and {file}. Its annotations may be of either: give each its own."
            )
    return found


def _file_name(entry: Any, path: str) -> str:
    """The file of an image; LVIS names only its address, whose last two parts are folder and file."""
    if isinstance(entry, dict) and "file_name" not in entry and isinstance(entry.get("coco_url"), str):
        return "/".join(urlsplit(entry["coco_url"]).path.split("/")[-2:])
    return _field(entry, "file_name", str, path)


def _own_name(data: dict[str, Any], place: str) -> str:
    """What an id is made of: LVIS's images have the ids of COCO's."""
    lvis = isinstance(data["images"][0], dict) and "file_name" not in data["images"][0]
    return place.rpartition("/")[2] if lvis else place


def _captions(data: dict[str, Any], path: str, listed: dict[Any, str]) -> tuple[dict[Any, list[str]], list[str]]:
    """Captions by image, and a note that counts those of images that are not listed, where they stand in a file of their own."""
    texts: dict[Any, list[str]] = defaultdict(list)
    strays = 0
    for entry in data["annotations"]:
        key = _id(entry, "image_id", path)
        if "caption" in entry and (text := _field(entry, "caption", str, path).strip()):
            texts[key].append(text)
            strays += key not in listed
    return texts, [f"{strays} captions of {path} are of images that are not listed, and left out"] if strays else []


def _strays(data: dict[str, Any], path: str, listed: dict[Any, str]) -> list[str]:
    """A note that counts the annotations of images that are not listed."""
    keys = [_id(entry, "image_id", path) for entry in data["annotations"] if "caption" not in entry]
    strays = [key for key in keys if key not in listed]
    return [f"{len(strays)} of {len(keys)} annotations are of images that are not listed, the first of image {strays[0]}"] if strays else []


def _labels(data: dict[str, Any], path: str) -> _Labels:
    found = _Labels()
    categories = _categories(data, path, found)
    for entry in data["annotations"]:
        image = _id(entry, "image_id", path)
        for region in _regions(entry):
            category = _id(region, "category_id", path)
            if category not in categories:
                raise SourceFormatError(f"{path}: an annotation has category_id {category}, which 'categories' does not list.")
            found.crowds += bool(region.get("iscrowd"))
            (found.ignored if region.get("ignore") else found.of)[image].add(categories[category])
    if any(found.ignored.values()):
        found.notes.append(
            f"of {sum(map(bool, found.ignored.values()))} images some classes are unknown, where only regions marked 'ignore' show them"
        )
    if any(isinstance(entry, dict) and "not_exhaustive_category_ids" in entry for entry in data["images"][:1]):
        found.notes.append("LVIS looks for few of its categories in each image: the others are read as absent, though nobody looked")
    return found


def _regions(entry: Any) -> Iterator[dict[str, Any]]:
    """What of an annotation has a category: itself, or, of a panoptic one, its segments."""
    if "category_id" in entry:
        yield entry
    for region in entry.get("segments_info") or ():
        if isinstance(region, dict):
            yield region


def _categories(data: dict[str, Any], path: str, found: _Labels) -> dict[Any, str]:
    listed = data.get("categories", [])
    if not isinstance(listed, list):
        raise SourceFormatError(f"{path}: 'categories' must be a list, found {type(listed).__name__}.")
    categories: dict[Any, str] = {}
    for entry in listed:
        key, label = _id(entry, "id", path), _field(entry, "name", str, path).strip()
        if not label:
            raise SourceFormatError(f"{path}: the category {key} has no name. Name it.")
        if categories.setdefault(key, label) != label:
            raise SourceFormatError(f"{path}: two categories have the id {key}: {categories[key]!r} and {label!r}. Give each its own.")
    ordered = sorted(categories, key=lambda key: (isinstance(key, str), key))
    found.names = tuple(dict.fromkeys(categories[key] for key in ordered))
    for label, count in Counter(categories.values()).items():
        if count > 1:
            ids = ", ".join(str(key) for key in ordered if categories[key] == label)
            found.notes.append(f"{count} categories are called {label!r} (ids {ids}), and are one class")
    return categories


def read_json(path: str) -> Any:
    """What a JSON file holds. Raises SourceFormatError."""
    try:
        with open_place(path) as file:
            return json.loads(file.read())
    except OSError as error:
        raise SourceFormatError(f"{path} cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        raise SourceFormatError(f"{path} is not JSON ({error}).") from None


def _annotations(data: Any, path: str) -> dict[str, Any]:
    """The content of an annotation file; lists of test images have no annotations. Raises SourceFormatError for anything else."""
    if isinstance(data, dict) and "annotations" not in data and isinstance(data.get("images"), list) and "categories" in data:
        return {**data, "annotations": [], "categories": []}
    if not isinstance(data, dict) or not isinstance(data.get("images"), list) or not isinstance(data.get("annotations"), list):
        found = ", ".join(list(data)[:6]) if isinstance(data, dict) else type(data).__name__
        raise SourceFormatError(f"{path} is no COCO annotation file: it needs the lists 'images' and 'annotations', and has: {found}.")
    return data


def _id(entry: Any, key: str, path: str) -> Any:
    """An id as a number, wherever it can be one: files that were merged or written by data frames hold `7`, `7.0` and `"7"` for one id."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip():
        return int(value) if value.isascii() and value.isdecimal() and len(value) < 20 else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise SourceFormatError(f"{path}: an entry lacks {key!r} of type int or str: {str(entry)[:120]}")
    return value


def _field(entry: Any, key: str, kind: type, path: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        raise SourceFormatError(f"{path}: an entry lacks {key!r} of type {kind.__name__}: {str(entry)[:120]}")
    return entry[key]
