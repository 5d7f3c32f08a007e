"""An artifact from elsewhere is read with suspicion: whatever is wrong with it is a typed error before any runtime opens it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from difffeat.engines import Artifact, open_engine
from difffeat.engines.artifact import MODEL_FILE, RECIPE_FILE, TABLE_FILE, TOKENIZER_FILE, file_digest, load_proto, read_initializers
from difffeat.errors import ForeignGraph, GraphError, RecipeMismatch, UnsafeGraph
from difffeat.recipe import ALIASES_KEY, METADATA_KEY
from tests.artifacts import copy_of, exported

DATA = f"{MODEL_FILE}_data"


def rewrite(folder: Path, change: Callable[[Any], None], file: str = MODEL_FILE) -> None:
    """Change a graph's protobuf in place, its weights untouched."""
    model = onnx.load(folder / file, load_external_data=False)
    change(model)
    (folder / file).write_bytes(model.SerializeToString())


def first_external(model: Any) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)


def place(tensor: Any, **entries: str) -> None:
    """Overwrite entries of a tensor's external data."""
    for entry in tensor.external_data:
        entry.value = entries.pop(entry.key, entry.value)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def hidden(name: str = "hidden", location: str = "../secret") -> Any:
    """A tensor of four bytes that lie outside the artifact."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    place(tensor, location=location, offset="0", length="4")
    return tensor


def constant(tensor: Any) -> Any:
    return helper.make_node("Constant", [], ["out"], value=tensor)


def test_a_finished_artifact_says_what_it_is() -> None:
    artifact = exported("sweep")
    assert artifact.recipe.kind == "sweep"
    assert artifact.graph == artifact.path / MODEL_FILE
    assert artifact.latents_graph == artifact.path / "latents.onnx"
    assert artifact.tokenizer is None
    assert artifact.size == sum(file.stat().st_size for file in artifact.path.iterdir())
    assert exported("text").tokenizer == exported("text").path / TOKENIZER_FILE
    assert exported("image").sweep_table() is None


@pytest.mark.parametrize("file", [MODEL_FILE, DATA, "latents.onnx", "latents.onnx_data", TABLE_FILE])
def test_the_digest_covers_every_file_that_decides_a_feature(tmp_path: Path, file: str) -> None:
    folder = copy_of("sweep", tmp_path)
    assert Artifact(folder, exported("sweep").recipe).digest == exported("sweep").digest
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1
    (folder / file).write_bytes(content)
    assert Artifact(folder, exported("sweep").recipe).digest != exported("sweep").digest


def test_a_folder_without_a_graph_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(
        ForeignGraph, match=r"holds no model\.onnx and is not an artifact\. Make an artifact with: difffeat export --model dit --weights PATH -o "
    ):
        Artifact.open(tmp_path)
    with pytest.raises(ForeignGraph, match=r"holds no model\.onnx"):
        Artifact.open(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x00" * 64, b"not a graph at all", bytes(range(256))])
def test_garbage_in_place_of_a_graph_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MODEL_FILE).write_bytes(content)
    with pytest.raises(ForeignGraph, match=r"is not an ONNX graph|carries no difffeat recipe"):
        Artifact.open(tmp_path)


def test_a_foreign_graph_is_told(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value]))
    (tmp_path / MODEL_FILE).write_bytes(model.SerializeToString())
    with pytest.raises(
        ForeignGraph, match=r"model\.onnx carries no difffeat recipe, so nobody can say what it computes\. Export it with difffeat export"
    ):
        Artifact.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "difffeat-recipe/9"}', "\x00"])
def test_an_ill_formed_recipe_in_the_metadata_is_told(tmp_path: Path, text: str) -> None:
    folder = copy_of("text", tmp_path)

    def change(model: Any) -> None:
        for entry in model.metadata_props:
            entry.value = text if entry.key == METADATA_KEY else entry.value

    rewrite(folder, change)
    with pytest.raises(ForeignGraph, match=r"the recipe is not JSON|expected a recipe of format difffeat-recipe/1"):
        Artifact.open(folder)


@pytest.mark.parametrize(("key", "value"), [("label", 3), ("pooling", "max"), ("timesteps", [31.0]), ("backbone", "dit-xl-2-256")])
def test_a_recipe_file_that_differs_names_the_field(tmp_path: Path, key: str, value: object) -> None:
    folder = copy_of("image", tmp_path)
    recipe = json.loads((folder / RECIPE_FILE).read_text())
    (folder / RECIPE_FILE).write_text(json.dumps({**recipe, key: value}))
    with pytest.raises(RecipeMismatch, match=rf"recipe\.json says {key} = .*, but the graph was exported with {key} = .*The graph is the truth"):
        Artifact.open(folder)


def test_a_recipe_file_that_is_missing_or_unreadable_is_told(tmp_path: Path) -> None:
    folder = copy_of("image", tmp_path)
    (folder / RECIPE_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ForeignGraph, match=r"recipe\.json is not a text file"):
        Artifact.open(folder)
    (folder / RECIPE_FILE).write_text("{")
    with pytest.raises(ForeignGraph, match="the recipe is not JSON"):
        Artifact.open(folder)
    (folder / RECIPE_FILE).unlink()
    with pytest.raises(RecipeMismatch, match=r"recipe\.json is missing\. The graph's metadata is the truth"):
        Artifact.open(folder)


@pytest.mark.parametrize(
    "location", ["../x", "/etc/passwd", "sub/model.onnx_data", "./model.onnx_data", "*/_ORT_MEM_ADDR_/*", "", "latents.onnx_data"]
)
def test_external_data_elsewhere_is_refused(tmp_path: Path, location: str) -> None:
    folder = copy_of("image", tmp_path)
    rewrite(folder, lambda model: place(first_external(model), location=location))
    with pytest.raises(UnsafeGraph, match=r"wants external data from .*; only 'model\.onnx_data' beside the graph is allowed"):
        Artifact.open(folder)


def test_external_data_without_a_place_is_refused(tmp_path: Path) -> None:
    folder = copy_of("image", tmp_path)
    rewrite(folder, lambda model: first_external(model).ClearField("external_data"))
    with pytest.raises(UnsafeGraph, match="wants external data from None"):
        Artifact.open(folder)


def test_external_data_with_two_places_is_refused(tmp_path: Path) -> None:
    folder = copy_of("image", tmp_path)
    rewrite(folder, lambda model: first_external(model).external_data.add(key="location", value=DATA))
    with pytest.raises(UnsafeGraph, match="says twice where its data lie"):
        Artifact.open(folder)


@pytest.mark.parametrize("kind", ["symbolic", "hard", "folder", "missing"])
def test_data_that_are_no_file_of_their_own_are_refused(tmp_path: Path, kind: str) -> None:
    folder, outside = copy_of("image", tmp_path), tmp_path / "outside"
    (folder / DATA).rename(outside)
    if kind == "symbolic":
        (folder / DATA).symlink_to(outside)
    elif kind == "hard":
        os.link(outside, folder / DATA)
    elif kind == "folder":
        (folder / DATA).mkdir()
    message = r"hard-linked to another file.*Make a copy of its own" if kind == "hard" else "must be a regular file beside the graph, not a link"
    with pytest.raises(UnsafeGraph, match=message):
        Artifact.open(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"length": str(2**62)}, r"claims 4611686018427387904 bytes at 0, its shape needs \d+"),
        ({"length": "0"}, r"claims 0 bytes at"),
        ({"length": "-4"}, "an ill-formed offset or length"),
        ({"offset": "-4"}, "an ill-formed offset or length"),
        ({"offset": "1e3"}, "an ill-formed offset or length"),
        ({"offset": " 64"}, "an ill-formed offset or length"),
        ({"offset": "1_0"}, "an ill-formed offset or length"),
        ({"offset": "9" * 400}, "an ill-formed offset or length"),
        ({"offset": str(2**62)}, r"asks for \d+ bytes of model\.onnx_data, which has \d+: truncated or forged"),
    ],
)
def test_absurd_offsets_and_lengths_are_refused(tmp_path: Path, entries: dict[str, str], message: str) -> None:
    folder = copy_of("image", tmp_path)
    rewrite(folder, lambda model: place(first_external(model), **entries))
    with pytest.raises(UnsafeGraph, match=message):
        Artifact.open(folder)


@pytest.mark.parametrize("dims", [[-1, -4], [2**40, 2**40], [-1]])
def test_absurd_shapes_are_refused(tmp_path: Path, dims: list[int]) -> None:
    folder = copy_of("image", tmp_path)

    def change(model: Any) -> None:
        tensor = first_external(model)
        del tensor.dims[:]
        tensor.dims.extend(dims)
        place(tensor, length=str(4 * dims[0] * dims[-1] if dims == [-1, -4] else 16))

    rewrite(folder, change)
    with pytest.raises(UnsafeGraph, match=r"no type or shape that weights can have|its shape needs"):
        Artifact.open(folder)


@pytest.mark.parametrize("data_type", [TensorProto.STRING, TensorProto.UNDEFINED, 9999])
def test_absurd_types_are_refused(tmp_path: Path, data_type: int) -> None:
    folder = copy_of("image", tmp_path)
    rewrite(folder, lambda model: setattr(first_external(model), "data_type", data_type))
    with pytest.raises(UnsafeGraph, match="no type or shape that weights can have"):
        Artifact.open(folder)


def test_truncated_data_are_refused(tmp_path: Path) -> None:
    folder = copy_of("image", tmp_path)
    os.truncate(folder / DATA, (folder / DATA).stat().st_size - 1)
    with pytest.raises(UnsafeGraph, match=r"asks for \d+ bytes of model\.onnx_data, which has \d+: truncated or forged\. Export again"):
        Artifact.open(folder)


def in_attribute(model: Any) -> None:
    model.graph.node.append(constant(hidden()))


def in_attribute_list(model: Any) -> None:
    model.graph.node.append(helper.make_node("Custom", [], ["out"], domain="x", values=[hidden()]))


def in_subgraph(model: Any) -> None:
    inner = helper.make_graph([constant(hidden())], "inner", [], [])
    middle = helper.make_graph([helper.make_node("If", ["c"], ["out"], then_branch=inner)], "middle", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["out"], then_branch=middle))


def in_initializer_of_a_subgraph(model: Any) -> None:
    inner = helper.make_graph([], "inner", [], [], initializer=[hidden()])
    model.graph.node.append(helper.make_node("If", ["c"], ["out"], then_branch=inner))


def in_function(model: Any) -> None:
    model.functions.append(helper.make_function("x", "F", [], ["out"], [constant(hidden())], [helper.make_opsetid("", 22)]))


def in_sparse_initializer(model: Any) -> None:
    model.graph.sparse_initializer.add(values=hidden("values"), indices=hidden("indices"), dims=[1])


def in_sparse_attribute(model: Any) -> None:
    node = helper.make_node("Constant", [], ["out"])
    node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.values.CopyFrom(hidden())
    model.graph.node.append(node)


def in_training(model: Any) -> None:
    model.training_info.add().algorithm.initializer.append(hidden())


@pytest.mark.parametrize(
    "hide",
    [
        in_attribute,
        in_attribute_list,
        in_subgraph,
        in_initializer_of_a_subgraph,
        in_function,
        in_sparse_initializer,
        in_sparse_attribute,
        in_training,
    ],
)
def test_a_tensor_hidden_anywhere_in_the_graph_is_found(tmp_path: Path, hide: Callable[[Any], None]) -> None:
    folder = copy_of("text", tmp_path)
    (tmp_path / "secret").write_bytes(b"1234")
    rewrite(folder, hide)
    with pytest.raises(UnsafeGraph, match=r"wants external data from '\.\./secret'"):
        Artifact.open(folder)


def test_the_graph_of_the_autoencoder_is_checked_too(tmp_path: Path) -> None:
    folder = copy_of("from-latents", tmp_path)
    rewrite(folder, lambda model: place(first_external(model), location="../x"), "latents.onnx")
    with pytest.raises(UnsafeGraph, match=r"latents\.onnx: tensor .* wants external data from '\.\./x'"):
        Artifact.open(folder)


def test_the_autoencoder_of_another_export_is_refused(tmp_path: Path) -> None:
    folder, other = copy_of("from-latents", tmp_path), exported("sweep").path
    for file in ("latents.onnx", "latents.onnx_data"):
        (folder / file).write_bytes((other / file).read_bytes())
    with pytest.raises(RecipeMismatch, match=r"latents\.onnx was exported with another recipe than .*model\.onnx: files of two exports were mixed"):
        Artifact.open(folder)


def test_a_tokenizer_that_is_missing_or_of_another_export_is_refused(tmp_path: Path) -> None:
    folder = copy_of("text", tmp_path)
    (folder / TOKENIZER_FILE).write_text("{}")
    with pytest.raises(RecipeMismatch, match=r"tokenizer\.json is not the tokenizer that the graph was exported with"):
        Artifact.open(folder)
    (folder / TOKENIZER_FILE).unlink()
    with pytest.raises(ForeignGraph, match=r"tokenizer\.json is missing, and captions cannot be read without it"):
        Artifact.open(folder)


def test_the_table_of_a_sweep_holds_a_row_for_every_timestep() -> None:
    for name in ("sweep", "sweep-mean", "text-sweep", "text-sweep-mean"):
        artifact = exported(name)
        table = artifact.sweep_table()
        assert table is not None
        assert table["timesteps"].dtype == np.float64
        assert table["timesteps"].tolist() == list(artifact.recipe.timesteps)
        with open_engine(artifact) as engine:
            for key in set(table) - {"timesteps"}:
                assert table[key].shape == (len(table["timesteps"]), *engine.inputs[key].shape), key
                assert table[key].dtype == np.float32
            per_sample = {"latents", "noise", "tokens", "lengths"}
            assert set(table) - {"timesteps"} == set(engine.inputs) - per_sample


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", None])
def test_a_table_that_is_garbage_or_missing_is_told(tmp_path: Path, content: bytes | None) -> None:
    folder = copy_of("sweep", tmp_path)
    (folder / TABLE_FILE).unlink()
    if content is not None:
        (folder / TABLE_FILE).write_bytes(content)
    with pytest.raises(GraphError, match=r"table\.safetensors is not readable .*Export the artifact again|is not for the timesteps of the graph"):
        Artifact.open(folder).sweep_table()


def test_a_table_for_other_timesteps_is_refused(tmp_path: Path) -> None:
    folder = copy_of("sweep", tmp_path)
    table = load_file(folder / TABLE_FILE)
    save_file({**table, "timesteps": table["timesteps"] + 1}, folder / TABLE_FILE)
    with pytest.raises(RecipeMismatch, match=r"table\.safetensors is not for the timesteps of the graph: files of two exports were mixed"):
        Artifact.open(folder).sweep_table()


def test_weights_come_out_of_the_graph_as_the_runtime_sees_them() -> None:
    artifact = exported("image")
    loaded = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(artifact.graph).graph.initializer}
    weights = read_initializers(artifact.graph)
    assert set(loaded) <= set(weights)
    for name, expected in loaded.items():
        np.testing.assert_array_equal(weights[name], expected)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": "no such tensor"}', '{"a": {}}'])
def test_ill_formed_aliases_are_told(tmp_path: Path, text: str) -> None:
    folder = copy_of("text", tmp_path)

    def change(model: Any) -> None:
        for entry in model.metadata_props:
            entry.value = text if entry.key == ALIASES_KEY else entry.value

    rewrite(folder, change)
    with pytest.raises(ForeignGraph, match="its weights cannot be read"):
        open_engine(folder, "torch")


def test_inline_weights_of_the_wrong_size_are_told(tmp_path: Path) -> None:
    folder = copy_of("text", tmp_path)

    def change(model: Any) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.raw_data)
        tensor.raw_data = tensor.raw_data[:-1]

    rewrite(folder, change)
    with pytest.raises(ForeignGraph, match="its weights cannot be read"):
        read_initializers(folder / MODEL_FILE)


def test_an_input_of_a_foreign_type_is_told(tmp_path: Path) -> None:
    folder = copy_of("text", tmp_path)
    rewrite(folder, lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", TensorProto.STRING))
    with pytest.raises(ForeignGraph, match=r"input or output 'tokens' has a type that difffeat graphs do not use \(8\)"):
        open_engine(folder)


def test_nothing_is_written_by_reading(tmp_path: Path) -> None:
    folder = copy_of("sweep", tmp_path)
    before = {file.name: file_digest(file) for file in folder.iterdir()}
    artifact = Artifact.open(folder)
    artifact.sweep_table()
    load_proto(artifact.graph)
    assert {file.name: file_digest(file) for file in folder.iterdir()} == before
