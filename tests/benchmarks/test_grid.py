"""The grid and its bound run in the same engine, and the cost is one over the other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from difffeat.benchmarks import grid
from difffeat.benchmarks.grid import BOUND, GRID, run_grid, time_grid
from difffeat.benchmarks.target import Target
from difffeat.benchmarks.timing import Timing
from tests.artifacts import exported


def quiet(*_: object, **__: object) -> None:
    """Says nothing."""


def test_the_grid_is_held_against_its_bound(tmp_path: Path) -> None:
    file = tmp_path / "grid.json"
    result = run_grid("dit-digits", None, vae=None, blocks=2, batch_size=2, repeats=2, threads=1, output=file, say=quiet)
    assert set(result["seconds"]) == {GRID, BOUND}
    assert result["cost_over_bound"] == pytest.approx(np.median(np.array(result["seconds"][GRID]) / np.array(result["seconds"][BOUND])))
    assert "dit-digits in ONNX Runtime on cpu in fp32, 1 threads, batch 2: 12 timesteps × 2 blocks = 24 taps" in result["text"]
    stored = json.loads(file.read_text())
    assert (stored["engine"], stored["device"], stored["precision"], stored["blocks"]) == ("ort", "cpu", "fp32", 2)


def test_artifacts_are_timed_in_their_engine_and_precision() -> None:
    sweep, fixed = exported("sweep", "fp16"), exported("from-latents", "fp16")
    result = time_grid(sweep, fixed, Target(engine="torch", threads=1), batch_size=2, repeats=2)
    assert (result["engine"], result["precision"], result["timesteps"]) == ("torch", "fp16", [0.0, 30.0, 500.0])
    assert "dit-small in torch on cpu in fp16, 1 threads, batch 2: 3 timesteps × 3 blocks = 9 taps" in result["text"]


def test_on_a_card_it_says_microseconds_and_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def compare(candidates: dict[str, object], repeats: int, *, device: str) -> list[Timing]:
        asked.append(device)
        return [Timing(name, (0.003 if name == GRID else 0.002,) * repeats) for name in candidates]

    opened = Target.open  # what stands for the card is this CPU
    monkeypatch.setattr(Target, "open", lambda self, *given, **how: opened(Target(engine=self.engine, threads=1), *given, **how))
    monkeypatch.setattr(grid, "compare", compare)
    target = Target(engine="torch", device="cuda:0", threads=1)
    result = time_grid(exported("sweep", "fp16"), exported("from-latents", "fp16"), target, batch_size=2, repeats=1)
    assert asked == ["cuda:0"]
    assert "1500.0 µs an image; the bound of one VAE pass and 3 truncated passes takes 1000.0 µs: 1.500 × (limit 1.1)" in result["text"]
    assert result["machine"]["gpu"]
