"""`make faults`: every promise of the store put to its long test, and a table of what came of it.

    python -m tests.faults [--short] [--jobs N] [CAMPAIGN ...]

Ends with 1 when anything differs from what is promised. Each campaign runs in a process of its own, because most of them fork.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from tests.faults.outcome import Outcome, Size

CAMPAIGNS = ("kill", "power", "refuse", "machine", "corrupt", "parsers", "poison", "hostile", "races", "memory", "door")
"""The longest first, so that the last to end is a short one."""


def run_campaign(name: str, size: Size) -> Iterator[Outcome]:
    """The outcomes of one campaign, in an empty folder, in memory where the machine has such a file system."""
    campaign = importlib.import_module(f"tests.faults.{name}").campaign
    importlib.metadata.version = functools.cache(importlib.metadata.version)  # half the time of a small extraction otherwise
    gc.freeze()  # so that forks share these pages for good
    memory = Path("/dev/shm")
    work = Path(tempfile.mkdtemp(prefix=f"difffeat-{name}-", dir=memory if memory.is_dir() else None))
    try:
        yield from campaign(size, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run_apart(name: str, size: Size) -> list[Outcome]:
    """The same in a process of its own; a crash is one more difference."""
    command = [sys.executable, "-m", "tests.faults", name, "--json", *(["--short"] if size == "short" else [])]
    finished = subprocess.run(command, capture_output=True, text=True)
    try:
        return [Outcome(**found) for found in json.loads(finished.stdout)]
    except ValueError:
        return [Outcome(name, differences=[f"the campaign ended with {finished.returncode}: {finished.stderr[-3000:]}"])]


def main(arguments: list[str]) -> int:
    """Print a line for each promise; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="The long tests of what the store promises.")
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"some of: {', '.join(CAMPAIGNS)}; default: all")
    parser.add_argument("--short", action="store_true", help="the short form that `make test` runs")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of the table, and everything in this process")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="campaigns at a time; default: one for each core")
    options = parser.parse_args(arguments)
    names = tuple(options.campaigns) or CAMPAIGNS
    if unknown := sorted(set(names) - set(CAMPAIGNS)):
        parser.error(f"no campaign {', '.join(unknown)}; there are {', '.join(CAMPAIGNS)}")
    size: Size = "short" if options.short else "long"
    if options.json:
        with contextlib.redirect_stdout(sys.stderr):  # hypothesis prints there, and standard output is the JSON's
            found = [outcome for name in names for outcome in run_campaign(name, size)]
        sys.stdout.write(json.dumps([asdict(outcome) for outcome in found]))
    else:
        found = _run_all(names, size, options.jobs)
    return int(any(outcome.differences for outcome in found))


def _run_all(names: tuple[str, ...], size: Size, jobs: int) -> list[Outcome]:
    started, found = time.monotonic(), list[Outcome]()
    with ThreadPoolExecutor(jobs) as pool:
        for finished in as_completed([pool.submit(run_apart, name, size) for name in names]):
            for outcome in finished.result():
                found.append(outcome)
                _show(outcome)
    points, differences = sum(outcome.points for outcome in found), sum(len(outcome.differences) for outcome in found)
    sys.stdout.write(f"{points} points, {differences} differences, {time.monotonic() - started:.0f} s\n")
    return found


def _show(outcome: Outcome, most: int = 10) -> None:
    lines = [outcome.line, *(f"  {difference}" for difference in outcome.differences[:most])]
    if len(outcome.differences) > most:
        lines.append(f"  and {len(outcome.differences) - most} more")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
