"""A target is what was asked for; what cannot be is refused by name, with what to do instead."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from difffeat.benchmarks import asking
from difffeat.benchmarks import target as module
from difffeat.benchmarks.target import Target
from difffeat.engines.driver import Driver, Gpu
from difffeat.errors import ConfigError, MissingExtra, ProviderMissing
from tests.artifacts import exported, feeds

NONE = Driver(None, (), "there is no NVIDIA driver")
CARD = Driver((13, 0), (Gpu("a card", (9, 0), 80 << 30),), None)


class Runtime:
    """An onnxruntime with CUDA."""

    @staticmethod
    def get_available_providers() -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def checked(**changes: Any) -> Target:
    return Target.checked(**{"engine": "ort", "device": None, "dtype": "fp32", "threads": 1, **changes})


@pytest.mark.parametrize(("changes", "said"), [
    ({"engine": "tensorrt"}, r"--engine takes ort, torch, trt, rtx; got 'tensorrt'\."),
    ({"dtype": "int8"}, r"--dtype takes fp32, fp16, bf16; got 'int8'\."),
    ({"threads": 0}, r"--threads must be at least 1, got 0\."),
    ({"device": "gpu"}, r"--device must be cpu, cuda or cuda:<n>, got 'gpu'\."),
    ({"device": "cuda:"}, r"--device must be cpu, cuda or cuda:<n>, got 'cuda:'\."),
    ({"engine": "torch", "device": "cpu:0"}, r"--device must be cpu, cuda or cuda:<n>, got 'cpu:0'\."),
    ({"engine": "trt", "device": "cpu"}, r"--engine trt runs on GPUs only\. Pass --device cuda, or --engine ort or torch for the CPU\."),
    ({"dtype": "bf16"}, r"ONNX Runtime has no bf16 on CPUs\. Pass --engine torch, or --dtype fp32 or fp16\."),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checked(**changes)


@pytest.mark.parametrize("engine", ["ort", "torch", "trt", "rtx"])
def test_without_a_driver_no_engine_is_timed_on_a_gpu(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "probe_driver", lambda: NONE)
    monkeypatch.setattr(asking, "import_onnxruntime", lambda: Runtime)
    monkeypatch.setattr(asking, "import_builder", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProviderMissing, match=r"cuda was asked for, but there is no NVIDIA driver\. Pass --device cpu, or run difffeat doctor"):
        checked(engine=engine, device="cuda")


def test_a_number_that_the_driver_does_not_list_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "probe_driver", lambda: CARD)
    monkeypatch.setattr(asking, "import_onnxruntime", lambda: Runtime)
    assert checked(device="cuda:0").device == "cuda:0"
    with pytest.raises(ProviderMissing, match=r"cuda:1 was asked for, but the driver lists 1 GPUs"):
        checked(device="cuda:1")


def test_an_onnxruntime_without_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "probe_driver", lambda: CARD)
    monkeypatch.setattr(Runtime, "get_available_providers", staticmethod(lambda: ["CPUExecutionProvider"]))
    monkeypatch.setattr(asking, "import_onnxruntime", lambda: Runtime)
    with pytest.raises(ProviderMissing, match=r"this onnxruntime offers CPUExecutionProvider\. Install difffeat\[gpu\]"):
        checked(device="cuda")


def test_a_tensorrt_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(engine: str) -> Any:
        raise MissingExtra("tensorrt", "tensorrt", f"The engine {engine!r}")

    monkeypatch.setattr(asking, "probe_driver", lambda: CARD)
    monkeypatch.setattr(asking, "import_builder", missing)
    with pytest.raises(MissingExtra, match="tensorrt"):
        checked(engine="trt")


def test_eager_beside_ours_must_have_the_gpu_in_torch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "probe_driver", lambda: CARD)
    monkeypatch.setattr(asking, "import_onnxruntime", lambda: Runtime)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checked(device="cuda").device == "cuda"
    with pytest.raises(ProviderMissing, match=r"cuda was asked for, but torch .* sees \d+ CUDA devices"):
        checked(device="cuda", eager=True)


def test_the_device_left_out_is_the_engines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "probe_driver", lambda: CARD)
    monkeypatch.setattr(asking, "import_builder", lambda _: None)
    assert {engine: checked(engine=engine).device for engine in ("ort", "torch", "trt", "rtx")} == {
        "ort": "cpu", "torch": "cpu", "trt": "cuda", "rtx": "cuda",
    }  # fmt: skip


def test_it_opens_the_engine_for_batches_of_the_size_and_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, asked = exported("from-latents", "fp16"), []
    opened = module.open_engine
    monkeypatch.setattr(module, "open_engine", lambda *given, **how: (asked.append(how["options"].batch), opened(*given, **how))[1])
    target = Target(engine="torch", threads=1)
    with ExitStack() as stack:
        engine = target.open(artifact, stack, batch_size=3, say=lambda _: None)
        assert (engine.name, engine.device, engine.precision) == ("torch", "cpu", "fp16")
        assert engine.run(feeds(artifact))["b2"].shape == (3, 64)
    assert asked == [3]
    assert target.describe(artifact) == "torch on cpu in fp16, 1 threads"
    assert target.facts(artifact) == {"engine": "torch", "device": "cpu", "precision": "fp16", "threads": 1}
    assert (target.label, Target(engine="rtx").label, Target().label) == ("difffeat, torch", "difffeat, TensorRT-RTX", "difffeat, ONNX Runtime")
