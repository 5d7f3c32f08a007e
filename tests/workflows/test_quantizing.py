"""int8: calibrated on real samples, a sample's features its own, and the probe hardly the worse for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from difffeat.engines import Artifact, open_engine
from difffeat.engines.int8 import quantisable
from difffeat.engines.parity import statistics
from difffeat.errors import ConfigError
from difffeat.recipe import RunRecipe
from difffeat.runtime.sources_options import SourceOptions
from difffeat.workflows.quantizing import run_quantize
from difffeat.workflows.quickstart_data import write_split
from tests.artifacts import copy_of, exported, feeds

KINDS = ["image", "latents", "from-latents", "sweep", "text", "text-sweep"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("scenes"), "train", 40)[0]


def quantize(path: Path, source: Path, output: Path, **changes: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "samples": 20, "parts": "all", "run": RunRecipe(), "source_options": SourceOptions(), "threads": 1, "overwrite": False,
        "say": lambda *_, **__: None,
    }  # fmt: skip
    return run_quantize(path, str(source), output=output, **{**asked, **changes})


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("int8")
    return {name: Artifact.open(quantize(exported(name).path, scenes, folder / name)["artifact"]) for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_products_are_int8_and_features_near_fp32(name: str, quantised: dict[str, Artifact]) -> None:
    artifact = quantised[name]
    assert artifact.recipe.precision == "int8"
    assert artifact.recipe.calibration is not None
    model = onnx.load(artifact.graph, load_external_data=False)
    operators = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert onnx.TensorProto.INT8 in {tensor.data_type for tensor in model.graph.initializer}
    given = feeds(artifact, batch=8)
    with open_engine(exported(name), threads=1) as exact, open_engine(artifact, threads=1) as low:
        assert low.precision == "int8"
        for tap, value in low.run(given).items():
            assert statistics(value, exact.run(given)[tap]).relative_l2 < 0.1


@pytest.mark.parametrize("name", KINDS)
def test_a_samples_features_do_not_move_with_its_neighbours(name: str, quantised: dict[str, Artifact]) -> None:
    artifact = quantised[name]
    given = feeds(artifact, batch=4, length=6)
    loud = {key: value.copy() for key, value in given.items()}
    for key in ("latents", "noise"):
        if key in loud:
            loud[key][1:] *= 50.0
    if "pixels" in loud:
        loud["pixels"][1:] = 255
    if "tokens" in loud:
        loud["tokens"][1:] = 3
    with open_engine(artifact, threads=1) as engine:
        quiet_features, loud_features = engine.run(given), engine.run(loud)
    for tap, value in quiet_features.items():
        np.testing.assert_array_equal(loud_features[tap][0], value[0])


def test_the_calibration_is_part_of_the_recipe(scenes: Path, tmp_path: Path) -> None:
    path = exported("text").path
    first, again, other = (quantize(path, scenes, tmp_path / str(index), samples=samples) for index, samples in enumerate((20, 20, 10)))
    assert first["fingerprint"] == again["fingerprint"] != other["fingerprint"]
    assert Artifact.open(first["artifact"]).digest == Artifact.open(again["artifact"]).digest


def test_linears_alone_leave_the_autoencoder_in_fp32(scenes: Path, tmp_path: Path) -> None:
    graph = Artifact.open(quantize(exported("image").path, scenes, tmp_path / "out", parts="linears")["artifact"]).graph
    convolutions = quantisable(exported("image").graph)["Conv"]
    assert convolutions
    types = {tensor.name: tensor.data_type for tensor in onnx.load(graph, load_external_data=False).graph.initializer}
    assert types["vae.encoder.conv_in.weight"] == onnx.TensorProto.FLOAT
    assert all(kind == onnx.TensorProto.FLOAT for name, kind in types.items() if name.startswith("vae.") and name.endswith("conv1.weight"))


def test_what_cannot_be_quantised_is_told(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is fp16; int8 is made from an fp32 artifact"):
        quantize(exported("text", "fp16").path, scenes, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--parts must be one of all, linears; got 'some'"):
        quantize(copy_of("text", tmp_path), scenes, tmp_path / "out", parts="some")


@pytest.mark.parametrize("engine", ["torch", "trt", "rtx"])
def test_int8_is_for_onnx_runtime(engine: str, quantised: dict[str, Artifact]) -> None:
    with pytest.raises(ConfigError, match=r"is int8, which is for ONNX Runtime on CPUs. Pass --engine ort"):
        open_engine(quantised["text"], engine)


def test_an_extraction_with_int8_is_its_own_store(quantised: dict[str, Artifact], scenes: Path, tmp_path: Path) -> None:
    from difffeat.errors import StoreMismatch
    from difffeat.runtime.extract import extract
    from difffeat.runtime.sources import open_source

    source = open_source(str(scenes))
    with open_engine(quantised["text"], threads=1) as low:
        extract(low, source, tmp_path / "store", tokenizer=quantised["text"].tokenizer, batch_size=8)
    with open_engine(exported("text"), threads=1) as exact, pytest.raises(StoreMismatch, match="precision"):
        extract(exact, source, tmp_path / "store", tokenizer=exported("text").tokenizer, batch_size=8)
