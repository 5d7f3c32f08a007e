"""The doctor names the engine to take: for many cards, with whatever is installed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from difffeat.engines.driver import Driver, Gpu
from difffeat.workflows.advising import Advice, Installed, advise

CARDS = {
    "Tesla P100": (6, 0), "Tesla V100": (7, 0), "Tesla T4": (7, 5), "NVIDIA A100": (8, 0), "NVIDIA RTX 3090": (8, 6), "NVIDIA RTX 4090": (8, 9),
    "NVIDIA L40S": (8, 9), "NVIDIA H100": (9, 0), "NVIDIA B200": (10, 0), "NVIDIA RTX 5090": (12, 0), "NVIDIA GB10": (12, 1),
}  # fmt: skip
TORCH = Installed(
    torch=True, ort=True, torch_cuda="13.0", ort_cuda_problem="the CPU build",
    torch_cards=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
)  # fmt: skip
"""torch 2.11 for CUDA 13.0, and ONNX Runtime for CPUs."""
PLANS = {
    "tensorrt": {"tensorrt": True, "bindings": "13.0.3"},
    "rtx": {"rtx": True, "bindings": "13.0.3"},
    "both": {"tensorrt": True, "rtx": True, "bindings": "13.0.3"},
}
NO_GPU = Driver(None, (), "there is no NVIDIA driver")


def card(name: str, cuda: tuple[int, int] = (13, 0)) -> Driver:
    return Driver(cuda, (Gpu(name, CARDS[name], 24 << 30),), None)


@pytest.mark.parametrize(("name", "torch", "tensorrt", "rtx", "both"), [
    ("Tesla P100", "ort cpu", "ort cpu", "ort cpu", "ort cpu"),
    ("Tesla V100", "ort cpu", "ort cpu", "ort cpu", "ort cpu"),
    ("Tesla T4", "torch cuda", "trt cuda", "torch cuda", "trt cuda"),
    ("NVIDIA A100", "torch cuda", "trt cuda", "rtx cuda", "trt cuda"),
    ("NVIDIA RTX 3090", "torch cuda", "trt cuda", "rtx cuda", "trt cuda"),
    ("NVIDIA RTX 4090", "torch cuda", "trt cuda", "rtx cuda", "trt cuda"),
    ("NVIDIA L40S", "torch cuda", "trt cuda", "rtx cuda", "trt cuda"),
    ("NVIDIA H100", "torch cuda", "trt cuda", "torch cuda", "trt cuda"),
    ("NVIDIA B200", "torch cuda", "trt cuda", "torch cuda", "trt cuda"),
    ("NVIDIA RTX 5090", "torch cuda", "trt cuda", "rtx cuda", "trt cuda"),
    ("NVIDIA GB10", "torch cuda", "trt cuda", "rtx cuda", "trt cuda"),
])  # fmt: skip
def test_the_engine_for_a_card_and_what_is_installed(name: str, torch: str, tensorrt: str, rtx: str, both: str) -> None:
    for wanted, there in ((torch, {}), (tensorrt, PLANS["tensorrt"]), (rtx, PLANS["rtx"]), (both, PLANS["both"])):
        found = advise(card(name), replace(TORCH, **there))
        assert f"{found.engine} {found.device}" == wanted, there
        assert found.dtype == ("fp16" if found.device == "cuda" else "fp32")
        assert f"{name}, compute capability {CARDS[name][0]}.{CARDS[name][1]}" in found.why


@pytest.mark.parametrize(("name", "changes", "said"), [
    ("NVIDIA H100", {}, r"; torch compiles the graph for this GPU; trt: not installed \(pip install 'difffeat\[tensorrt\]' -c constraints.txt\); "
     r"rtx: TensorRT-RTX does not run on this GPU$"),
    ("NVIDIA RTX 4090", {"rtx": True}, r"rtx: cuda-bindings is not installed \(pip install 'difffeat\[rtx\]' -c constraints.txt\)$"),
    ("NVIDIA RTX 4090", PLANS["rtx"], r"; TensorRT-RTX is for this GPU, and compiles in seconds; trt: not installed"),
    ("NVIDIA H100", PLANS["tensorrt"], r"compute capability 9\.0; TensorRT tunes a plan for this GPU$"),
    ("NVIDIA H100", {"torch_cuda": ""}, r"^no engine is ready for NVIDIA H100, .*; the nearest is torch: this one is built without CUDA"),
    ("Tesla V100", {}, r"the nearest is torch: it is built for sm_75, .* and not for this GPU"),
    ("NVIDIA H100", {"torch": False}, r"the nearest is torch: not installed \(pip install 'difffeat\[export\]' -c constraints.txt\)"),
])  # fmt: skip
def test_the_reason_names_the_card_and_what_keeps_the_faster_engines(name: str, changes: dict[str, Any], said: str) -> None:
    assert re.search(said, advise(card(name), replace(TORCH, **changes)).why)


def test_a_driver_older_than_torch_is_told_and_onnx_runtime_taken_where_it_runs() -> None:
    old = card("NVIDIA A100", (12, 4))
    assert (
        "torch: it is built for CUDA 13.0 and the driver supports 12.4 (update the driver, or install a torch for CUDA 12)" in advise(old, TORCH).why
    )
    found = advise(old, replace(TORCH, ort_cuda_problem=None))
    assert (found.engine, found.device, found.dtype) == ("ort", "cuda", "fp16")


def test_old_cards_gain_nothing_from_half_precision() -> None:
    assert advise(card("Tesla P100"), replace(TORCH, torch_cards=("sm_60",))) == Advice(
        "torch", "cuda", "fp32", "Tesla P100, compute capability 6.0; with --no-compile, since triton is for compute capability 7.0 and later; "
        "trt: TensorRT is for compute capability 7.5 and later; rtx: TensorRT-RTX does not run on this GPU",
    )  # fmt: skip


@pytest.mark.parametrize(("cards", "name", "runs"), [
    (("sm_80",), "NVIDIA RTX 4090", True),  # of the same generation, and no newer
    (("sm_89",), "NVIDIA A100", False),
    (("sm_90",), "NVIDIA B200", False),
    (("sm_90", "compute_90"), "NVIDIA B200", True),  # compiled when it is loaded
    (("sm_100a",), "NVIDIA B200", True),
    (("sm_120a", "compute_120a"), "NVIDIA GB10", False),
    (("sm_120f",), "NVIDIA GB10", True),
    ((), "NVIDIA H100", True),
])  # fmt: skip
def test_torch_runs_on_the_cards_that_it_has_code_for(cards: tuple[str, ...], name: str, runs: bool) -> None:
    assert (advise(card(name), replace(TORCH, torch_cards=cards)).engine == "torch") is runs


@pytest.mark.parametrize(("changes", "units", "engine", "dtype", "said"), [
    ({}, {"bf16"}, "torch", "bf16", r"there is no NVIDIA driver; this CPU has units for bf16"),
    ({}, {"bf16", "fp16"}, "torch", "bf16", r"units for bf16"),
    ({}, set(), "ort", "fp32", r"ONNX Runtime is the fastest in fp32 \(int8, by difffeat quantize, is faster still"),
    ({"torch": False}, set(), "ort", "fp32", r"ONNX Runtime is the fastest"),
    ({"ort": False}, set(), "torch", "fp32", r"ONNX Runtime would be faster in fp32 \(pip install 'difffeat\[cpu\]' -c constraints.txt\)"),
    ({"ort": False, "torch": False}, set(), "ort", "fp32", r"no engine is installed yet \(pip install 'difffeat\[cpu\]' -c constraints.txt\)"),
])  # fmt: skip
def test_without_a_gpu_the_cpus_units_decide(changes: dict[str, Any], units: set[str], engine: str, dtype: str, said: str) -> None:
    found = advise(NO_GPU, replace(TORCH, **changes), frozenset(units))
    assert (found.engine, found.device, found.dtype) == (engine, "cpu", dtype)
    assert re.search(said, found.why)


def test_advice_reads_as_options() -> None:
    assert str(Advice("torch", "cuda", "fp16", "why")) == "--engine torch --device cuda, of an artifact exported with --dtype fp16: why"
