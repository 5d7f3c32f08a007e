"""What an engine says of itself besides its name: a store goes on with the same card and the same plan, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from difffeat.engines import Artifact, EngineOptions, driver, open_engine
from difffeat.engines.driver import Gpu
from difffeat.engines.tensorrt_build import build_plan
from difffeat.engines.tensorrt_plans import Profile
from difffeat.errors import StoreMismatch
from difffeat.runtime.configuration import Configuration, recorded_plans
from difffeat.runtime.manifest import read_manifest
from tests.artifacts import copy_of
from tests.engines.fake_gpu import GPUS, Runtime, TensorRt, install
from tests.engines.test_tensorrt_engine import SMALL


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from tests.runtime.fake import folder_of_images

    return folder_of_images(tmp_path / "pictures", 6)


def extracted(folder: Path, source: Path, out: Path, **changes: Any) -> list[str]:
    """What a run says."""
    from difffeat.recipe import RunRecipe
    from difffeat.runtime.sources_options import SourceOptions
    from difffeat.workflows.commands import run_extract

    said: list[str] = []
    asked: dict[str, Any] = {
        "engine": "trt", "device": None, "threads": 1, "options": EngineOptions(batch=2), "batch_size": 2, "shard_size": 4, "num_workers": 1,
        "run": RunRecipe(), "latents": None, "source_options": SourceOptions(), "max_bad_fraction": 0.5, "executor": "local", "overwrite": False,
        "say": lambda text, **_: said.append(text),
    }  # fmt: skip
    run_extract(folder, str(source), out, **{**asked, **changes})
    return said


def test_a_store_goes_on_with_the_plan_that_it_was_begun_with(tmp_path: Path, pictures: Path, device: Any) -> None:
    folder, out = copy_of("image", tmp_path), tmp_path / "out"
    first = build_plan(folder, "trt", Profile(opt_batch=8, max_batch=8))
    extracted(folder, pictures, out)
    assert read_manifest(out).engine == {
        "name": "trt", "precision": "fp32", "device": "cuda", "gpu": "Fake 9000, compute capability 9.0",
        "plan": f"{first.path.name} {first.sidecar['sha256']}",
    }  # fmt: skip
    nearer = build_plan(folder, "trt", Profile(opt_batch=2, max_batch=2))
    (out / "receipts" / "00001.json").unlink()
    extracted(folder, pictures, out)
    aside = first.path.rename(tmp_path / "aside")
    with pytest.raises(StoreMismatch) as caught:
        extracted(folder, pictures, out)
    assert f"engine.plan: '{first.identity}' -> '{nearer.identity}'" in str(caught.value)
    assert f"(put {first.path.name} with its .json back into the artifact's engines folder" in str(caught.value)
    aside.rename(first.path)
    extracted(folder, pictures, out)


def test_every_graph_of_a_store_goes_on_with_its_own_plan(tmp_path: Path, pictures: Path, device: tuple[Runtime, TensorRt]) -> None:
    folder, out = copy_of("from-latents", tmp_path), tmp_path / "out"
    device[1].contexts = 100
    parts = ("model", "latents")
    first = {part: build_plan(folder, "trt", Profile(opt_batch=8, max_batch=8), graph=part) for part in parts}
    extracted(folder, pictures, out)
    engine = read_manifest(out).engine
    assert (engine["plan"], engine["latents plan"]) == (first["model"].identity, first["latents"].identity)
    assert recorded_plans(out) == {part: plan.sidecar["sha256"] for part, plan in first.items()}
    for part in parts:
        build_plan(folder, "trt", Profile(opt_batch=2, max_batch=2), graph=part)
    (out / "receipts" / "00001.json").unlink()
    assert not any("may not be used here" in line for line in extracted(folder, pictures, out))
    first["latents"].path.unlink()
    with pytest.raises(StoreMismatch, match=rf"(?s)engine\.latents plan: .*\(put {first['latents'].path.name} with its \.json back"):
        extracted(folder, pictures, out)


def test_what_was_begun_without_plans_records_none(tmp_path: Path) -> None:
    assert recorded_plans(tmp_path / "none") == {}


def test_two_cards_are_two_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: None) -> None:
    artifact, found = Artifact.open(copy_of("image", tmp_path)), []
    for gpu in (Gpu("NVIDIA H100", (9, 0), 80 << 30), Gpu("NVIDIA A10", (8, 6), 24 << 30)):
        install(monkeypatch, (gpu,))
        with open_engine(artifact, "trt", options=SMALL) as engine:
            found.append(Configuration.of(engine))
    assert found[0].difference(found[1]) == "engine gpu 'NVIDIA H100, compute capability 9.0' and 'NVIDIA A10, compute capability 8.6'"


def test_the_card_of_an_engine_without_plans_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "probe_driver", lambda: driver.Driver((13, 0), GPUS, None))
    assert driver.gpu_identity("cuda:1") == {"gpu": "Fake 9000, compute capability 9.0"}
    assert driver.gpu_identity("cuda:2") == {"gpu": "one that the NVIDIA driver does not name"}
    assert driver.gpu_identity("cpu") == {}
