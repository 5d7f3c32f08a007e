"""What the NVIDIA driver says is told in its own words, with what mends it; nothing that it does is raised."""

from __future__ import annotations

import ctypes.util
from typing import Any

import pytest

from difffeat.engines import driver
from difffeat.engines.driver import Gpu, probe_driver


class Library:
    """Stands for libcuda.so.1 with one GPU and a slice of another; `refuses` gives a call's status."""

    words: dict[int, bytes] = {100: b"no CUDA-capable device is detected", 802: b"system not yet initialized"}  # noqa: RUF012
    names = (b"NVIDIA H100 80GB HBM3", b"NVIDIA H100 80GB HBM3 MIG 1g.10gb")

    def __init__(self, gpus: int = 2, **refuses: int) -> None:
        self.gpus, self.refuses = gpus, refuses

    def _answer(self, call: str, reference: Any, value: Any) -> int:
        if call not in self.refuses:
            reference._obj.value = value
        return self.refuses.get(call, 0)

    def cuInit(self, flags: int) -> int:
        return self.refuses.get("cuInit", 0)

    def cuDriverGetVersion(self, version: Any) -> int:
        return self._answer("cuDriverGetVersion", version, 13010)

    def cuDeviceGetCount(self, count: Any) -> int:
        return self._answer("cuDeviceGetCount", count, self.gpus)

    def cuDeviceGet(self, device: Any, index: int) -> int:
        return self._answer("cuDeviceGet", device, 7 + index)  # a handle is no index

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = self.names[device.value - 7]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        return self._answer("cuDeviceGetAttribute", value, {75: 9, 76: 0}[attribute])

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:
        return self._answer("cuDeviceTotalMem_v2", size, (80 << 30, 10 << 30)[device.value - 7])

    def cuGetErrorString(self, status: int, words: Any) -> int:
        words._obj.value = self.words.get(status)
        return 0 if status in self.words else 1


@pytest.fixture(autouse=True)
def _visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_are_named_in_order_and_a_slice_is_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda _: Library())
    found = probe_driver()
    assert (found.version, found.problem) == ((13, 1), None)
    assert found.gpus == (Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30), Gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 10 << 30))
    assert found.gpu(1) == found.gpus[1]
    assert found.gpu(2) is None


@pytest.mark.parametrize(("library", "visible", "problem"), [
    (Library(cuInit=100), None, "the NVIDIA driver finds no usable GPU (cuInit returned 100, no CUDA-capable device is detected; "
     "run nvidia-smi; in a container, start it with GPUs (docker run --gpus all))"),
    (Library(cuInit=100), "", "the NVIDIA driver finds no usable GPU (cuInit returned 100, no CUDA-capable device is detected; "
     "CUDA_VISIBLE_DEVICES is '': unset it)"),
    (Library(cuInit=802), "0", "the NVIDIA driver finds no usable GPU (cuInit returned 802, system not yet initialized; "
     "the machine's NVSwitches are not ready: start the service nvidia-fabricmanager)"),
    (Library(cuInit=12345), None, "the NVIDIA driver finds no usable GPU (cuInit returned 12345)"),
    (Library(cuDeviceGetCount=3), None, "the NVIDIA driver does not describe its GPUs (cuDeviceGetCount returned 3)"),
    (Library(cuDeviceTotalMem_v2=100), None, "the NVIDIA driver does not describe its GPUs (cuDeviceTotalMem_v2 returned 100, "
     "no CUDA-capable device is detected; run nvidia-smi; in a container, start it with GPUs (docker run --gpus all))"),
    (Library(gpus=0), None, "the NVIDIA driver lists no GPU"),
])  # fmt: skip
def test_what_is_wrong_is_told_in_the_drivers_words(library: Library, visible: str | None, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda _: library)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = probe_driver()
    assert (found.gpus, found.problem) == ((), problem)
    assert found.version == (13, 1)  # told also where there is no GPU


def test_a_library_that_is_no_driver_is_told(tmp_path: Any) -> None:
    path = tmp_path / "libcuda.so.1"
    path.write_bytes(b"no library")
    assert str(probe_driver(str(path)).problem).startswith("the NVIDIA driver cannot be loaded (")
    name = ctypes.util.find_library("m")
    assert name is not None
    assert str(probe_driver(name).problem).startswith(f"{name} is no NVIDIA driver (")


def test_a_version_that_is_not_told_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda _: Library(cuDriverGetVersion=3))
    assert probe_driver().version is None
