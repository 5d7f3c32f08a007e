"""Verification on real samples: what holds passes, what fails is named, and promotion mends it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from difffeat.engines import Artifact, EngineOptions
from difffeat.engines.parity import statistics
from difffeat.errors import ConfigError, DifffeatError, ParityError, ProviderMissing, RecipeMismatch
from difffeat.export import layers
from difffeat.export.weights import random_dit
from difffeat.recipe import RunRecipe
from difffeat.runtime.sources_options import SourceOptions
from difffeat.workflows import verifying
from difffeat.workflows.exporting import ExportOptions, export_dit
from difffeat.workflows.quickstart_data import write_split
from difffeat.workflows.verifying import LIMITS, choose_judge, run_verify
from tests.artifacts import DIT, copy_of, exported, vae_weights
from tests.workflows.test_precision import planted


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("scenes"), "validation", 40)[0]


def verify(path: Path, source: Path, **changes: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "reference": None, "engine": None, "device": None, "threads": 1, "options": EngineOptions(), "samples": 12, "batches": [1, 5],
        "promoting": False, "probe": None, "run": RunRecipe(), "source_options": SourceOptions(), "say": lambda *_, **__: None,
    }  # fmt: skip
    return run_verify(path, str(source), **{**asked, **changes})


@pytest.mark.parametrize("name", ["image", "image-constant", "latents", "from-latents", "sweep", "text", "text-random", "text-sweep"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_kind_of_graph_is_verified_at_every_batch_size(
    name: str, precision: str, tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIMITS, "fp16", 5e-2)  # features of random weights hardly differ between samples, and rounding weighs more
    reference = exported(name)
    path = copy_of(name, tmp_path, precision)
    result = verify(path, scenes, reference=None if precision == "fp32" else reference.path)
    assert result["passed"]
    assert list(result["batches"]) == ["1", "5"]
    wanted = set(reference.recipe.taps) | ({"latents"} if reference.latents_graph is not None else set())
    for taps in result["batches"].values():
        assert set(taps) == wanted
        assert all(tap["samples"] == 12 and tap["nonfinite"] == 0 for tap in taps.values())
    assert json.loads((path / "verify.json").read_text())["passed"] is True


@pytest.fixture(scope="module")
def exports_of_an_overflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32 and fp16 artifacts of a DiT whose second block overflows in fp16, the low one with the promotion at export switched off."""
    from difffeat.workflows import exporting

    folder = tmp_path_factory.mktemp("overflow")
    option = ExportOptions(kind="image", blocks=(1, 3), timesteps=(30.0,), noising="random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "promote", lambda recipe, *_: recipe)
        export_dit(planted(2, 1e5), vae_weights(), option, folder / "dit", say=lambda _: None)
        low = ExportOptions(**{**vars(option), "precision": "fp16"})
        with pytest.raises(ParityError):
            export_dit(planted(2, 1e5), vae_weights(), low, folder / "dit-fp16", say=lambda _: None)
    shutil.move(folder / "dit-fp16.failed", folder / "dit-fp16")
    return folder


@pytest.fixture
def overflowing(exports_of_an_overflow: Path, tmp_path: Path) -> Path:
    """The low one in a copy of its own, the fp32 one beside it."""
    return Path(shutil.copytree(exports_of_an_overflow, tmp_path / "copy")) / "dit-fp16"


def test_a_planted_overflow_is_found_named_promoted_and_passes(overflowing: Path, scenes: Path) -> None:
    with pytest.raises(
        ParityError, match=r"1 taps of .*dit-fp16 are beyond 0.01 in torch; b3/t30: .* non-finite values\. .*Run again with --promote"
    ):
        verify(overflowing, scenes)
    assert not json.loads((overflowing / "verify.json").read_text())["passed"]
    before, said = Artifact.open(overflowing), list[str]()
    result = verify(overflowing, scenes, promoting=True, say=said.append)
    after = Artifact.open(overflowing)
    assert result["passed"]
    assert any(line.startswith("block 2 differs by") and line.endswith("kept in fp32") for line in said)
    assert list(after.recipe.options["fp32_parts"]) == [2]
    assert after.recipe.fingerprint != before.recipe.fingerprint
    found = {tensor.name: tensor.data_type for tensor in onnx.load(after.graph, load_external_data=False).graph.initializer}
    assert found["trunk.blocks.1.fc1.weight"] == onnx.TensorProto.FLOAT
    assert found["trunk.blocks.2.fc1.weight"] == onnx.TensorProto.FLOAT16
    assert not overflowing.with_name("dit-fp16.partial").exists()


def test_in_onnx_runtime_on_a_cpu_the_overflow_does_not_show_and_that_is_said(overflowing: Path, scenes: Path) -> None:
    said: list[str] = []
    with pytest.raises(ParityError, match=r"b3/t30: .* 0 non-finite values"):  # only the tiny weights behind it are coarse
        verify(overflowing, scenes, engine="ort", say=said.append)
    assert "computes fp16 graphs in fp32: an overflow would not show" in said[0]


def test_a_frozen_probe_is_scored_on_both(tmp_path: Path, scenes: Path) -> None:
    from difffeat.engines import open_engine
    from difffeat.probe.ridge import RidgeProbe
    from difffeat.runtime.extract import extract
    from difffeat.runtime.sources import open_source
    from difffeat.runtime.store import Store

    artifact = exported("image")
    with open_engine(artifact, threads=1) as engine:
        extract(engine, open_source(str(scenes)), tmp_path / "store", batch_size=8)
    store = Store.open(tmp_path / "store")
    labels = store.labels
    assert labels is not None
    probe = RidgeProbe().fit(np.asarray(store["b3/t30"], np.float32), labels, classes=store.classes)
    path = probe.save(tmp_path / "probe.safetensors", {"tap": "b3/t30"})
    result = verify(copy_of("image", tmp_path), scenes, probe=path)
    assert result["probe"]["difference"] == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < result["probe"]["map"] <= 1.0
    with pytest.raises(ConfigError, match=r"is a probe on b3/t30; the artifact gives b2/t30"):
        verify(copy_of("image-constant", tmp_path), scenes, probe=path)


def test_low_precision_needs_its_fp32_artifact(tmp_path: Path, scenes: Path) -> None:
    low = copy_of("text", tmp_path, "fp16")
    with pytest.raises(ConfigError, match=r"there is no fp32 artifact at .*text to hold it against\. .*--reference"):
        verify(low, scenes)
    copy_of("text", tmp_path)
    assert verify(low, scenes)["passed"]
    with pytest.raises(RecipeMismatch, match=r"differs from .* in blocks, .*: it is no reference for it"):
        verify(low, scenes, reference=exported("text-random").path)
    with pytest.raises(ConfigError, match=r"is fp16; a reference is fp32"):
        verify(low, scenes, reference=low)


def test_another_checkpoint_is_no_reference(tmp_path: Path, scenes: Path) -> None:
    low = copy_of("from-latents", tmp_path, "fp16")
    other = ExportOptions(kind="from-latents", blocks=(0, 2, 3), timesteps=(30.0,), noising="random")
    exact = export_dit(random_dit(DIT, seed=9), vae_weights(), other, tmp_path / "exact", say=lambda _: None).artifact.path
    with pytest.raises(RecipeMismatch, match=r"differs from .* in origin, weights, not in precision alone"):
        verify(low, scenes, reference=exact)


def test_statistics_are_those_of_their_definition() -> None:
    rng = np.random.default_rng(0)
    r = rng.standard_normal((50, 6)) * [1, 10, 100, 1, 1, 0] + [0, 5, 1000, 0, 0, 7]
    x = r + 1e-3 * rng.standard_normal(r.shape) * [1, 10, 100, 1, 1, 0]
    found = statistics(x.astype(np.float64), r)
    z = ((x - r)[:, :5] / r.std(0)[:5]).ravel()
    s = ((r - r.mean(0))[:, :5] / r.std(0)[:5]).ravel()
    assert found.standardised_l2 == pytest.approx(np.linalg.norm(z) / np.linalg.norm(s))
    assert found.relative_l2 == pytest.approx(np.linalg.norm(x - r) / np.linalg.norm(r))
    assert found.percentiles["50"] < found.percentiles["99"] <= found.percentiles["100"]
    assert found.within(2e-3)
    x[3, 1] = np.nan
    spoiled = statistics(x, r)
    assert spoiled.nonfinite == 1
    assert not spoiled.within(1e9)


@pytest.mark.parametrize(("units", "said"), [((), "no hardware here computes fp16"), ((torch.float16,), "this CPU has units for fp16")])
def test_who_judges_low_precision_is_said(units: tuple[torch.dtype, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "CPU_TYPES", frozenset({torch.float32, *units}))
    engine, words = choose_judge(Artifact.open(copy_of("image", tmp_path, "fp16")), None, None)
    assert engine == "torch"
    assert said in words


@pytest.mark.parametrize(("changes", "said"), [
    ({"batches": [0]}, r"--batches takes batch sizes of at least 1, got 0"),
    ({"batches": [4, -1]}, r"--batches takes batch sizes of at least 1, got 4, -1"),
    ({"batches": []}, r"--batches takes batch sizes of at least 1, got none"),
    ({"samples": 0}, r"--samples must be at least 2, since features are standardised over them, got 0"),
    ({"samples": -3}, r"--samples must be at least 2, .*got -3"),
    ({"samples": 1}, r"--samples must be at least 2, .*got 1"),
])  # fmt: skip
def test_counts_that_make_no_sense_are_refused_before_anything_runs(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        verify(exported("text").path, tmp_path / "none", **changes)


def test_too_few_samples_are_counted_as_they_are(tmp_path: Path) -> None:
    from tests.runtime.fake import folder_of_images

    one = folder_of_images(tmp_path / "one", 1)
    with pytest.raises(ConfigError, match=r"one has 1 sample; features are standardised over at least 2"):
        verify(copy_of("image", tmp_path), one)
    three = folder_of_images(tmp_path / "three", 3)
    for picture in sorted(three.glob("*.png"))[:2]:
        picture.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"of 3 that were chosen from .*three there could be read 1 sample; features"):
        verify(copy_of("image", tmp_path / "again"), three)


@pytest.mark.parametrize(("changes", "error"), [
    ({"engine": "nonsense"}, ConfigError),
    ({"engine": "torch", "device": "cuda:99"}, ProviderMissing),
    ({"engine": "trt", "device": "cpu"}, DifffeatError),
])  # fmt: skip
def test_an_engine_that_cannot_run_is_told_before_the_reference_is_computed(
    changes: dict[str, Any], error: type[Exception], scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "features_of", lambda *_, **__: pytest.fail("the reference was computed"))
    with pytest.raises(error):
        verify(exported("text").path, scenes, **changes)
