"""Two configurations never mix: whatever of it changes, going on is refused, the field is named, and nothing is written.

The cases are held against the fields of the dataclasses: a new field without a case fails.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from difffeat.engines import EngineOptions, open_engine
from difffeat.engines.base import TensorSpec
from difffeat.errors import StoreMismatch
from difffeat.recipe import GraphRecipe, RunRecipe
from difffeat.runtime.configuration import Configuration
from difffeat.runtime.extract import extract
from difffeat.runtime.manifest import Manifest, read_manifest
from difffeat.runtime.matching import Mode
from difffeat.runtime.sources import open_source
from tests.artifacts import copy_of, exported
from tests.faults.scenarios import make_source, run
from tests.runtime.fake import RECIPE, FakeEngine, encoded, tree

GRAPH_CASES: dict[str, Any] = {
    "backbone": "other",
    "family": "plaid",
    "architecture": {"input_size": 4, "in_channels": 2, "depth": 3},
    "weights": {"backbone": "1" * 64},
    "kind": "from-latents",
    "blocks": (1, 2, 3),
    "timesteps": (31.0,),
    "log_snr": (3.5,),
    "noising": "mean",
    "pooling": "max",
    "origin": "random:1",
    "noise_seed": 7,
    "label": 1,
    "precision": "fp16",
    "calibration": "c" * 64,
    "options": {"fp32_parts": ["norm"]},
    "diffusion": {"schedule": "linear beta"},
}
RUN_CASES: dict[str, Any] = {
    "seed": 1,
    "draws": 2,
    "preprocessing": "squash",
    "captions": "first",
    "truncate": True,
    "store_dtype": "fp32",
    "pixels": "pillow",
}


class OtherEngine(FakeEngine):
    """The little engine with something about it changed."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        for name, value in changes.items():
            setattr(self, name, value)
        self.outputs = {f"b{block}": TensorSpec(f"b{block}", "float32", ("batch", 3)) for block in self.recipe.blocks}


class WiderEngine(FakeEngine):
    """Features of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = {name: TensorSpec(name, "float32", ("batch", 4)) for name in self.outputs}


def _engine(**changes: Any) -> Callable[..., Any]:
    return lambda source, out, _: run("image", source, out, engine=OtherEngine(**changes))


def _option(**changes: Any) -> Callable[..., Any]:
    return lambda source, out, _: run("image", source, out, **changes)


def _other_version(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9" if name == "pillow" else real(name))
    run("image", source, out)


def _other_sample(source: Path, out: Path, _: Any) -> None:
    (source / "07.png").write_bytes(encoded(70, "BMP"))
    run("image", source, out)


def _fewer_samples(source: Path, out: Path, _: Any) -> None:
    (source / "07.png").unlink()
    run("image", source, out)


def _labels(source: Path, out: Path, _: Any) -> None:
    opened = open_source(source)
    labelled = replace(opened, samples=tuple(replace(sample, labels=("cat",)) for sample in opened.samples), classes=("cat",))
    extract(FakeEngine(), labelled, out, batch_size=2, shard_size=4, num_workers=1)


MANIFEST_CASES: dict[str, tuple[Callable[[Path, Path, pytest.MonkeyPatch], Any], str]] = {
    "graph_digest": (_engine(digest="e" * 64), "graph_digest: 'fff"),
    "engine": (_engine(name="other", precision="fp16", device="cuda:0"), "engine.device: 'cpu' -> 'cuda'"),
    "batch_size": (_option(batch_size=3), "batch_size: 2 -> 3"),
    "rows": (_fewer_samples, "10 -> 9"),
    "samples": (_other_sample, "07"),
    "samples_digest": (_other_sample, "samples_digest"),
    "classes": (_labels, "'cat'"),
    "taps": (lambda source, out, _: run("image", source, out, engine=WiderEngine()), "taps.b1/t30: [3] -> [4]"),
    "shards": (_option(shard_size=5), "shard"),
    "shard_rows": (_option(shard_size=5), "shard_rows: 4 -> 5"),
    "versions": (_other_version, "versions.pillow: "),
}
"""What makes the field differ, and what the message must hold."""

ELSEWHERE = {"recipe", "options", "earlier_batch_sizes"}
"""`recipe` has the tables above, `options` the test of the length multiple below; earlier batch sizes are a record of what was allowed."""


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, Path]:
    """A source and a store made of it."""
    source = make_source(tmp_path / "source")
    run("image", source, tmp_path / "out")
    return source, tmp_path / "out"


def refused(call: Callable[[], Any], out: Path) -> str:
    """The message of the refusal, after which nothing has changed."""
    before = tree(out)
    with pytest.raises(StoreMismatch) as caught:
        call()
    assert tree(out) == before
    message = str(caught.value)
    assert "--overwrite" in message or "--append" in message or "--retry-quarantined" in message
    return message


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(GraphRecipe)])
def test_another_graph_recipe_is_refused_and_its_field_named(field: str, begun: tuple[Path, Path]) -> None:
    assert GRAPH_CASES[field] != getattr(RECIPE, field)
    changes = {field: GRAPH_CASES[field]} | ({"log_snr": (3.0,)} if field == "timesteps" else {})
    source, out = begun
    message = refused(lambda: run("image", source, out, engine=OtherEngine(recipe=replace(RECIPE, **changes))), out)
    assert f"recipe.graph.{field}" in message


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RunRecipe)])
def test_another_run_recipe_is_refused_and_its_field_named(field: str, begun: tuple[Path, Path]) -> None:
    default = getattr(RunRecipe(), field)
    source, out = begun
    message = refused(lambda: run("image", source, out, run=RunRecipe(**{field: RUN_CASES[field]})), out)
    assert f"recipe.run.{field}: {default!r} -> {RUN_CASES[field]!r}" in message


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Manifest) if field.name not in ELSEWHERE])
def test_whatever_else_the_bytes_depend_on_is_refused_and_named(field: str, begun: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    change, expected = MANIFEST_CASES[field]
    assert expected in refused(lambda: change(*begun, monkeypatch), begun[1])


A10 = {"gpu": "NVIDIA A10, compute capability 8.6", "plan": f"0123456789abcdef.plan {'a' * 64}"}
H100 = {"gpu": "NVIDIA H100, compute capability 9.0", "plan": f"fedcba9876543210.plan {'b' * 64}"}
IDENTITIES: list[tuple[dict[str, str], dict[str, str]]] = [
    *(({}, switch) for switch in ({"compile": "true"}, {"channels_last": "true"}, {"tensorrt_provider": "true"}, {"winograd": "false"})),
    (H100, A10),
    (H100, {**H100, "gpu": A10["gpu"]}),
    (H100, {**H100, "plan": A10["plan"]}),
]


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("first", "identity"), IDENTITIES)
def test_another_card_plan_or_switch_is_refused_and_named(first: dict[str, str], identity: dict[str, str], mode: Mode, tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    run("image", source, out, engine=OtherEngine(identity=first))
    message = refused(lambda: run("image", source, out, engine=OtherEngine(identity=identity), mode=mode), out)
    for name, value in identity.items():
        assert (f"engine.{name}: {first.get(name)!r} -> {value!r}" in message) is (first.get(name) != value)
    if identity.get("plan") == A10["plan"]:
        assert "(put fedcba9876543210.plan with its .json back into the artifact's engines folder" in message
    run("image", source, out, engine=OtherEngine(identity=first))


def test_another_plan_of_the_autoencoder_ahead_is_refused_too(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source", 4), tmp_path / "out"

    def go(vae: dict[str, str]) -> None:
        with open_engine(exported("from-latents"), threads=1) as engine, open_engine(exported("from-latents"), threads=1, graph="latents") as first:
            engine.identity = A10
            first.identity = vae
            extract(engine, open_source(source), out, batch_size=2, num_workers=1, latents_engine=first)

    go(A10)
    assert read_manifest(out).engine == {"name": "ort", "precision": "fp32", "device": "cpu", **A10}
    assert f"engine.latents plan: None -> '{H100['plan']}'" in refused(lambda: go({**A10, "plan": H100["plan"]}), out)


def test_a_plain_run_on_a_cpu_is_named_as_it_always_was() -> None:
    for engine in ("ort", "torch"):
        with open_engine(exported("image"), engine, threads=1) as running:
            assert Configuration.of(running).engine == {"name": engine, "precision": "fp32", "device": "cpu"}


@pytest.mark.parametrize(("engine", "switch"), [("ort", {"winograd": False}), ("torch", {"channels_last": True}), ("torch", {"compile": True})])
def test_two_ways_to_run_a_graph_are_two_configurations(engine: str, switch: dict[str, Any]) -> None:
    with (
        open_engine(exported("image"), engine, threads=1) as plain,
        open_engine(exported("image"), engine, threads=1, options=EngineOptions(**switch)) as other,
    ):
        (name, value), *_ = switch.items()
        assert Configuration.of(plain).difference(Configuration.of(other)) == f"engine {name} None and {str(value).lower()!r}"


def test_captions_cut_into_batches_by_other_lengths_are_refused(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    run("text", source, out)
    assert "options.length_multiple: 8 -> 16" in refused(lambda: run("text", source, out, length_multiple=16), out)


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx_data"])
def test_one_byte_of_the_graph_is_another_graph(file: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", 4)
    folder, out = copy_of("image", tmp_path), tmp_path / "out"

    def go() -> None:
        with open_engine(folder, "ort", threads=1) as engine:
            extract(engine, open_source(source), out, batch_size=2, num_workers=1)

    go()
    content = bytearray((folder / file).read_bytes())
    content[content.find(b"pytorch") if file == "model.onnx" else len(content) - 8] ^= 1
    (folder / file).write_bytes(content)
    assert "graph_digest" in refused(go, out)


def test_a_switch_that_is_missing_is_named_as_it_is_typed(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source", 4), tmp_path / "out"

    def go(**switches: Any) -> None:
        with open_engine(exported("image"), "torch", threads=1, options=EngineOptions(**switches)) as engine:
            extract(engine, open_source(source), out, batch_size=2, num_workers=1)

    go(channels_last=True)
    assert "Repeat the first configuration to go on (with --channels-last), choose another -o" in refused(go, out)
    assert "(with --channels-last, without --compile)" in refused(lambda: go(compile=True), out)
