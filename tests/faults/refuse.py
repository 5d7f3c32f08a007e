"""A disk that refuses, or writes less than it was given: told with what to do, and once it is mended the run ends in the same bytes."""

from __future__ import annotations

import errno
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from difffeat.runtime import files as module
from difffeat.runtime.store import verify
from tests.faults.forks import Ended, in_child
from tests.faults.outcome import Outcome, Size, outcome, told
from tests.faults.scenarios import Scenario, scenarios
from tests.runtime.fake import CountedFiles, tree

ERRORS = {"short": (errno.ENOSPC,), "long": (errno.ENOSPC, errno.EIO)}
SHORT = ("image extraction", "image extraction with --append")
NEEDS_SPACE = frozenset({"create", "allocate", "write", "sync", "rename", "link", "make_one_folder"})
MESSAGE = re.compile(r"writing to .*out failed: .+\. Finished shards are kept; free space or mend the disk, then run the same command again\.")


def campaign(size: Size, work: Path) -> Iterator[Outcome]:
    """Each error at each operation, once and for good; then writes cut short."""
    for scenario in scenarios(work, ("image",) if size == "short" else ("image", "text")):
        if size == "short" and scenario.name not in SHORT:
            continue
        for number in ERRORS[size]:
            with outcome(f"{errno.errorcode[number]} during {scenario.name}") as found:
                for operation in range(0, scenario.operations, 1 if size == "long" else 5):
                    _refused(scenario, f"operation {operation} refused", Refusing(operation, number, lasting=False), found)
                    if size == "long" or operation % 2 == 0:
                        _refused(scenario, f"all from operation {operation} on refused", Refusing(operation, number, lasting=True), found)
            yield found
        with outcome(f"short writes during {scenario.name}") as found:
            for seed in range(2 if size == "short" else 20):
                _short(scenario, seed, found)
        yield found


class Refusing(CountedFiles):
    """Refuses one operation, or from there on all that need space."""

    def __init__(self, operation: int, number: int, *, lasting: bool) -> None:
        super().__init__(self._refuse)
        self._operation, self._number, self._lasting, self.struck = operation, number, lasting, False

    def _refuse(self, current: int, name: str) -> None:
        if current == self._operation or (self._lasting and current > self._operation and name in NEEDS_SPACE):
            self.struck = True
            raise OSError(self._number, os.strerror(self._number))


def _refused(scenario: Scenario, where: str, files: Refusing, found: Outcome) -> None:
    scenario.reset()

    def work() -> None:
        scenario.go(files)
        if files.struck:
            raise AssertionError("a refused operation was passed over in silence")

    ended = in_child(work)
    found.points += 1
    found.reached += bool(ended.error)
    typed = (ended.error, ended.exit_code) == ("StoreWriteError", 4)
    found.expect(typed, f"{where}: ended with {ended.error} ({ended.exit_code}): {ended.message}")
    found.expect(MESSAGE.fullmatch(ended.message) is not None, f"{where}: the message falls short: {ended.message}")
    told(lambda: verify(scenario.out))
    _finish(scenario, where, in_child(scenario.go), found)


def _short(scenario: Scenario, seed: int, found: Outcome) -> None:
    rng, write = random.Random(seed), os.write

    def some(descriptor: int, data: Any) -> int:
        return write(descriptor, bytes(data)[: rng.randint(1, 9)])

    def work() -> None:
        module.os.write = some  # type: ignore[assignment]
        scenario.go()

    scenario.reset()
    found.points += 1
    found.reached += 1
    _finish(scenario, f"short writes, seed {seed}", in_child(work), found)


def _finish(scenario: Scenario, where: str, ended: Ended, found: Outcome) -> None:
    found.expect(not ended.error and not ended.signal, f"{where}: going on failed: {ended.error}: {ended.message}")
    found.expect(tree(scenario.out) == scenario.expected, f"{where}: other bytes than undisturbed")
