"""Run in a process of its own, because Ray needs sockets: the same store by one engine and by two workers, of which one is killed midway.

Arguments: artifact, source, folder to work in. Prints what came of it as JSON.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from difffeat.errors import ClusterError
from difffeat.runtime.cluster import Cluster, extract_on_ray
from difffeat.runtime.extract import extract
from difffeat.runtime.feeding import Opening
from difffeat.runtime.progress import Progress
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store, verify
from tests.runtime.fake import tree

OPTIONS: dict[str, Any] = {"batch_size": 2, "shard_size": 4, "num_workers": 1}


class Killer:
    """Kills one worker when the first shard is told; `done` counts what has been told."""

    def __init__(self) -> None:
        self.killed, self.done = 0, 0

    def __call__(self, state: Progress) -> None:
        self.done = state.done
        workers = [process for process in psutil.Process().children(recursive=True) if process.name().startswith("ray::Worker")]
        if not self.killed and workers:
            workers[0].kill()
            self.killed += 1


def main(artifact: Path, source: Path, work: Path) -> None:
    """Both stores, and a run that gives up."""
    opening, listed = Opening(artifact=artifact, threads=1), open_source(source)
    with ExitStack() as stack:
        engine, beside = opening.open(stack)
        extract(engine, listed, work / "local", **beside, **OPTIONS)
    said: list[str] = []
    killer = Killer()
    summary = extract_on_ray(opening, listed, work / "ray", Cluster(workers=2), progress=killer, say=said.append, **OPTIONS)
    given_up = ""
    try:
        extract_on_ray(opening, listed, work / "given-up", Cluster(workers=2, attempts=1), progress=Killer(), **OPTIONS)
    except ClusterError as error:
        given_up = str(error)
    result = {
        "same": tree(work / "local") == tree(work / "ray"),
        "problems": verify(work / "ray"),
        "killed": killer.killed,
        "told": killer.done,
        "said": said,
        "samples": summary.samples,
        "executor": summary.executor,
        "stages": summary.stages,
        "given_up": given_up,
        "kept": Store.open(work / "given-up", partial=True).finished_shards,
        "lock": (work / "given-up" / "lock").exists(),
        "left": [process.name() for process in psutil.Process().children(recursive=True) if process.name().startswith("ray::")],
    }
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
