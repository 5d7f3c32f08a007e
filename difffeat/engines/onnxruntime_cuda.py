"""What ONNX Runtime wants of a machine before it runs on its GPU, asked before a session is opened: the runtime would fall back to the CPU, and say
so only on the terminal.

Its libraries come from wheels of their own, which lie on no path of the system's loader: `onnxruntime.preload_dlls` loads them by name, so that the
loader then has them. Where torch was imported first, they are those of torch's wheels, as far as both want the same major version.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from difffeat.engines import libraries
from difffeat.engines.driver import Driver

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
CUDNN = "libcudnn.so.9"
"""Loaded by the CUDA provider when the first convolution comes, and not linked to it (since 1.29): a graph of captions runs without it."""
WHEELS = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
_FILES = {CUDA: ("cuda",), TENSORRT: ("tensorrt", "cuda")}
_OF_CUDA, _OF_TENSORRT, _OF_DRIVER = ("libcu", "libnvrtc", "libnvJitLink"), ("libnvinfer", "libnvonnxparser"), "libcuda.so"
_LAST_OF_CUDA_12 = "1.27"
"""The first onnxruntime-gpu whose wheels want CUDA 13."""


def why_not(runtime: Any, provider: str, driver: Driver, number: int = 0) -> str | None:
    """Why a provider would not run on the GPU of this number, with what mends it, as a clause; None where nothing speaks against it.

    Loads the libraries that the provider wants; prints nothing.
    """
    if driver.problem is not None:
        return driver.problem
    if driver.gpu(number) is None:
        return f"the driver lists {len(driver.gpus)} GPUs"
    wants = _cuda_version(runtime)
    if wants and driver.version is not None and driver.version[0] < int(wants.partition(".")[0]):
        return (
            f"the driver supports CUDA {driver.version[0]}.{driver.version[1]}, and this onnxruntime-gpu is built for CUDA {wants}. "
            f"Update the NVIDIA driver, or, for CUDA 12, run: pip install 'onnxruntime-gpu[cuda,cudnn]<{_LAST_OF_CUDA_12}'"
        )
    missing = _missing(runtime, provider)
    return f"{_listed(missing)} cannot be loaded. {_mended(missing, wants)}" if missing else None


def cudnn_missing() -> bool:
    """Whether convolutions lack their library; asked after `why_not`."""
    return bool(libraries.unloadable([CUDNN]))


def _missing(runtime: Any, provider: str) -> tuple[str, ...]:
    """Libraries that the provider is linked against and that cannot be loaded, even after the wheels' own were."""
    said = _preload(runtime)
    if provider == TENSORRT:
        _load_tensorrt()
    folder = Path(runtime.__file__).parent / "capi"
    try:
        wanted = [name for file in _FILES[provider] for name in libraries.needed(folder / f"libonnxruntime_providers_{file}.so")]
    except (OSError, ValueError):  # another system than Linux, or another format: what the runtime says then is all there is
        return tuple(dict.fromkeys(re.findall(r"Failed to load (\S+?):", said)))
    return libraries.unloadable(dict.fromkeys(wanted))


def _preload(runtime: Any) -> str:
    """Load CUDA's libraries out of their wheels. Returns what the runtime would print: it prints what it does not find, in colours."""
    if not hasattr(runtime, "preload_dlls"):  # builds other than the wheels of onnxruntime-gpu
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same again, about a provider that it then does not register
        runtime.preload_dlls()
    return said.getvalue()


def _load_tensorrt() -> None:
    """The wheel of TensorRT's libraries loads them when it is imported. Whether they are those that are wanted shows when they are asked for."""
    if importlib.util.find_spec("tensorrt_libs") is not None:
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module("tensorrt_libs")


def _mended(missing: Iterable[str], cuda: str) -> str:
    """What installs them."""
    commands, others = [], []
    for name in missing:
        if name.startswith(_OF_TENSORRT):
            commands.append(_tensorrt_wheel(name, cuda))
        elif name.startswith(_OF_CUDA) and not name.startswith(_OF_DRIVER):
            commands.append(WHEELS)
        else:
            others.append(name)
    told = [f"Run: {' and '.join(dict.fromkeys(commands))}"] if commands else []
    if others:
        told.append(f"{_listed(others)}: from your system's packages, or its NVIDIA driver")
    return ". ".join(told)


def _tensorrt_wheel(name: str, cuda: str) -> str:
    """`tensorrt` resolves to a newer TensorRT than the provider is built for; its last versions of that one are for CUDA 13."""
    wanted = re.search(r"\.so\.(\d+)", name)
    limit = f"<{int(wanted[1]) + 1}" if wanted else ""
    major = cuda.partition(".")[0]
    command = f"pip install '{'tensorrt' if major in ('', '13') else f'tensorrt-cu{major}'}{limit}'"
    try:
        return f"{command} (there is tensorrt {importlib.metadata.version('tensorrt')}, which brings another)"
    except importlib.metadata.PackageNotFoundError:
        return command


def _cuda_version(runtime: Any) -> str:
    """Of CUDA that the runtime is built for: `13.0`; empty where it does not say."""
    found = str(getattr(runtime, "cuda_version", "") or "")
    return found if re.fullmatch(r"\d+(\.\d+)*", found) else ""


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
