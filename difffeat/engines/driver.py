"""What the CUDA driver says, asked through ctypes: creating a TensorRT runtime on a machine without a GPU can end in a segmentation fault."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from typing import Any

from difffeat.errors import ConfigError

_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
_NO_DEVICE = 100
_ADVICE = {
    34: "libcuda.so.1 is the stub of a CUDA toolkit: take its folder out of LD_LIBRARY_PATH",
    _NO_DEVICE: "run nvidia-smi; in a container, start it with GPUs (docker run --gpus all)",
    802: "the machine's NVSwitches are not ready: start the service nvidia-fabricmanager",
    803: "the driver's library and its kernel module are of two versions: restart the machine",
    804: "the package cuda-compat is not for this GPU: take its folder out of LD_LIBRARY_PATH",
    999: "restart the machine, or load its kernel module: nvidia-modprobe -u",
}


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

    def gpu(self, number: int) -> Gpu | None:
        """The device behind `cuda:<number>`; None where there is none."""
        return self.gpus[number] if number < len(self.gpus) else None


def probe_driver(library: str = _LIBRARY) -> Driver:
    """Ask the driver; never raises.

    Devices come in the order in which CUDA's runtime, and so torch and TensorRT, count them: the driver itself reads CUDA_VISIBLE_DEVICES and
    CUDA_DEVICE_ORDER. A slice of a GPU (MIG) is a device of its own.
    """
    try:
        cuda = ctypes.CDLL(library)
    except OSError as error:
        if str(error).startswith(f"{library}: cannot open shared object file"):
            return Driver(None, (), f"there is no NVIDIA driver ({library} cannot be loaded)")
        return Driver(None, (), f"the NVIDIA driver cannot be loaded ({error})")
    try:
        return _asked(cuda)
    except AttributeError as error:
        return Driver(None, (), f"{library} is no NVIDIA driver ({error})")
    except _Refused as refused:
        return Driver(_version(cuda), (), str(refused))


class _Refused(Exception):
    """A call of the driver that returned an error."""


def _asked(cuda: ctypes.CDLL) -> Driver:
    if (status := cuda.cuInit(0)) != 0:
        raise _Refused(f"the NVIDIA driver finds no usable GPU (cuInit returned {_told(cuda, status)})")
    count = ctypes.c_int()
    _call(cuda, "cuDeviceGetCount", ctypes.byref(count))
    gpus = tuple(_gpu(cuda, index) for index in range(count.value))
    return Driver(_version(cuda), gpus, None if gpus else "the NVIDIA driver lists no GPU")


def _version(cuda: ctypes.CDLL) -> tuple[int, int] | None:
    """Of CUDA, which the driver tells also where it finds no GPU."""
    found = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(found)) != 0:
        return None
    return found.value // 1000, found.value % 1000 // 10


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    _call(cuda, "cuDeviceGet", ctypes.byref(device), index)
    _call(cuda, "cuDeviceGetName", name, len(name), device)
    _call(cuda, "cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
    _call(cuda, "cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    return Gpu(name.value.decode("utf-8", "replace"), (major.value, minor.value), memory.value)


def _call(cuda: ctypes.CDLL, name: str, *arguments: Any) -> None:
    if (status := getattr(cuda, name)(*arguments)) != 0:
        raise _Refused(f"the NVIDIA driver does not describe its GPUs ({name} returned {_told(cuda, status)})")


def _told(cuda: ctypes.CDLL, status: int) -> str:
    """A status with the driver's own words for it, and what to do about it."""
    words = ctypes.c_char_p()
    cuda.cuGetErrorString(status, ctypes.byref(words))
    text = f"{status}, {words.value.decode('utf-8', 'replace')}" if words.value else str(status)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    advice = f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it" if status == _NO_DEVICE and visible is not None else _ADVICE.get(status)
    return f"{text}; {advice}" if advice else text


def gpu_number(device: str) -> int | None:
    """The number in `cuda` (0) or `cuda:<n>`, None for `cpu`. Raises ConfigError for what names no device."""
    found = re.fullmatch(r"cpu|cuda(?::([0-9]+))?", device)
    if found is None:
        raise ConfigError(f"--device must be cpu, cuda or cuda:<n>, got {device!r}.")
    return None if device == "cpu" else int(found[1] or 0)


def gpu_identity(device: str) -> dict[str, str]:
    """The GPU behind `cuda` or `cuda:<n>`, as an engine's `identity` has it; nothing for a CPU."""
    if (number := gpu_number(device)) is None:
        return {}
    gpu = probe_driver().gpu(number)
    return {"gpu": "one that the NVIDIA driver does not name" if gpu is None else str(gpu)}
