"""What an artifact and a plan say of themselves, and what is damaged beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from difffeat.engines.tensorrt_build import build_plan
from difffeat.engines.tensorrt_plans import Profile
from difffeat.errors import ConfigError
from difffeat.workflows.inspecting import run_inspect
from tests.artifacts import copy_of, exported


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFFEAT_DATA", str(tmp_path / "data"))
    return copy_of("text", tmp_path)


def test_a_graph_is_its_artifact(text: Path, tmp_path: Path) -> None:
    assert run_inspect(text / "model.onnx") == run_inspect(text)
    alone = tmp_path / "alone" / "model2.onnx"
    alone.parent.mkdir()
    alone.write_bytes((text / "model.onnx").read_bytes())
    with pytest.raises(ConfigError, match=r"is a graph's file: neither an artifact \(no model\.onnx\), nor a plan"):
        run_inspect(alone)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"{}", b'{"taps": {"b0/t0": {"relative_l2": "x"}}}', b'{"taps": [1]}', b"[" * 9999])
def test_a_spoiled_parity_report_is_told_and_the_rest_is_shown(content: bytes, text: Path) -> None:
    assert "parity: relative L2 " in run_inspect(text)["text"]
    (text / "parity.json").write_bytes(content)
    found = run_inspect(text)
    assert found["parity"] is None
    assert "  parity: parity.json is damaged (" in found["text"]
    assert "blocks 0, 2" in found["text"]
    (text / "parity.json").unlink()
    assert "  parity: not measured" in run_inspect(text)["text"]


@pytest.fixture
def plan(text: Path) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'difffeat[rtx]'")
    return build_plan(text, "rtx", Profile(opt_batch=2, max_batch=4)).path


def test_a_plan_says_what_it_computes_for_what_and_what_it_takes(plan: Path, text: Path) -> None:
    found: dict[str, Any] = run_inspect(plan)
    recipe = exported("text").recipe
    assert (found["sealed"], found["taps"], found["recipe"]) == (True, list(recipe.taps), recipe.to_dict())
    assert "batches 1..4 (tuned for 2), captions of 1..32 tokens, sealed" in found["text"]
    assert f"text graph of plaid-small, taps {', '.join(recipe.taps)}" in found["text"]
    width = recipe.architecture["width"]
    assert found["memory"]["buffers"] == 4 * 32 * 8 + 4 * 8 + 2 * 4 * width * 4  # tokens, lengths, and two taps
    assert found["memory"]["weights"] > 100_000
    assert found["memory"]["activations"] > 4 * 32 * width * 4
    assert f"plan {plan}: rtx" in run_inspect(text)["text"]


def test_a_plan_that_may_not_be_loaded_says_why(plan: Path, text: Path, tmp_path: Path) -> None:
    with (text / "parity.json").open("a") as file:
        file.write(" ")  # beside the graph, no part of it
    assert run_inspect(plan)["sealed"]
    beside = plan.with_suffix(".json").rename(tmp_path / "aside")
    found = run_inspect(plan)
    assert found["text"] == f"{plan.name} may not be loaded: {plan.stem}.json, which says what it was built from, is missing; it will be built anew"
    beside.rename(plan.with_suffix(".json"))
    tokenizer = text / "model.onnx"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b"pytorch", b"pytorcH", 1))
    assert "  which has changed since: it will be built anew" in run_inspect(plan)["text"]
    tokenizer.rename(tmp_path / "model.onnx")
    assert "where its artifact would be, holds none" in run_inspect(plan)["text"]
