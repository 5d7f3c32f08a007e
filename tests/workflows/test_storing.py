"""`difffeat store info`, `diff` and `convert` say what a user wants to know."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from difffeat.errors import ConfigError
from difffeat.workflows.storing import run_convert, run_diff, run_info
from tests.runtime.fake import tree
from tests.runtime.stores import make_store

FEATURES = {"b1/t30": np.arange(33, dtype=np.float16).reshape(11, 3), "b2/t30": np.ones((11, 2, 2), np.float16)}


def test_info_counts_rows_reasons_and_positives(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", FEATURES, bad=[2, 7])
    found = run_info(store.path)
    assert (found["rows"], found["valid"], len(found["quarantined"])) == (11, 9, 2)
    (reason,) = found["reasons"]
    assert (reason["stage"], reason["error"], reason["count"], reason["id"]) == ("decode", "DecodeError", 2, "s2")
    assert found["classes"] == {"a": 11, "b": 6}
    assert found["taps"] == {"b1/t30": [3], "b2/t30": [2, 2]}
    assert found["bytes"] == sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    assert (found["resume"], found["fingerprint"]) == (None, store.fingerprint)
    json.dumps(found)


def test_info_in_words_has_the_recipe_with_log_snr(tmp_path: Path) -> None:
    text = run_info(make_store(tmp_path / "store", FEATURES, bad=[2, 7]).path)["text"]
    for words in (
        "11 rows (9 valid, 2 in quarantine), 2 taps, 3 of 3 shards, fp16",
        "b2/t30: [2, 2]",
        "2 classes, rows with each: a 11, b 6",
        "quarantine: 2 × DecodeError at decode; the first is s2: ",
        "image graph of fake (file weights), fp32; blocks 1, 2",
        "t = 30 (log-SNR +3.00)",
        "noising random, seed 0; pooling mean; preprocessing center",
        "engine fake (fp32, cpu), batch 4",
    ):
        assert words in text


def test_info_of_an_unfinished_store_ends_with_the_command_that_goes_on(tmp_path: Path) -> None:
    make_store(tmp_path / "store", FEATURES)
    (tmp_path / "store/receipts/00001.json").unlink()
    found = run_info(tmp_path / "store")
    assert (found["finished_shards"], found["valid"]) == (2, 7)
    assert found["resume"].startswith(f"difffeat extract ARTIFACT SOURCE -o {tmp_path / 'store'} --engine fake --batch-size 4 --shard-size 4")
    assert f"unfinished; go on with: {found['resume']}" in found["text"]


def test_info_of_a_store_without_labels_or_finished_shards(tmp_path: Path) -> None:
    make_store(tmp_path / "store", FEATURES, labels=False)
    for receipt in (tmp_path / "store/receipts").iterdir():
        receipt.unlink()
    found = run_info(tmp_path / "store")
    assert (found["valid"], found["classes"], found["reasons"]) == (0, {}, [])
    assert "no labels" in found["text"]


def test_convert_says_what_was_left_out_and_how_taps_are_called(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", FEATURES, bad=[2])
    found = run_convert(store.path, tmp_path / "out", "parquet")
    assert "10 rows as parquet in 1 files" in found["text"]
    assert "1 in quarantine left out (--keep-quarantined keeps them, marked)" in found["text"]
    assert "b1/t30 is called b1_t30: [3]" in found["text"]
    assert found["files"].keys() | {"difffeat.json"} == tree(tmp_path / "out").keys()
    assert found["bytes"] == (tmp_path / "out/data/train-00000-of-00001.parquet").stat().st_size


def test_convert_without_an_output_shows_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"say where to write: difffeat store convert .*store --to npy -o store-npy"):
        run_convert(tmp_path / "store", None, "npy")


def test_diff_says_everything_in_a_few_lines(tmp_path: Path) -> None:
    make_store(tmp_path / "a", FEATURES, bad=[2])
    make_store(tmp_path / "b", {"b1/t30": FEATURES["b1/t30"] + np.float16(1)}, ids=[f"s{row}" for row in range(1, 12)], label=3)
    found = run_diff(tmp_path / "a", tmp_path / "b")
    assert found["samples"] == {"compared": 9, "only_a": ["s0"], "only_b": ["s11"], "in_quarantine": ["s2"]}
    (tap,) = found["taps"]
    assert (tap["tap_a"], tap["rows"], tap["max_difference"]) == ("b1/t30", 9, 2.0)
    assert tap["cka"] == pytest.approx(1)
    for words in (
        "1 only in A: s0; 1 only in B: s11; 1 in quarantine in either: s2",
        "taps only in A: b2/t30",
        "CKA 1",
        "recipe.graph.label: None -> 3",
    ):
        assert words in found["text"]
    json.dumps(found)
