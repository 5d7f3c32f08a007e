"""Karpathy's splits of COCO and Flickr: `dataset_coco.json`, five captions an image and the split that caption papers use."""

from __future__ import annotations

from typing import Any

from difffeat.errors import SourceError, SourceFormatError
from difffeat.runtime.places import blob_at, parent
from difffeat.runtime.samples import Sample, Source
from difffeat.runtime.sources_manifest import without_suffix
from difffeat.runtime.understood import Understood


def is_karpathy(data: Any) -> bool:
    """Whether the content of a JSON file has this form: images that hold their own sentences and their split."""
    images = data.get("images") if isinstance(data, dict) else None
    first = images[0] if isinstance(images, list) and images else None
    return isinstance(first, dict) and {"sentences", "split", "filename"} <= first.keys()


def read_karpathy(data: dict[str, Any], path: str, images: str | None, split: str | None, name: str) -> Source:
    """The images of one split in the file's order: `train`, `val`, `test`, `restval`, or several joined as `train+restval`.

    **Arguments:** `data` the content of `path`; `images` the folder or URL that `val2014`, `train2014` lie in (None: where `path` lies). The captions
    are the sentences as they were written (`raw`), the id is the file name without its suffix, as for COCO's own annotations. There are no labels.

    Raises SourceError (which splits there are), SourceFormatError naming the entry.
    """
    entries = data["images"]
    found = dict.fromkeys(_field(entry, "split", str, path, row) for row, entry in enumerate(entries))
    wanted = (split or "").split("+")
    if unknown := [part for part in wanted if part not in found]:
        asked = "has several splits" if split is None else f"has no split {unknown[0]!r}"
        raise SourceError(f"{name} {asked}: {', '.join(found)}. Choose one with --split, or as SOURCE::{next(iter(found))}; join them with +.")
    base = images if images is not None else parent(path)
    samples = [_sample(entry, base, path, row) for row, entry in enumerate(entries) if entry["split"] in wanted]
    ids, captions = "file names without suffix", "the sentences as they were written"
    form = f"Karpathy's split {'+'.join(wanted)}"
    return Source(name, tuple(samples), understood=Understood(form=form, ids=ids, captions=captions, labels="none (Karpathy's splits have none)"))


def _sample(entry: dict[str, Any], base: str, path: str, row: int) -> Sample:
    file, sentences = _field(entry, "filename", str, path, row), _field(entry, "sentences", list, path, row)
    folder = _field(entry, "filepath", str, path, row) if "filepath" in entry else ""  # Flickr's files have none
    place = f"{folder}/{file}" if folder else file
    captions = tuple(text for sentence in sentences if (text := _field(sentence, "raw", str, path, row).strip()))
    return Sample(without_suffix(file), blob_at(base, place), place, captions)


def _field(entry: Any, key: str, kind: type, path: str, row: int) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        raise SourceFormatError(f"{path}: in image {row + 1} of its list there is no {key!r} of type {kind.__name__}: {str(entry)[:120]}")
    return entry[key]
