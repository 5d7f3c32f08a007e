"""The stages of an extraction overlap, tell where the time goes, and end cleanly and resumably whatever goes wrong in any of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from difffeat.errors import ConfigError, DifffeatError, EngineError, Interrupted, OutOfMemory, StoreWriteError, TooManyBadSamples
from difffeat.recipe import RunRecipe
from difffeat.runtime.blobs import BytesBlob, FileBlob
from difffeat.runtime.extract import cpu_cores, decode_workers, extract
from difffeat.runtime.files import Files
from difffeat.runtime.progress import Progress, Summary, advice
from difffeat.runtime.samples import Sample, Source
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store, verify
from tests.runtime.fake import CountedFiles, FakeEngine, encoded, folder_of_images, tree

ROOT = Path(__file__).parents[2]


def run(source: Path | Source, out: Path, engine: FakeEngine | None = None, **options: Any) -> Summary:
    listed = source if isinstance(source, Source) else open_source(source)
    return extract(engine or FakeEngine(), listed, out, **{"batch_size": 2, "shard_size": 4, **options})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return folder_of_images(tmp_path / "images", 10)


def test_while_the_engine_computes_later_batches_are_decoded_and_the_shard_before_is_written(source: Path, tmp_path: Path) -> None:
    decoded, written = threading.Event(), threading.Event()

    class Watched(Files):
        def create(self, path: Path) -> int:
            if path.name.startswith("00000.safetensors"):
                written.set()
            return super().create(path)

    class Seen(BytesBlob):
        def read(self, limit: int = 1 << 30) -> bytes:
            decoded.set()
            return super().read(limit)

    def before(runs: int) -> None:
        assert {0: decoded, 2: written}.get(runs, decoded).wait(20), f"nothing goes on beside run {runs}"

    samples = list(open_source(source).samples)
    samples[5] = replace(samples[5], image=Seen(encoded(5)))
    summary = run(Source("watched", tuple(samples)), tmp_path / "out", FakeEngine(before), files=Watched(), num_workers=1)
    assert summary.samples == 10


def test_the_slowest_stage_is_named_with_what_to_do_about_it(source: Path, tmp_path: Path) -> None:
    summary = run(source, tmp_path / "out", FakeEngine(lambda _: time.sleep(0.1)))
    assert summary.stages["engine"] >= 0.5
    assert summary.waiting["write"] > 0.3
    assert summary.bottleneck == "engine"
    assert summary.advice == (
        "The engine sets the pace, as it should; a GPU (--device cuda), int8 (difffeat quantize), or bf16 where difffeat doctor finds units for it "
        "would be faster."
    )


class Failing(FakeEngine):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def run(self, feeds: Any) -> dict[str, np.ndarray]:
        if self.runs == 3:
            raise self.error
        return super().run(feeds)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stage", ["source", "engine", "write", "progress"])
def test_an_error_in_any_stage_is_the_one_that_is_raised_and_no_thread_is_left(stage: str, source: Path, tmp_path: Path) -> None:
    class Bad(tuple):
        def __getitem__(self, key: Any) -> Any:
            if key == 6:
                raise EngineError("source")
            return super().__getitem__(key)

    def refuse(number: int, _: str) -> None:
        if number == 25:
            raise OSError(28, "write")

    def told(state: Progress) -> None:
        if state.done >= 6:
            raise EngineError("progress")

    listed = open_source(source)
    options: dict[str, Any] = {"num_workers": 2}
    if stage == "source":
        object.__setattr__(listed, "samples", Bad(listed.samples))
    elif stage == "engine":
        options["engine"] = Failing(EngineError("engine"))
    elif stage == "write":
        options["files"] = CountedFiles(refuse)
    else:
        options["progress"] = told
    before = threading.active_count()
    with pytest.raises(DifffeatError, match=stage) as caught:
        run(listed, tmp_path / "out", **options)
    assert isinstance(caught.value, StoreWriteError if stage == "write" else EngineError)
    assert threading.active_count() == before
    run(source, tmp_path / "out")
    run(source, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_what_the_engine_has_finished_is_written_before_a_stop_is_told(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"stopped after 6 of 10 samples"):
        run(source, tmp_path / "out", Failing(KeyboardInterrupt()))
    assert Store.open(tmp_path / "out", partial=True).finished_shards == 1


def test_without_memory_the_run_stops_resumably_and_names_the_command_that_goes_on(source: Path, tmp_path: Path) -> None:
    message = (
        r"ran out of memory at batch size 2; 1 of 3 shards are finished and kept in .*\. To go on, run the same command with --batch-size 1 "
        r"--allow-rebatch\."
    )
    with pytest.raises(OutOfMemory, match=message) as caught:
        run(source, tmp_path / "out", Failing(OutOfMemory("no room")))
    assert caught.value.exit_code == 4
    assert run(source, tmp_path / "out", batch_size=1, rebatch=True).skipped == 1
    assert verify(tmp_path / "out") == []
    with pytest.raises(OutOfMemory, match=r"run the same command on a larger device\."):
        run(source, tmp_path / "other", Failing(OutOfMemory("no room")), batch_size=1)


class Memory(FakeEngine):
    """Large batches do not fit; the larger a batch, the faster a sample, up to a point."""

    def __init__(self, largest: int, best: int) -> None:
        super().__init__()
        self.largest, self.best = largest, best
        self.sizes: list[int] = []

    def run(self, feeds: Any) -> dict[str, np.ndarray]:
        size = len(feeds["pixels"])
        self.sizes.append(size)
        if size > self.largest:
            raise OutOfMemory("no room")
        time.sleep(0.06 * max(1.0, (size / self.best) ** 1.5))
        return super().run(feeds)


@pytest.mark.parametrize(("largest", "best", "found"), [(4, 100, 4), (100, 2, 2), (1, 1, 1)])
def test_the_batch_size_left_to_us_is_the_fastest_that_fits(largest: int, best: int, found: int, source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    engine = Memory(largest, best)
    summary = run(source, tmp_path / "out", engine, batch_size=None, say=said.append)
    assert summary.batch_size == Store.open(tmp_path / "out").manifest["batch_size"] == found
    assert said[0].startswith("batch size 1: ")
    assert (largest >= 100) or said[-1] == f"batch size {2 * largest}: out of memory"


def test_a_store_keeps_the_batch_size_that_was_found_for_it(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", Memory(4, 100), batch_size=None)
    engine = Memory(100, 100)
    assert run(source, tmp_path / "out", engine, batch_size=None).batch_size == 4
    assert engine.sizes == []
    with pytest.raises(OutOfMemory, match="no room"):
        run(source, tmp_path / "other", Memory(0, 1), batch_size=None)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_fraction_of_bad_samples_is_one(fraction: float, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max-bad-fraction must lie in 0\.\.1, got"):
        run(source, tmp_path / "out", max_bad_fraction=fraction)
    assert not (tmp_path / "out").exists()


def test_as_many_bad_samples_as_the_fraction_says_are_allowed(tmp_path: Path) -> None:
    source = folder_of_images(tmp_path / "images", 100)
    for index in range(29):
        (source / f"{3 * index:02d}.png").write_bytes(b"")
    assert run(source, tmp_path / "out", max_bad_fraction=0.29).quarantined == 29
    with pytest.raises(TooManyBadSamples, match=r"29 of 100 samples are in quarantine, more than --max-bad-fraction 0\.28 allows"):
        run(source, tmp_path / "other", max_bad_fraction=0.28, shard_size=100)


def test_the_number_of_workers_left_to_us_follows_the_stated_rule() -> None:
    assert (decode_workers(None, 8), decode_workers(None), decode_workers(3, 8)) == (8, cpu_cores(), 3)
    with pytest.raises(ConfigError, match="the number of workers must be at least 1, got 0; leave it at auto"):
        decode_workers(0)


@pytest.mark.parametrize("stage", ["decode", "noise", "copy", "engine", "write"])
def test_there_is_advice_for_every_stage(stage: str) -> None:
    for device in ("cpu", "cuda:0"):
        assert advice(stage, device, 2).endswith(".")


def test_the_summary_lies_in_the_store_and_is_part_of_no_digest(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (source / "04.png").write_bytes(b"<script>")
    (source / "05.png").write_bytes(b"")
    summary = run(source, out)
    data = json.loads((out / "summary.json").read_text())
    assert (data["rows"], data["quarantined"], data["bottleneck"], data["batch_size"]) == (10, 2, summary.bottleneck, 2)
    assert set(data["stages"]) == {"decode", "noise", "engine", "write"} == set(data["waiting"])
    assert data["quarantine"]["decode: DecodeError"]["samples"] == 2
    assert data["quarantine"]["decode: DecodeError"]["first_ids"] == ["04", "05"]
    page = (out / "summary.html").read_text()
    assert "04, 05" in page
    assert "<script" not in page
    assert "http" not in page
    (out / "summary.html").write_text("gone")
    assert verify(out) == []
    assert run(source, out).computed == 0
    assert (out / "summary.html").read_text() == "gone"
    assert json.loads((out / "summary.json").read_text()) == data


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_batches(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(0, "BMP"))
    listed = Source("many", tuple(Sample(f"{i}", FileBlob(str(tmp_path), "a.png"), "a.png") for i in range(10_000)))
    process, sizes = psutil.Process(), []

    def look(state: Progress) -> None:
        if state.done % 1000 == 0:
            sizes.append(process.memory_info().rss)

    run(listed, tmp_path / "out", batch_size=1, shard_size=500, progress=look, num_workers=1)
    assert len(sizes) == 10
    assert max(sizes[3:]) - sizes[2] < 8 << 20, sizes


COMMAND = """
import sys, time
from pathlib import Path
from difffeat.cli import stops_like_ctrl_c
from difffeat.errors import Interrupted
from difffeat.runtime.extract import extract
from difffeat.runtime.sources import open_source
from tests.runtime.fake import FakeEngine, CountedFiles
def before(runs):
    Path(sys.argv[2], "begun").touch()
    time.sleep(float(sys.argv[3]) if runs == 3 else 0.0)
stops_like_ctrl_c()
try:
    extract(FakeEngine(before), open_source(sys.argv[1]), Path(sys.argv[2], "out"), batch_size=2, shard_size=4)
except Interrupted as error:
    print(error)
    sys.exit(4)
"""


def begun(source: Path, tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", COMMAND, str(source), str(tmp_path), str(seconds)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    receipt = tmp_path / "out" / "receipts" / "00000.json"
    deadline = time.monotonic() + 30
    while not receipt.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_the_batch_under_way_and_is_resumable(number: int, source: Path, tmp_path: Path) -> None:
    process = begun(source, tmp_path, 1.5)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 4
    assert "Run the same command again to go on" in said
    assert not (tmp_path / "out" / "lock").exists()


def test_a_second_stop_ends_at_once_and_the_store_is_none_the_worse(source: Path, tmp_path: Path) -> None:
    process = begun(source, tmp_path, 60)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    since = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - since < 5
    assert process.returncode == -signal.SIGINT
    run(source, tmp_path / "out")
    run(source, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_draws_of_many_timesteps_keep_their_order(source: Path, tmp_path: Path) -> None:
    one = run(source, tmp_path / "one", run=RunRecipe(draws=3, store_dtype="fp32"), num_workers=1)
    two = run(source, tmp_path / "two", run=RunRecipe(draws=3, store_dtype="fp32"), num_workers=4)
    assert tree(one.path) == tree(two.path)
