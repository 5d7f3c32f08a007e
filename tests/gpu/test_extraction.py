"""Extraction on a card: killed and resumed to the same bytes, `--batch-size auto`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from difffeat.engines import open_engine
from difffeat.runtime.extract import extract
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import verify
from tests.artifacts import exported
from tests.gpu.conftest import REHEARSING
from tests.gpu.needs import require_autoencoder
from tests.runtime.fake import folder_of_images, tree

ROOT = Path(__file__).parents[2]
DEVICE = "cpu" if REHEARSING else "cuda"
IMAGES, SHARD = 400, 8


def command(artifact: Path, source: Path, out: Path) -> list[str]:
    options = ["--engine", "torch", "--device", DEVICE, "--batch-size", "4", "--shard-size", str(SHARD), "--num-workers", "2"]
    return [sys.executable, "-m", "difffeat.cli", "extract", str(artifact), str(source), "-o", str(out), *options]


@pytest.mark.parametrize("name", ["image", "text"])
def test_killed_and_resumed_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    require_autoencoder(name)
    artifact, source = exported(name, "fp16").path, folder_of_images(tmp_path / "images", IMAGES)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    subprocess.run(command(artifact, source, tmp_path / "whole"), check=True, env=environment, cwd=ROOT, capture_output=True, timeout=240)
    out = tmp_path / "out"
    running = subprocess.Popen(command(artifact, source, out), env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not list((out / "receipts").glob("*.json")):
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = len(list((out / "receipts").glob("*.json")))
    subprocess.run(command(artifact, source, out), check=True, env=environment, cwd=ROOT, capture_output=True, timeout=240)
    assert 1 <= done < IMAGES // SHARD
    assert tree(out) == tree(tmp_path / "whole")
    assert not verify(out)


def test_auto_finds_a_batch_size(tmp_path: Path) -> None:
    require_autoencoder("image")
    source = open_source(folder_of_images(tmp_path / "images", 40))
    with open_engine(exported("image", "fp16"), "torch", device="cuda") as engine:
        summary = extract(engine, source, tmp_path / "store", batch_size=None, largest_batch=16)
    assert summary.samples == 40
    assert summary.quarantined == 0
