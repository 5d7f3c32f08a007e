"""The benchmarks run, compare like with like, and their figures follow from the seconds they keep."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from difffeat.benchmarks.baselines import CHANNELS_LAST, COMPILED, HOOK, NAIVE, TRUNCATED, eager_candidates, naive_candidate
from difffeat.benchmarks.ceiling import int8_rate, matrix_rate
from difffeat.benchmarks.grid import BOUND, GRID, run_grid
from difffeat.benchmarks.text import BUCKETED, PADDED, run_text
from difffeat.benchmarks.text import INT8 as TEXT_INT8
from difffeat.benchmarks.throughput import INT8, ORT, TORCH, random_feeds, run_throughput
from difffeat.benchmarks.timing import Timing, compare, ratios, table
from difffeat.engines import open_engine
from difffeat.engines.parity import compare as parity
from difffeat.workflows.loading import Backbone
from tests.artifacts import dit_weights, export_named, plaid_weights, vae_weights


def test_every_round_runs_every_candidate_once_and_warm_ups_are_not_counted() -> None:
    order: list[str] = []
    timings = compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert [(t.name, len(t.seconds)) for t in timings] == [("a", 3), ("b", 3)]


def test_ratios_are_medians_of_the_rounds_own_ratios() -> None:
    timings = [Timing("theirs", (2.0, 8.0, 3.0)), Timing("ours", (1.0, 2.0, 3.0))]
    assert ratios(timings, "ours") == {"theirs": 2.0}
    assert timings[0].median == 3.0
    assert timings[0].spread == (2.5, 5.5)


def test_the_table_states_seconds_per_sample() -> None:
    lines = table([Timing("theirs", (4.0,)), Timing("ours", (1.0,))], per=2, ours="ours")
    assert "2.0000" in lines[1]
    assert "4.00 x" in lines[1]
    assert lines[2].rstrip().endswith("-")


def quiet(*_: object, **__: object) -> None:
    """Says nothing."""


@pytest.mark.parametrize(
    ("model", "start"),
    [
        pytest.param("dit-digits", "pixels", marks=pytest.mark.slow),
        ("dit-digits", "latents"),
        pytest.param("plaid-digits", "pixels", marks=pytest.mark.slow),
    ],
)
def test_throughput_compares_side_by_side_at_equal_threads(model: str, start: str, tmp_path: Path) -> None:
    said: list[str] = []
    file = tmp_path / "results" / "throughput.json"
    result = run_throughput(
        model, None, vae=None, block=1, start=start, batch_size=2, repeats=2, threads=1, engines=("torch", "int8", "naive"), output=file,
        say=lambda text, **_: said.append(text),
    )  # fmt: skip
    wanted = {HOOK, TRUNCATED, TORCH, ORT, INT8} | ({NAIVE} if model == "dit-digits" else set())
    assert set(result["seconds"]) == wanted | ({CHANNELS_LAST} if model == "dit-digits" and start == "pixels" else set())
    assert all(len(seconds) == 2 for seconds in result["seconds"].values())
    for name, faster in result["ours_is_faster_by"].items():
        assert faster == pytest.approx(np.median(np.array(result["seconds"][name]) / np.array(result["seconds"][ORT])))
    for name, share in result["share_of_matrix_rate"].items():
        assert share == pytest.approx(result["flops_per_sample"] * 2 / np.median(result["seconds"][name]) / result["matrix_rate"])
    assert (result["threads"], result["batch_size"], result["blocks"]) == (1, 2, [1])
    assert json.loads(file.read_text())["seconds"] == result["seconds"]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert any("1 threads" in line for line in said)


def test_the_grid_is_held_against_its_bound(tmp_path: Path) -> None:
    result = run_grid("dit-digits", None, vae=None, blocks=2, batch_size=2, repeats=2, threads=1, output=tmp_path / "grid.json", say=quiet)
    assert set(result["seconds"]) == {GRID, BOUND}
    assert result["cost_over_bound"] == pytest.approx(np.median(np.array(result["seconds"][GRID]) / np.array(result["seconds"][BOUND])))
    assert "12 timesteps × 2 blocks = 24 taps" in result["text"]


def test_captions_go_in_buckets_and_padded(tmp_path: Path) -> None:
    file = tmp_path / "text.json"
    result = run_text(
        "plaid-digits", None, tokenizer=None, block=1, captions=9, batch_size=4, repeats=2, threads=1, int8=True, output=file, say=quiet
    )
    assert {PADDED, BUCKETED, TEXT_INT8, f"{HOOK}, padded", f"{TRUNCATED}, padded"} == set(result["seconds"])
    assert result["length_percentiles"]["100"] == 64
    assert result["length_percentiles"]["0"] >= 10
    assert json.loads(file.read_text())["captions"] == 9


def test_the_matrix_rates_are_those_of_products() -> None:
    assert 1e8 < matrix_rate(1) < 1e14
    assert 1e8 < int8_rate(1, size=256) < 1e14


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param("image", marks=pytest.mark.slow), "text"])
def test_the_eager_candidates_compute_the_same_features_as_ours(name: str, compiled: bool, tmp_path: Path) -> None:
    if name == "image":
        backbone = Backbone("dit", dit_weights(), vae_weights())
        artifact = export_named(name, tmp_path / "one", blocks=(2,)).artifact
    else:
        backbone = Backbone("plaid", plaid_weights(), tokenizer=b"")
        artifact = export_named(name, tmp_path / "one", blocks=(2,), timesteps=(0.0,)).artifact
    feeds = random_feeds(artifact, 3)
    if "lengths" in feeds:
        feeds["tokens"], feeds["lengths"] = feeds["tokens"][:, :20], np.full(3, 20)
    with open_engine(artifact, "ort", threads=1) as engine:
        ours = engine.run(feeds)["b2"]
    candidates = eager_candidates(backbone, artifact, feeds, compiled=compiled) | naive_candidate(backbone, artifact, feeds, tmp_path, 1)
    assert {HOOK, TRUNCATED} | ({COMPILED} if compiled else set()) <= set(candidates)
    for candidate in candidates.values():
        assert parity(np.asarray(candidate()), ours).within(1e-5)
