"""Every write of a store goes through `Files`: seen by Python's audit hook, and by replaying what went through on a model of the disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from difffeat.runtime import files as module
from tests.faults.disk import Disk, Journal
from tests.faults.forks import in_child
from tests.faults.outcome import Outcome, Size, outcome
from tests.faults.scenarios import Scenario, scenarios
from tests.runtime.fake import tree

PACKAGE = Path(module.__file__).parents[1]
CHANGES = {"os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime"}


def campaign(size: Size, work: Path) -> Iterator[Outcome]:
    """Each scenario once, the same in both sizes."""
    for scenario in scenarios(work):
        with outcome(f"one door to the disk, {scenario.name}") as found:
            _watch(scenario, found)
            _replay(scenario, work / "replayed", found)
        yield found


def _watch(scenario: Scenario, found: Outcome) -> None:
    """Every change below the store's folder that Python sees is made by runtime/files.py."""
    scenario.reset()

    def work() -> tuple[int, list[str]]:
        events: list[tuple[str, str]] = []

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if _changes(event, arguments) and str(scenario.out) in str(arguments[:2]):
                events.append((_maker(sys._getframe()), f"{event} {arguments!r:.150}"))

        sys.addaudithook(hook)
        scenario.go()
        return len(events), [what for maker, what in events if maker != "runtime/files.py"]

    ended = in_child(work)
    found.expect(not ended.error, f"{ended.error}: {ended.message}")
    if ended.value is not None:
        count, elsewhere = ended.value
        found.points += count
        found.reached += count - len(elsewhere)
        found.differences += [f"not by runtime/files.py: {what}" for what in elsewhere]


def _changes(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool(isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    return event in CHANGES


def _maker(frame: FrameType | None) -> str:
    """The innermost module of the package on the stack."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            return path.relative_to(PACKAGE).as_posix()
        frame = frame.f_back
    return "elsewhere"


def _replay(scenario: Scenario, replayed: Path, found: Outcome) -> None:
    """What went through `Files`, done again on a model, is all that lies on the disk: nothing was written behind its back, by native code neither."""
    scenario.reset()
    journal = Journal(scenario.out.parent)
    disk = Disk()
    if scenario.start is not None:
        disk.root.bind("out", Disk(scenario.start).root)
    scenario.go(journal)
    for operation in journal.operations:
        disk.apply(operation)
    disk.flush()
    disk.cut(replayed / scenario.name, None)
    found.points += 1
    found.reached += 1
    found.expect(tree(replayed / scenario.name / "out") == tree(scenario.out), "the disk holds what did not go through Files")
