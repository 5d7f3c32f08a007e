"""The whole way is held against the bare engine on the same batches, and the store against the disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from difffeat.benchmarks.extraction import BARE, DECODE, WHOLE, run_extraction
from difffeat.benchmarks.storing import RAW, STORE, run_storing


def quiet(*_: object, **__: object) -> None:
    """Says nothing."""


def test_extraction_is_held_against_the_bare_engine(tmp_path: Path) -> None:
    file = tmp_path / "extract.json"
    result = run_extraction(
        "dit-digits", None, vae=None, block=1, images=6, batch_size=4, repeats=2, threads=1, num_workers=1, output=file, say=quiet
    )
    assert set(result["seconds"]) == {BARE, DECODE, WHOLE}
    assert result["share_of_bare_engine"] == pytest.approx(1 / np.median(np.array(result["seconds"][WHOLE]) / np.array(result["seconds"][BARE])))
    assert result["bottleneck"] in result["stages"]
    seconds = {name: np.median(rounds) / 6 for name, rounds in result["seconds"].items()}
    assert result["rate_sharing_the_cores"] == pytest.approx(1 / (seconds[BARE] + seconds[DECODE]))
    assert result["share_of_rate_sharing_the_cores"] == pytest.approx((seconds[BARE] + seconds[DECODE]) / seconds[WHOLE])
    assert json.loads(file.read_text())["images"] == 6


def test_storing_is_held_against_the_disk(tmp_path: Path) -> None:
    result = run_storing(rows=500, width=16, shard_rows=128, repeats=2, folder=tmp_path, output=tmp_path / "store.json", say=quiet)
    assert set(result["seconds"]) == {RAW, STORE}
    assert result["over_sequential"] == pytest.approx(np.median(np.array(result["seconds"][STORE]) / np.array(result["seconds"][RAW])))
    assert result["reading"]["features_mb"] == pytest.approx(500 * 16 * 2 / 1e6)
    assert [path.name for path in tmp_path.iterdir()] in (["store.json", "store.png"], ["store.png", "store.json"])
