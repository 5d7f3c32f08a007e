# ruff: noqa: N815 - names of the CUDA runtime
"""A GPU in NumPy: streams that do nothing until they are waited for, device memory on the host, a TensorRT whose plans run in ONNX Runtime.

Work lies in its stream until a wait, so that a host buffer written too early, a copy forgotten or an output read too soon gives wrong numbers.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from difffeat.engines.driver import Driver, Gpu
from difffeat.engines.tensorrt_build import PACKAGES

GPUS = (Gpu("Fake 9000", (9, 0), 80 << 30), Gpu("Fake 9000", (9, 0), 80 << 30))


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Runtime(ModuleType):
    """`cuda.bindings.runtime` of the fake device. `memory` bytes of it are free; `log` holds the names of all calls."""

    cudaError_t, cudaMemcpyKind, cudaStreamNonBlocking = Status, Kind, 1

    class cudaStreamCaptureMode(IntEnum):
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.memory, self.log, self.fail = 1 << 40, list[str](), dict[str, Status]()
        self.blocks: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], Any]]] = {}
        self.capturing: dict[int, list[Callable[[], Any]]] = {}
        self.graphs: dict[int, list[Callable[[], Any]]] = {}

    def _called(self, name: str, *results: Any) -> tuple[Any, ...]:
        self.log.append(name)
        status = self.fail.get(name, Status.cudaSuccess)
        return (status, *results) if status == Status.cudaSuccess else (status, *[None] * len(results))

    def _allocate(self, name: str, size: int) -> tuple[Any, ...]:
        if size > self.memory:
            return Status.cudaErrorMemoryAllocation, None
        self.memory -= size
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return self._called(name, ctypes.addressof(block))

    def _free(self, name: str, address: int) -> tuple[Any, ...]:
        self.memory += len(self.blocks.pop(address))
        return self._called(name)

    def put(self, stream: int, work: Callable[[], Any]) -> None:
        (self.capturing[stream] if stream in self.capturing else self.streams[stream]).append(work)

    def cudaSetDevice(self, device: int) -> Any:
        return self._called("cudaSetDevice")

    def cudaMalloc(self, size: int) -> Any:
        return self._allocate("cudaMalloc", size)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return self._allocate("cudaHostAlloc", size)

    def cudaFree(self, address: int) -> Any:
        return self._free("cudaFree", address)

    def cudaFreeHost(self, address: int) -> Any:
        return self._free("cudaFreeHost", address)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        handle = len(self.streams) + 1
        self.streams[handle] = []
        return self._called("cudaStreamCreateWithFlags", handle)

    def cudaStreamDestroy(self, stream: int) -> Any:
        return self._called("cudaStreamDestroy")

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Kind, stream: int) -> Any:
        self.put(stream, lambda: ctypes.memmove(to, source, size))
        return self._called("cudaMemcpyAsync")

    def cudaStreamSynchronize(self, stream: int) -> Any:
        while self.streams[stream]:
            self.streams[stream].pop(0)()
        return self._called("cudaStreamSynchronize")

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> Any:
        self.capturing[stream] = []
        return self._called("cudaStreamBeginCapture")

    def cudaStreamEndCapture(self, stream: int) -> Any:
        return self._called("cudaStreamEndCapture", self.capturing.pop(stream))

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        handle = self.log.count("cudaGraphInstantiate") + 1
        self.graphs[handle] = list(graph)
        return self._called("cudaGraphInstantiate", handle)

    def cudaGraphDestroy(self, graph: Any) -> Any:
        return self._called("cudaGraphDestroy")

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:
        for work in self.graphs[graph]:
            self.put(stream, work)
        return self._called("cudaGraphLaunch")

    def cudaGraphExecDestroy(self, graph: int) -> Any:
        del self.graphs[graph]
        return self._called("cudaGraphExecDestroy")

    def cudaGetErrorString(self, status: Status) -> Any:
        return Status.cudaSuccess, status.name.encode()


class Flag(IntEnum):
    STRONGLY_TYPED = 1
    TF32 = 2
    WORKSPACE = 3


class TensorRt(ModuleType):
    """`tensorrt` whose plan is the path of the graph and the number of the build, and whose engine is ONNX Runtime on the fake device's memory."""

    __version__ = "11.0.0"
    NetworkDefinitionCreationFlag = BuilderFlag = MemoryPoolType = Flag

    class ExecutionContextAllocationStrategy(IntEnum):
        STATIC, USER_MANAGED = 0, 2

    class ILogger:
        class Severity(IntEnum):
            INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

    class IProgressMonitor:
        pass

    def __init__(self, cuda: Runtime) -> None:
        super().__init__("tensorrt")
        self.cuda, self.contexts, self.built, self.timings = cuda, 10, 0, list[bytes]()
        self.endless, self.configs, self.capabilities, self.complaint = False, list[Any](), list[Any](), ""
        self.Builder, self.Runtime, self.OnnxParser = partial(Builder, self), partial(PlanReader, self), OnnxParser


class TensorRtx(TensorRt):
    """`tensorrt_rtx`: the same, with what is its own."""

    __version__ = "1.7.1"

    class DynamicShapesKernelSpecializationStrategy(IntEnum):
        LAZY, EAGER, NONE = 0, 1, 2

    class CudaGraphStrategy(IntEnum):
        DISABLED, WHOLE_GRAPH_CAPTURE = 0, 1

    class ComputeCapability(IntEnum):
        SM75 = 75


class Builder:
    def __init__(self, module: TensorRt, log: Any) -> None:
        self.module, self.log = module, log

    def create_network(self, flags: int) -> dict[str, Any]:
        return {}

    def create_builder_config(self) -> Config:
        return Config(self.module)

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: dict[str, Any], config: Config) -> bytes | None:
        self.module.built += 1
        monitor = config.progress_monitor
        monitor.phase_start("Build", None, 2)
        monitor.phase_start("Tactics", "Build", 9)
        goes_on = monitor.step_complete("Tactics", 3)
        while self.module.endless and goes_on:
            goes_on = monitor.step_complete("Tactics", 4)
        monitor.phase_finish("Tactics")
        monitor.phase_finish("Build")
        if not goes_on:
            return None
        return f"{network['path']}\n{self.module.built}".encode()  # no two builds give the same bytes


class Config:
    progress_monitor: Any
    num_compute_capabilities = 0

    def set_compute_capability(self, capability: Any, index: int) -> bool:
        self.module.capabilities.append((capability, index, self.num_compute_capabilities))
        return True

    def __init__(self, module: TensorRt) -> None:
        self.module = module

    def clear_flag(self, flag: Any) -> None: ...

    def set_memory_pool_limit(self, pool: Any, size: int) -> None: ...

    def add_optimization_profile(self, profile: Any) -> None: ...

    def create_timing_cache(self, content: bytes) -> Timings:
        return Timings(content)

    def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> None:
        self.module.timings.append(cache.content)
        self.cache = cache

    def get_timing_cache(self) -> Timings:
        return self.cache


class Timings:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"measured "


class Profile:
    def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None: ...


class OnnxParser:
    def __init__(self, network: dict[str, Any], log: Any) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network["path"] = path
        return True


class PlanReader:
    def __init__(self, module: TensorRt, log: Any) -> None:
        self.module, self.log = module, log

    def deserialize_cuda_engine(self, content: bytes) -> Any:
        if self.module.complaint:
            self.log.log(self.module.ILogger.Severity.ERROR, self.module.complaint)
            return None
        return Engine_(self.module, self.module.cuda, bytes(content).decode().partition("\n")[0])


class Engine_:
    def __init__(self, module: TensorRt, cuda: Runtime, path: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._module, self._cuda, self._session = module, cuda, onnxruntime.InferenceSession(path, options)
        self.names = [value.name for value in (*self._session.get_inputs(), *self._session.get_outputs())]
        self.num_io_tensors, self.device_memory_size_v2 = len(self.names), 4096

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace()

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> Any:
        self._module.contexts -= 1
        self._module.configs.append(runtime_config)
        return Context(self._cuda, self._session, strategy) if self._module.contexts >= 0 else None


class Context:
    """A graph that was captured here is worth nothing once other shapes were set."""

    def __init__(self, cuda: Runtime, session: Any, strategy: Any) -> None:
        self._cuda, self._session, self._lacks_memory, self._generation = cuda, session, strategy is not None, 0
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._types = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._generation += self._shapes.get(name) != tuple(shape)
        self._shapes[name] = tuple(shape)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory in self._cuda.blocks
        assert size >= 4096
        self._lacks_memory = False

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(shape[0] for key, shape in self._shapes.items() if key in ("pixels", "latents", "tokens"))
        declared = next(value.shape for value in self._session.get_outputs() if value.name == name)
        return tuple(batch if isinstance(axis, str) else axis for axis in declared)

    def execute_async_v3(self, stream: int) -> bool:
        shapes, generation = dict(self._shapes), self._generation
        self._cuda.put(stream, lambda: self._compute(shapes, generation))
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], generation: int) -> None:
        assert generation == self._generation, "replayed after other shapes were set"
        assert not self._lacks_memory
        feeds = {}
        for value in self._session.get_inputs():
            dtype = np.dtype(self._types[value.type])
            size = int(np.prod(shapes[value.name])) * dtype.itemsize
            feeds[value.name] = np.frombuffer(ctypes.string_at(self._addresses[value.name], size), dtype).reshape(shapes[value.name])
        for value, found in zip(self._session.get_outputs(), self._session.run(None, feeds), strict=True):
            content = np.ascontiguousarray(found).tobytes()
            ctypes.memmove(self._addresses[value.name], content, len(content))


def install(monkeypatch: pytest.MonkeyPatch, gpus: tuple[Gpu, ...] = GPUS, engine: str = "trt") -> tuple[Runtime, TensorRt]:
    """Put the fake device, its driver and its TensorRT (for `rtx` TensorRT-RTX) in the place of real ones."""
    from difffeat.engines import tensorrt_build, tensorrt_engine

    cuda = Runtime()
    trt = TensorRt(cuda) if engine == "trt" else TensorRtx(cuda)
    for name, module in (
        ("cuda", ModuleType("cuda")),
        ("cuda.bindings", ModuleType("cuda.bindings")),
        ("cuda.bindings.runtime", cuda),
        (PACKAGES[engine][0], trt),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    driver = Driver((13, 0), gpus, None if gpus else "the NVIDIA driver lists no GPU")
    for module in (tensorrt_build, tensorrt_engine):
        monkeypatch.setattr(module, "probe_driver", lambda: driver)
    return cuda, trt
