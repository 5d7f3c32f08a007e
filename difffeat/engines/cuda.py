"""The few calls of the CUDA runtime that running a plan needs, through `cuda.bindings`, every status checked."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from difffeat.errors import EngineError, MissingExtra, OutOfMemory, ProviderMissing

_OLD_DRIVER = "There is no NVIDIA driver, or it is older than cuda-bindings: update it, or, for one of CUDA 12, pip install 'cuda-bindings<13'"


class Cuda:
    """The runtime bound to one device. Whatever it allocates is freed by `close`.

    Raises MissingExtra without the package; it and its methods raise ProviderMissing (no driver, or one older than the package), OutOfMemory and
    EngineError.
    """

    def __init__(self, device: int, extra: str) -> None:
        try:
            self._runtime = importlib.import_module("cuda.bindings.runtime")
        except ImportError:
            raise MissingExtra("cuda-bindings", extra, "Running a plan") from None
        self._device = device
        self._frees: list[tuple[str, Any]] = []
        self.select()

    def select(self) -> None:
        """Make the device the current one of the calling thread."""
        self.call("cudaSetDevice", self._device)

    def call(self, name: str, *arguments: Any) -> Any:
        """One call of the runtime; its results without the status."""
        status, *results = getattr(self._runtime, name)(*arguments)
        if status != self._runtime.cudaError_t.cudaSuccess:
            what = f"{name} failed on cuda:{self._device}: {self._text(status)}"
            if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
                raise OutOfMemory(f"{what}. Finished shards are kept; build a plan with a smaller --max-batch, or free the device.")
            if status == self._runtime.cudaError_t.cudaErrorInsufficientDriver:
                raise ProviderMissing(f"{what}. {_OLD_DRIVER}.")
            raise EngineError(f"{what}. Run difffeat doctor.")
        return results[0] if len(results) == 1 else tuple(results)

    def device_memory(self, size: int) -> int:
        """Address of `size` bytes on the device."""
        address = int(self.call("cudaMalloc", size))
        self._frees.append(("cudaFree", address))
        return address

    def pinned(self, size: int) -> tuple[int, np.ndarray]:
        """Address and uint8 view of `size` bytes of host memory that the device copies without a detour."""
        address = int(self.call("cudaHostAlloc", size, 0))
        self._frees.append(("cudaFreeHost", address))
        return address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def stream(self) -> Any:
        """A stream that does not wait for the default one."""
        handle = self.call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        self._frees.append(("cudaStreamDestroy", handle))
        return handle

    def upload(self, device: int, host: int, size: int, stream: Any) -> None:
        """Host -> device, in the stream's order."""
        self.call("cudaMemcpyAsync", device, host, size, self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def download(self, host: int, device: int, size: int, stream: Any) -> None:
        """Device -> host, in the stream's order."""
        self.call("cudaMemcpyAsync", host, device, size, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def wait(self, stream: Any) -> None:
        """Until everything in the stream is done."""
        self.call("cudaStreamSynchronize", stream)

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """Record what `enqueue()` puts into the stream, without running it; an executable CUDA graph. Free it with `forget`.

        An error of `enqueue` is raised as it is: CUDA only says of it that the recording is spoilt.
        """
        self.call("cudaStreamBeginCapture", stream, self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
        except BaseException as error:
            self._abandon(stream, error)
            raise
        recorded = self.call("cudaStreamEndCapture", stream)
        try:
            return self.call("cudaGraphInstantiate", recorded, 0)
        finally:
            self.call("cudaGraphDestroy", recorded)

    def _abandon(self, stream: Any, because: BaseException) -> None:
        """End a recording that failed, so that the stream can be used and freed; what CUDA says to that is noted on the error."""
        try:
            self.call("cudaGraphDestroy", self.call("cudaStreamEndCapture", stream))
        except EngineError as error:
            because.add_note(str(error))

    def replay(self, graph: Any, stream: Any) -> None:
        """Run a captured graph in the stream's order."""
        self.call("cudaGraphLaunch", graph, stream)

    def forget(self, graph: Any) -> None:
        """Free a captured graph."""
        self.call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Free everything, last first; what cannot be freed does not keep the rest. Raises the first error."""
        errors: list[EngineError] = []
        while self._frees:
            name, what = self._frees.pop()
            try:
                self.call(name, what)
            except EngineError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _text(self, status: Any) -> str:
        _, text = self._runtime.cudaGetErrorString(status)
        return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
