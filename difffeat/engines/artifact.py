"""An exported artifact on disk: its graphs, its recipe, and the checks that come before any runtime touches it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines.base import TensorSpec
from difffeat.errors import ConfigError, ForeignGraph, MissingExtra, RecipeMismatch, UnsafeGraph
from difffeat.recipe import ALIASES_KEY, METADATA_KEY, GraphRecipe

MODEL_FILE = "model.onnx"
LATENTS_FILE = "latents.onnx"
RECIPE_FILE = "recipe.json"
TABLE_FILE = "table.safetensors"
TOKENIZER_FILE = "tokenizer.json"

_NUMPY_TYPES = {1: "float32", 2: "uint8", 7: "int64", 10: "float16", 11: "float64"}


@dataclass(frozen=True)
class Artifact:
    """A folder written by `difffeat export`. Open with `Artifact.open`."""

    path: Path
    recipe: GraphRecipe

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read and check the folder; no weights are loaded.

        Raises ForeignGraph (no graph, or none of ours), RecipeMismatch (metadata and recipe.json differ), UnsafeGraph (external data elsewhere).
        """
        folder = Path(path)
        graph = folder / MODEL_FILE
        if not graph.is_file():
            raise ForeignGraph(f"{folder} holds no {MODEL_FILE}. Make an artifact with: difffeat export --model dit --weights PATH -o {folder}")
        metadata = graph_metadata(graph)
        if METADATA_KEY not in metadata:
            raise ForeignGraph(f"{graph} carries no difffeat recipe, so nobody can say what it computes. Export it with difffeat export.")
        recipe = GraphRecipe.from_json(metadata[METADATA_KEY])
        _check_recipe_file(folder / RECIPE_FILE, recipe)
        artifact = cls(folder, recipe)
        if artifact.latents_graph is not None:
            check_external_data(artifact.latents_graph)
        return artifact

    @property
    def graph(self) -> Path:
        """The main graph."""
        return self.path / MODEL_FILE

    @property
    def latents_graph(self) -> Path | None:
        """pixels -> latents, where the main graph takes latents and a VAE was exported beside it."""
        return self._optional(LATENTS_FILE)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer of a text graph."""
        return self._optional(TOKENIZER_FILE)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names and bytes of everything that decides a feature: graphs, their weights, table, tokenizer."""
        names = (MODEL_FILE, f"{MODEL_FILE}_data", LATENTS_FILE, f"{LATENTS_FILE}_data", TABLE_FILE, TOKENIZER_FILE)
        total = hashlib.sha256()
        for name in names:
            if (self.path / name).is_file():
                total.update(f"{name}:{file_digest(self.path / name)}\n".encode())
        return total.hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files in the folder."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def sweep_table(self) -> dict[str, np.ndarray] | None:
        """`timesteps` float64 [T], and for every per-timestep input of a sweep graph an array [T, ...]; None where it is no sweep."""
        path = self._optional(TABLE_FILE)
        if path is None:
            return None
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ForeignGraph(f"{path} is not readable ({error}). Export the artifact again.") from None

    def _optional(self, name: str) -> Path | None:
        path = self.path / name
        return path if path.is_file() else None


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_proto(path: Path) -> Any:
    """The graph without its weights, external data checked. Raises ForeignGraph when it is no ONNX file."""
    onnx = import_onnx()
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own exception types differ between its implementations
        raise ForeignGraph(f"{path} is not an ONNX graph ({type(error).__name__}: {error}).") from None
    _check_external(model, path)
    return model


def graph_metadata(path: Path) -> dict[str, str]:
    """The metadata of a graph, external data checked."""
    return {entry.key: entry.value for entry in load_proto(path).metadata_props}


def check_external_data(path: Path) -> None:
    """Raises UnsafeGraph unless every weight lies in `<graph>_data` beside the graph."""
    load_proto(path)


def read_specs(model: Any) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs of a graph, by name."""
    return {v.name: _spec(v) for v in model.graph.input}, {v.name: _spec(v) for v in model.graph.output}


def read_initializers(path: Path) -> dict[str, np.ndarray]:
    """All weights of a graph by name, read-only; the large ones are memory-mapped. Aliases (equal tensors stored once) are resolved."""
    onnx = import_onnx()
    model = load_proto(path)
    weights: dict[str, np.ndarray] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            weights[tensor.name] = onnx.numpy_helper.to_array(tensor)
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        weights[tensor.name] = np.memmap(
            path.parent / place["location"], dtype=dtype, mode="r", offset=int(place.get("offset", 0)), shape=tuple(tensor.dims)
        )
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    for alias, name in json.loads(metadata.get(ALIASES_KEY, "{}")).items():
        weights[alias] = weights[name]
    return weights


def import_onnx() -> Any:
    """The onnx package, or MissingExtra."""
    try:
        import onnx
    except ImportError:
        raise MissingExtra("onnx", "cpu", "Reading a graph") from None
    return onnx


def _check_recipe_file(path: Path, recipe: GraphRecipe) -> None:
    if not path.is_file():
        raise RecipeMismatch(f"{path} is missing. The graph's metadata is the truth; export again, or write its recipe there.")
    try:
        beside = GraphRecipe.from_json(path.read_text()).to_dict()
    except UnicodeDecodeError:
        raise ForeignGraph(f"{path} is not a text file.") from None
    own = recipe.to_dict()
    for key in sorted(own.keys() | beside.keys()):
        if own.get(key) != beside.get(key):
            raise RecipeMismatch(
                f"{path} says {key} = {beside.get(key)!r}, but the graph was exported with {key} = {own.get(key)!r}. "
                "The graph is the truth: files of two exports were mixed; export again into an empty folder."
            )


def _check_external(model: Any, path: Path) -> None:
    """External data may lie in `<graph>_data` only: a regular file of its own in the same folder, long enough for every tensor."""
    expected = f"{path.name}_data"
    ends = [_external_end(tensor, expected, path) for tensor in _tensors(model.graph) if tensor.external_data]
    if not ends:
        return
    data = path.parent / expected
    if data.is_symlink() or not data.is_file():
        raise UnsafeGraph(f"{data} must be a regular file beside the graph, not a link. Copy the artifact's own file there.")
    stat = data.stat()
    if stat.st_nlink > 1:
        raise UnsafeGraph(f"{data} is hard-linked to another file, which could change under it. Make a copy of its own (cp --reflink=never).")
    if max(ends) > stat.st_size:
        raise UnsafeGraph(f"{path} asks for {max(ends)} bytes of {expected}, which has {stat.st_size}: truncated or forged. Export again.")


def _external_end(tensor: Any, expected: str, path: Path) -> int:
    place: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    if place.get("location") != expected:
        raise UnsafeGraph(f"{path}: tensor {tensor.name!r} wants external data from {place.get('location')!r}; only {expected!r} beside the graph is allowed.")
    try:
        offset, length = int(place.get("offset", 0)), int(place.get("length", -1))
    except ValueError:
        raise UnsafeGraph(f"{path}: tensor {tensor.name!r} has an ill-formed offset or length. Export again.") from None
    if offset < 0 or length < 0 or length != _nbytes(tensor):
        raise UnsafeGraph(f"{path}: tensor {tensor.name!r} claims {length} bytes at {offset}, its shape needs {_nbytes(tensor)}. Export again.")
    return offset + length


def _nbytes(tensor: Any) -> int:
    item = np.dtype(import_onnx().helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    count = item
    for dim in tensor.dims:
        count *= int(dim)
    return count


def _tensors(graph: Any) -> list[Any]:
    """Every tensor of a graph: initializers, and constants in the attributes of nodes, subgraphs too."""
    found = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            found += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                found += _tensors(inner) if inner.node or inner.initializer else []
    return found


def _spec(value: Any) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(d.dim_param if d.dim_param else d.dim_value for d in kind.shape.dim)
    if kind.elem_type not in _NUMPY_TYPES:
        raise ForeignGraph(f"input or output {value.name!r} has a type that difffeat graphs do not use ({kind.elem_type}).")
    return TensorSpec(value.name, _NUMPY_TYPES[kind.elem_type], shape)


def resolve(artifact: Artifact | str | Path, graph: str) -> tuple[Artifact, Path]:
    """An artifact and the path of its `model` or `latents` graph."""
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
    if graph == "model":
        return opened, opened.graph
    if graph == "latents" and opened.latents_graph is not None:
        return opened, opened.latents_graph
    raise ConfigError(f"{opened.path} has no {graph!r} graph; it was exported without a VAE. Pass --vae to difffeat export, or --latents to extract.")
