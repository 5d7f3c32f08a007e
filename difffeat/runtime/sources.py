"""Where samples come from: `open_source` lists them; no image is read here."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from difffeat.errors import ConfigError, EmptySource, SourceError, SourceFormatError
from difffeat.runtime.blobs import UnreadableBlob
from difffeat.runtime.listing import common_root, files_of
from difffeat.runtime.places import absolute, expand, fixed_part, is_pattern, suffix_of
from difffeat.runtime.remote import is_url
from difffeat.runtime.samples import IMAGE_SUFFIXES, Source
from difffeat.runtime.sources_coco import read_coco, read_json
from difffeat.runtime.sources_folder import read_folder
from difffeat.runtime.sources_hf import is_saved_dataset, read_saved_dataset
from difffeat.runtime.sources_karpathy import is_karpathy, read_karpathy
from difffeat.runtime.sources_manifest import MANIFEST_SUFFIXES, read_manifest
from difffeat.runtime.sources_named import DATASETS, FOLDER, read_named, recognise
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.sources_tar import PACKED, read_tars

ACCEPTED = (*MANIFEST_SUFFIXES, ".tar", ".json")


def open_source(locator: str | Path, options: SourceOptions | None = None) -> Source:
    """List the samples of a source: ids, captions, labels, and where each image lies. No image is read, nothing is written or unpacked.

    **Arguments:** `locator`, a path or a URL of any protocol that fsspec knows (`s3://`, `https://`, `memory://` ...):

    - a folder of images, a pattern of images or of folders on disk (`photos/*.jpg`, `photos/**/*.png`), or one image: `read_folder`
    - a manifest `.csv .tsv .jsonl .ndjson .parquet .arrow`, whose images are paths, URLs, or bytes in Parquet and Arrow: `read_manifest`
    - tar shards `.tar`, as WebDataset and img2dataset write them: `read_tars`
    - COCO annotations `.json`: `read_coco`, and Karpathy's splits of them: `read_karpathy`
    - a folder written by Hugging Face's `save_to_disk` (on disk only): `read_saved_dataset`
    - the root folder of a standard data set (on disk only): `sources_named`

    Manifests and shards may be several, in one pattern: `shards/{000..150}.tar`, `{train,val}.parquet`, and on disk `shards/*.tar`; they are read as
    one source in that order. A split of a saved or a standard data set, or of Karpathy's, may follow as `PATH::SPLIT`. `options`, see SourceOptions.

    A row that cannot be read keeps its place as a sample with its problem, and ends in quarantine; a note of the source counts them.

    Raises SourceError (no such place, no such split), SourceFormatError (a file that cannot be read or lacks its columns, named with the row),
    EmptySource, DuplicateSample, ConfigError (options that do not fit), MissingExtra (the package of a protocol), UntrustedFile (pickles).
    """
    options = options or SourceOptions()
    name, place = str(locator), os.path.expanduser(str(locator))
    before, separator, split = place.rpartition("::")
    splittable = os.path.isdir(before) or (suffix_of(before) == ".json" and os.path.isfile(before))
    if separator and not is_url(place) and not os.path.exists(place) and splittable:
        if options.split not in (None, split):
            raise ConfigError(f"{name} asks for the split {split!r}, --split for {options.split!r}. Leave out one.")
        place, options = before, replace(options, split=split)
    if options.images is not None:
        options = replace(options, images=absolute(str(options.images)))
    source = _read(place, options, name)
    return _labelled(source) if options.drop_unlabelled else source


def _read(place: str, options: SourceOptions, name: str) -> Source:
    """Places become absolute, since blobs are read by workers too, which live in other folders; patterns are expanded as they were written."""
    if not is_url(place) and os.path.isdir(place):
        return _read_folder(Path(absolute(place)), options, name)
    if options.dataset not in (None, FOLDER):
        raise SourceError(f"{name} is no folder on this disk, which --dataset {options.dataset} needs: the root of the data set.")
    if options.split is not None and suffix_of(place) != ".json":
        raise _no_splits(options, name)
    if is_pattern(place):
        found = [absolute(found) for found in expand(place)]
        if any(os.path.isdir(path) or suffix_of(path) in IMAGE_SUFFIXES for path in found if not is_url(path)):
            return _read_images(found, absolute(fixed_part(place)), options, name)
        return _read_files(found, options, name)
    if is_url(place):
        return _read_files([place], options, name) if suffix_of(place) in (*ACCEPTED, *PACKED) else read_folder(place, options.class_folders, name)
    if not os.path.exists(place):
        raise SourceError(f"{name} does not exist. Pass a folder of images, a CSV, JSONL or Parquet manifest, tar shards, or COCO JSON.")
    if suffix_of(place) in IMAGE_SUFFIXES and os.path.isfile(place):
        return _read_images([absolute(place)], os.path.dirname(absolute(place)), options, name)
    return _read_files([absolute(place)], options, name)


def _read_images(places: list[str], root: str, options: SourceOptions, name: str) -> Source:
    """What a pattern or a name of one image finds: listed as their folder is, below the part that is no pattern."""
    if not os.path.isdir(root):
        root = common_root(places)
    listing = files_of(root, [os.path.relpath(place, root) for place in places], name)
    return read_folder(root, options.class_folders, name, listing, "one image" if len(places) == 1 else f"{len(places)} paths of a pattern")


def _read_folder(root: Path, options: SourceOptions, name: str) -> Source:
    if options.dataset is None and is_saved_dataset(root):
        return read_saved_dataset(root, options, name)
    dataset = options.dataset or recognise(root, name)
    if dataset in (None, FOLDER):
        if options.split is not None:
            raise ConfigError(f"{name} is a plain folder without splits. Leave out --split, or name the folder of the split.")
        return read_folder(str(root), options.class_folders, name)
    return read_named(root, dataset, options, name)


def _read_files(places: list[str], options: SourceOptions, name: str) -> Source:
    kinds = {suffix_of(place) for place in places}
    images = None if options.images is None else str(options.images)
    if kinds == {".tar"}:
        return read_tars(places, options, name)
    if kinds & set(PACKED):
        packed = next(place for place in places if suffix_of(place) in PACKED)
        raise SourceFormatError(
            f"{packed} is compressed: what it holds cannot be read where it lies, and images hardly shrink. Unpack the compression alone, "
            "for example: gunzip shard.tar.gz"
        )
    if kinds <= set(MANIFEST_SUFFIXES):
        return read_manifest(places, images, options, name)
    if kinds == {".json"} and len(places) == 1:
        return _read_json(places[0], images, options, name)
    raise SourceFormatError(f"{name} is no source we read: pass a folder, or a file ending in {', '.join(ACCEPTED)}.")


def _read_json(place: str, images: str | None, options: SourceOptions, name: str) -> Source:
    content = read_json(place)
    if is_karpathy(content):
        return read_karpathy(content, place, images, options.split, name)
    if options.split is not None:
        raise _no_splits(options, name)
    return read_coco(place, images, str(options.coco_captions) if options.coco_captions else None, name, content)


def _no_splits(options: SourceOptions, name: str) -> ConfigError:
    return ConfigError(f"--split {options.split} is for saved and standard data sets ({', '.join(DATASETS)}); {name} is none.")


def _labelled(source: Source) -> Source:
    """The source without its samples that have no label; rows that cannot be read stay. Raises EmptySource where no sample has any."""
    kept = tuple(sample for sample in source.samples if sample.labels or isinstance(sample.image, UnreadableBlob))
    if not any(sample.labels for sample in kept):
        raise EmptySource(f"{source.name}: no sample has a label, and --drop-unlabelled leaves out those without.")
    note = f"{len(source) - len(kept)} samples without a label are left out, {len(kept)} remain"
    return replace(source, samples=kept, notes=(*source.notes, note))
