"""Folders of images, on disk or behind a URL: subfolders may be classes, `NAME.txt` beside `NAME.jpg` holds captions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from difffeat.errors import DecodeError
from difffeat.recognise import quoted
from difffeat.runtime.blobs import Blob, FileBlob, UrlBlob
from difffeat.runtime.file_names import key_of
from difffeat.runtime.listing import Listing, list_files
from difffeat.runtime.listing import suffix_of_name as _suffix
from difffeat.runtime.places import below
from difffeat.runtime.remote import is_url
from difffeat.runtime.samples import IMAGE_SUFFIXES, Sample, Source, multi_hot_classes, storable
from difffeat.runtime.sources_manifest import without_suffix
from difffeat.runtime.understood import Understood

MAX_TEXT = 1 << 20
HIDDEN = "hidden"
TABLES, SHOWN = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".tar"), 5
"""What hidden files are counted under, among the suffixes of those passed over."""
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"))
"""Names of folders that are parts of a data set, and no classes where nobody says so."""


def read_folder(root: str, class_folders: bool | None, name: str, listing: Listing | None = None, form: str = "a folder of images") -> Source:
    """Every image below a folder in path order. Links on disk are followed. Names that begin with a dot are left out, files and folders with all that
    is in them: they are what tools leave behind (`.ipynb_checkpoints`, `._1.jpg`). They are counted as `hidden`, a folder on disk as one, and told in
    a note where they might hold images; so are folders that may not be opened.

    Captions come from a .txt of the same stem, one a line. The first folder of a path is its class where `class_folders` says so, or, for None, when
    every image lies one folder deep in two or more folders that are not called as parts of a data set (train, test ...). `listing` where the files
    are known already.

    Raises SourceError when the folder cannot be listed, EmptySource.
    """
    listing = list_files(root, name) if listing is None else listing
    files = listing.files
    images = [path for path in files if _suffix(path) in IMAGE_SUFFIXES]
    texts = [path for path in files if _suffix(path) == ".txt"]
    ignored = Counter(_suffix(path) for path in files if _suffix(path) not in (*IMAGE_SUFFIXES, ".txt"))
    named, why = (class_folders, "") if class_folders is not None else _class_folders(images)
    classes = {folder: (folder,) for folder in sorted({path.partition("/")[0] for path in images if "/" in path})} if named else {}
    beside = _beside(images, texts)
    samples = []
    for path in images:
        text = beside.get(path)
        captions, problem = _read_captions(_blob(root, text, files[text]), os.path.basename(text)) if text is not None else ((), None)
        own = classes.get(path.partition("/")[0]) if "/" in path else None
        samples.append(Sample(without_suffix(path), _blob(root, path, files[path]), path, captions, own, problem))
    ignored[".txt"] += len(texts) - len(set(beside.values()))
    ignored[HIDDEN] += len(listing.hidden)
    understood = Understood(
        form=form,
        ids="paths below it, without suffix",
        labels="names of the first folder" if named else f"none: {why or 'folders are not taken as classes'}",
        classes="the folders, sorted" if named else "",
        captions=f".txt files beside {len(beside)} images" if beside else "none (no .txt of an image's name)",
    )
    found = multi_hot_classes(map(storable, samples))
    return Source(name, tuple(samples), found, +ignored, (*listing.notes(), *_tables(root, files, bool(images))), understood)


def _tables(root: str, files: Iterable[str], has_images: bool) -> tuple[str, ...]:
    """What is said of tables and tars among the files: beside images those that Hugging Face's ImageFolder reads, else all."""
    found = [path for path in files if _suffix(path) in TABLES]
    if has_images:
        found = [path for path in found if os.path.splitext(os.path.basename(path))[0] == "metadata"]
    if not found:
        return ()
    shown = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    first = quoted(f"{root.rstrip('/')}/{found[0]}")
    if has_images:
        return (
            f"{shown} may hold captions and labels of these images, and is not read: difffeat extract ARTIFACT {first} --image-column file_name "
            "reads the images that it lists (--caption-column, --label-column for the others)",
        )
    return (f"it holds {shown}: a table or tar, and so each split, is a source of its own (difffeat extract ARTIFACT {first})",)


def _class_folders(images: Sequence[str]) -> tuple[bool, str]:
    """Whether subfolders look like classes, and why not."""
    deep = [path for path in images if path.count("/") > 1]
    root = [path for path in images if "/" not in path]
    folders = sorted({path.partition("/")[0] for path in images if "/" in path})
    advice = "--class-folders takes them as such"
    if not folders:
        return False, "all images lie in the folder itself"
    if root or deep:
        where = f"{len(root)} images lie in the folder itself ({root[0]})" if root else f"{len(deep)} images lie deeper ({deep[0]})"
        return False, f"its {len(folders)} subfolders are not taken as classes, since {where}; {advice}"
    if len(folders) == 1:
        return False, f"the one subfolder {folders[0]} is not taken as a class; {advice}"
    if {folder.lower() for folder in folders} <= SPLITS:
        return False, f"its subfolders {', '.join(folders)} are called as parts of a data set, and are not taken as classes; {advice}"
    return True, ""


def _beside(images: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """The text of each image that has one: of the same stem, or of one that differs in case or Unicode form alone."""
    exact = {os.path.splitext(path)[0]: path for path in reversed(texts)}
    alike: dict[str, list[str]] = {}
    for path in texts:
        alike.setdefault(key_of(os.path.splitext(path)[0]), []).append(path)
    found = {}
    for path in images:
        stem = os.path.splitext(path)[0]
        others = alike.get(key_of(stem), [])
        text = exact.get(stem) or (others[0] if len(others) == 1 else None)
        if text is not None:
            found[path] = text
    return found


def _blob(root: str, path: str, size: int) -> Blob:
    return UrlBlob(below(root, path), size) if is_url(root) else FileBlob(root, path)


def _read_captions(blob: Blob, name: str) -> tuple[tuple[str, ...], str | None]:
    try:
        text = blob.read(MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return (), f"{name} is not UTF-8 (byte {error.start}). Save it as UTF-8."
    except DecodeError as error:
        return (), f"{name}: {error}"
    return tuple(line.strip() for line in text.splitlines() if line.strip()), None
