"""The whole way is held against the faster of the bare engine's two ways on the same batches, and the store against the disk."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.benchmarks import extraction
from difffeat.benchmarks import target as targets
from difffeat.benchmarks.extraction import BARE, DECODE, LIMIT, LIMIT_ON_CARD, SUBMITTED, WHOLE, overlapped, run_extraction, time_extraction
from difffeat.benchmarks.storing import RAW, STORE, run_storing
from difffeat.benchmarks.target import Target
from difffeat.benchmarks.timing import Timing
from difffeat.engines.base import Pending
from tests.artifacts import exported


def quiet(*_: object, **__: object) -> None:
    """Says nothing."""


def small(**changes: Any) -> dict[str, Any]:
    return time_extraction(exported("image", "fp16"), **{"target": Target(engine="torch", threads=1), "images": 6, "batch_size": 4, "repeats": 2,
                                                         "num_workers": 1, **changes})  # fmt: skip


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch engine keeps two batches under way, as it does on a card."""
    opened = targets.open_engine

    def open_engine(*given: Any, **how: Any) -> Any:
        engine: Any = opened(*given, **how)
        engine.overlap()
        return engine

    monkeypatch.setattr(targets, "open_engine", open_engine)


def test_extraction_is_held_against_the_bare_engine(tmp_path: Path) -> None:
    file = tmp_path / "extract.json"
    result = run_extraction(
        "dit-digits", None, vae=None, block=1, images=6, batch_size=4, repeats=2, threads=1, num_workers=1, output=file, say=quiet,
    )  # fmt: skip
    assert set(result["seconds"]) == {BARE, DECODE, WHOLE}
    assert result["share_of_bare_engine"] == pytest.approx(1 / np.median(np.array(result["seconds"][WHOLE]) / np.array(result["seconds"][BARE])))
    assert result["bottleneck"] in result["stages"]
    seconds = {name: np.median(rounds) / 6 for name, rounds in result["seconds"].items()}
    assert result["rate_sharing_the_cores"] == pytest.approx(1 / (seconds[BARE] + seconds[DECODE]))
    assert result["share_of_rate_sharing_the_cores"] == pytest.approx((seconds[BARE] + seconds[DECODE]) / seconds[WHOLE])
    stored = json.loads(file.read_text())
    assert (stored["images"], stored["engine"], stored["device"], stored["precision"]) == (6, "ort", "cpu", "fp32")
    assert result["text"].startswith("dit-digits, block 1, ONNX Runtime on cpu in fp32, 1 threads: 6 JPEGs")
    assert "(aim 95%)" in result["text"]


def test_an_artifact_is_timed_in_its_engine_and_precision_in_both_ways_of_the_bare_engine(overlapping: None) -> None:
    result = small()
    assert set(result["seconds"]) == {BARE, SUBMITTED, DECODE, WHOLE}
    assert (result["engine"], result["precision"], result["depth"]) == ("torch", "fp16", 2)
    assert result["text"].startswith("dit-small, block 0, torch on cpu in fp16, 1 threads: 6 JPEGs")
    assert "2 batches under way make the bare engine" in result["text"]


@pytest.mark.parametrize("faster", [BARE, SUBMITTED])
def test_the_share_is_of_the_faster_way(faster: str, overlapping: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(candidates: dict[str, Any], repeats: int, *, device: str) -> list[Timing]:
        for run in candidates.values():
            run()
        seconds = {BARE: 2.0, SUBMITTED: 2.0, DECODE: 1.0, WHOLE: 3.0} | {faster: 1.5}
        return [Timing(name, (seconds[name],) * repeats) for name in candidates]

    monkeypatch.setattr(extraction, "compare", compare)
    result = small()
    assert result["bare_engine"] == faster
    assert result["share_of_bare_engine"] == 0.5
    assert result["limit"] == LIMIT


def test_on_a_card_decoding_is_timed_apart_and_shares_no_cores(overlapping: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], str]] = []

    def compare(candidates: dict[str, Any], repeats: int, *, device: str = "cpu") -> list[Timing]:
        asked.append((list(candidates), device))
        for run in candidates.values():
            run()
        return [Timing(name, (1.0,) * repeats) for name in candidates]

    opened = targets.open_engine  # what stands for the card is this CPU
    monkeypatch.setattr(targets, "open_engine", lambda *given, **how: opened(*given, **{**how, "device": "cpu"}))
    monkeypatch.setattr(extraction, "compare", compare)
    result = small(target=Target(engine="torch", device="cuda", threads=1))
    assert asked == [([BARE, SUBMITTED, WHOLE], "cuda"), ([DECODE], "cpu")]
    assert result["limit"] == LIMIT_ON_CARD
    assert "(aim 90%)" in result["text"]
    assert "rate_sharing_the_cores" not in result
    assert result["machine"]["gpu"]


class Engine:
    """Counts what is under way."""

    depth = 2

    def __init__(self) -> None:
        self.under_way, self.most, self.done = 0, 0, []
        self.lock = threading.Lock()

    def submit(self, feeds: Any) -> Pending:
        self.under_way += 1
        self.most = max(self.most, self.under_way)

        def finish() -> dict[str, Any]:
            self.under_way -= 1
            self.done.append(feeds)
            return {}

        return Pending(finish)


def test_as_many_batches_as_the_engine_allows_are_under_way_and_all_are_waited_for() -> None:
    engine: Any = Engine()
    overlapped(engine, [1, 2, 3, 4, 5])  # type: ignore[list-item]
    assert (engine.most, engine.under_way, engine.done) == (2, 0, [1, 2, 3, 4, 5])


def test_storing_is_held_against_the_disk(tmp_path: Path) -> None:
    result = run_storing(rows=500, width=16, shard_rows=128, repeats=2, folder=tmp_path, output=tmp_path / "store.json", say=quiet)
    assert set(result["seconds"]) == {RAW, STORE}
    assert result["over_sequential"] == pytest.approx(np.median(np.array(result["seconds"][STORE]) / np.array(result["seconds"][RAW])))
    assert result["reading"]["features_mb"] == pytest.approx(500 * 16 * 2 / 1e6)
    assert [path.name for path in tmp_path.iterdir()] in (["store.json", "store.png"], ["store.png", "store.json"])
