"""Killed anywhere, a run goes on to the same bytes; killed again while it goes on, it still does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from difffeat.errors import DifffeatError
from difffeat.runtime.files import LOCK, TEMPORARY
from difffeat.runtime.store import Store, verify
from tests.faults.forks import die, in_child
from tests.faults.outcome import Outcome, Size, outcome, told
from tests.faults.scenarios import Scenario, scenarios
from tests.runtime.fake import CountedFiles, tree

SECOND_KILLS = {"short": 1, "long": 3}


def campaign(size: Size, work: Path) -> Iterator[Outcome]:
    """Every operation of every scenario is a point; each is tried with a seeded sample of second kills too. The short form has all of a
    first extraction of images, and fewer of the others.
    """
    for scenario in scenarios(work):
        image = scenario.name.startswith("image")
        if size == "long" or image or scenario.fresh:
            with outcome(f"killed during {scenario.name}") as found:
                for operation in range(0, scenario.operations, 1 if size == "long" or scenario.name == "image extraction" else 3 if image else 5):
                    _once(scenario, operation, found)
            yield found
        if size == "long" or (image and scenario.fresh):
            with outcome(f"killed again while {scenario.name} goes on") as found:
                for operation in range(0, scenario.operations, 1 if size == "long" else 5):
                    _twice(scenario, operation, SECOND_KILLS[size], found)
            yield found


def kill_at(operation: int) -> CountedFiles:
    """Files that kill their process ahead of an operation."""
    return CountedFiles(lambda number, _: die() if number == operation else None)


def _once(scenario: Scenario, operation: int, found: Outcome) -> None:
    where = f"killed ahead of operation {operation}"
    scenario.reset()
    found.points += 1
    found.reached += in_child(lambda: scenario.go(kill_at(operation))).killed
    if scenario.fresh:
        for name, digest in tree(scenario.out).items():
            partial = name == LOCK or name.endswith(TEMPORARY)
            found.expect(partial or scenario.expected.get(name) == digest, f"{where}: {name} lies there half-written")
    if scenario.grows:
        found.expect(_still_readable(scenario), f"{where}: the finished store that was added to or mended cannot be read any more")
    told(lambda: verify(scenario.out))  # whatever the state: problems or a typed error, never a crash
    _finish(scenario, where, found)


def _still_readable(scenario: Scenario) -> bool:
    """Every row that was good before is there, under its own id."""
    assert scenario.start is not None
    try:
        store, before = Store.open(scenario.out), Store.open(scenario.start)
        kept = all(np.array_equal(np.asarray(store[tap])[: len(before)][before.valid], np.asarray(before[tap])[before.valid]) for tap in before.taps)
        return kept and store.ids[: len(before)] == before.ids and bool(store.valid[: len(before)][before.valid].all())
    except DifffeatError:
        return False


def _twice(scenario: Scenario, operation: int, seconds: int, found: Outcome) -> None:
    for second in random.Random(operation).sample(range(1, scenario.operations), seconds):
        scenario.reset()
        found.points += 1
        first = in_child(lambda: scenario.go(kill_at(operation)))
        ended = in_child(lambda second=second: scenario.go(kill_at(second)))
        found.reached += first.killed
        where = f"killed ahead of operation {operation}, then of {second}{'' if ended.killed else ' (not reached)'}"
        _finish(scenario, where, found)


def _finish(scenario: Scenario, where: str, found: Outcome) -> None:
    ended = in_child(scenario.go)
    found.expect(not ended.error and not ended.signal, f"{where}: going on failed: {ended.error}: {ended.message}")
    found.expect(tree(scenario.out) == scenario.expected, f"{where}: other bytes than undisturbed")
