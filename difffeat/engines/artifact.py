"""An exported artifact on disk: its graphs, its recipe, and the checks that come before any runtime touches it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines.base import TensorSpec
from difffeat.errors import ConfigError, ForeignGraph, MissingExtra, RecipeMismatch, UnsafeGraph
from difffeat.recipe import ALIASES_KEY, METADATA_KEY, GraphRecipe
from difffeat.recognise import not_an_artifact

MODEL_FILE = "model.onnx"
LATENTS_FILE = "latents.onnx"
DENOISER_FILE = "denoiser.onnx"
RECIPE_FILE = "recipe.json"
TABLE_FILE = "table.safetensors"
DENOISER_TABLE_FILE = "denoiser.safetensors"
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
            raise ForeignGraph(not_an_artifact(folder))
        metadata = graph_metadata(graph)
        if METADATA_KEY not in metadata:
            raise ForeignGraph(f"{graph} carries no difffeat recipe, so nobody can say what it computes. Export it with difffeat export.")
        recipe = GraphRecipe.from_json(metadata[METADATA_KEY])
        _check_recipe_file(folder / RECIPE_FILE, recipe)
        artifact = cls(folder, recipe)
        _check_companions(artifact)
        return artifact

    @property
    def graph(self) -> Path:
        """The main graph."""
        return self.path / MODEL_FILE

    @property
    def latents_graph(self) -> Path | None:
        """Pixels -> latents, where the main graph takes latents and a VAE was exported beside it."""
        return self._optional(LATENTS_FILE)

    @property
    def denoiser_graph(self) -> Path | None:
        """The whole backbone, where samples are noised by inversion or looked at first."""
        return self._optional(DENOISER_FILE)

    @property
    def graphs(self) -> dict[str, Path]:
        """Every graph by its part: `model`, and where there are such `latents` and `denoiser`."""
        found = {"model": self.graph, "latents": self.latents_graph, "denoiser": self.denoiser_graph}
        return {part: path for part, path in found.items() if path is not None}

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer of a text graph."""
        return self._optional(TOKENIZER_FILE)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names and bytes of everything that decides a feature: graphs, their weights, table, tokenizer."""
        graphs = [name for graph in (MODEL_FILE, LATENTS_FILE, DENOISER_FILE) for name in (graph, f"{graph}_data")]
        names = (*graphs, TABLE_FILE, DENOISER_TABLE_FILE, TOKENIZER_FILE)
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
        if not self.recipe.kind.endswith("sweep"):
            return None
        path = self.path / TABLE_FILE
        table = _read_table(path)
        if table.get("timesteps", np.zeros(0)).tolist() != list(self.recipe.timesteps):
            raise RecipeMismatch(f"{path} is not for the timesteps of the graph: files of two exports were mixed; export again into an empty folder.")
        return table

    def denoiser_table(self) -> dict[str, np.ndarray]:
        """`timesteps` float64 [T] at which the denoiser is asked, and its per-timestep inputs, alpha and sigma for each; `embeddings` for text."""
        return _read_table(self.path / DENOISER_TABLE_FILE)

    def _optional(self, name: str) -> Path | None:
        path = self.path / name
        return path if path.is_file() else None


def _read_table(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ForeignGraph(f"{path} is not readable ({error}). Export the artifact again.") from None


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


def read_specs(model: Any) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs of a graph, by name."""
    return {v.name: _spec(v) for v in model.graph.input}, {v.name: _spec(v) for v in model.graph.output}


def read_initializers(path: Path) -> dict[str, np.ndarray]:
    """All weights of a graph by name, read-only; the large ones are memory-mapped. Aliases (equal tensors stored once) are resolved."""
    model = load_proto(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    try:
        weights = {tensor.name: initializer_values(tensor, path) for tensor in model.graph.initializer}
        return weights | {alias: weights[name] for alias, name in json.loads(metadata.get(ALIASES_KEY, "{}")).items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ForeignGraph(f"{path}: its weights cannot be read ({type(error).__name__}: {error}). Export it again.") from None


def initializer_values(tensor: Any, path: Path) -> np.ndarray:
    """One weight of a graph, memory-mapped and read-only where it lies outside the graph."""
    onnx = import_onnx()
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(path.parent / place["location"], dtype=dtype, mode="r", offset=int(place.get("offset", 0)), shape=tuple(tensor.dims))


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


def _check_companions(artifact: Artifact) -> None:
    """What lies beside the main graph must come from the same export."""
    mixed = "files of two exports were mixed; export again into an empty folder."
    recipe = artifact.recipe
    for part, path in artifact.graphs.items():
        if part == "model":
            continue
        beside = GraphRecipe.from_json(graph_metadata(path).get(METADATA_KEY, "null"))
        if beside.to_dict() != recipe.to_dict():
            raise RecipeMismatch(f"{path} was exported with another recipe than {artifact.graph}: {mixed}")
    if recipe.noised_outside and artifact.denoiser_graph is None:
        raise ForeignGraph(f"{artifact.path / DENOISER_FILE} is missing, and samples of this graph go through it first. Export the artifact again.")
    if recipe.family == "plaid":
        path = artifact.path / TOKENIZER_FILE
        if not path.is_file():
            raise ForeignGraph(f"{path} is missing, and captions cannot be read without it. Export the artifact again.")
        if file_digest(path) != recipe.weights.get("tokenizer"):
            raise RecipeMismatch(f"{path} is not the tokenizer that the graph was exported with: {mixed}")


def _check_external(model: Any, path: Path) -> None:
    """External data may lie in `<graph>_data` only: a regular file of its own in the same folder, long enough for every tensor."""
    expected = f"{path.name}_data"
    external = import_onnx().TensorProto.EXTERNAL
    ends = [_external_end(t, expected, path) for t in _tensors(model) if t.external_data or t.data_location == external]
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
    if len(place) != len(tensor.external_data):
        raise UnsafeGraph(f"{path}: tensor {tensor.name!r} says twice where its data lie, and readers may differ on which they take. Export again.")
    if place.get("location") != expected:
        raise UnsafeGraph(
            f"{path}: tensor {tensor.name!r} wants external data from {place.get('location')!r}; only {expected!r} beside the graph is allowed."
        )
    offset, length = _whole(place.get("offset", "0")), _whole(place.get("length", ""))
    if offset is None or length is None:
        raise UnsafeGraph(f"{path}: tensor {tensor.name!r} has an ill-formed offset or length. Export again.")
    if length != _nbytes(tensor, path):
        raise UnsafeGraph(f"{path}: tensor {tensor.name!r} claims {length} bytes at {offset}, its shape needs {_nbytes(tensor, path)}. Export again.")
    return offset + length


def _whole(text: str) -> int | None:
    """Plain decimal digits only: what other readers would take for another number is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _nbytes(tensor: Any, path: Path) -> int:
    helper = import_onnx().helper
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except KeyError:
        dtype = np.dtype(object)
    if dtype.hasobject or any(dim < 0 for dim in tensor.dims):
        raise UnsafeGraph(f"{path}: tensor {tensor.name!r} has no type or shape that weights can have. Export again.")
    return math.prod(tensor.dims, start=dtype.itemsize)


def _tensors(model: Any) -> list[Any]:
    """Every tensor of a model, wherever it hides: initializers (sparse ones too), and constants in the attributes of nodes, subgraphs and
    functions.
    """
    found: list[Any] = []
    graphs = [model.graph, *(g for info in model.training_info for g in (info.initialization, info.algorithm))]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            found += graph.initializer
            found += _sparse(graph.sparse_initializer)
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            found += [attribute.t, *attribute.tensors, *_sparse([attribute.sparse_tensor, *attribute.sparse_tensors])]
            graphs += [inner for inner in (attribute.g, *attribute.graphs) if inner.ByteSize()]
    return found


def _sparse(tensors: Iterable[Any]) -> list[Any]:
    return [part for tensor in tensors for part in (tensor.values, tensor.indices)]


def _spec(value: Any) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(d.dim_param if d.dim_param else d.dim_value for d in kind.shape.dim)
    if kind.elem_type not in _NUMPY_TYPES:
        raise ForeignGraph(f"input or output {value.name!r} has a type that difffeat graphs do not use ({kind.elem_type}).")
    return TensorSpec(value.name, _NUMPY_TYPES[kind.elem_type], shape)


def resolve(artifact: Artifact | str | Path, graph: str) -> tuple[Artifact, Path]:
    """An artifact and the path of its `model`, `latents` or `denoiser` graph."""
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
    if graph in opened.graphs:
        return opened, opened.graphs[graph]
    raise ConfigError(f"{opened.path} has no {graph!r} graph; it was exported without a VAE. Pass --vae to difffeat export, or --latents to extract.")


def require_typed(artifact: Artifact) -> None:
    """Raises ConfigError for an int8 artifact: its quantised products are ONNX Runtime's, on CPUs."""
    if artifact.recipe.precision == "int8":
        raise ConfigError(
            f"{artifact.path} is int8, which is for ONNX Runtime on CPUs. Pass --engine ort, or for a GPU export with --dtype fp16 and build that."
        )
