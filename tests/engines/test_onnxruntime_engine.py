"""ONNX Runtime: the provider that runs is the one that was asked for, computes what was asked for, and its refusals are told."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import numpy as np
import pytest

from difffeat.engines import EngineOptions, onnxruntime_cuda, onnxruntime_engine, open_engine
from difffeat.engines.driver import Driver
from difffeat.engines.onnxruntime_engine import OrtEngine
from difffeat.errors import ConfigError, EngineError, OutOfMemory, ProviderMissing
from tests.artifacts import copy_of, exported, feeds
from tests.engines.test_engines import opened


class Session:
    """Stands for a session of ONNX Runtime, and keeps what it was opened with."""

    opened: ClassVar[list[Any]] = []

    def __init__(self, source: object, settings: Any, providers: list[Any], enable_fallback: int) -> None:
        assert not enable_fallback  # it prints
        self._providers = providers
        Session.opened.append((settings, providers))

    def disable_fallback(self) -> None: ...
    def get_providers(self) -> list[str]:
        return [name for name, _ in self._providers]


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    import onnxruntime

    exported("text")  # by the real runtime
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime_cuda, "why_not", lambda *_: None)
    monkeypatch.setattr(Session, "opened", [])
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # so that it is put back as it was
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    return Session.opened


def test_onnx_runtime_on_a_gpu_computes_fp32_alike_in_every_run(sessions: list[Any]) -> None:
    with opened("text", "ort", device="cuda:1") as running:
        assert running.device == "cuda:1"
    ((settings, providers),) = sessions
    assert settings.use_deterministic_compute
    exact = {"device_id": "1", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert providers == [("CUDAExecutionProvider", exact)]
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    with opened("text", "ort", device="cuda:1", options=EngineOptions(tensorrt_provider=True)) as running:
        assert running.identity["tensorrt_provider"] == "true"
    assert sessions[1][1] == [("TensorrtExecutionProvider", {"device_id": "1"}), ("CUDAExecutionProvider", exact)]


def test_the_tensorrt_provider_computes_no_tf32(sessions: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = EngineOptions(tensorrt_provider=True)
    with opened("text", "ort", device="cuda", options=tensorrt):
        assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(ConfigError, match=r"NVIDIA_TF32_OVERRIDE=1 lets fp32 be computed as TF32\. Unset it"):
        opened("text", "ort", device="cuda", options=tensorrt)


def test_a_device_that_is_not_there_is_an_error_and_not_a_slow_surprise() -> None:
    import onnxruntime
    import torch

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() or torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(
        ProviderMissing, match=r"CUDAExecutionProvider was asked for \(device cuda\), but this onnxruntime offers .*CPUExecutionProvider"
    ) as ort:
        opened("text", "ort", device="cuda")
    assert "Install difffeat[gpu] in place of difffeat[cpu], or pass --device cpu." in str(ort.value)
    with pytest.raises(ProviderMissing, match=r"cuda:1 was asked for, but .+\. Run difffeat doctor, or pass --device cpu\."):
        opened("text", "torch", device="cuda:1")


def test_a_runtime_that_falls_back_to_another_provider_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class Fallen:
        def __init__(self, *_: object, **__: object) -> None: ...
        def disable_fallback(self) -> None: ...
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    monkeypatch.setattr(onnxruntime_cuda, "why_not", lambda *_: None)
    with pytest.raises(
        ProviderMissing, match="CUDAExecutionProvider was asked for, but the session runs on CPUExecutionProvider: the driver or a CUDA library"
    ):
        opened("text", "ort", device="cuda")


def test_a_gpu_that_the_runtime_cannot_use_is_told_before_a_session_is_opened(sessions: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    driver = Driver((13, 0), (), None)
    monkeypatch.setattr(onnxruntime_engine, "probe_driver", lambda: driver)
    monkeypatch.setattr(onnxruntime_cuda, "why_not", lambda _, *rest: asked.append(rest) or "libcublasLt.so.13 cannot be loaded. Run: pip install x")
    with pytest.raises(
        ProviderMissing,
        match=r"CUDAExecutionProvider was asked for \(device cuda:1\), but libcublasLt\.so\.13 cannot be loaded\. Run: pip install x\. "
        r"Or pass --engine torch, or --device cpu\.$",
    ):
        opened("text", "ort", device="cuda:1")
    assert (asked, sessions) == ([("CUDAExecutionProvider", driver, 1)], [])


@pytest.mark.parametrize(("words", "error", "said"), [
    ("cuDNN is unavailable or disabled for CUDA Execution Provider: x", ProviderMissing, r"libcudnn\.so\.9, .* pip install 'onnxruntime-gpu\["),
    ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", OutOfMemory, r"out of memory.*smaller --batch-size"),
])  # fmt: skip
def test_what_a_gpu_lacks_in_the_middle_of_a_run_is_told(words: str, error: type[EngineError], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def run(self, *_: object) -> None:
            raise RuntimeError(words)

    with opened("text") as running:
        monkeypatch.setattr(running, "_session", Broken())
        with pytest.raises(error, match=rf"ONNX Runtime failed: {said}"):
            running.run(feeds(exported("text")))


def test_other_failures_keep_the_words_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def run(self, *_: object) -> None:
            raise RuntimeError("no such kernel")

    with opened("text") as running:
        monkeypatch.setattr(running, "_session", Broken())
        with pytest.raises(EngineError, match="ONNX Runtime failed: no such kernel"):
            running.run(feeds(exported("text")))


def test_a_graph_that_the_runtime_refuses_is_told(tmp_path: Any) -> None:
    import onnx

    folder = copy_of("text", tmp_path)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot open .*model\.onnx: .*NoSuchOperator"):
        open_engine(folder)


def test_bf16_on_a_cpu_names_the_engine_that_has_it() -> None:
    with pytest.raises(EngineError, match=r"no bf16 here.*Pass --engine torch"):
        open_engine(exported("image", "bf16"), "ort")


def test_bound_inputs_and_outputs_give_the_same_features() -> None:
    given = feeds(exported("image"))
    with opened("image") as running:
        assert isinstance(running, OrtEngine)
        bound = running._run_bound(given, list(running.outputs))
        for value, expected in zip(bound, running.run(given).values(), strict=True):
            np.testing.assert_array_equal(value, expected)


def test_the_tensorrt_provider_is_for_gpus_and_checked() -> None:
    options = EngineOptions(tensorrt_provider=True)
    with pytest.raises(ConfigError, match=r"--tensorrt-provider runs on a GPU. Pass --device cuda"):
        opened("text", options=options)
    with pytest.raises(ProviderMissing, match=r"TensorrtExecutionProvider was asked for \(device cuda\), but this onnxruntime offers"):
        opened("text", device="cuda", options=options)
