"""What the CUDA driver says, asked through ctypes: creating a TensorRT runtime on a machine without a GPU can end in a segmentation fault."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_LIBRARY = "libcuda.so.1"


@dataclass(frozen=True)
class Gpu:
    """One device: its name, compute capability and memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]}"


@dataclass(frozen=True)
class Driver:
    """`version` of CUDA that the driver supports, (13, 0) for example; `gpus` in order; `problem` why there are none, None when there are."""

    version: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    problem: str | None


def probe_driver(library: str = _LIBRARY) -> Driver:
    """Ask the driver; never raises."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Driver(None, (), f"there is no NVIDIA driver ({library} cannot be loaded)")
    if (status := cuda.cuInit(0)) != 0:
        return Driver(None, (), f"the NVIDIA driver finds no usable GPU (cuInit returned {status})")
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    found = (version.value // 1000, version.value % 1000 // 10)
    gpus = tuple(_gpu(cuda, index) for index in range(count.value))
    return Driver(found, gpus, None if gpus else "the NVIDIA driver lists no GPU")


def gpu_identity(device: str) -> dict[str, str]:
    """The GPU behind `cuda` or `cuda:<n>`, as an engine's `identity` has it; nothing for a CPU."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return {}
    gpus = probe_driver().gpus
    return {"gpu": str(gpus[int(number or 0)]) if int(number or 0) < len(gpus) else "one that the NVIDIA driver does not name"}


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(name.value.decode("utf-8", "replace"), (major.value, minor.value), memory.value)
