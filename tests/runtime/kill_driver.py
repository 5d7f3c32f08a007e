"""Run in a process of its own: forks a child for each point of the extraction, lets it be killed there, and resumes. Prints what came of it as JSON.

A child that is killed runs no handler and flushes nothing. Every second resume is killed too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from difffeat.runtime.extract import extract
from difffeat.runtime.sources import open_source
from tests.runtime.fake import CountedFiles, FakeEngine, tree


def run(source: str, out: Path, at: object = None, overwrite: bool = False) -> CountedFiles:
    """One extraction of three shards."""
    files = CountedFiles(at if callable(at) else lambda number, name: None)
    extract(FakeEngine(), open_source(source), out, batch_size=2, shard_size=4, num_workers=1, overwrite=overwrite, files=files)
    return files


def killed_at(source: str, out: Path, operation: int, overwrite: bool = False) -> bool:
    """Run in a child that is killed ahead of an operation; whether it was."""

    def kill(number: int, _: str) -> None:
        if number == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        run(source, out, kill, overwrite)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)


def main(source: str, work: Path) -> None:
    """All kill points of a first run, and of an overwrite."""
    whole = work / "whole"
    operations = run(source, whole).count
    expected = tree(whole)
    failures = []
    killed = 0
    for operation in range(operations):
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        killed += killed_at(source, out, operation)
        if operation % 2:
            killed_at(source, out, max(4, (operations - operation) // 3))
        run(source, out)
        if tree(out) != expected:
            failures.append(f"killed ahead of operation {operation}")
    for operation in range(12):
        killed_at(source, whole, operation, overwrite=True)
        run(source, whole, overwrite=True)
        if tree(whole) != expected:
            failures.append(f"overwrite killed ahead of operation {operation}")
    sys.stdout.write(json.dumps({"operations": operations, "killed": killed, "failures": failures}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
