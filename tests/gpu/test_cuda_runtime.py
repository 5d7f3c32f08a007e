"""The CUDA runtime through cuda-bindings, as running a plan uses it: pinned memory to the device and back, a captured copy replayed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest

from difffeat.engines.cuda import Cuda
from difffeat.errors import OutOfMemory

SIZE = 1 << 20


@pytest.fixture
def cuda(card: None) -> Iterator[Cuda]:
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("needs cuda-bindings")
    runtime = Cuda(0, "tensorrt")
    yield runtime
    runtime.close()


def content(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, SIZE, dtype=np.uint8)


def test_pinned_memory_goes_to_the_device_and_back(cuda: Cuda) -> None:
    stream, device = cuda.stream(), cuda.device_memory(SIZE)
    (there, first), (back, second) = cuda.pinned(SIZE), cuda.pinned(SIZE)
    first[:] = content(0)
    second[:] = 0
    cuda.upload(device, there, SIZE, stream)
    cuda.download(back, device, SIZE, stream)
    cuda.wait(stream)
    assert np.array_equal(second, content(0))


def test_a_captured_copy_runs_when_it_is_replayed_and_not_before(cuda: Cuda) -> None:
    stream, device = cuda.stream(), cuda.device_memory(SIZE)
    (there, first), (back, second) = cuda.pinned(SIZE), cuda.pinned(SIZE)
    second[:] = 0

    def copies() -> None:
        cuda.upload(device, there, SIZE, stream)
        cuda.download(back, device, SIZE, stream)

    graph = cuda.capture(stream, copies)
    cuda.wait(stream)
    assert not second.any()
    for seed in (1, 2):
        first[:] = content(seed)
        cuda.replay(graph, stream)
        cuda.wait(stream)
        assert np.array_equal(second, content(seed))
    cuda.forget(graph)


def test_more_memory_than_there_is_is_told_as_such(cuda: Cuda) -> None:
    with pytest.raises(OutOfMemory, match=r"cudaMalloc failed on cuda:0"):
        cuda.device_memory(1 << 44)
    assert cuda.device_memory(SIZE)
