"""Whatever is wrong with a store is found, called by its kind, and told with the command that mends it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from difffeat.runtime.check import check
from difffeat.runtime.files import Lock, hash_file
from difffeat.runtime.manifest import read_manifest, read_receipt
from difffeat.runtime.origin import Origin
from difffeat.runtime.store import verify
from difffeat.runtime.writer import quarantine_lines
from tests.runtime.stores import make_store
from tests.runtime.test_store import edit, flip, swap, swap_samples

FEATURES = {"b1/t30": np.arange(33, dtype=np.float16).reshape(11, 3)}
BAD = [5, 6]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "store", FEATURES, bad=BAD).path


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "store"))


def zero_page(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-40] + bytes(40))


def rewrite(store: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Another content for shard 1, with a receipt that fits it: what a buggy or hostile writer would leave."""
    path = store / "shards/00001.safetensors"
    arrays = load_file(path)
    change(arrays)
    path.write_bytes(save(arrays))
    written = hash_file(path)
    edit(store / "receipts/00001.json", lambda receipt: {**receipt, "bytes": written.bytes, "sha256": written.sha256})


SPOILED: dict[str, tuple[Callable[[Path], Any], list[tuple[str, str]]]] = {
    "a flipped bit": (lambda s: flip(s / "shards/00001.safetensors", -3), [("shards/00001.safetensors", "wrong-bytes")]),
    "a truncated shard": (
        lambda s: (s / "shards/00002.safetensors").write_bytes((s / "shards/00002.safetensors").read_bytes()[:-1]),
        [("shards/00002.safetensors", "wrong-size")],
    ),
    "a zeroed page": (lambda s: zero_page(s / "shards/00001.safetensors"), [("shards/00001.safetensors", "wrong-bytes")]),
    "a deleted shard": (lambda s: (s / "shards/00000.safetensors").unlink(), [("shards/00000.safetensors", "missing-shard")]),
    "two swapped shards": (
        lambda s: swap(s / "shards/00000.safetensors", s / "shards/00001.safetensors"),
        [("shards/00000.safetensors", "swapped"), ("shards/00001.safetensors", "swapped")],
    ),
    "two swapped receipts": (
        lambda s: swap(s / "receipts/00000.json", s / "receipts/00001.json"),
        [("receipts/00000.json", "stale-receipt"), ("receipts/00001.json", "stale-receipt")],
    ),
    "a missing receipt": (lambda s: (s / "receipts/00001.json").unlink(), [("shards/00001.safetensors", "missing-receipt")]),
    "a shard that was never computed": (
        lambda s: ((s / "receipts/00002.json").unlink(), (s / "shards/00002.safetensors").unlink()),
        [("shards/00002.safetensors", "unfinished")],
    ),
    "a receipt of another configuration": (
        lambda s: edit(s / "receipts/00002.json", lambda r: {**r, "configuration": "0" * 64}),
        [("receipts/00002.json", "stale-receipt")],
    ),
    "a receipt of other samples": (
        lambda s: edit(s / "receipts/00002.json", lambda r: {**r, "samples_digest": "0" * 64}),
        [("receipts/00002.json", "wrong-samples")],
    ),
    "a receipt that is no JSON": (lambda s: (s / "receipts/00002.json").write_text("{"), [("receipts/00002.json", "damaged-receipt")]),
    "garbage for samples": (lambda s: (s / "samples.parquet").write_bytes(b"PAR1"), [("samples.parquet", "samples")]),
    "no samples": (lambda s: (s / "samples.parquet").unlink(), [("samples.parquet", "samples")]),
    "samples in another order": (lambda s: swap_samples(s), [("samples.parquet", "samples")]),
    "an orphaned shard": (
        lambda s: shutil.copy(s / "shards/00000.safetensors", s / "shards/00007.safetensors"),
        [("shards/00007.safetensors", "orphan")],
    ),
    "an older generation": (
        lambda s: shutil.copy(s / "shards/00000.safetensors", s / "shards/00000.1.safetensors"),
        [("shards/00000.1.safetensors", "orphan")],
    ),
    "an orphaned receipt": (lambda s: shutil.copy(s / "receipts/00000.json", s / "receipts/00007.json"), [("receipts/00007.json", "orphan")]),
    "a half-written file": (lambda s: (s / "shards/00003.safetensors.tmp").write_bytes(b"x"), [("shards/00003.safetensors.tmp", "leftover")]),
    "a file of somebody else": (lambda s: (s / "notes.txt").write_text("mine"), [("notes.txt", "foreign")]),
    "an altered quarantine": (lambda s: (s / "quarantine.jsonl").write_text("{}\n"), [("quarantine.jsonl", "quarantine")]),
    "no quarantine": (lambda s: (s / "quarantine.jsonl").unlink(), [("quarantine.jsonl", "quarantine")]),
    "a damaged origin": (lambda s: (s / "origin.json").write_text("{}"), [("origin.json", "origin")]),
    "a row lost from quarantine": (
        lambda s: edit(s / "receipts/00001.json", lambda r: {**r, "quarantined": r["quarantined"][:1]}),
        [("shards/00001.safetensors", "wrong-rows"), ("quarantine.jsonl", "quarantine")],
    ),
    "a quarantined row under another's id": (
        lambda s: edit(s / "receipts/00001.json", lambda r: {**r, "quarantined": [{**entry, "id": "s4"} for entry in r["quarantined"]]}),
        [("receipts/00001.json", "wrong-rows"), ("quarantine.jsonl", "quarantine")],
    ),
    "a row that is not valid and in no quarantine": (
        lambda s: rewrite(s, lambda arrays: arrays["valid"].__setitem__(0, False)),
        [("shards/00001.safetensors", "wrong-rows")],
    ),
    "a shard without a tap": (lambda s: rewrite(s, lambda arrays: arrays.pop("b1/t30")), [("shards/00001.safetensors", "wrong-content")]),
}


def test_a_whole_store_has_no_problem(store: Path) -> None:
    assert check(store) == []
    with Lock(store):
        assert check(store) == []


@pytest.mark.parametrize("damage", SPOILED)
def test_damage_is_found_and_called_by_its_kind(damage: str, store: Path) -> None:
    spoil, expected = SPOILED[damage]
    spoil(store)
    assert [(problem.file, problem.kind) for problem in check(store)] == expected


@pytest.mark.parametrize("damage", SPOILED)
def test_every_message_names_the_file_and_ends_with_a_command(damage: str, store: Path) -> None:
    SPOILED[damage][0](store)
    for problem in check(store):
        assert str(store / problem.file) in problem.message
        assert str(problem).endswith(f". Next: {problem.fix}")
        assert problem.fix.split()[:2] in (["difffeat", "store"], ["difffeat", "extract"]) or problem.fix.startswith("mv ")
    assert verify(store) == [str(problem) for problem in check(store)]


def test_swapped_shards_are_told_whose_bytes_they_hold(store: Path) -> None:
    swap(store / "shards/00000.safetensors", store / "shards/00002.safetensors")
    first, second = check(store)
    assert "it holds shard 2" in first.message
    assert "it holds shard 0" in second.message


def test_what_was_never_computed_ends_with_the_command_of_its_origin(store: Path) -> None:
    (store / "origin.json").write_text(json.dumps({"format": "difffeat-origin/1", **vars(Origin("artifacts/dit", "photos/"))}))
    (store / "receipts/00002.json").unlink()
    (store / "shards/00002.safetensors").unlink()
    (problem,) = check(store)
    assert problem.fix.startswith(f"difffeat extract artifacts/dit photos/ -o {store} --engine fake --batch-size 4 --shard-size 4 --seed 0")


def test_everything_that_is_wrong_is_found_at_once(store: Path) -> None:
    swap(store / "shards/00000.safetensors", store / "shards/00001.safetensors")
    (store / "receipts/00002.json").write_text("{")
    (store / "samples.parquet").unlink()
    assert [problem.kind for problem in check(store)] == ["swapped", "swapped", "damaged-receipt", "samples"]


def test_valid_rows_and_quarantined_rows_are_the_rows_of_the_source(finished: Path) -> None:
    manifest = read_manifest(finished)
    receipts = [read_receipt(finished, manifest, shard) for shard in range(3)]
    aside = [entry["row"] for receipt in receipts if receipt is not None for entry in receipt.quarantined]
    assert aside == BAD
    assert len(quarantine_lines(receipt for receipt in receipts if receipt is not None).splitlines()) == len(BAD)
