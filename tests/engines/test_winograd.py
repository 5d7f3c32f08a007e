"""Winograd's convolutions are convolutions: against sums written out in NumPy, in a session, and in the engine on a whole artifact."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from difffeat.engines import EngineOptions, open_engine, winograd
from tests.artifacts import exported

RNG = np.random.default_rng(0)
POINT = st.fractions(min_value=-3, max_value=3, max_denominator=8)


@given(st.lists(POINT, min_size=5, max_size=5, unique=True), st.integers(0, 2**32 - 1))
def test_the_transforms_correlate_for_any_points(points: list[Fraction], seed: int) -> None:
    rng = np.random.default_rng(seed)
    patch, taps = rng.standard_normal(6), rng.standard_normal(3)
    made = winograd.toom_cook(tuple(points))
    scale = np.abs(made.output) @ (np.abs(made.filter @ taps) * np.abs(made.input @ patch))
    assert np.all(np.abs(made.output @ ((made.filter @ taps) * (made.input @ patch)) - np.correlate(patch, taps, "valid")) <= 1e-12 * (1 + scale))


@pytest.mark.parametrize("points", [(Fraction(0),) * 5, winograd.POINTS[:4]])
def test_too_few_points_are_refused(points: tuple[Fraction, ...]) -> None:
    with pytest.raises(ValueError, match="needs 5 distinct points"):
        winograd.toom_cook(points)


def test_the_points_round_less_than_the_usual_ones() -> None:
    def error(points: tuple[Fraction, ...]) -> float:
        made = winograd.toom_cook(points)
        filters, patches = RNG.standard_normal((256, 3)).astype(np.float32), RNG.standard_normal((256, 6)).astype(np.float32)
        out, into, own = (matrix.astype(np.float32) for matrix in (made.output, made.input, made.filter))
        found = ((filters @ own.T) * (patches @ into.T)) @ out.T
        exact = np.stack([np.correlate(p, f, "valid") for p, f in zip(patches.astype(np.float64), filters.astype(np.float64), strict=True)])
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    usual = tuple(Fraction(value) for value in (0, 1, -1, 2, -2))
    assert np.mean([error(winograd.POINTS) for _ in range(20)]) < 0.8 * np.mean([error(usual) for _ in range(20)])


def convolution(weight: np.ndarray, bias: np.ndarray | None, image: tuple[int, int], **attributes: Any) -> onnx.ModelProto:
    """A graph of one convolution between dynamic batches."""
    weights = [numpy_helper.from_array(weight, "weight"), *([] if bias is None else [numpy_helper.from_array(bias, "bias")])]
    kind = weights[0].data_type
    node = helper.make_node("Conv", ["x", *(tensor.name for tensor in weights)], ["y"], **{"pads": [1, 1, 1, 1], **attributes})
    into = weight.shape[1] * attributes.get("group", 1)
    graph = helper.make_graph(
        [node],
        "convolution",
        [helper.make_tensor_value_info("x", kind, ["batch", into, *image])],
        [helper.make_tensor_value_info("y", kind, None)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, filters: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    settings = onnxruntime.SessionOptions()
    settings.add_external_initializers(list(filters), [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in filters.values()])
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def direct(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The sum over channels and the nine neighbours, in float64."""
    height, width = x.shape[2:]
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    shifted = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.einsum("kbchw,ock->bohw", np.stack(shifted), weight.reshape(*weight.shape[:2], 9).astype(np.float64)) + bias[:, None, None]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("image", [(4, 4), (8, 20)])
def test_a_rewritten_convolution_is_the_sum_over_neighbours(image: tuple[int, int], biased: bool) -> None:
    weight = (RNG.standard_normal((160, 128, 3, 3)) / 34).astype(np.float32)
    bias = RNG.standard_normal(160).astype(np.float32)
    x = RNG.standard_normal((3, 128, *image)).astype(np.float32)
    model = convolution(weight, bias if biased else None, image)
    filters = winograd.rewrite(model, Path())
    assert [node.op_type for node in model.graph.node].count("MatMul") == 1
    assert "weight" not in {tensor.name for tensor in model.graph.initializer}
    exact = direct(x, weight, bias if biased else np.zeros(160))
    assert np.linalg.norm(run(model, filters, x) - exact) < 2e-6 * np.linalg.norm(exact)


def test_two_convolutions_of_one_filter_are_both_rewritten() -> None:
    weight = (RNG.standard_normal((128, 128, 3, 3)) / 34).astype(np.float32)
    bias = RNG.standard_normal(128).astype(np.float32)
    model = convolution(weight, bias, (8, 8))
    model.graph.node[0].output[0] = "middle"
    model.graph.node.append(helper.make_node("Conv", ["middle", "weight", "bias"], ["y"], pads=[1, 1, 1, 1]))
    x = RNG.standard_normal((1, 128, 8, 8)).astype(np.float32)
    filters = winograd.rewrite(model, Path())
    assert len(filters) == 2
    exact = direct(direct(x, weight, bias), weight, bias)
    assert np.linalg.norm(run(model, filters, x) - exact) < 2e-6 * np.linalg.norm(exact)


def ineligible() -> dict[str, onnx.ModelProto]:
    weight, bias, image = np.zeros((128, 128, 3, 3), np.float32), np.zeros(128, np.float32), (8, 8)
    computed = convolution(weight, bias, image)
    computed.graph.node.insert(0, helper.make_node("Identity", ["weight"], ["same"]))
    computed.graph.node[1].input[1] = "same"
    unknown = convolution(weight, bias, image)
    del unknown.graph.input[0].type.tensor_type.shape.dim[2:]
    for name in ("height", "width"):
        unknown.graph.input[0].type.tensor_type.shape.dim.add(dim_param=name)
    return {
        "stride": convolution(weight, bias, image, strides=[2, 2]),
        "dilation": convolution(weight, bias, image, dilations=[2, 2]),
        "padding": convolution(weight, bias, image, pads=[0, 0, 0, 0]),
        "groups": convolution(weight, bias, image, group=2),
        "few channels": convolution(weight[:, :64], bias, image),
        "1 x 1": convolution(weight[:, :, :1, :1], bias, image, pads=[0, 0, 0, 0]),
        "a size that no tiles fill": convolution(weight, bias, (8, 6)),
        "a size that varies": unknown,
        "fp16": convolution(weight.astype(np.float16), bias.astype(np.float16), image),
        "a computed filter, as int8 has": computed,
    }


@pytest.mark.parametrize("case", ineligible())
def test_other_convolutions_stay_as_they_are(case: str) -> None:
    model = ineligible()[case]
    before = model.SerializeToString()
    assert winograd.rewrite(model, Path()) == {}
    assert model.SerializeToString() == before


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_engine_gives_the_features_of_direct_convolutions(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 8)
    rewritten: list[int] = []
    real = winograd.rewrite
    monkeypatch.setattr(winograd, "rewrite", lambda *arguments: (filters := real(*arguments), rewritten.append(len(filters)))[0])
    artifact = exported("image").path
    features = []
    for options in (EngineOptions(winograd=False), EngineOptions()):
        with open_engine(artifact, engine="ort", options=options) as engine:
            shapes = {name: (spec.dtype, (size, *spec.shape[1:])) for name, spec in engine.inputs.items()}
            rng = np.random.default_rng(1)
            feeds = {
                name: rng.integers(0, 256, shape).astype(kind) if kind == "uint8" else rng.standard_normal(shape).astype(kind)  # type: ignore[arg-type]
                for name, (kind, shape) in shapes.items()
            }
            features.append(engine.run(feeds))
            alone = engine.run({name: array[-1:] for name, array in feeds.items()})
    for tap, together in features[1].items():
        np.testing.assert_allclose(alone[tap][0], together[-1], rtol=1e-4, atol=1e-6)
    assert rewritten[0] > 0
    assert features[0].keys() == features[1].keys()
    for tap, plain in features[0].items():
        assert plain.shape[0] == size
        assert 0 < np.linalg.norm(features[1][tap] - plain) < 1e-5 * np.linalg.norm(plain)


def test_filters_are_read_from_beside_the_graph(tmp_path: Path) -> None:
    weight = (RNG.standard_normal((128, 128, 3, 3)) / 34).astype(np.float32)
    path = tmp_path / "model.onnx"
    onnx.save(convolution(weight, None, (4, 4)), str(path), save_as_external_data=True, location="model.onnx_data", size_threshold=16)
    model = onnx.load(str(path), load_external_data=False)
    assert model.graph.initializer[0].data_location == TensorProto.EXTERNAL
    inside = winograd.rewrite(convolution(weight, None, (4, 4)), Path())
    np.testing.assert_array_equal(winograd.rewrite(model, path)["y/filters"], inside["y/filters"])
