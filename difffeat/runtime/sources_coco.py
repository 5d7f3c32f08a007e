"""COCO annotations: instances (labels) and captions, joined by image id."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from difffeat.errors import SourceFormatError
from difffeat.runtime.places import blob_at, open_place, parent
from difffeat.runtime.samples import Sample, Source
from difffeat.runtime.sources_manifest import without_suffix


def read_coco(path: str, images: str | None, captions: str | None, name: str | None = None, content: Any = None) -> Source:
    """Every image of an annotation file, in the file's order.

    **Arguments:** `path` instances or captions JSON, a path or URL; `images` their folder (None: the folder that `path` lies in); `captions`
    captions JSON to join to instances; `name` of the source; `content` of `path`, where it was read already. Labels are the names of all categories
    annotated, crowd regions included; an image without any has none set. The id is the file name without its suffix.

    Raises SourceFormatError.
    """
    main = _annotations(read_json(path) if content is None else content, path)
    caption_data = _annotations(read_json(captions), captions) if captions else main
    texts: dict[int, list[str]] = defaultdict(list)
    for entry in caption_data["annotations"]:
        key = _field(entry, "image_id", int, captions or path)
        if "caption" in entry:
            texts[key].append(_field(entry, "caption", str, captions or path).strip())
    names, labels = _labels(main, path)
    base = images if images is not None else parent(path)
    samples = []
    for entry in main["images"]:
        key, file = _field(entry, "id", int, path), _field(entry, "file_name", str, path)
        own = tuple(label for label in names if label in labels[key]) if names else None
        samples.append(Sample(without_suffix(file), blob_at(base, file), file, tuple(text for text in texts[key] if text), own))
    return Source(name or path, tuple(samples), names)


def _labels(data: dict[str, Any], path: str) -> tuple[tuple[str, ...], dict[int, set[str]]]:
    """Class names in the order of their ids, and the names of each image."""
    listed = data.get("categories", [])
    if not isinstance(listed, list):
        raise SourceFormatError(f"{path}: 'categories' must be a list, found {type(listed).__name__}.")
    categories = {_field(c, "id", int, path): _field(c, "name", str, path) for c in listed}
    labels: dict[int, set[str]] = defaultdict(set)
    for entry in data["annotations"]:
        if "category_id" in entry:
            category = _field(entry, "category_id", int, path)
            if category not in categories:
                raise SourceFormatError(f"{path}: an annotation has category_id {category}, which 'categories' does not list.")
            labels[_field(entry, "image_id", int, path)].add(categories[category])
    return tuple(categories[key] for key in sorted(categories)), labels


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
    if not isinstance(data, dict) or not isinstance(data.get("images"), list) or not isinstance(data.get("annotations"), list):
        found = ", ".join(list(data)[:6]) if isinstance(data, dict) else type(data).__name__
        raise SourceFormatError(f"{path} is no COCO annotation file: it needs the lists 'images' and 'annotations', and has: {found}.")
    return data


def _field(entry: Any, key: str, kind: type, path: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        raise SourceFormatError(f"{path}: an entry lacks {key!r} of type {kind.__name__}: {str(entry)[:120]}")
    return entry[key]
