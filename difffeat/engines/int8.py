"""int8 graphs for ONNX Runtime on CPUs: static QDQ, calibrated on real samples.

Scales are constants of the graph, so a sample's features do not depend on its neighbours. Weights: int8, symmetric, one scale an output channel, in
seven bits (U8S8 products of eight bits saturate on CPUs without VNNI). Activations: uint8, one scale a tensor. What is quantised: the linears of the
blocks, and the autoencoder's convolutions between its first and last.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines.artifact import load_proto
from difffeat.errors import ConfigError, MissingExtra
from difffeat.recipe import ALIASES_KEY, METADATA_KEY, GraphRecipe, digest

METHOD = "minmax"
_KEPT = ("vae.encoder.conv_in.", "vae.encoder.conv_out.", "vae.mean.", "trunk.patch_embed.", "trunk.input.")
"""Weights that stay in fp32: first and last maps, a few channels wide."""

Feeds = Mapping[str, np.ndarray]


def quantisable(graph: Path) -> dict[str, list[str]]:
    """Names of the nodes that are quantised, by operator."""
    model = load_proto(graph)
    weights = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, list[str]] = {"MatMul": [], "Conv": []}
    for node in model.graph.node:
        if node.op_type in found and node.input[1] in weights and not node.input[1].startswith(_KEPT):
            found[node.op_type].append(node.name)
    return found


def calibration_digest(batches: Iterable[tuple[str, Feeds]], operators: Iterable[str]) -> str:
    """SHA-256 of the method and of every calibrating input (graph, inputs by name), in order."""
    prints = [
        [graph, {name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest() for name, value in feeds.items()}]
        for graph, feeds in batches
    ]
    return digest({"method": METHOD, "operators": sorted(operators), "inputs": prints})


def quantise_graph(graph: Path, out: Path, batches: Iterable[Feeds], nodes: Iterable[str], recipe: GraphRecipe) -> None:
    """Write the int8 form of an fp32 graph, weights in `<out>_data`, `recipe` in its metadata.

    **Arguments:** `batches` calibrating inputs; `nodes` names out of `quantisable`.

    Raises ConfigError when there is nothing to calibrate with, MissingExtra.
    """
    try:
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise MissingExtra(getattr(error, "name", None) or "onnxruntime", "cpu", "Quantising a graph") from None
    pending = iter(batches)
    first = next(pending, None)
    if first is None:
        raise ConfigError("no sample could be read, and int8 scales are measured on samples. Name a source with readable ones.")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds = _chain(first, pending)

        def get_next(self) -> Any:
            return next(self._feeds, None)

    with _quiet():
        quantize_static(
            str(graph),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=list(nodes),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=True,
            # A linear's output is added to a bias and the residual stream and stays in fp32; a convolution's must be int8 or nothing is gained.
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
    _finish(out, recipe)


def copy_graph(graph: Path, out: Path, recipe: GraphRecipe) -> None:
    """The same graph under another recipe, for one that stays in fp32 beside int8 ones."""
    import onnx

    load_proto(graph)
    _save(onnx.load(str(graph)), out, recipe)


def _finish(out: Path, recipe: GraphRecipe) -> None:
    """Our metadata, and weights in the one file that an artifact may have."""
    import onnx

    model = onnx.load(str(out))
    for file in out.parent.glob(f"{out.name}*"):
        if file != out:
            file.unlink()
    _save(model, out, recipe)


def _save(model: Any, out: Path, recipe: GraphRecipe) -> None:
    import onnx

    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key == ALIASES_KEY}
    del model.metadata_props[:]
    model.doc_string = ""
    model.producer_name, model.producer_version = "difffeat", ""
    for key, value in {**kept, METADATA_KEY: recipe.to_json()}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    data = out.with_name(f"{out.name}_data")
    data.touch()
    mode = data.stat().st_mode  # as the umask has it; onnx makes the file anew, for the user alone
    data.unlink()
    onnx.save(model, str(out), save_as_external_data=True, all_tensors_to_one_file=True, location=data.name, size_threshold=1024)
    if data.exists():
        data.chmod(stat.S_IMODE(mode))


def _chain(first: Feeds, rest: Iterator[Feeds]) -> Iterator[dict[str, np.ndarray]]:
    yield dict(first)
    for feeds in rest:
        yield dict(feeds)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises on standard error to preprocess the graph; ours needs none."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
