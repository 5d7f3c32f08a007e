"""Winograd's convolutions for ONNX Runtime on CPUs: 3 × 3 filters in a quarter of the products (Lavin and Gray, arXiv 1509.09308).

F(4 × 4, 3 × 3) computes an output tile of 4 × 4 as Aᵀ[(G g Gᵀ) ∘ (Bᵀ d B)]A, for a filter g and an input tile d of 6 × 6: 36 products, not 144, each
summed over channels. ONNX Runtime computes 3 × 3 convolutions directly, and an autoencoder spends most of its time in them. The graph on disk is not
touched; it is rewritten when a session is opened, in terms of operators that the runtime has fast kernels for:

    x [B, C, H, W] -> Conv (the 36 values of Bᵀ d B, stride 4) -> MatMul (36 × [O, C]) -> ConvTranspose (Aᵀ · A, stride 4) + bias -> y [B, O, H, W]
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines.artifact import import_onnx, initializer_values

TILE, FILTER = 4, 3
PATCH = TILE + FILTER - 1
POINTS = (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2))
"""Where the polynomials are evaluated, besides infinity: with less rounding than 0, ±1, ±2 (why: Barabasz et al., arXiv 1803.10986)."""

LEAST_CHANNELS = 128
"""With fewer, moving tiles costs more than the products saved."""

PIECE = 2
"""Samples at a time: the transformed tiles of an image are 2.25 times as large as the image."""

_INPUT, _OUTPUT, _AXES = "winograd/input", "winograd/output", "winograd/axes"


@dataclass(frozen=True)
class Transforms:
    """The constant matrices, float64: `output` Aᵀ [4, 6], `filter` G [6, 3], `input` Bᵀ [6, 6]."""

    output: np.ndarray
    filter: np.ndarray
    input: np.ndarray


def toom_cook(points: tuple[Fraction, ...] = POINTS, tile: int = TILE, taps: int = FILTER) -> Transforms:
    """Transforms of F(tile, taps) for the given points and infinity, rows of G and Bᵀ balanced by powers of two."""
    if len(set(points)) != tile + taps - 2:
        raise ValueError(f"F({tile}, {taps}) needs {tile + taps - 2} distinct points besides infinity, got {len(set(points))} of {points}")
    output = [[point**power for point in points] + [Fraction(power == tile - 1)] for power in range(tile)]
    filters, inputs = [], []
    for index, point in enumerate(points):
        others = [*points[:index], *points[index + 1 :]]
        scale = _product(point - other for other in others)
        filters.append([point**power / scale for power in range(taps)])
        inputs.append([*_with_roots(others), Fraction(0)])
    filters.append([Fraction(power == taps - 1) for power in range(taps)])
    inputs.append(_with_roots(list(points)))
    for row in range(len(filters)):
        power = Fraction(2) ** round(float(np.log2(float(max(map(abs, filters[row]))))))
        filters[row] = [value / power for value in filters[row]]
        inputs[row] = [value * power for value in inputs[row]]
    return Transforms(*(np.array(matrix, dtype=np.float64) for matrix in (output, filters, inputs)))


def eligible(model: Any) -> dict[str, tuple[int, int]]:
    """Height and width of the image of every convolution that gains, by the name of its output; `model` may be without its weights.

    These are 3 × 3 convolutions of fp32 with stride 1 and one pixel of padding, of at least `LEAST_CHANNELS` channels on either side, and of images
    whose fixed height and width are multiples of 4.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    chosen = [node for node in model.graph.node if node.op_type == "Conv" and _gains(node, tensors)]
    shapes = _shapes(model) if chosen else {}
    images = {node.output[0]: shapes.get(node.input[0], (0, 0, 0, 0))[2:] for node in chosen}
    return {name: (height, width) for name, (height, width) in images.items() if height > 0 and width > 0 and height % TILE == width % TILE == 0}


def rewrite(model: Any, path: Path) -> dict[str, np.ndarray]:
    """Replace the eligible convolutions of `model` (without its weights, out of `path`), in place.

    **Returns** the transformed filters, float32 [1, 36, O, C], by the names of the initializers that stand for them; empty where nothing is eligible.
    """
    images = eligible(model)
    if not images:
        return {}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    transforms, filters, biases = toom_cook(), dict[str, np.ndarray](), set[str]()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.output[0] not in images:
            model.graph.node.append(node)
            continue
        name, weight = f"{node.output[0]}/filters", tensors[node.input[1]]
        filters[name] = _filters(initializer_values(weight, path), transforms)
        biases.update(node.input[2:])
        model.graph.node.extend(_replacement(node, name, images[node.output[0]], weight.dims[:2]))
    _add_constants(model, transforms, filters, biases)
    _drop_unused(model)
    return filters


def _gains(node: Any, tensors: dict[str, Any]) -> bool:
    """Whether a convolution is of the eligible form, whatever its image."""
    if any(name not in tensors for name in node.input[1:]):
        return False
    weight, onnx = tensors[node.input[1]], import_onnx()
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return (
        weight.data_type == onnx.TensorProto.FLOAT
        and list(weight.dims[2:]) == [FILTER, FILTER]
        and min(weight.dims[:2]) >= LEAST_CHANNELS
        and attributes.get("group", 1) == 1
        and list(attributes.get("pads", [0] * 4)) == [1] * 4
        and all(list(attributes.get(name, [1, 1])) == [1, 1] for name in ("strides", "dilations"))
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
    )


def _replacement(node: Any, filters: str, image: tuple[int, int], channels: Any) -> list[Any]:
    """The nodes in the place of one convolution. The two transforms see every channel as an image of its own."""
    helper = import_onnx().helper
    (height, width), (out, into), result = image, channels, node.output[0]
    rows, columns, values = height // TILE, width // TILE, PATCH * PATCH
    made: list[Any] = []

    def step(operator: str, inputs: list[str], name: str = "", **attributes: Any) -> str:
        output = name or f"{result}/{len(made)}"
        made.append(helper.make_node(operator, inputs, [output], name=f"{node.name or result}/winograd/{len(made)}", **attributes))
        return output

    def shaped(value: str, *shape: int) -> str:
        constant = step("Constant", [], value_ints=list(shape))
        return step("Reshape", [value, constant])

    planes = shaped(node.input[0], -1, 1, height, width)
    tiles = step("Conv", [planes, _INPUT], kernel_shape=[PATCH, PATCH], strides=[TILE, TILE], pads=[1, 1, 1, 1])
    by_value = step("Transpose", [shaped(tiles, -1, into, values, rows * columns)], perm=[0, 2, 1, 3])
    products = step("Transpose", [step("MatMul", [filters, by_value])], perm=[0, 2, 1, 3])
    pixels = step("ConvTranspose", [shaped(products, -1, values, rows, columns), _OUTPUT], kernel_shape=[TILE, TILE], strides=[TILE, TILE])
    if len(node.input) > 2:
        step("Add", [shaped(pixels, -1, out, height, width), _bias(node.input[2])], result)
    else:
        constant = step("Constant", [], value_ints=[-1, out, height, width])
        step("Reshape", [pixels, constant], result)
    return made


def _add_constants(model: Any, transforms: Transforms, filters: dict[str, np.ndarray], biases: set[str]) -> None:
    """The transforms as filters, the biases with axes to add along, and a place for each transformed filter, which the session is given."""
    onnx = import_onnx()
    into = np.einsum("ia,jb->ijab", transforms.input, transforms.input).reshape(PATCH * PATCH, 1, PATCH, PATCH)
    out = np.einsum("ai,bj->ijab", transforms.output, transforms.output).reshape(PATCH * PATCH, 1, TILE, TILE)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in ((_INPUT, into), (_OUTPUT, out)))
    axes = onnx.numpy_helper.from_array(np.array([1, 2]), _AXES)
    model.graph.initializer.append(axes)
    for bias in sorted(biases):
        model.graph.node.insert(0, onnx.helper.make_node("Unsqueeze", [bias, _AXES], [_bias(bias)], name=f"{bias}/winograd"))
    for name, array in filters.items():
        place = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL)
        place.external_data.add(key="location", value="given to the session")
        model.graph.initializer.append(place)


def _drop_unused(model: Any) -> None:
    """The filters that nothing reads any more."""
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _filters(weight: np.ndarray, transforms: Transforms) -> np.ndarray:
    """G g Gᵀ for every pair of channels: float32 [1, 36, O, C], computed in float64."""
    out, into = weight.shape[:2]
    square = np.kron(transforms.filter, transforms.filter)  # [36, 9]
    return (square @ weight.reshape(out * into, FILTER * FILTER).T.astype(np.float64)).astype(np.float32).reshape(1, PATCH * PATCH, out, into)


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of images [B, C, H, W] in the graph, 0 where an axis varies."""
    inferred = import_onnx().shape_inference.infer_shapes(model)
    values = (*inferred.graph.input, *inferred.graph.value_info)
    shapes = {value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim) for value in values}
    return {name: shape for name, shape in shapes.items() if len(shape) == 4}


def _bias(name: str) -> str:
    return f"{name}/as an image"


def _product(factors: Any) -> Fraction:
    product = Fraction(1)
    for factor in factors:
        product *= factor
    return product


def _with_roots(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients of the polynomial with these roots, lowest power first."""
    found = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *found], [*(-root * value for value in found), Fraction(0)]
        found = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return found
