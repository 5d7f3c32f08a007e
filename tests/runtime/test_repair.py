"""A damaged store is taken back to the bytes it had; what is whole is not touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from difffeat.errors import StoreLocked, StoreMismatch
from difffeat.recipe import RunRecipe
from difffeat.runtime.check import check
from difffeat.runtime.extract import extract
from difffeat.runtime.files import Files, Lock
from difffeat.runtime.manifest import read_manifest
from difffeat.runtime.matching import Mode
from difffeat.runtime.origin import extract_command
from difffeat.runtime.repair import diagnose, require_samples, set_aside, shard_digests_of
from difffeat.runtime.samples import Source
from difffeat.runtime.sources import open_source
from tests.runtime.fake import CountedFiles, tree
from tests.runtime.stores import Recall, make_source, make_store
from tests.runtime.test_check import SPOILED, zero_page
from tests.runtime.test_store import edit, flip, swap

FEATURES = {"b1/t30": np.random.default_rng(0).standard_normal((31, 40)).astype(np.float16)}
BAD = [5, 6, 30]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "store", FEATURES, bad=BAD).path


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "store"))


def go_on(store: Path, finished: Path) -> int:
    """What `difffeat extract` does after a repair; how many batches it ran."""
    engine = Recall(FEATURES)
    extract(engine, source_of(finished), store, run=RunRecipe(), batch_size=4, shard_size=4, max_bad_fraction=1.0, num_workers=1)
    return engine.runs


def source_of(finished: Path) -> Source:
    return open_source(str(finished.with_name("store-source") / "samples.jsonl"))


def places(store: Path) -> dict[str, tuple[int, int]]:
    """Inode and time stamp of every shard and receipt."""
    return {
        path.relative_to(store).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for folder in ("shards", "receipts")
        for path in (store / folder).iterdir()
    }


@pytest.mark.parametrize("damage", [name for name in SPOILED if name != "a file of somebody else"])
def test_every_damage_is_mended_to_the_same_bytes(damage: str, store: Path, finished: Path) -> None:
    SPOILED[damage][0](store)
    set_aside(store, diagnose(store))
    go_on(store, finished)
    assert tree(store) == tree(finished)
    assert check(store) == []


def test_only_what_is_damaged_is_computed_and_the_rest_is_not_touched(store: Path, finished: Path) -> None:
    shards = [store / f"shards/{number:05d}.safetensors" for number in range(8)]
    flip(shards[0], -3)
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    zero_page(shards[2])
    shards[3].unlink()
    swap(shards[4], shards[5])
    edit(store / "receipts/00006.json", lambda receipt: {**receipt, "configuration": "0" * 64})
    before = places(store)
    found = diagnose(store)
    assert found.shards == (0, 1, 2, 3, 4, 5, 6)
    set_aside(store, found)
    assert go_on(store, finished) == 7
    assert tree(store) == tree(finished)
    after = places(store)
    assert {name for name in before if after[name] == before[name]} == {"shards/00007.safetensors", "receipts/00007.json"}


def test_what_needs_no_engine_is_mended_without_one(store: Path, finished: Path) -> None:
    (store / "quarantine.jsonl").unlink()
    (store / "shards/00099.safetensors").write_bytes(b"x")
    (store / "receipts/00001.json.tmp").write_bytes(b"x")
    found = diagnose(store)
    assert not found.needs_extraction
    assert sorted(set_aside(store, found)) == ["receipts/00001.json.tmp", "shards/00099.safetensors"]
    assert tree(store) == tree(finished)


def test_files_of_somebody_else_are_left_alone(store: Path) -> None:
    (store / "notes.txt").write_text("mine")
    found = diagnose(store)
    assert found.foreign == ("notes.txt",)
    assert set_aside(store, found) == []
    assert (store / "notes.txt").read_text() == "mine"


def test_killed_anywhere_the_repair_goes_on(finished: Path, tmp_path: Path) -> None:
    def spoilt(name: str) -> Path:
        store = Path(shutil.copytree(finished, tmp_path / name))
        swap(store / "shards/00001.safetensors", store / "shards/00002.safetensors")
        (store / "receipts/00003.json").write_text("{")
        (store / "shards/00099.safetensors").write_bytes(b"x")
        return store

    class Killed(BaseException):
        pass

    def at(stop: int) -> Files:
        def check(number: int, name: str) -> None:
            if number >= stop:
                raise Killed

        return CountedFiles(check)

    counting = CountedFiles(lambda number, name: None)
    store = spoilt("whole")
    set_aside(store, diagnose(store), files=counting)
    assert counting.count > 10
    for stop in range(counting.count):
        store = spoilt(f"killed{stop}")
        with pytest.raises(Killed):
            set_aside(store, diagnose(store), files=at(stop))
        set_aside(store, diagnose(store))
        go_on(store, finished)
        assert tree(store) == tree(finished)


def test_a_store_that_grew_is_mended_from_the_whole_source(tmp_path: Path) -> None:
    def run(source: str, mode: Mode) -> None:
        listed = open_source(str(tmp_path / source / "samples.jsonl"))
        extract(Recall(FEATURES), listed, tmp_path / "store", batch_size=4, shard_size=4, num_workers=1, mode=mode)

    make_source(tmp_path / "first", 9, bad=[2])
    make_source(tmp_path / "all", 15, bad=[2])
    run("first", Mode.RESUME)
    run("all", Mode.APPEND)
    store, before = tmp_path / "store", tree(tmp_path / "store")
    flip(store / "shards/00000.safetensors", -3)
    (store / "receipts/00003.json").write_text("{")
    found = diagnose(store)
    assert found.shards == (0, 3)
    assert "--append" in extract_command(store, read_manifest(store), None)
    set_aside(store, found)
    run("all", Mode.APPEND)
    assert tree(store) == before


def test_a_store_that_is_being_written_is_not_touched(store: Path) -> None:
    flip(store / "shards/00000.safetensors", -3)
    before, found = tree(store), diagnose(store)
    with Lock(store), pytest.raises(StoreLocked):
        set_aside(store, found)
    assert tree(store) == before


def test_another_source_is_refused_before_anything_is_touched(store: Path, finished: Path) -> None:
    manifest, source = read_manifest(store), source_of(finished)
    require_samples(store, manifest, source)
    for samples in (source.samples[:-1], source.samples[::-1]):
        with pytest.raises(StoreMismatch, match=r"lists other samples than .* was made from: \d+ now, 31 then.*Nothing was touched"):
            require_samples(store, manifest, Source(source.name, samples, source.classes))


def test_receipts_are_remembered_so_that_new_bytes_can_be_held_against_them(store: Path) -> None:
    manifest = read_manifest(store)
    expected = {int(name[7:12]): sha256 for name, sha256 in tree(store).items() if name.startswith("shards/")}
    (store / "receipts/00003.json").write_text("{")
    del expected[3]
    assert shard_digests_of(store, manifest, range(8)) == expected
