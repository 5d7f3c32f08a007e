"""What low precision costs is measured against fp32 on the same scenes, and a cost beyond its limit is marked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from difffeat.benchmarks.precision import LIMIT_MAP, Cost, run_precision
from difffeat.workflows.loading import load_backbone


def quiet(*_: object, **__: object) -> None:
    """Says nothing."""


@pytest.mark.slow
@pytest.mark.parametrize("precisions", [("fp16",), ("bf16", "int8")])
@pytest.mark.parametrize("model", ["plaid-digits", "dit-digits"])
def test_the_bundled_backbones_hold_in_every_precision(model: str, precisions: tuple[str, ...], tmp_path: Path) -> None:
    """On few scenes; `difffeat bench precision` prints it on many."""
    file = tmp_path / "precision.json"
    result = run_precision(train=150, test=120, precisions=precisions, models=(model,), output=file, say=quiet)
    assert set(result["costs"][model]) == set(precisions)
    for precision, cost in result["costs"][model].items():
        assert 0 < cost["l2"] < (1e-2 if precision != "int8" else 0.35)
        assert abs(cost["map_points"]) < 4 * LIMIT_MAP[precision]  # few scenes rank coarsely
        assert cost["l2_tap"].startswith("b")
    assert json.loads(file.read_text())["costs"] == result["costs"]


@pytest.mark.parametrize(("l2", "points", "within"), [(0.009, -0.2, True), (0.011, 0.0, False), (0.001, 0.21, False), (np.nan, 0.0, False)])
def test_a_cost_is_judged_by_both_limits(l2: float, points: float, within: bool) -> None:
    assert Cost("torch", [], l2, "b1/t0", points, "b1/t0", 0.0).within("fp16") is within


def test_the_backbones_are_the_bundled_ones() -> None:
    assert load_backbone("dit-digits").weights.origin == "file"
