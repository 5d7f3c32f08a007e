"""What a graph costs, read off the file: FLOPs, parameters, memory, and the precision of each class of nodes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difffeat.engines.artifact import import_onnx, load_proto

_NAMES = {1: "fp32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "fp16", 11: "fp64", 16: "bf16"}
_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}
_SHOWN = ("MatMul", "Gemm", "Conv", "LayerNormalization", "GroupNormalization", "Softmax", "Gelu")


@dataclass(frozen=True)
class Cost:
    """Of one run of a graph at a batch size (and, for text, a length).

    **Fields:** `flops` multiply and add counted as two, of matrix products and convolutions, by operator; `parameters` weights in the file;
    `weight_bytes`; `activation_bytes` largest sum of tensors alive at once, in the file's order of nodes (a runtime may need somewhat more, or
    less where it fuses); `precision` operator -> element types of its outputs, with counts.
    """

    flops: Mapping[str, int]
    parameters: int
    weight_bytes: int
    activation_bytes: int
    precision: Mapping[str, Mapping[str, int]]

    @property
    def total_flops(self) -> int:
        """Over all operators."""
        return sum(self.flops.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        precision = {operator: dict(kinds) for operator, kinds in self.precision.items()}
        return {**vars(self), "flops": dict(self.flops), "precision": precision, "total_flops": self.total_flops}


def graph_cost(path: Path, batch: int = 1, length: int = 32) -> Cost:
    """Count a graph's cost at a batch size and a length in tokens. Raises ForeignGraph and UnsafeGraph."""
    onnx = import_onnx()
    model = load_proto(path)
    sizes = {"batch": batch, "length": length}
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in sizes:
                axis.dim_value = sizes[axis.dim_param]
    model = _inferred(onnx, model, batch)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    shapes = {v.name: _filled([axis.dim_value for axis in v.type.tensor_type.shape.dim], batch, length) for v in values}
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    shapes |= {name: tuple(tensor.dims) for name, tensor in weights.items()}
    types |= {name: tensor.data_type for name, tensor in weights.items()}
    flops: Counter[str] = Counter()
    precision: dict[str, Counter[str]] = {}
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        flops[node.op_type] += _flops(node, shapes)
        if node.op_type in _SHOWN:
            weight = types.get(node.input[1]) if node.op_type in ("MatMul", "Gemm", "Conv") else None
            kind = _kind(node, makers, weight if weight is not None else types.get(node.output[0]))
            precision.setdefault(node.op_type, Counter())[kind] += 1
    constant = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights}
    sizes_of = {name: 0 if name in constant else math.prod(shape) * _BYTES.get(types.get(name, 1), 4) for name, shape in shapes.items()}
    own = [t for t in weights.values() if t.data_type in (1, 3, 10, 16) and t.dims]
    return Cost(
        {name: count for name, count in flops.items() if count},
        sum(math.prod(t.dims) for t in own),
        sum(math.prod(t.dims) * _BYTES.get(t.data_type, 4) for t in weights.values()),
        _peak(model, sizes_of, set(weights)),
        precision,
    )


def _inferred(onnx: Any, model: Any, batch: int) -> Any:
    """With shapes and types of all values. Where onnx gives up it is helped and infers again: GroupNormalization in half precision keeps its input's
    shape and type, and a first axis that was lost is the batch.
    """
    del model.graph.value_info[:]
    while True:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        known = {v.name: v for v in (*model.graph.value_info, *model.graph.input)}
        if not _help(model, known, batch):
            return model


def _help(model: Any, known: Mapping[str, Any], batch: int) -> bool:
    """Fill in the first gap, in the order of the nodes; whether there was one."""
    for node in model.graph.node:
        name = node.output[0]
        if name not in known and node.op_type == "GroupNormalization" and node.input[0] in known:
            value = model.graph.value_info.add()
            value.CopyFrom(known[node.input[0]])
            value.name = name
            return True
        axes = known[name].type.tensor_type.shape.dim if name in known else []
        if len(axes) > 1 and not axes[0].dim_value and all(axis.dim_value for axis in axes[1:]):
            axes[0].dim_value = batch
            return True
    return False


def _filled(shape: list[int], batch: int, length: int) -> tuple[int, ...]:
    """Axes that shape inference lost: the first is the batch, the second of three the length."""
    return tuple(axis or (batch if index == 0 else length) for index, axis in enumerate(shape))


def _flops(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return 0
    out, left, right = (shapes.get(name, ()) for name in (node.output[0], node.input[0], node.input[1]))
    if node.op_type == "Conv":
        return 2 * math.prod(out) * math.prod(right[1:])
    return 2 * math.prod(out) * (left[-1] if left else 0)


def _kind(node: Any, makers: Mapping[str, str], element: int | None) -> str:
    """The type a node computes in; a product of dequantised inputs is computed in int8."""
    if node.op_type in ("MatMul", "Conv") and all(makers.get(name) == "DequantizeLinear" for name in node.input[:2]):
        return "int8"
    return _NAMES.get(element or 0, "unknown")


def _peak(model: Any, sizes: Mapping[str, int], weights: set[str]) -> int:
    """Largest sum of the sizes of activations that are alive at once, in the order of the nodes."""
    last: dict[str, int] = {}
    for index, node in enumerate(model.graph.node):
        for name in node.input:
            last[name] = index
    for value in model.graph.output:
        last[value.name] = len(model.graph.node)
    alive = {value.name for value in model.graph.input}
    now = peak = sum(sizes.get(name, 0) for name in alive)
    for index, node in enumerate(model.graph.node):
        for name in node.output:
            alive.add(name)
            now += sizes.get(name, 0)
        peak = max(peak, now)
        for name in {*node.input, *node.output} & alive:
            if name not in weights and last.get(name, -1) <= index:
                alive.discard(name)
                now -= sizes.get(name, 0)
    return peak
