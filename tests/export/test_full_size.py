"""Published geometries at full width, random weights: run by `make full-size`."""

from __future__ import annotations

from pathlib import Path

import pytest

from difffeat.export.weights import DIT_CONFIGS, PLAID_1B, random_dit
from difffeat.workflows.exporting import ExportOptions, export_dit

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", sorted(DIT_CONFIGS))
def test_every_published_dit_exports_within_tolerance(name: str, tmp_path: Path) -> None:
    weights = random_dit(DIT_CONFIGS[name], seed=1)
    options = ExportOptions(kind="from-latents", blocks=(0, 2), timesteps=(30.0,), noising="random")
    report = export_dit(weights, None, options, tmp_path / name, say=lambda _: None, check_samples=2)
    assert report.parity.passed
    assert report.artifact.recipe.backbone == name


@pytest.mark.timeout(900)
def test_the_sweep_graph_of_the_xl_holds_at_every_timestep(tmp_path: Path) -> None:
    weights = random_dit(DIT_CONFIGS["dit-xl-2-256"], seed=1)
    options = ExportOptions(kind="sweep", blocks=(4, 8, 12), timesteps=(0.0, 30.0, 200.0, 999.0), noising="random")
    report = export_dit(weights, None, options, tmp_path / "sweep", say=lambda _: None, check_samples=2)
    assert report.parity.passed
    assert len(report.parity.taps) == 12


def test_plaid_has_the_published_numbers() -> None:
    assert (PLAID_1B.depth, PLAID_1B.width, PLAID_1B.vocab, PLAID_1B.embed_dim, PLAID_1B.max_length) == (24, 2048, 32768, 16, 1024)
