"""What is interrupted: extractions of a few samples, images or captions, each from a prepared folder to a known end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from difffeat.engines.base import Engine
from difffeat.recipe import RunRecipe
from difffeat.runtime.extract import Summary, extract
from difffeat.runtime.files import Files
from difffeat.runtime.matching import Mode
from difffeat.runtime.origin import Origin
from difffeat.runtime.sources import open_source
from difffeat.workflows.scenes import tokenizer_json
from tests.runtime.fake import CountedFiles, FakeEngine, FakeTextEngine, encoded, folder_of_images, tree

ENGINES: dict[str, Callable[[], Engine]] = {"image": FakeEngine, "text": FakeTextEngine}


ORIGIN = Origin("/artifact", "/source")


def make_source(folder: Path, count: int = 10) -> Path:
    """Images with captions beside them, one bad of each; a tokenizer in the folder above."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder_of_images(folder, count)
    (folder / "03.png").write_bytes(encoded(3)[:40])
    (folder / "05.txt").write_bytes(b"two \xff three")
    (folder.parent / "tokenizer.json").write_text(tokenizer_json())
    return folder


def run(kind: str, source: Path, out: Path, *, engine: Engine | None = None, files: Files | None = None, **options: Any) -> Summary:
    """One extraction by a little engine, in three shards of up to four rows."""
    arguments = {"batch_size": 2, "shard_size": 4, "num_workers": 1, "tokenizer": source.parent / "tokenizer.json", "origin": ORIGIN, **options}
    return extract(engine or ENGINES[kind](), open_source(source), out, files=files, **arguments)


@dataclass
class Scenario:
    """A run of `work` on the folder `out`, begun from `start` (None: no folder), that must always end in `expected`.

    **Fields:** `operations` that an undisturbed run makes; `fresh` whether every file that appears under its own name is already the final one;
    `grows` whether a finished store is added to or mended, and stays one that can be read all the while.
    """

    name: str
    work: Callable[..., Summary]
    out: Path
    start: Path | None
    expected: dict[str, str]
    operations: int
    fresh: bool
    grows: bool = False

    def reset(self) -> None:
        """The folder as it was before."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.start is not None:
            shutil.copytree(self.start, self.out)

    def go(self, files: Files | None = None) -> Summary:
        """Run, or go on."""
        return self.work(self.out, files=files)


def _scenario(name: str, folder: Path, work: Callable[..., Summary], start: Path | None) -> Scenario:
    (folder / "run").mkdir()
    made = Scenario(name, work, folder / "run" / "out", start, {}, 0, start is None)
    made.reset()
    counted = CountedFiles(lambda *_: None)
    made.go(counted)
    made.expected, made.operations, made.grows = tree(made.out), counted.count, "--append" in name or "--retry" in name
    return made


def scenarios(folder: Path, kinds: tuple[str, ...] = ("image", "text")) -> list[Scenario]:
    """Every kind of run that writes a store."""
    return [make(kind, folder / kind / make.__name__) for kind in kinds for make in (_first, _overwrite, _append, _retry)]


def _first(kind: str, place: Path) -> Scenario:
    """Three shards, from nothing."""
    return _scenario(f"{kind} extraction", place, partial(run, kind, make_source(place / "source")), None)


def _overwrite(kind: str, place: Path) -> Scenario:
    """The same over a store of another configuration."""
    source = make_source(place / "source")
    run(kind, source, place / "base", run=RunRecipe(seed=9), shard_size=3)
    return _scenario(f"{kind} extraction with --overwrite", place, partial(run, kind, source, overwrite=True), place / "base")


def _append(kind: str, place: Path) -> Scenario:
    """Five more samples, one of them bad, whose names lie between those that are there."""
    source = make_source(place / "source")
    run(kind, source, place / "base")
    for index in range(5):
        (source / f"{index:02d}-more.png").write_bytes(encoded(20 + index) if index != 2 else b"")
        (source / f"{index:02d}-more.txt").write_bytes(b"two three" if index != 2 else b"\xff")
    return _scenario(f"{kind} extraction with --append", place, partial(run, kind, source, mode=Mode.APPEND), place / "base")


def _retry(kind: str, place: Path) -> Scenario:
    """Bad samples in every shard; all are mended but one, whose bytes change though it stays bad."""
    source = make_source(place / "source")
    suffix, bad, still_bad = (".png", b"", b"a note") if kind == "image" else (".txt", b"\xff", b"the \xff")
    for index in (1, 2, 8, 9):
        (source / f"{index:02d}{suffix}").write_bytes(bad)
    run(kind, source, place / "base", max_bad_fraction=0.9)
    for index in (1, 2, 8, 3 if kind == "image" else 5):
        (source / f"{index:02d}{suffix}").write_bytes(encoded(index) if kind == "image" else b"the two")
    (source / f"09{suffix}").write_bytes(still_bad)
    return _scenario(f"{kind} extraction with --retry-quarantined", place, partial(run, kind, source, mode=Mode.RETRY), place / "base")
