"""The benchmarks run, compare like with like, and their figures follow from the seconds they keep."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from difffeat.benchmarks.throughput import HOOK, ORT, TORCH, TRUNCATED, eager_candidates, random_feeds, run_throughput
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


@pytest.mark.parametrize("model", ["dit-digits", "plaid-digits"])
def test_throughput_compares_four_ways_at_equal_threads(model: str, tmp_path: Path) -> None:
    said: list[str] = []
    file = tmp_path / "results" / "throughput.json"
    result = run_throughput(model, None, vae=None, block=1, batch_size=2, repeats=2, threads=1, output=file, say=lambda text, **_: said.append(text))
    assert set(result["seconds"]) == {HOOK, TRUNCATED, TORCH, ORT}
    assert all(len(seconds) == 2 for seconds in result["seconds"].values())
    for name, faster in result["ours_is_faster_by"].items():
        assert faster == pytest.approx(np.median(np.array(result["seconds"][name]) / np.array(result["seconds"][ORT])))
    assert (result["threads"], result["batch_size"], result["blocks"]) == (1, 2, [1])
    stored = json.loads(file.read_text())
    assert stored["seconds"] == result["seconds"]
    assert any("1 threads" in line for line in said)


@pytest.mark.parametrize("name", ["image", "text"])
def test_the_eager_candidates_compute_the_same_features_as_ours(name: str, tmp_path: Path) -> None:
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
    for candidate in eager_candidates(backbone, artifact, feeds).values():
        assert parity(np.asarray(candidate()), ours).within(1e-5)
