"""Where samples come from: `open_source` lists them; nothing is decoded here."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from difffeat.errors import SourceError, SourceFormatError
from difffeat.runtime.samples import IMAGE_SUFFIXES, Sample, Source, multi_hot_classes
from difffeat.runtime.sources_coco import read_coco
from difffeat.runtime.sources_manifest import read_manifest

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


def open_source(
    locator: str | Path, *, images: str | Path | None = None, captions: str | Path | None = None, class_folders: bool | None = None
) -> Source:
    """List the samples of a folder, a manifest (CSV, TSV, JSONL, Parquet) or COCO annotations.

    **Arguments:** `images` folder of the images of COCO annotations, or the base of relative paths in a manifest (default: the manifest's folder);
    `captions` COCO captions JSON; `class_folders` whether subfolders name classes (None: when every image lies one folder deep in two or more
    folders).

    Raises EmptySource, SourceFormatError, DuplicateSample, SourceError (no such path).
    """
    path = Path(locator).expanduser()
    if path.is_dir():
        return _folder(path, str(locator), class_folders)
    if not path.is_file():
        raise SourceError(f"{locator} does not exist. Pass a folder of images, a CSV, JSONL or Parquet manifest, or COCO JSON.")
    suffix = path.suffix.lower()
    if suffix in MANIFEST_SUFFIXES:
        return read_manifest(path, Path(images) if images else path.parent)
    if suffix == ".json":
        return read_coco(path, Path(images) if images else None, Path(captions) if captions else None)
    raise SourceFormatError(f"{locator} is no source we read: pass a folder, or a file ending in {', '.join((*MANIFEST_SUFFIXES, '.json'))}.")


def _folder(root: Path, name: str, class_folders: bool | None) -> Source:
    """Every image below a folder in path order; captions from a .txt of the same stem, one a line. Links are followed to files, not to folders."""
    ignored: Counter[str] = Counter()
    paths: list[Path] = []
    texts: set[Path] = set()
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        for file in files:
            path = Path(folder, file)
            if path.suffix.lower() in IMAGE_SUFFIXES:
                paths.append(path)
            elif path.suffix.lower() == ".txt":
                texts.add(path)
            else:
                ignored[path.suffix.lower()] += 1
    paths.sort(key=lambda p: p.relative_to(root).as_posix())
    relative = [p.relative_to(root) for p in paths]
    folders = {r.parts[0] for r in relative if len(r.parts) == 2}
    named = class_folders if class_folders is not None else len(folders) > 1 and all(len(r.parts) == 2 for r in relative)
    samples = []
    for path, rel in zip(paths, relative, strict=True):
        beside = path.with_suffix(".txt")
        captions, problem = _read_captions(beside) if beside in texts else ((), None)
        texts.discard(beside)
        labels = (rel.parts[0],) if named and len(rel.parts) > 1 else None
        samples.append(Sample(rel.with_suffix("").as_posix(), path, rel.as_posix(), captions, labels, problem))
    ignored[".txt"] += len(texts)
    return Source(name, tuple(samples), multi_hot_classes(samples), +ignored)


def _read_captions(path: Path) -> tuple[tuple[str, ...], str | None]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return (), f"{path.name} is not UTF-8 (byte {error.start}). Save it as UTF-8."
    except OSError as error:
        return (), f"{path.name} cannot be read ({error.strerror})."
    return tuple(line.strip() for line in text.splitlines() if line.strip()), None
