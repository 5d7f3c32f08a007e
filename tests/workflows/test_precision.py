"""Low precision is typed at export, judged with rounding at every operation, and left where it does not hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from difffeat.engines import Artifact, open_engine
from difffeat.engines.parity import compare
from difffeat.errors import ParityError
from difffeat.export.weights import DiTWeights
from difffeat.workflows.exporting import ExportOptions, export_dit
from tests.artifacts import OPTIONS, dit_weights, exported, feeds

HALF = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
PRODUCTS = ("MatMul", "Gemm", "Conv")


def types(path: Path) -> dict[str, int]:
    """Element type of every value of a graph."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in model.graph.initializer}


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", ["image", "sweep", "text", "text-sweep"])
def test_products_are_in_low_precision_and_sums_in_fp32(name: str, precision: str) -> None:
    artifact = exported(name, precision)
    known = types(artifact.graph)
    nodes = list(onnx.load(artifact.graph, load_external_data=False).graph.node)
    weights = {value for node in nodes if node.op_type in PRODUCTS for value in node.input if "blocks" in value and value.endswith("weight")}
    assert weights
    assert {known[value] for value in weights} == {HALF[precision]}
    assert {known[value.name] for value in onnx.load(artifact.graph, load_external_data=False).graph.output} == {onnx.TensorProto.FLOAT}
    norms = [node for node in nodes if node.op_type == "LayerNormalization"]
    assert all(known[value] == onnx.TensorProto.FLOAT for node in norms for value in node.input[1:])
    assert parity(artifact)["passed"]
    assert artifact.recipe.precision == precision


def parity(artifact: Artifact) -> dict[str, Any]:
    """What the export has measured."""
    return json.loads((artifact.path / "parity.json").read_text())


OTHERS = ("latents", "from-latents", "sweep-ddim", "text-sweep-ddim")
"""Beside the four above: of every shell that a graph can have, one."""


@pytest.mark.parametrize("name", [n if n in OTHERS else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS])
def test_every_kind_of_graph_has_an_fp16_form(name: str) -> None:
    assert 0 < max(tap["relative_l2"] for tap in parity(exported(name, "fp16"))["taps"].values()) < 5e-3


def test_low_precision_is_another_fingerprint_and_a_smaller_file() -> None:
    low = exported("text", "fp16")
    assert low.recipe.fingerprint != exported("text").recipe.fingerprint
    assert low.size < 0.6 * exported("text").size


def planted(block: int, scale: float) -> DiTWeights:
    """The small DiT with one block whose MLP's hidden values are beyond fp16's range; in fp32 it computes nearly the same."""
    weights: Any = dit_weights()
    tensors = dict(weights.tensors)
    prefix = f"blocks.{block - 1}.mlp"
    tensors[f"{prefix}.fc1.weight"] = tensors[f"{prefix}.fc1.weight"] * scale
    tensors[f"{prefix}.fc1.bias"] = tensors[f"{prefix}.fc1.bias"] * scale
    tensors[f"{prefix}.fc2.weight"] = tensors[f"{prefix}.fc2.weight"] / scale
    return replace(weights, tensors=tensors)


OPTION = ExportOptions(kind="from-latents", blocks=(3,), timesteps=(30.0,), noising="random", precision="fp16")


def test_a_planted_overflow_is_found_named_and_kept_in_fp32(tmp_path: Path) -> None:
    said: list[str] = []
    report = export_dit(planted(2, 1e5), None, OPTION, tmp_path / "out", say=said.append)
    assert [line for line in said if "kept in fp32" in line] == [line for line in said if line.startswith("block 2 differs by")]
    assert list(report.artifact.recipe.options["fp32_parts"]) == [2]
    assert report.parity.passed
    found = {tensor.name: tensor.data_type for tensor in onnx.load(report.artifact.graph, load_external_data=False).graph.initializer}
    assert found["trunk.blocks.1.fc1.weight"] == onnx.TensorProto.FLOAT
    assert found["trunk.blocks.0.fc1.weight"] == onnx.TensorProto.FLOAT16


def test_without_the_promotion_the_overflow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from difffeat.workflows import exporting

    monkeypatch.setattr(exporting, "promote", lambda recipe, *_: recipe)
    with pytest.raises(ParityError, match=r"b3/t30: .* non-finite values"):
        export_dit(planted(2, 1e5), None, OPTION, tmp_path / "out", say=lambda _: None)


def test_a_promoted_graph_is_the_same_in_both_engines(tmp_path: Path) -> None:
    artifact = export_dit(planted(1, 1e5), None, OPTION, tmp_path / "out", say=lambda _: None).artifact
    given = feeds(artifact)
    with open_engine(artifact, "torch") as eager, open_engine(artifact, "ort") as ort:
        assert compare(eager.run(given)["b3"], ort.run(given)["b3"]).within(5e-3)


@pytest.mark.slow
def test_the_bundled_backbones_hold_in_fp16_on_standardised_features(tmp_path: Path) -> None:
    from difffeat.workflows.loading import load_backbone
    from difffeat.workflows.scenes import scene

    dit = load_backbone("dit-digits")
    pixels = np.stack([scene("validation", index).pixels for index in range(96)])
    noise = np.random.default_rng(0).standard_normal((96, 4, 12, 12), dtype=np.float32)
    found = {}
    for precision, engine in (("fp32", "ort"), ("fp16", "torch")):
        options = ExportOptions(kind="image", blocks=(0, 3, 7, 8), timesteps=(50.0,), noising="random", precision=precision)
        artifact = export_dit(dit.weights, dit.vae, options, tmp_path / precision, say=lambda _: None).artifact
        with open_engine(artifact, engine) as running:
            found[precision] = running.run({"pixels": pixels, "noise": noise})
    for name, reference in found["fp32"].items():
        mean, deviation = reference.mean(0), reference.std(0) + 1e-9
        exact, low = (reference - mean) / deviation, (found["fp16"][name] - mean) / deviation
        assert np.linalg.norm(low - exact) / np.linalg.norm(exact) < 1e-2
