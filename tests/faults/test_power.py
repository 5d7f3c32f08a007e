"""The campaign finds what it looks for: a store written by careless files does not pass."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from difffeat.runtime.files import Written
from tests.faults.disk import Journal
from tests.faults.outcome import Outcome
from tests.faults.power import cut_everywhere
from tests.faults.scenarios import scenarios

ROOT = Path(__file__).parents[2]


class NoSync(Journal):
    """Renames files whose bytes were not flushed."""

    def sync(self, descriptor: int) -> None:
        return


class NoFlush(Journal):
    """Never flushes a folder."""

    def fsync(self, path: Path) -> None:
        return


class InPlace(Journal):
    """Writes under the final name."""

    def commit(self, path: Path, chunks: Iterable[bytes | memoryview], size: int) -> Written:
        self.rename, keep = lambda *_: None, self.rename  # type: ignore[method-assign]
        made = path.with_name(path.name.removesuffix(".tmp"))
        self.create, create = lambda _: create(made), self.create  # type: ignore[method-assign]
        try:
            return super().commit(path, chunks, size)
        finally:
            self.rename, self.create = keep, create  # type: ignore[method-assign]


CARELESS = {"NoSync": (NoSync, 2), "NoFlush": (NoFlush, 2), "InPlace": (InPlace, 8)}
"""With how many states of the disk after each operation it takes to see the harm."""


@pytest.mark.parametrize("name", CARELESS)
def test_carelessness_is_found(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.test_power", name, str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout), "a power cut did no harm to a store written without care"


if __name__ == "__main__":  # in a process of its own, because it forks
    found = Outcome("careless")
    kind, states = CARELESS[sys.argv[1]]
    cut_everywhere(scenarios(Path(sys.argv[2]), ("image",))[0], states, 0, found, kind, every=3)
    sys.stdout.write(json.dumps(found.differences))
