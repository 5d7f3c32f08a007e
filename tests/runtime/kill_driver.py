"""Run in a process of its own: forks a child for each point of a run, lets it be killed there, and runs again. Prints what came of it as JSON.

A child that is killed runs no handler and flushes nothing. Every second run that follows is killed too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difffeat.runtime.extract import extract
from difffeat.runtime.matching import Mode
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store
from tests.runtime.fake import CountedFiles, FakeEngine, encoded, folder_of_images, tree


@dataclass(frozen=True)
class Scene:
    """A run that is killed: of `source`, in `mode`, on a copy of the store `base` (None: there is none yet)."""

    source: Path
    base: Path | None = None
    mode: Mode = Mode.RESUME
    overwrite: bool = False

    def run(self, out: Path, at: Callable[[int, str], Any] = lambda *_: None) -> int:
        """The number of its file operations."""
        files = CountedFiles(at)
        options: dict[str, Any] = {"mode": self.mode, "overwrite": self.overwrite, "max_bad_fraction": 0.9, "files": files}
        extract(FakeEngine(), open_source(self.source), out, batch_size=2, shard_size=4, num_workers=1, **options)
        return files.count

    def begin(self, out: Path) -> None:
        """Lay out what the run finds."""
        shutil.rmtree(out, ignore_errors=True)
        if self.base is not None:
            shutil.copytree(self.base, out)

    def killed_at(self, out: Path, operation: int) -> bool:
        """Run in a child that is killed ahead of an operation; whether it was."""

        def kill(number: int, _: str) -> None:
            if number == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if child == 0:
            self.run(out, kill)
            os._exit(0)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def first(work: Path) -> Scene:
    """Three shards, from nothing."""
    return Scene(folder_of_images(work / "images", 10))


def overwrite(work: Path) -> Scene:
    """The same over a store that is there."""
    source = folder_of_images(work / "images", 10)
    Scene(source).run(work / "base")
    return Scene(source, work / "base", overwrite=True)


def append(work: Path) -> Scene:
    """Five more samples, whose names lie between those that are there, with a class of their own."""
    source = folder_of_images(work / "images", 10)
    Scene(source).run(work / "base")
    for index in range(5):
        (source / f"{index:02d}-more.png").write_bytes(encoded(20 + index))
    return Scene(source, work / "base", Mode.APPEND)


def retry(work: Path) -> Scene:
    """Four bad images: two of one shard are mended, one of another, one stays bad though its bytes change."""
    source = folder_of_images(work / "images", 10)
    for index in (1, 2, 8, 9):
        (source / f"{index:02d}.png").write_bytes(b"")
    Scene(source).run(work / "base")
    for index in (1, 2, 8):
        (source / f"{index:02d}.png").write_bytes(encoded(index))
    (source / "09.png").write_bytes(b"this is a note")
    return Scene(source, work / "base", Mode.RETRY)


SCENES = {"first": first, "overwrite": overwrite, "append": append, "retry": retry}


def main(name: str, work: Path) -> None:
    """All kill points of a scene."""
    scene = SCENES[name](work)
    whole, out = work / "whole", work / "out"
    scene.begin(whole)
    operations = scene.run(whole)
    expected, failures, killed = tree(whole), [], 0
    for operation in range(operations):
        scene.begin(out)
        killed += scene.killed_at(out, operation)
        failures += _unreadable(scene, out, operation)
        if operation % 2:
            scene.killed_at(out, max(4, (operations - operation) // 3))
        scene.run(out)
        if tree(out) != expected:
            failures.append(f"killed ahead of operation {operation}")
    sys.stdout.write(json.dumps({"operations": operations, "killed": killed, "failures": failures}))


def _unreadable(scene: Scene, out: Path, operation: int) -> list[str]:
    """A finished store that is added to or mended stays one that can be read, wherever the run is killed."""
    if scene.mode is Mode.RESUME:
        return []
    store, before = Store.open(out), Store.open(scene.base or out)
    same = store.ids[:10] == before.ids and all((store[tap][:10][before.valid] == before[tap][before.valid]).all() for tap in before.taps)
    return [] if same and len(store.labels if store.labels is not None else store.ids) == len(store) else [f"unreadable after operation {operation}"]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
