"""Captions go in buckets and padded, through whichever engine is asked for; eager beside it is of the same device and precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.benchmarks import text
from difffeat.benchmarks.baselines import HOOK, TRUNCATED, eager_candidates, eager_captions
from difffeat.benchmarks.target import Target
from difffeat.benchmarks.text import BUCKETED, INT8, PADDED, run_text, time_captions
from difffeat.benchmarks.timing import Timing
from difffeat.errors import ConfigError
from difffeat.workflows.loading import Backbone
from tests.artifacts import export_named, exported, plaid_weights

ORT = "difffeat, ONNX Runtime"
LENGTHS = np.array([3, 9, 20, 32, 5])


def quiet(*_: object, **__: object) -> None:
    """Says nothing."""


def test_captions_go_in_buckets_and_padded(tmp_path: Path) -> None:
    file = tmp_path / "text.json"
    result = run_text(
        "plaid-digits", None, tokenizer=None, block=1, captions=9, batch_size=4, repeats=2, threads=1, int8=True, output=file, say=quiet
    )
    assert {f"{ORT}, {PADDED}", f"{ORT}, {BUCKETED}", INT8, f"{HOOK}, padded", f"{TRUNCATED}, padded"} == set(result["seconds"])
    assert result["length_percentiles"]["100"] == 64
    assert result["length_percentiles"]["0"] >= 10
    stored = json.loads(file.read_text())
    assert (stored["captions"], stored["engine"], stored["device"], stored["precision"]) == (9, "ort", "cpu", "fp32")


def test_an_artifact_is_timed_in_its_engine_and_precision_without_eager() -> None:
    result = time_captions(exported("text", "fp16"), Target(engine="torch", threads=1), LENGTHS, batch_size=2, repeats=2)
    assert list(result["seconds"]) == [f"difffeat, torch, {PADDED}", f"difffeat, torch, {BUCKETED}"]
    assert list(result["ours_is_faster_by"]) == [f"difffeat, torch, {PADDED}"]
    assert (result["captions"], result["precision"], result["blocks"]) == (5, "fp16", [0, 2])
    assert "torch on cpu in fp16, 1 threads: " in result["text"]
    assert "5 captions of 3 to 32 tokens" in result["text"]


def test_eager_runs_on_the_same_device_and_in_the_same_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def eager(_: Any, __: Any, batches: list[Any], *, device: str, precision: str) -> dict[str, Any]:
        asked.append((len(batches), device, precision))
        return {TRUNCATED: lambda: None}

    def compare(candidates: dict[str, Any], repeats: int, *, device: str) -> list[Timing]:
        asked.append(device)
        return [Timing(name, (1.0,) * repeats) for name in candidates]

    opened = Target.open  # what stands for the card is this CPU
    monkeypatch.setattr(Target, "open", lambda self, *given, **how: opened(Target(engine=self.engine, threads=1), *given, **how))
    monkeypatch.setattr(text, "eager_captions", eager)
    monkeypatch.setattr(text, "compare", compare)
    target = Target(engine="torch", device="cuda:0", threads=1)
    backbone = Backbone("plaid", plaid_weights(), tokenizer=b"")
    result = time_captions(exported("text", "fp16"), target, LENGTHS, batch_size=2, repeats=1, backbone=backbone)
    assert asked == [(3, "cuda:0", "fp16"), "cuda:0"]
    assert "µs/caption" in result["text"]
    assert "torch on cuda:0 in fp16, 1 threads: microseconds per caption" in result["text"]
    assert result["machine"]["gpu"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_model_serves_all_batches_of_captions(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from difffeat.export import reference

    built: list[str] = []
    unfolded = reference.unfolded_plaid
    monkeypatch.setattr(reference, "unfolded_plaid", lambda weights: (built.append("model"), unfolded(weights))[1])
    artifact = export_named("text", tmp_path / "one", blocks=(2,), timesteps=(0.0,)).artifact
    backbone, rng = Backbone("plaid", plaid_weights(), tokenizer=b""), np.random.default_rng(0)
    batches = [{"tokens": rng.integers(0, 9, (size, 6)), "lengths": np.full(size, length)} for size, length in ((2, 6), (1, 3))]
    built.clear()  # export holds its graph against one too
    found = eager_captions(backbone, artifact, batches, precision=precision)
    assert built == ["model"]
    assert list(found) == [HOOK, TRUNCATED]
    for name, run in found.items():
        alone = [eager_candidates(backbone, artifact, feeds, precision=precision)[name]() for feeds in batches]
        assert np.array_equal(run(), np.concatenate(alone))


@pytest.mark.parametrize("changes", [{"engine": "torch"}, {"dtype": "fp16"}, {"engine": "torch", "dtype": "bf16"}])
def test_int8_stands_beside_onnx_runtime_in_fp32_on_the_cpu_only(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "load_backbone", lambda *_, **__: pytest.fail("loaded"))
    given: dict[str, Any] = {"tokenizer": None, "block": 1, "captions": 9, "batch_size": 4, "repeats": 1, "threads": 1, "output": None, "say": quiet}
    with pytest.raises(ConfigError, match=r"int8 is made from an fp32 graph and runs in ONNX Runtime on the CPU\. Leave --int8 out"):
        run_text("plaid-digits", None, int8=True, **given, **changes)
