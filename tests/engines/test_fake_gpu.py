"""The stand-in of a GPU is held to the real packages: names, parameters, results and numbers of cuda-bindings, classes and methods of TensorRT-RTX.

Both are ordinary wheels that can be imported where there is no GPU.
"""

from __future__ import annotations

import inspect
import re
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from difffeat.engines import cuda as cuda_module
from difffeat.engines import tensorrt_compile, tensorrt_engine
from difffeat.engines.cuda import Cuda
from difffeat.engines.driver import probe_driver
from difffeat.errors import ProviderMissing
from tests.engines import fake_gpu
from tests.engines.fake_gpu import Kind, Runtime, Status, install

NAMES = sorted(set(re.findall(r"(?:\"|_runtime\.)(cuda[A-Z]\w+)(?:\"|\()", Path(str(cuda_module.__file__)).read_text(encoding="utf-8"))))
"""Functions of the runtime that the code calls, read from its text."""


@pytest.fixture
def real() -> ModuleType:
    return pytest.importorskip("cuda.bindings.runtime", reason="pip install cuda-bindings")


Call = tuple[str, tuple[Any, ...], tuple[Any, ...]]


@pytest.fixture
def calls(real: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Name, arguments and results of every call that running a plan makes of the stand-in, errors and their words included.

    The real module is imported first: the stand-in then takes its place.
    """
    runtime, _ = install(monkeypatch)
    found: list[Call] = []
    for name in NAMES:
        monkeypatch.setattr(runtime, name, recorded(name, getattr(runtime, name), found))
    exercise(Cuda(0, "tensorrt"))
    runtime.fail["cudaSetDevice"] = Status.cudaErrorInsufficientDriver
    with pytest.raises(ProviderMissing):
        Cuda(0, "tensorrt")
    return found


def recorded(name: str, function: Any, found: list[Call]) -> Any:
    def call(*arguments: Any) -> Any:
        results = function(*arguments)
        found.append((name, arguments, results))
        return results

    return call


def exercise(cuda: Cuda) -> None:
    """A batch of 16 bytes to the device and back, at once and replayed from a graph."""
    stream, device = cuda.stream(), cuda.device_memory(16)
    (up, given), (down, got) = cuda.pinned(16), cuda.pinned(16)
    given[:] = np.arange(16)

    def there_and_back() -> None:
        cuda.upload(device, up, 16, stream)
        cuda.download(down, device, 16, stream)

    there_and_back()
    cuda.wait(stream)
    np.testing.assert_array_equal(got, np.arange(16))
    graph = cuda.capture(stream, there_and_back)
    given[:] = 7
    cuda.replay(graph, stream)
    cuda.wait(stream)
    np.testing.assert_array_equal(got, np.full(16, 7))
    cuda.forget(graph)
    cuda.close()


def results_of(function: Any) -> int:
    """How many results the documentation of a function lists, the status among them; some releases indent all of it."""
    section = re.search(r"^( *)Returns\n\1-+\n(.*?)(?:\n\s*\n|\Z)", function.__doc__, re.DOTALL | re.MULTILINE)
    assert section is not None, function
    return sum(re.match(rf"{section[1]}\S", line) is not None for line in section[2].splitlines())


def test_every_function_that_the_code_calls_is_exercised(calls: list[Call]) -> None:
    assert {"cudaSetDevice", "cudaMalloc", "cudaFreeHost", "cudaGraphInstantiate", "cudaGetErrorString"} <= set(NAMES)
    assert {name for name, _, _ in calls} == set(NAMES)


def test_calls_fit_the_real_functions_and_give_as_many_results(calls: list[Call], real: ModuleType) -> None:
    for name, arguments, results in calls:
        function = getattr(real, name)
        signature = inspect.signature(function)
        assert len(signature.bind(*arguments).arguments) == len(signature.parameters), name
        assert len(results) == results_of(function), name


def test_the_stand_in_takes_its_parameters_in_the_order_of_the_real_ones(real: ModuleType) -> None:
    for name in NAMES:
        mine = inspect.signature(getattr(Runtime(), name)).parameters
        assert len(mine) == len(inspect.signature(getattr(real, name)).parameters), name
    assert list(inspect.signature(real.cudaMemcpyAsync).parameters) == ["dst", "src", "count", "kind", "stream"]
    assert list(inspect.signature(real.cudaGraphLaunch).parameters) == ["graphExec", "stream"]


ENUMERATIONS: dict[str, type[IntEnum]] = {
    "cudaError_t": Status, "cudaMemcpyKind": Kind, "cudaStreamCaptureMode": Runtime.cudaStreamCaptureMode,
}  # fmt: skip


@pytest.mark.parametrize(("enumeration", "member"), [(name, member) for name, members in ENUMERATIONS.items() for member in members])
def test_numbers_are_the_real_ones(enumeration: str, member: IntEnum, real: ModuleType) -> None:
    assert getattr(getattr(real, enumeration), member.name).value == member.value


def test_flags_are_the_real_ones(real: ModuleType) -> None:
    assert real.cudaStreamNonBlocking == Runtime.cudaStreamNonBlocking
    assert real.cudaHostAllocDefault == 0


def test_a_handle_is_a_number_as_tensorrt_wants_it(real: ModuleType) -> None:
    assert int(real.cudaStream_t(7)) == 7


@pytest.mark.skipif(probe_driver().version is not None, reason="this machine has an NVIDIA driver")
def test_without_a_driver_the_real_functions_return_a_status_that_becomes_our_error(real: ModuleType, calls: list[Call]) -> None:
    cuda = object.__new__(Cuda)
    cuda._runtime, cuda._device, cuda._frees = real, 0, []
    kinds = {Kind: real.cudaMemcpyKind, Runtime.cudaStreamCaptureMode: real.cudaStreamCaptureMode, Status: real.cudaError_t}
    for name, arguments, results in calls:
        given = [getattr(kinds[type(one)], one.name) if type(one) in kinds else 0 if isinstance(one, list) else one for one in arguments]
        if name == "cudaGetErrorString":
            assert cuda._text(given[0]) == "CUDA driver version is insufficient for CUDA runtime version"
            continue
        assert len(getattr(real, name)(*given)) == len(results), name
        said = rf"^{name} failed on cuda:0: CUDA driver version is insufficient .*pip install 'cuda-bindings<13'\.$"
        with pytest.raises(ProviderMissing, match=said):
            cuda.call(name, *given)


@pytest.mark.skipif(probe_driver().problem is not None, reason="no NVIDIA GPU")
def test_on_a_gpu_bytes_go_there_and_back_at_once_and_replayed(real: ModuleType) -> None:
    exercise(Cuda(0, "tensorrt"))


CLASSES = {
    fake_gpu.Builder: "Builder", fake_gpu.Config: "IBuilderConfig", fake_gpu.Timings: "ITimingCache", fake_gpu.Profile: "IOptimizationProfile",
    fake_gpu.OnnxParser: "OnnxParser", fake_gpu.PlanReader: "Runtime", fake_gpu.Engine_: "ICudaEngine", fake_gpu.Context: "IExecutionContext",
}  # fmt: skip
"""Classes of the stand-in's TensorRT, and whom they stand for. What the code calls of them is there, or its tests would fail."""


def overloads(method: Any) -> list[list[str]]:
    """Parameters of each form of a bound C++ function, as its documentation spells them, `self` left out."""
    forms = re.findall(r"\(self: [\w.]+(?:, )?(.*)\) ->", method.__doc__ or "")
    return [[one for one in re.split(r", (?=\w+: )", form) if one] for form in forms]


@pytest.mark.parametrize("fake", CLASSES, ids=lambda one: one.__name__)
def test_methods_are_those_of_the_real_classes(fake: type) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'difffeat[rtx]'")
    real = getattr(trt, CLASSES[fake])
    for name, method in vars(fake).items():
        if name.startswith("_") or not inspect.isfunction(method):
            continue
        forms = overloads(getattr(real, name))
        assert forms, f"{fake.__name__}.{name}"
        given = sum(one.default is one.empty for one in inspect.signature(method).parameters.values()) - 1
        assert any(sum("=" not in one for one in form) <= given <= len(form) for form in forms), f"{name} is given {given} of {forms}"


def test_parameters_that_are_passed_by_name_have_the_real_names() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'difffeat[rtx]'")
    passed = {"runtime_config": trt.ICudaEngine.create_execution_context, "ignore_mismatch": trt.IBuilderConfig.set_timing_cache}
    for name, method in passed.items():
        assert any(one.startswith(f"{name}: ") for form in overloads(method) for one in form)


def test_what_is_read_and_set_is_there() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'difffeat[rtx]'")
    attributes = {
        "IBuilderConfig": ("progress_monitor", "num_compute_capabilities", "builder_optimization_level"),
        "ICudaEngine": ("num_io_tensors", "device_memory_size_v2"),
        "IRuntimeConfig": ("dynamic_shapes_kernel_specialization_strategy", "cuda_graph_strategy"),
        "OnnxParser": ("num_errors",),
    }
    for owner, names in attributes.items():
        for name in names:
            assert isinstance(inspect.getattr_static(getattr(trt, owner), name), property), f"{owner}.{name}"


def taken() -> list[str]:
    """Names that the code takes from a TensorRT module, as `ILogger.Severity.ERROR`."""
    text = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (tensorrt_compile, tensorrt_engine))
    return sorted(set(re.findall(r"\btrt\.([A-Z]\w*(?:\.\w+)*)", text)))


@pytest.mark.parametrize("name", taken())
def test_names_of_the_module_are_the_real_ones_and_the_stand_ins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'difffeat[rtx]'")
    fake = install(monkeypatch, engine="rtx")[1]
    for module in (trt, fake):
        found: Any = module
        for part in name.split("."):
            found = found.__init__ if part == "__init__" else getattr(found, part)
    for monitored in ("phase_start", "step_complete", "phase_finish"):
        assert hasattr(trt.IProgressMonitor, monitored)
