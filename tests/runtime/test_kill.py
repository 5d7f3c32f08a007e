"""Killed anywhere, an extraction resumes to the same bytes; refused by the disk anywhere, it says so and resumes."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from difffeat.errors import Interrupted, StoreWriteError
from difffeat.runtime.extract import extract
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store, verify
from tests.artifacts import exported
from tests.runtime.fake import CountedFiles, FakeEngine, folder_of_images, tree

ROOT = Path(__file__).parents[2]


def run(source: Path, out: Path, engine: FakeEngine | None = None, files: CountedFiles | None = None) -> None:
    extract(engine or FakeEngine(), open_source(source), out, batch_size=2, shard_size=4, num_workers=1, files=files)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return folder_of_images(tmp_path / "images", 10)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_any_operation_is_told_and_the_run_goes_on_later(source: Path, tmp_path: Path, number: int) -> None:
    whole = tmp_path / "whole"
    counted = CountedFiles(lambda *_: None)
    run(source, whole, files=counted)
    for operation in range(counted.count):

        def refuse(current: int, _: str, operation: int = operation) -> None:
            if current == operation:
                raise OSError(number, "refused")

        out = tmp_path / f"out-{operation}"
        with pytest.raises(StoreWriteError, match=r"writing to .* failed: refused\. Finished shards are kept; free space or mend the disk") as caught:
            run(source, out, files=CountedFiles(refuse))
        assert caught.value.exit_code == 4
        run(source, out)
        assert tree(out) == tree(whole), operation


def test_finished_shards_are_neither_computed_nor_written_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(runs: int) -> None:
        if runs == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"stopped after 6 of 10 samples; finished shards are kept .* Run the same command again to go on"):
        run(source, out, FakeEngine(stop))
    assert Store.open(out, partial=True).finished_shards == 1
    first = out / "shards" / "00000.safetensors"
    before = (first.stat().st_ino, first.stat().st_mtime_ns)
    engine = FakeEngine()
    run(source, out, engine)
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == before
    assert engine.runs == 3
    again = FakeEngine()
    run(source, out, again)
    assert again.runs == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(0, 45), max_size=4), spoil=st.lists(st.sampled_from(["flip-size", "receipt", "shard", "half"]), max_size=2))
def test_any_sequence_of_stops_and_losses_ends_with_the_same_bytes(
    source: Path, tmp_path_factory: pytest.TempPathFactory, stops: list[int], spoil: list[str]
) -> None:
    work = tmp_path_factory.mktemp("sequence")
    run(source, work / "whole")
    out = work / "out"
    for stop in stops:

        def refuse(current: int, _: str, stop: int = stop) -> None:
            if current == stop:
                raise KeyboardInterrupt

        try:
            run(source, out, files=CountedFiles(refuse))
        except (Interrupted, KeyboardInterrupt):
            continue
    for loss in spoil:
        _lose(out, loss)
    run(source, out)
    assert tree(out) == tree(work / "whole")
    assert verify(out) == []


def _lose(out: Path, loss: str) -> None:
    shards, receipts = sorted(out.glob("shards/*.safetensors")), sorted(out.glob("receipts/*.json"))
    if loss == "receipt" and receipts:
        receipts[0].unlink()
    elif loss == "half" and receipts:
        receipts[-1].write_bytes(receipts[-1].read_bytes()[:20])
    elif loss == "shard" and shards:
        shards[-1].unlink()
    elif loss == "flip-size" and shards:
        shards[0].write_bytes(shards[0].read_bytes()[:-1])


def test_the_command_killed_while_it_works_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = folder_of_images(tmp_path / "images", 60)
    artifact = exported("image").path

    def command(out: Path) -> list[str]:
        options = ["--batch-size", "2", "--shard-size", "4", "--threads", "1", "--num-workers", "2", "--draws", "96"]  # enough work to be killed in
        return [sys.executable, "-m", "difffeat.cli", "extract", str(artifact), str(source), "-o", str(out), *options]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, cwd=ROOT)
    out = tmp_path / "out"
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (out / "receipts" / "00001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 2 <= Store.open(out, partial=True).finished_shards < 15
    kept = {path: path.stat().st_mtime_ns for path in (out / "receipts").glob("*.json")}
    subprocess.run(command(out), check=True, capture_output=True, cwd=ROOT)
    assert tree(out) == tree(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_polite_stop_of_the_command_is_resumable_and_says_so(tmp_path: Path) -> None:
    source = folder_of_images(tmp_path / "images", 60)
    out = tmp_path / "out"
    options = ["--batch-size", "1", "--shard-size", "4", "--threads", "1", "--draws", "96"]
    command = [sys.executable, "-m", "difffeat.cli", "extract", str(exported("image").path), str(source), "-o", str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (out / "receipts" / "00001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "Interrupted: stopped after" in errors
    assert not (out / "lock").exists()
