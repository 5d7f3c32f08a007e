"""The machine's measured matrix rate: what every share of it is a share of."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from difffeat.benchmarks.timing import device_seconds, on_card
from difffeat.engines.torch_precision import exact_products

REPEATS = 7
SIZES = {"cpu": (256, 1024, 2048), "cuda": (4096, 8192)}
LONGEST_S = 0.5  # of one product: a CPU without half-precision units multiplies halves a thousand times slower than floats


def matrix_rate(threads: int, device: str = "cpu", precision: str = "fp32") -> float:
    """Best rate of square matrix products in torch, in FLOP/s, over a few sizes: on a CPU from the fastest of `REPEATS` products, on a card from the
    median of many, warmed up and timed by `device_seconds` as everything on a card is.

    What else runs on the machine slows single products on a CPU, and a ceiling must not be lower for it. In a type that this CPU has no units for, a
    size is left out whose product would take longer than `LONGEST_S` at the rate found so far.

    **Arguments:** `device` `cpu` or `cuda[:n]`; `precision` `fp32`, `fp16` or `bf16`. TF32 is off, and sums are in fp32.
    """
    import torch

    from difffeat.export.precision import cpu_computes

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    slow, best = device == "cpu" and not cpu_computes(precision), 0.0
    for size in SIZES[device.partition(":")[0]]:
        if slow and best and 2 * size**3 / best > LONGEST_S:
            break
        with exact_products():
            best = max(best, _rate(torch, size, device, dtype))
    return best


def int8_rate(threads: int, size: int = 2048) -> float:
    """Rate of a square product of uint8 and seven-bit int8 in ONNX Runtime on the CPU, in operations/s, the fastest of `REPEATS`.

    Without VNNI it may be no more than the fp32 rate: then int8 cannot gain anything on this machine.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.Generator(np.random.Philox(0))
    weight = numpy_helper.from_array(rng.integers(-64, 64, (size, size)).astype(np.int8), "b")
    shape = [size, size]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("c", TensorProto.INT32, shape)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    feeds = {"a": rng.integers(0, 256, (size, size), dtype=np.uint8)}
    seconds = []
    for _ in range(REPEATS + 2):
        started = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[2:])


def _rate(torch: Any, size: int, device: str, dtype: Any) -> float:
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))  # zeros would run faster than work does
    if on_card(device):
        return 2 * size**3 / device_seconds(lambda: torch.matmul(a, b), device).median
    seconds = []
    for _ in range(REPEATS + 2):
        started = time.perf_counter()
        torch.matmul(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[2:])
