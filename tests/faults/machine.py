"""Any sequence of runs, kills, corruption, repair, growth and mending: no row is lost, doubled or shifted, and none holds another's features.

Each sample's picture encodes its number, and the engine gives the picture back: a row shows whose features it holds.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from PIL import Image

from difffeat.errors import DifffeatError, StoreCorrupt, StoreIncomplete, StoreMismatch, TooManyBadSamples
from difffeat.runtime.extract import Summary
from difffeat.runtime.files import LOCK
from difffeat.runtime.manifest import read_manifest
from difffeat.runtime.matching import Mode
from difffeat.runtime.store import Store, verify
from tests.faults.corrupt import DAMAGES, mend
from tests.faults.outcome import Outcome, Size, outcome, told
from tests.faults.poison import saved
from tests.faults.scenarios import run
from tests.runtime.fake import CountedFiles, FakeEngine

EXAMPLES = {"short": 12, "long": 60}
STEPS = {"short": 15, "long": 30}


class Killed(BaseException):
    """The process is gone: nothing it does afterwards reaches the disk."""


class IdentityEngine(FakeEngine):
    """Features that say the number of the sample, exactly; of noise they hold nothing."""

    def run(self, feeds: Any) -> dict[str, np.ndarray]:
        colour = feeds["pixels"][:, 4, 4].astype(np.float32)
        return {name: np.float32(index + 1) * colour for index, name in enumerate(self.outputs)}


def portrait(number: int) -> bytes:
    """A picture of one colour that encodes a number."""
    return saved(Image.new("RGB", (8, 8), (number % 256, number // 256, 7)), "PNG")


def number_of(features: np.ndarray) -> int:
    """The number that a row of the first tap encodes."""
    red, green, blue = (int(value) for value in features)
    return red + 256 * green if blue == 7 else -1


class StoreMachine(RuleBasedStateMachine):
    """One source, one store. `listed` are the samples of the source in order, `good` those that can be read, `held` the rows of the store once a run
    has ended, `seen` the samples that were bad at a time when a run may have read them.
    """

    totals: Outcome

    @initialize(count=st.integers(1, 9))
    def begin(self, count: int) -> None:
        self.work = Path(tempfile.mkdtemp(prefix="machine-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.source, self.out = self.work / "source", self.work / "out"
        self.source.mkdir()
        (self.work / "tokenizer.json").write_text("{}")
        self.good: dict[int, bool] = {}
        self.held: list[int] = []
        self.ever_bad: set[int] = set()
        self.begun = False
        self.pending: Mode | None = None
        self._add(count, [])

    def _add(self, count: int, bad: list[int]) -> None:
        for number in range(len(self.good), len(self.good) + count):
            self.good[number] = number not in bad
            (self.source / f"{number:04d}.png").write_bytes(portrait(number) if self.good[number] else b"")
            if not self.good[number]:
                self.ever_bad.add(number)

    @rule(count=st.integers(1, 6), bad=st.integers(0, 2))
    def add_samples(self, count: int, bad: int) -> None:
        """The source grows; some of the new samples are bad."""
        start = len(self.good)
        self._add(count, random.Random(start).sample(range(start, start + count), min(bad, count - 1)))

    @precondition(lambda self: not all(self.good.values()))
    @rule(choice=st.integers(0, 99))
    def mend_a_file(self, choice: int) -> None:
        """A bad sample becomes good."""
        bad = [number for number, good in self.good.items() if not good]
        number = bad[choice % len(bad)]
        (self.source / f"{number:04d}.png").write_bytes(portrait(number))
        self.good[number] = True

    @rule(mode=st.sampled_from(Mode))
    def extract(self, mode: Mode) -> None:
        """A run that is let finish."""
        try:
            summary = self._run(mode)
        except (StoreMismatch, StoreIncomplete, TooManyBadSamples):
            return
        except DifffeatError as error:
            if mode is not Mode.RESUME and not self.begun:
                return  # nothing to add to, or to heal
            raise error
        self._finished(summary)

    @rule(mode=st.sampled_from(Mode), operation=st.integers(0, 120))
    def extract_and_be_killed(self, mode: Mode, operation: int) -> None:
        """A run that dies ahead of an operation, if it has so many."""

        def at(number: int, _: str) -> None:
            if number >= operation:
                raise Killed

        try:
            summary = self._run(mode, CountedFiles(at))
        except Killed:
            self.begun = (self.out / "manifest.json").exists()
            _age_lock(self.out)
            return
        except DifffeatError:
            return
        self._finished(summary)

    @precondition(lambda self: self.begun)
    @rule(damage=st.sampled_from(sorted(DAMAGES)), seed=st.integers(0, 2**16))
    def corrupt_and_repair(self, damage: str, seed: int) -> None:
        """Something on the disk is spoiled, found and mended; whatever was finished is so again."""
        whole = told(lambda: verify(self.out)) == []
        spoiled = DAMAGES[damage](self.out, random.Random(seed))
        if spoiled is None:
            return
        if whole and not spoiled.startswith(
            "samples"
        ):  # of the samples table, bits that change no row are not noticed; see the campaign of corruption
            assert told(lambda: verify(self.out)), f"{damage} of {spoiled} was not found"
        try:
            mend(self.out, self._again)
        except (StoreMismatch, StoreIncomplete):
            return  # the source has changed since: what is damaged is computed when its samples are those of the store again

    def _again(self, overwrite: bool = False) -> None:
        """As a repair does it; the table of a grown store is not made again out of the source: then, as its message says, with --overwrite."""
        if not overwrite:
            grown = len(read_manifest(self.out).samples) > 1
            try:
                self._run(Mode.APPEND if grown else Mode.RESUME)
            except StoreCorrupt as error:
                overwrite = "extract again with --overwrite" in str(error)
                if not overwrite:
                    raise
        if overwrite:
            self.held = []
            run("image", self.source, self.out, engine=IdentityEngine(), overwrite=True, max_bad_fraction=1.0)

    def _run(self, mode: Mode, files: CountedFiles | None = None) -> Summary:
        return run("image", self.source, self.out, engine=IdentityEngine(), mode=mode, files=files, max_bad_fraction=1.0)

    def _finished(self, summary: Summary) -> None:
        self.begun = True
        store = Store.open(self.out)
        assert verify(self.out) == []
        assert summary.rows == len(store) == len(store.ids) == len(set(store.ids))
        assert store.ids[: len(self.held)] == [f"{number:04d}" for number in self.held], "rows were moved"
        self.held = [int(name) for name in store.ids]
        assert int(store.valid.sum()) + len(store.quarantined) == len(store)

    @invariant()
    def every_row_is_its_own_sample(self) -> None:
        """Whatever has happened: a row that is there and valid holds its own sample's features, one that is not valid zeros and a reason."""
        if not getattr(self, "begun", False):
            return
        store = Store.open(self.out, partial=True)
        self.totals.points += 1
        reasons = {entry["row"]: entry for entry in store.quarantined}
        for first, arrays in store.shards():
            features, valid = arrays["b1/t30"], arrays["valid"]
            for offset in range(len(valid)):
                row = first + offset
                name = store.ids[row] if row < len(store) else None
                if valid[offset]:
                    assert f"{number_of(features[offset]):04d}" == name, f"row {row} of {name} holds {number_of(features[offset])}"
                    assert row not in reasons
                else:
                    assert not features[offset].any()
                    assert reasons[row]["id"] == name
                    assert int(name or -1) in self.ever_bad

    def teardown(self) -> None:
        if hasattr(self, "work"):
            shutil.rmtree(self.work, ignore_errors=True)


def _age_lock(store: Path) -> None:
    """The lock that a killed run left names this process, which lives on: make it that of a process that is gone."""
    lock = store / LOCK
    if lock.exists() and (text := lock.read_text()):
        lock.write_text(json.dumps({**json.loads(text), "started": "0"}))


def campaign(size: Size, work: Path) -> Iterator[Outcome]:
    """Seeded sequences."""
    with outcome("any sequence of runs, kills, corruption, repair, growth and mending") as found:
        machine = type("Machine", (StoreMachine,), {"totals": found})
        chosen = settings(
            max_examples=EXAMPLES[size],
            stateful_step_count=STEPS[size],
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        )
        try:
            run_state_machine_as_test(machine, settings=chosen)
        except Exception as error:  # the shortest sequence that breaks a promise, as hypothesis tells it
            found.differences.append("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))
        found.reached = found.points
        found.note = f"{EXAMPLES[size]} sequences of up to {STEPS[size]} steps"
    yield found
