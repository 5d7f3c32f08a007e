"""What ONNX Runtime lacks on a machine with a GPU is named, with the command that installs it, and nothing is printed."""

from __future__ import annotations

import importlib.metadata
import struct
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from difffeat.engines import libraries, onnxruntime_cuda
from difffeat.engines.driver import Driver, Gpu
from difffeat.engines.libraries import needed, unloadable
from difffeat.engines.onnxruntime_cuda import CUDA, TENSORRT, why_not

CARD = Driver((13, 0), (Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30),), None)
NEEDS = {
    "cuda": ("libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudart.so.13", "libcuda.so.1", "libc.so.6"),
    "tensorrt": ("libcublas.so.13", "libnvinfer.so.10", "libnvonnxparser.so.10", "libcudnn.so.9", "libc.so.6"),
}
"""Of onnxruntime-gpu 1.31.1."""


def elf(names: tuple[str, ...], address: int = 0x40000) -> bytes:
    """A file of the format whose dynamic section names these libraries, mapped far from where its bytes lie."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    offsets = [strings.index(b"\0" + name.encode() + b"\0") + 1 for name in names]
    at = 64 + 2 * 56
    entries = [*((1, offset) for offset in offsets), (5, address + at), (10, len(strings)), (0, 0)]
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 4, at, address + at, 0, len(strings), len(strings), 8)
    last = struct.pack("<IIQQQQQQ", 2, 4, at + len(strings), 0, 0, len(dynamic), len(dynamic), 8)
    return header + load + last + strings + dynamic


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for the wheel onnxruntime-gpu, whose libraries the loader finds where they are in `there`."""
    module: Any = ModuleType("onnxruntime")
    module.__file__ = str(tmp_path / "onnxruntime" / "__init__.py")
    module.cuda_version, module.there, module.calls = "13.0", {"libc.so.6", "libcuda.so.1"}, []
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    for name, names in NEEDS.items():
        (capi / f"libonnxruntime_providers_{name}.so").write_bytes(elf(names))

    def load(name: str) -> None:
        if name not in module.there:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    def preload_dlls() -> None:
        module.calls.append("preload_dlls")
        print("Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file: No such file or directory")
        warnings.warn("Failed to register bundled CUDA plugin EP", stacklevel=1)

    module.preload_dlls = preload_dlls
    monkeypatch.setattr(libraries.ctypes, "CDLL", load)
    return module


def test_the_libraries_that_are_missing_are_named_with_what_installs_them_and_nothing_is_printed(
    runtime: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    runtime.there |= {"libcudart.so.13"}
    assert why_not(runtime, CUDA, CARD) == (
        "libcublasLt.so.13, libcublas.so.13 and libcurand.so.10 cannot be loaded. Run: pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )
    assert runtime.calls == ["preload_dlls"]
    assert capfd.readouterr() == ("", "")


def test_the_libraries_are_asked_for_after_the_wheels_were_loaded(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "preload_dlls", lambda: runtime.there.update(NEEDS["cuda"]))
    assert why_not(runtime, CUDA, CARD) is None
    assert onnxruntime_cuda.cudnn_missing()
    runtime.there.add("libcudnn.so.9")
    assert not onnxruntime_cuda.cudnn_missing()


def test_the_tensorrt_provider_names_the_tensorrt_that_it_is_built_for(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.there |= {*NEEDS["cuda"], "libcudnn.so.9"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "11.4.0.106" if name == "tensorrt" else pytest.fail(name))
    assert why_not(runtime, TENSORRT, CARD) == (
        "libnvinfer.so.10 and libnvonnxparser.so.10 cannot be loaded. Run: pip install 'tensorrt<11' "
        "(there is tensorrt 11.4.0.106, which brings another)"
    )
    runtime.cuda_version, runtime.there = "12.8", set()

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert why_not(runtime, TENSORRT, CARD) == (
        "libcublas.so.13, libnvinfer.so.10, libnvonnxparser.so.10, libcudnn.so.9, libc.so.6, libcublasLt.so.13, libcurand.so.10, libcudart.so.13 and "
        "libcuda.so.1 cannot be loaded. Run: pip install 'onnxruntime-gpu[cuda,cudnn]' and pip install 'tensorrt-cu12<11'. "
        "libc.so.6 and libcuda.so.1: from your system's packages, or its NVIDIA driver"
    )


def test_the_wheel_of_tensorrts_libraries_is_imported_first(runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_libs.py").write_text("import onnxruntime_stand_in as it; it.there |= {'libnvinfer.so.10', 'libnvonnxparser.so.10'}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "onnxruntime_stand_in", runtime)
    monkeypatch.delitem(sys.modules, "tensorrt_libs", raising=False)
    runtime.there |= {*NEEDS["cuda"], "libcudnn.so.9"}
    assert why_not(runtime, CUDA, CARD) is None
    assert "tensorrt_libs" not in sys.modules
    assert why_not(runtime, TENSORRT, CARD) is None
    del sys.modules["tensorrt_libs"]


@pytest.mark.parametrize(("driver", "number", "said"), [
    (Driver(None, (), "there is no NVIDIA driver"), 0, "there is no NVIDIA driver"),
    (CARD, 1, "the driver lists 1 GPUs"),
    (Driver((12, 4), CARD.gpus, None), 0, "the driver supports CUDA 12.4, and this onnxruntime-gpu is built for CUDA 13.0. "
     "Update the NVIDIA driver, or, for CUDA 12, run: pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'"),
])  # fmt: skip
def test_a_driver_that_will_not_do_is_told_before_any_library_is_loaded(driver: Driver, number: int, said: str, runtime: Any) -> None:
    assert why_not(runtime, CUDA, driver, number) == said
    assert runtime.calls == []


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"MZ" * 99), lambda path: path.write_bytes(path.read_bytes()[:200])])
def test_where_the_provider_does_not_say_what_it_wants_the_runtimes_words_do(spoil: Any, runtime: Any) -> None:
    spoil(Path(runtime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so")
    assert why_not(runtime, CUDA, CARD) == "libcublasLt.so.13 cannot be loaded. Run: pip install 'onnxruntime-gpu[cuda,cudnn]'"


def test_a_runtime_that_says_nothing_is_tried(runtime: Any) -> None:
    for file in (Path(runtime.__file__).parent / "capi").iterdir():
        file.unlink()
    del runtime.preload_dlls
    runtime.cuda_version = ""
    assert why_not(runtime, CUDA, Driver((12, 4), CARD.gpus, None)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="files of Linux")
def test_real_files_name_their_libraries() -> None:
    file = Path(str(np._core._multiarray_umath.__file__))  # type: ignore[attr-defined]
    found = needed(file)
    assert "libc.so.6" in found
    assert unloadable(["libc.so.6", "libnothing.so.9"]) == ("libnothing.so.9",)


def test_files_of_other_formats_are_no_libraries(tmp_path: Path) -> None:
    path = tmp_path / "x.so"
    for content, said in ((b"", "ends early"), (b"MZ" * 99, "no 64-bit little-endian ELF file"), (elf(("libc.so.6",))[:-99], "ends early")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            needed(path)
    path.write_bytes(elf(()))
    assert needed(path) == ()
