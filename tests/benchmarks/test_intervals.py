"""The simulation of coverage: the same numbers from every number of processes, and what it says of intervals that are right or wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.benchmarks import intervals
from difffeat.errors import ConfigError


def simulated(**options: Any) -> dict[str, Any]:
    known = {"settings": ["small"], "simulations": 12, "resamples": 20, "truth": 30, "seed": 0, "workers": 1, "output": None}
    return intervals.run_intervals(**{**known, **options}, say=lambda *_, **__: None)


def test_the_numbers_come_from_the_seed_alone(tmp_path: Path) -> None:
    first, again = (simulated(output=tmp_path / f"{name}.json") for name in "ab")
    assert first["settings"] == again["settings"]
    assert simulated(seed=1)["settings"]["small"]["truth"] != first["settings"]["small"]["truth"]
    assert json.loads((tmp_path / "a.json").read_text())["settings"] == json.loads(json.dumps(first["settings"]))


@pytest.mark.parametrize("name", list(intervals.SETTINGS))
def test_every_setting_can_be_drawn_and_scored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(intervals.SETTINGS, name, replace(intervals.SETTINGS[name], samples=60))
    found = simulated(settings=[name], simulations=2, truth=3, resamples=5)["settings"][name]
    assert 0 < found["truth"] < 1
    assert found["difference"] > 0 or name in ("cf1", "rarest", "rare")
    assert 0 <= found["centred"] <= 2


def test_four_settings_are_held_to_the_limits() -> None:
    held = {name for name, setting in intervals.SETTINGS.items() if setting.held}
    assert held == {"common", "tail", "tail-weak", "rare"}
    tail, rare = (np.array(intervals.SETTINGS[name].shares) for name in ("tail", "rare"))
    assert (len(tail), len(rare), rare.sum() * intervals.SETTINGS["rare"].samples) == (80, 100, pytest.approx(500))


def test_wrong_intervals_are_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(intervals.SETTINGS, "small", replace(intervals.SETTINGS["small"], held=True))
    coverage = intervals.Coverage(0.5, 0.1, 100, 91, 60, 95, 40, 0.1)
    assert not coverage.right
    assert intervals.Coverage(0.5, 0.1, 100, 95, 60, 95, 40, 0.1).right
    share, low, high = coverage.share(91)
    assert low < share == 0.91 < high
    monkeypatch.setattr(intervals, "_simulated", lambda *_: [("small", coverage)])
    result = simulated()
    assert not result["kept"]
    assert "<- not right" in result["text"]
    assert "NOT kept" in result["text"]


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--settings takes common, tail, .*; got 'huge'"):
        simulated(settings=["huge"])
    with pytest.raises(ConfigError, match="--simulations must be at least 1, got 0"):
        simulated(simulations=0)
