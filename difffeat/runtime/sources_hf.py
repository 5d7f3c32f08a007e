"""Hugging Face datasets that were saved to disk, read with pyarrow; the datasets library is not needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from difffeat.errors import SourceError, SourceFormatError
from difffeat.runtime.samples import Source
from difffeat.runtime.sources_manifest import read_manifest
from difffeat.runtime.sources_options import SourceOptions

STATE, SPLITS = "state.json", "dataset_dict.json"


def is_saved_dataset(root: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return (root / SPLITS).is_file() or ((root / STATE).is_file() and (root / "dataset_info.json").is_file())


def read_saved_dataset(root: Path, options: SourceOptions, name: str) -> Source:
    """A folder written by `save_to_disk`: a Dataset, or a DatasetDict of which `options.split` chooses one.

    Images are the column that its features declare as Image (bytes, or a path where the bytes were not saved), labels the names of its ClassLabel,
    alone or in a list, captions strings or lists of strings. Without an id column the id is the row number.

    Raises SourceError (which splits there are), SourceFormatError.
    """
    folder = root
    if (root / SPLITS).is_file():
        splits = _read(root / SPLITS).get("splits")
        known = [str(split) for split in splits] if isinstance(splits, list) else []
        if options.split not in known:
            asked = "has several splits" if options.split is None else f"has no split {options.split!r}"
            raise SourceError(f"{name} {asked}: {', '.join(known)}. Choose one with --split, or as SOURCE::{known[0] if known else 'NAME'}.")
        folder = root / str(options.split)
    elif options.split is not None:
        raise SourceError(f"{name} is one saved dataset, without splits. Leave out --split.")
    state = _read(folder / STATE)
    if state.get("_indices_data_files"):
        raise SourceFormatError(f"{folder} holds rows in another order than its files. Save it anew: dataset.flatten_indices().save_to_disk(...).")
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) and isinstance(file.get("filename"), str) for file in files):
        raise SourceFormatError(f"{folder / STATE} names no data files. Save the dataset anew.")
    places = [str(folder / Path(file["filename"]).name) for file in files]
    missing = [place for place in places if not os.path.isfile(place)]  # which, unlike Path's, refuses no name
    if missing or not places:
        raise SourceError(f"{folder} lacks {missing[0] if missing else 'data files'}, of {len(places)} files. Copy the dataset again.")
    return read_manifest(places, str(options.images) if options.images else str(folder), options, name)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceFormatError(f"{path} cannot be read ({error}). Save the dataset anew.") from None
    if not isinstance(data, dict):
        raise SourceFormatError(f"{path} is no JSON object. Save the dataset anew.")
    return data
