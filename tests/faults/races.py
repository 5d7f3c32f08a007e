"""Many processes on one store: one writes, the others are told; readers meanwhile see whole shards or none."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import DifffeatError, StoreCorrupt
from difffeat.runtime.files import LOCK, Lock
from difffeat.runtime.store import Store, verify
from tests.faults.forks import Ended, die, in_child
from tests.faults.outcome import Outcome, Size, outcome, told
from tests.faults.scenarios import ENGINES, make_source, run
from tests.runtime.fake import tree

WRITERS = READERS = 8
ROUNDS = {"short": 6, "long": 60}


def campaign(size: Size, work: Path) -> Iterator[Outcome]:
    """Rounds of eight writers on nothing, on the lock of a dead process, and on garbage; then eight readers beside one writer."""
    source = make_source(work / "source", 40)
    run("image", source, work / "whole")
    for before in ("no lock", "a dead process's lock", "garbage for a lock"):
        with outcome(f"{WRITERS} writers at once, {before}") as found:
            for number in range(ROUNDS[size]):
                _writers(source, work, before, number, found)
        yield found
    with outcome(f"{READERS} readers beside a writer") as found:
        for number in range(2 if size == "short" else 20):
            _readers(source, work, number, found)
    yield found


def together(jobs: list[Callable[[], Any]]) -> list[Ended]:
    """Run each job in a fork of its own, all let go at one moment."""
    gate_reader, gate = os.pipe()
    pipes = []
    for job in jobs:
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.close(gate)
            os.read(gate_reader, 1)  # returns when the parent closes its end
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(_ended(job), pipe)
            os._exit(0)
        os.close(writer)
        pipes.append(reader)
    os.close(gate_reader)
    os.close(gate)
    found = []
    for reader in pipes:
        with os.fdopen(reader, "rb") as pipe:
            found.append(pickle.loads(pipe.read()))
    for _ in jobs:
        os.wait()
    return found


def _ended(job: Callable[[], Any]) -> Ended:
    try:
        return Ended(value=job())
    except BaseException as error:  # reported to the parent, whatever it is
        return Ended(error=type(error).__name__, message=str(error), exit_code=getattr(error, "exit_code", 1))


def _writers(source: Path, work: Path, before: str, number: int, found: Outcome) -> None:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    _plant(out, before)
    ended = together([partial(_write, source, out, 1000 * number + index) for index in range(WRITERS)])
    found.points += 1
    found.reached += 1
    wrote = [end for end in ended if not end.error and end.value > 0]
    others = {end.error for end in ended if end.error}
    where = f"round {number}"
    found.expect(len(wrote) == 1, f"{where}: {len(wrote)} processes wrote")
    found.expect(others <= {"StoreLocked"}, f"{where}: {[f'{end.error}: {end.message}' for end in ended if end.error not in ('', 'StoreLocked')]}")
    found.expect(tree(out) == tree(work / "whole"), f"{where}: other bytes than one writer's, or something left: {sorted(tree(out))}")
    found.expect(told(lambda: verify(out)) == [], f"{where}: the store does not verify")


def _write(source: Path, out: Path, seed: int) -> int:
    """Shards that this writer computed."""
    time.sleep(random.Random(seed).random() * 0.004)
    engine = ENGINES["image"]()
    engine._before = lambda _: time.sleep(0.004)  # type: ignore[attr-defined]
    return run("image", source, out, engine=engine).computed


def _plant(out: Path, before: str) -> None:
    out.mkdir()
    if before.startswith("a dead"):
        ended = in_child(lambda: (Lock(out).__enter__(), die()))
        if not ended.killed or not json.loads((out / LOCK).read_text())["pid"]:
            raise AssertionError("no lock was left to take over")
    elif before.startswith("garbage"):
        (out / LOCK).write_bytes(b"\0" * 80)


def _readers(source: Path, work: Path, number: int, found: Outcome) -> None:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    expected = {tap: np.asarray(features) for tap, features in _whole(work / "whole").items()}
    done = work / f"done-{number}"
    ended = together([partial(_write_slowly, source, out, done), *(partial(_read, out, done, expected) for _ in range(READERS))])
    for end in ended:
        found.expect(not end.error, f"round {number}: {end.error}: {end.message}")
    reads = [end.value for end in ended[1:] if not end.error]
    found.points += sum(seen for _, seen, _ in reads)
    found.reached += sum(seen for _, seen, _ in reads)
    found.note = "looks at an unfinished store"
    for _, _, wrong in reads:
        found.differences += [f"round {number}: {line}" for line in wrong]


def _whole(store: Path) -> dict[str, np.ndarray]:
    opened = Store.open(store)
    return {tap: np.asarray(opened[tap]) for tap in opened.taps}


def _write_slowly(source: Path, out: Path, done: Path) -> None:
    try:
        _write(source, out, 0)
    finally:
        done.touch()


def _read(out: Path, done: Path, expected: dict[str, np.ndarray]) -> tuple[int, int, list[str]]:
    """How often the store was looked at, how often some shards were there, and what was wrong with them."""
    tried, seen, wrong = 0, 0, []
    while not done.exists():
        tried += 1
        try:
            store = Store.open(out, partial=True)
            if not store.finished_shards:
                continue
            seen += 1
            for first, arrays in store.shards():
                for tap, whole in expected.items():
                    if not np.array_equal(arrays[tap], whole[first : first + len(arrays[tap])]):
                        wrong.append(f"{tap}: rows of shard at {first} are not the sample's")
        except StoreCorrupt as error:
            wrong.append(f"corrupt while it is written: {error}")
        except DifffeatError:
            continue
    return tried, seen, wrong
