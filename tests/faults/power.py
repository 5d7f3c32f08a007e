"""A power cut after any operation: what was receipted is whole, `verify` tells what is not, and going on ends in the same bytes."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from difffeat.runtime.files import TEMPORARY
from difffeat.runtime.manifest import shard_path
from difffeat.runtime.store import verify
from tests.faults.disk import Disk, Journal
from tests.faults.forks import in_child
from tests.faults.outcome import Outcome, Size, outcome, told
from tests.faults.scenarios import Scenario, scenarios
from tests.runtime.fake import tree

STATES = {"short": 2, "long": 6}
SHORT = ("image extraction", "image extraction with --retry-quarantined")
SECOND_STATES = {"short": 0, "long": 1}


def campaign(size: Size, work: Path) -> Iterator[Outcome]:
    """For every operation of every scenario: the state in which nothing unflushed survived, and a seeded sample of the others."""
    for scenario in scenarios(work, ("image",) if size == "short" else ("image", "text")):
        if size == "long" or scenario.name in SHORT:
            with outcome(f"power cut during {scenario.name}") as found:
                cut_everywhere(scenario, STATES[size], SECOND_STATES[size], found, every=1 if size == "long" else 3)
            yield found


def cut_everywhere(scenario: Scenario, states: int, second_states: int, found: Outcome, journal: type[Journal] = Journal, every: int = 1) -> None:
    """Each state after each operation of a run (or every second, third, ... one)."""
    scenario.reset()
    disk = Disk()
    for number, disk in enumerate(_disks(_record(scenario, journal), scenario.start)):
        if number % every:
            continue
        for state in range(states):
            rng = random.Random(1000 * number + state) if state else None
            _cut(scenario, disk, f"cut after operation {number}, state {state}", rng, found)
            for second in range(second_states if state in (1, 2) else 0):
                _cut_again(scenario, disk, number, state, second, found)
    _expect_kept(scenario, disk, found)


def _expect_kept(scenario: Scenario, disk: Disk, found: Outcome) -> None:
    """When a run has said that it is finished, a power cut must not lose any of it."""
    _lay(scenario, disk, None)
    kept = set(_receipted(scenario, disk))
    for name in scenario.expected:
        if name.startswith("receipts/"):
            found.expect(name in kept, f"cut after the run had finished: {name} is lost")


def _record(scenario: Scenario, kind: type[Journal] = Journal) -> list[tuple[Any, ...]]:
    """The operations of a run from what lies in `scenario.out`, by a process that is gone afterwards: its lock is stale, as after a power cut."""

    def work() -> list[tuple[Any, ...]]:
        journal = kind(scenario.out.parent)
        scenario.go(journal)
        return journal.operations

    ended = in_child(work)
    if ended.error or ended.signal:
        raise AssertionError(f"an undisturbed run failed: {ended.error}: {ended.message}")
    return ended.value


def _disks(operations: list[tuple[Any, ...]], start: Path | None) -> Iterator[Disk]:
    """The disk after each operation, the same object moving on."""
    disk = Disk()
    if start is not None:
        disk.root.bind("out", Disk(start).root)
        disk.root.flush()
    yield disk
    for operation in operations:
        disk.apply(operation)
        yield disk


def _cut(scenario: Scenario, disk: Disk, where: str, rng: random.Random | None, found: Outcome) -> None:
    _lay(scenario, disk, rng)
    found.points += 1
    found.reached += 1
    problems = told(lambda: verify(scenario.out))
    kept = _receipted(scenario, disk)
    for name in kept:
        blamed = re.compile(rf"/{re.escape(name)}(?!{re.escape(TEMPORARY)})")  # a temporary left beside it is another file
        found.expect(not any(blamed.search(problem) for problem in problems), f"{where}: {name} was receipted and is not whole")
    before = {name: (scenario.out / name).stat().st_mtime_ns for name in kept if scenario.fresh}  # --overwrite begins anew each time
    _finish(scenario, where, found)
    for name, moment in before.items():
        found.expect((scenario.out / name).stat().st_mtime_ns == moment, f"{where}: {name} was receipted and was computed again")


def _cut_again(scenario: Scenario, disk: Disk, number: int, state: int, second: int, found: Outcome) -> None:
    """Power fails again while the run goes on."""
    rng = random.Random(1000 * number + state)
    _lay(scenario, disk, rng)
    start = None
    if scenario.out.exists():
        start = scenario.out.with_name("start")
        shutil.rmtree(start, ignore_errors=True)
        shutil.copytree(scenario.out, start)
    operations = _record(scenario)
    choice = random.Random(1_000_000 * second + 1000 * number + state)
    stop = choice.randint(0, len(operations))
    for index, again in enumerate(_disks(operations, start)):
        if index == stop:
            _cut(scenario, again, f"cut after operation {number}, state {state}, and again after {stop}", choice, found)
            return


def _lay(scenario: Scenario, disk: Disk, rng: random.Random | None) -> None:
    """The state after a cut, in place of the scenario's folder."""
    laid = scenario.out.parent.with_name("laid")
    shutil.rmtree(laid, ignore_errors=True)
    shutil.rmtree(scenario.out, ignore_errors=True)
    disk.cut(laid, rng)
    if (laid / "out").exists():
        (laid / "out").rename(scenario.out)


def _receipted(scenario: Scenario, disk: Disk) -> list[str]:
    """Files of the final store that no power cut can harm any more, by the disk's own model: a shard counts with its receipt."""
    if not disk.durable("out/manifest.json"):
        return []
    hashes, kept = tree(scenario.out), []
    for name, digest in scenario.expected.items():
        if name.startswith("receipts/") and disk.durable(f"out/{name}") and hashes.get(name) == digest:
            receipt = json.loads((scenario.out / name).read_text())
            kept += [name, shard_path(Path(), receipt["shard"], receipt["generation"]).as_posix()]
    return kept


def _finish(scenario: Scenario, where: str, found: Outcome) -> None:
    ended = in_child(scenario.go)
    found.expect(not ended.error and not ended.signal, f"{where}: going on failed: {ended.error}: {ended.message}")
    found.expect(tree(scenario.out) == scenario.expected, f"{where}: other bytes than undisturbed")
    found.expect(told(lambda: verify(scenario.out)) == [], f"{where}: the finished store does not verify")
