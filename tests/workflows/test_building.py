"""Plans are built for the GPU that is named and for every caption; the doctor says what this machine's units are good for."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from difffeat.engines import onnxruntime_cuda
from difffeat.engines.driver import Driver, Gpu
from difffeat.engines.tensorrt_plans import Profile
from difffeat.errors import ConfigError, ProviderMissing
from difffeat.export import layers
from difffeat.workflows import building
from difffeat.workflows.building import run_build, run_doctor
from tests.artifacts import copy_of, exported
from tests.engines.fake_gpu import install


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text artifact, exported before a module that only looks like tensorrt is there."""
    monkeypatch.setenv("DIFFFEAT_DATA", str(tmp_path / "data"))
    exported("text")
    return copy_of("text", tmp_path)


def build(path: Path, **options: Any) -> dict[str, Any]:
    return run_build(path, **{"engine": "trt", "profile": Profile(opt_batch=2, max_batch=2), "level": None, "say": lambda *_, **__: None, **options})


def test_a_build_is_for_the_gpu_that_is_named(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, _ = install(monkeypatch)
    chosen: list[int] = []
    monkeypatch.setattr(cuda, "cudaSetDevice", lambda number: (chosen.append(number), cuda._called("cudaSetDevice"))[1])
    build(text, device="cuda:1")
    assert set(chosen) == {1}
    with pytest.raises(ProviderMissing, match="cuda:2 was asked for, but the driver lists 2 GPUs"):
        build(text, device="cuda:2")
    with pytest.raises(ConfigError, match="--engine trt runs on a GPU: --device cuda or cuda:<n>, got 'cpu'"):
        build(text, device="cpu")


def test_a_plan_for_shorter_captions_is_said_to_be_none_for_extraction(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert "extract does not take it: its captions may have all 32 tokens" in build(text, profile=Profile(opt_length=8, max_length=8))["text"]
    whole = build(text)
    assert "extract does not take it" not in whole["text"]
    assert whole["plans"]["model"]["profile"]["max_length"] == 32


@pytest.mark.parametrize(("name", "capability", "device", "said"), [
    ("NVIDIA H100", (9, 0), None, r"TensorRT-RTX does not run on the GPU here \(NVIDIA H100, .* 9\.0\): extract with --engine torch --device cuda"),
    ("NVIDIA T4", (7, 5), "cpu", r"The GPU here \(NVIDIA T4, .* 7\.5\) wants a plan of its own: --device cuda"),
    ("NVIDIA RTX 4090", (8, 9), "cpu", r"neither its numbers nor its speed$"),
])  # fmt: skip
def test_a_plan_built_ahead_of_time_is_said_to_be_one(
    name: str, capability: tuple[int, int], device: str | None, said: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Driver((13, 0), (Gpu(name, capability, 24 << 30),), None)
    install(monkeypatch, card.gpus, "rtx")
    monkeypatch.setattr(building, "probe_driver", lambda: card)
    result = build(text, engine="rtx", device=device)
    assert result["plans"]["model"]["device"] == ["ahead of time", []]
    assert re.search(rf"built ahead of time, for GPUs of compute capability 8\.0, 8\.6, 8\.9, 12\.0 and 12\.1: .*{said}", result["text"])


def test_a_plan_for_the_gpu_here_is_not_said_to_be_built_ahead_of_time(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, (Gpu("NVIDIA RTX 4090", (8, 9), 24 << 30),), "rtx")
    result = build(text, engine="rtx")
    assert result["plans"]["model"]["device"] == ["NVIDIA RTX 4090", [8, 9]]
    assert "ahead of time" not in result["text"]


@pytest.mark.parametrize(
    ("units", "said"),
    [
        ((), "cpu"),
        ((torch.bfloat16,), "cpu, which has units for bf16 (export with --dtype bf16)"),
        ((torch.bfloat16, torch.float16), "cpu, which has units for fp16 and bf16 (export with --dtype bf16)"),
    ],
)
@pytest.mark.parametrize("cuda", [True, False])
def test_units_for_low_precision_are_named_with_or_without_a_gpu(
    units: tuple[torch.dtype, ...], said: str, cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "CPU_TYPES", frozenset({torch.float32, *units}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    words = run_doctor()["engines"]["torch"]
    assert words.startswith("runs on cuda and " + said if cuda else f"runs on {said}; not on cuda: ")


def test_a_gpu_without_the_bindings_that_run_plans_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "cuda-bindings":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    pytest.importorskip("tensorrt_rtx", reason="pip install 'difffeat[rtx]'")
    monkeypatch.setattr(building, "probe_driver", lambda: Driver((13, 0), (Gpu("a card", (8, 9), 24 << 30),), None))
    monkeypatch.setattr(importlib.metadata, "version", version)
    without = run_doctor()
    assert without["engines"]["rtx"] == "runs no plans here: cuda-bindings is not installed (pip install 'difffeat[rtx]' -c constraints.txt)"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "13.0.0" if name == "cuda-bindings" else real(name))
    found = run_doctor()
    assert found["engines"]["rtx"] == "builds plans (difffeat build) and runs them"
    assert found["versions"]["cuda-bindings"] == "13.0.0"


@pytest.mark.parametrize(("cards", "cuda", "said"), [
    (((9, 0), (8, 9)), (13, 0), "builds plans (difffeat build) and runs them on cuda:1"),
    (((7, 5),), (13, 0), "builds plans (difffeat build) and runs them; for compute capability 7.5 graphs of images in fp16 alone"),
    (((9, 0),), (13, 0), "builds plans ahead of time for other machines (difffeat build); runs none here: TensorRT-RTX does not run on this GPU"),
    (((8, 9),), (12, 4), "is for CUDA 13 and the driver supports 12.4 (update the driver, or pip install 'cuda-bindings<13')"),
])  # fmt: skip
def test_the_doctor_looks_at_every_gpu_and_at_the_driver(
    cards: tuple[tuple[int, int], ...], cuda: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'difffeat[rtx]'")
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "13.5.0" if name == "cuda-bindings" else real(name))
    gpus = tuple(Gpu(f"card {number}", capability, 24 << 30) for number, capability in enumerate(cards))
    monkeypatch.setattr(building, "probe_driver", lambda: Driver(cuda, gpus, None))
    assert said in run_doctor()["engines"]["rtx"]


def test_the_doctor_names_the_engine_for_the_card_and_what_the_others_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    pytest.importorskip("tensorrt_rtx", reason="pip install 'difffeat[rtx]'")
    card = Driver((13, 0), (Gpu("NVIDIA H100", (9, 0), 80 << 30),), None)
    monkeypatch.setattr(building, "probe_driver", lambda: card)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime_cuda, "why_not", lambda *_: "libcublasLt.so.13 cannot be loaded. Run: pip install x")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    found = run_doctor()
    assert found["engines"]["ort"] == "runs on cpu; not on cuda: libcublasLt.so.13 cannot be loaded. Run: pip install x"
    assert found["engines"]["rtx"].startswith(
        "builds plans ahead of time for other machines (difffeat build); runs none here: TensorRT-RTX does not run"
    )
    advice = found["advice"]
    assert (advice["engine"], advice["device"], advice["dtype"]) == ("torch", "cuda", "fp16")
    assert advice["why"].startswith("NVIDIA H100, compute capability 9.0; torch compiles the graph for this GPU; trt: ")
    assert found["text"].splitlines()[-1].startswith("take: --engine torch --device cuda, of an artifact exported with --dtype fp16: NVIDIA H100")
    json.dumps(found)


def test_the_doctor_says_what_convolutions_lack_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime_cuda, "why_not", lambda *_: None)
    for missing, said in (
        (True, "runs on cpu; not on cuda: libcudnn.so.9, which convolutions need, cannot be loaded. Run: pip"),
        (False, "runs on cpu and"),
    ):
        monkeypatch.setattr(onnxruntime_cuda, "cudnn_missing", lambda missing=missing: missing)
        assert run_doctor()["engines"]["ort"].startswith(said)


def test_two_onnx_runtimes_that_overwrite_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.31.1" if name == "onnxruntime-gpu" else real(name))
    said = run_doctor()["engines"]["ort"]
    assert said.endswith("overwrite each other. Run: pip uninstall onnxruntime onnxruntime-gpu, then pip install 'difffeat[gpu]' -c constraints.txt")


def test_without_a_gpu_the_doctor_advises_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "probe_driver", lambda: Driver(None, (), "there is no NVIDIA driver"))
    for units, taken in (((), "ort"), ((torch.bfloat16,), "torch")):
        monkeypatch.setattr(layers, "CPU_TYPES", frozenset({torch.float32, *units}))
        assert run_doctor()["advice"]["engine"] == taken
