"""A plan counts what a run on the real samples measured."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.engines import EngineOptions
from difffeat.errors import ConfigError, TooManyBadSamples
from difffeat.recipe import RunRecipe
from difffeat.runtime import plan as planning
from difffeat.runtime.extract import extract
from difffeat.runtime.feeding import Opening
from difffeat.runtime.plan import Plan, make_plan
from difffeat.runtime.progress import Summary
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from difffeat.workflows.planning import run_plan
from tests.artifacts import exported
from tests.runtime.fake import FakeEngine, folder_of_images

SUMMARY = Summary(Path("out"), 8, 0, 1, 0, 8, 2.0, {"engine": 1.0}, {})


def planned(source: Path, out: Path, **changes: Any) -> Plan:
    settings: dict[str, Any] = {"run": RunRecipe(), "batch_size": 2, "shard_size": 8, "num_workers": 1, "seconds": 0.4, **changes}
    return make_plan(FakeEngine(lambda _: time.sleep(0.05)), open_source(source), out, **settings)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_images(tmp_path_factory.mktemp("plan") / "images", 60)


def test_the_rate_is_that_of_the_engine_and_the_hours_follow(source: Path, tmp_path: Path) -> None:
    plan = planned(source, tmp_path / "deep" / "out")
    assert 8 <= plan.measured <= 20
    assert 5 < plan.rate < 80  # 40 on a machine that does nothing else
    assert plan.low <= plan.rate * 1.5
    assert plan.low <= plan.high
    assert plan.hours == pytest.approx(60 / plan.rate / 3600)
    assert plan.bottleneck == "engine"
    assert plan.shares["engine"] > 0.5
    assert (plan.samples, plan.batch_size, plan.num_workers) == (60, 2, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_store_has_the_size_and_the_shards_that_were_planned(source: Path, tmp_path: Path) -> None:
    plan = planned(source, tmp_path / "out")
    summary = extract(FakeEngine(), open_source(source), tmp_path / "out", batch_size=2, shard_size=8)
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file() and path.stem not in ("summary", "manifest"))
    assert plan.shards == summary.computed
    assert plan.disk_bytes == pytest.approx(size, rel=0.1)
    assert plan.peak_bytes > 10 << 20


def test_workers_share_one_disk(source: Path, tmp_path: Path) -> None:
    few, many = planned(source, tmp_path / "out", workers=2), planned(source, tmp_path / "out", workers=10_000)
    assert few.workers_rate == pytest.approx(2 * few.rate)
    assert many.workers_rate < 10_000 * many.rate


def test_the_batch_size_is_the_one_that_an_extraction_would_find(source: Path, tmp_path: Path) -> None:
    from tests.runtime.test_job import Memory

    assert (
        make_plan(Memory(4, 100), open_source(source), tmp_path / "out", run=RunRecipe(), batch_size=None, shard_size=8, num_workers=1).batch_size
        == 4
    )
    extract(FakeEngine(), open_source(source), tmp_path / "out", batch_size=3, shard_size=8)
    assert planned(source, tmp_path / "out", batch_size=None).batch_size == 3


def test_batches_that_are_told_in_bursts_have_no_rates_of_their_own() -> None:
    ticks = [(float(second) + early * 1e-6, 10 * second + early) for second in range(1, 41) for early in range(10)]
    rate, low, high = planning._rates(ticks, SUMMARY)
    assert rate == pytest.approx(10, rel=0.05)
    assert 6 < low <= rate <= high < 15
    assert planning._rates(ticks[:1], SUMMARY) == (SUMMARY.rate,) * 3


def test_a_source_without_a_good_sample_is_told_as_what_it_is(tmp_path: Path) -> None:
    source = folder_of_images(tmp_path / "images", 6)
    for path in source.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(TooManyBadSamples, match=r"none of the samples of .*images that were tried can be read, so nothing can be measured\."):
        planned(source, tmp_path / "out")


def test_a_full_disk_is_warned_of_and_everything_is_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000})())
    (tmp_path / "few").mkdir()
    opening = Opening(artifact=exported("image").path, threads=1, options=EngineOptions())
    options: dict[str, Any] = {"batch_size": 4, "shard_size": 100, "num_workers": 1, "seconds": 0.2, "source_options": SourceOptions()}
    result = run_plan(opening, str(source), tmp_path / "out", run=RunRecipe(), workers=3, say=lambda *_, **__: None, **options)
    assert not result["fits"]
    for words in ("WARNING: the disk lacks", "one worker: ", "3 workers: ", "peak memory ", "engine builds: none needed", "measured on "):
        assert words in result["text"]
    assert result["engine"] == "ort (fp32) on cpu"
    with pytest.raises(ConfigError, match="--workers must be at least 1 and --seconds above 0, got 0 and 1"):
        run_plan(opening, str(source), None, run=RunRecipe(), workers=0, say=lambda _: None, **{**options, "seconds": 1.0})
    with pytest.raises(ConfigError, match="--seconds above 0, got 1 and nan"):
        run_plan(opening, str(source), None, run=RunRecipe(), workers=1, say=lambda _: None, **{**options, "seconds": float("nan")})


def test_slow_samples_are_measured_in_smaller_batches_and_fewer(source: Path, tmp_path: Path) -> None:
    """A batch of 32 takes six times as long as was asked for; that batches are smaller is said."""
    rows: list[int] = []
    said: list[str] = []

    class Slow(FakeEngine):
        def run(self, feeds: Any) -> dict[str, np.ndarray]:
            rows.append(len(feeds["pixels"]))
            time.sleep(0.02 * rows[-1])
            return super().run(feeds)

    settings: dict[str, Any] = {"run": RunRecipe(), "batch_size": 32, "shard_size": 8, "num_workers": 1, "seconds": 0.1}
    plan = make_plan(Slow(), open_source(source), tmp_path / "out", say=lambda line, **_: said.append(line), **settings)
    assert plan.batch_size <= 2
    assert sum(rows) <= 30, "two samples alone, a batch to warm up, a batch or some to measure; not six batches of 32"
    assert any("to hold --seconds" in line for line in said)
