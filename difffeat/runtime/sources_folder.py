"""Folders of images, on disk or behind a URL: subfolders may be classes, `NAME.txt` beside `NAME.jpg` holds captions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from difffeat.errors import DecodeError, SourceError
from difffeat.runtime.blobs import Blob, FileBlob, UrlBlob
from difffeat.runtime.places import below, is_hidden
from difffeat.runtime.remote import is_url, list_remote
from difffeat.runtime.samples import IMAGE_SUFFIXES, Sample, Source, multi_hot_classes, storable
from difffeat.runtime.sources_manifest import without_suffix

MAX_TEXT = 1 << 20
HIDDEN = "hidden"
"""What hidden files are counted under, among the suffixes of those passed over."""


def read_folder(root: str, class_folders: bool | None, name: str) -> Source:
    """Every image below a folder in path order. Links on disk are followed to files, not to folders. Names that begin with a dot are left out, files
    and folders with all that is in them: they are what tools leave behind (`.ipynb_checkpoints`, `._1.jpg`). They are counted as `hidden`, a folder
    on disk as one, and told in a note where they might hold images.

    Captions come from a .txt of the same stem, one a line. The first folder of a path is its class where `class_folders` says so, or, for None, when
    every image lies one folder deep in two or more folders.

    Raises SourceError when the folder cannot be listed, EmptySource.
    """
    files, hidden = _listing(root, name)
    images = [path for path in files if _suffix(path) in IMAGE_SUFFIXES]
    texts = {path for path in files if _suffix(path) == ".txt"}
    ignored = Counter(_suffix(path) for path in files if _suffix(path) not in (*IMAGE_SUFFIXES, ".txt"))
    folders = {path.partition("/")[0] for path in images if path.count("/") == 1}
    named = class_folders if class_folders is not None else len(folders) > 1 and all(path.count("/") == 1 for path in images)
    classes = {folder: (folder,) for folder in sorted({path.partition("/")[0] for path in images if "/" in path})} if named else {}
    samples = []
    for path in images:
        beside = os.path.splitext(path)[0] + ".txt"
        captions, problem = _read_captions(_blob(root, beside, files[beside]), os.path.basename(beside)) if beside in texts else ((), None)
        texts.discard(beside)
        samples.append(Sample(without_suffix(path), _blob(root, path, files[path]), path, captions, classes.get(path.partition("/")[0]), problem))
    ignored[".txt"] += len(texts)
    ignored[HIDDEN] += len(hidden)
    return Source(name, tuple(samples), multi_hot_classes(map(storable, samples)), +ignored, _hidden_notes(hidden))


def _listing(root: str, name: str) -> tuple[dict[str, int], list[str]]:
    """Path below the root -> bytes (−1: not known) of every file in path order; and what is hidden (folders on disk end in a slash, unopened)."""
    try:
        if is_url(root):
            listed = dict(list_remote(root))
            return {path: size for path, size in listed.items() if not is_hidden(path)}, list(filter(is_hidden, listed))
        found, hidden = {}, []
        for folder, subfolders, files in os.walk(root, onerror=_refuse):
            below = os.path.relpath(folder, root)
            inside = {file: file if below == "." else Path(below, file).as_posix() for file in (*files, *subfolders)}
            hidden += [f"{inside[file]}{'/' if file in subfolders else ''}" for file in inside if is_hidden(file)]
            subfolders[:] = sorted(subfolder for subfolder in subfolders if not is_hidden(subfolder))
            found |= {inside[file]: -1 for file in files if not is_hidden(file)}
        return dict(sorted(found.items())), sorted(hidden)
    except OSError as error:
        raise SourceError(f"{name} cannot be listed ({error.strerror or error}). Check the address and your access.") from None


def _hidden_notes(hidden: Sequence[str]) -> tuple[str, ...]:
    """A sentence that counts what is hidden and might be or hold images."""
    told = [path for path in hidden if path.endswith("/") or _suffix(path) in IMAGE_SUFFIXES]
    if not told:
        return ()
    return (f"{len(told)} hidden images and folders are left out, the first is {told[0]}: rename what belongs to the samples",)


def _refuse(error: OSError) -> None:
    raise error


def _blob(root: str, path: str, size: int) -> Blob:
    return UrlBlob(below(root, path), size) if is_url(root) else FileBlob(root, path)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _read_captions(blob: Blob, name: str) -> tuple[tuple[str, ...], str | None]:
    try:
        text = blob.read(MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return (), f"{name} is not UTF-8 (byte {error.start}). Save it as UTF-8."
    except DecodeError as error:
        return (), f"{name}: {error}"
    return tuple(line.strip() for line in text.splitlines() if line.strip()), None
