"""Products in full precision for a block of code: whatever API set the switches before, they hold within and are as they were afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from difffeat.engines.torch_precision import exact_products

SWITCHES: Any = torch._C
BACKENDS: Any = torch.backends
PRODUCTS: Any = torch.backends.cuda.matmul
KEYS = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")]
REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


def state() -> dict[str, Any]:
    """Every switch as torch would read it now, with what reading the old ones says."""
    found: dict[str, Any] = {f"{backend}.{op}": SWITCHES._get_fp32_precision_getter(backend, op) for backend, op in [("generic", "all"), *KEYS]}
    for name in ("_get_cublas_allow_tf32", "_get_cudnn_allow_tf32", "_get_float32_matmul_precision"):
        try:
            found[name] = getattr(SWITCHES, name)()
        except RuntimeError as error:
            found[name] = str(error)[:50]
    found |= {name: (getattr(PRODUCTS, name), getattr(PRODUCTS, f"{name}_split_k", None)) for name in REDUCTIONS}
    return found | {
        "accumulation": PRODUCTS.allow_fp16_accumulation,
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.backends.cudnn.deterministic,
    }


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """What a test sets is put back by torch's own setters; cuDNN's own default, which cannot be, is left before."""
    put_back()
    yield
    put_back()


def put_back() -> None:
    for backend, op in KEYS:
        SWITCHES._set_fp32_precision_setter(backend, op, "none")
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for name in REDUCTIONS:
        setattr(PRODUCTS, name, True)
    PRODUCTS.allow_fp16_accumulation = False
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = False


def new_for_one(backend: str, op: str, value: str) -> Callable[[], None]:
    return lambda: SWITCHES._set_fp32_precision_setter(backend, op, value)


def both() -> None:
    """What raises in many libraries: the old switch off, the new one on."""
    PRODUCTS.allow_tf32 = False
    PRODUCTS.fp32_precision = "tf32"


BEFORE: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "old, on": lambda: (setattr(PRODUCTS, "allow_tf32", True), setattr(torch.backends.cudnn, "allow_tf32", True)),
    "old, off": lambda: (setattr(PRODUCTS, "allow_tf32", False), setattr(torch.backends.cudnn, "allow_tf32", False)),
    "old, high": lambda: torch.set_float32_matmul_precision("high"),
    "old, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "new, all tf32": new_for_one("generic", "all", "tf32"),
    "new, all bf16": new_for_one("generic", "all", "bf16"),
    "new, all ieee": new_for_one("generic", "all", "ieee"),
    "new, cuda tf32": new_for_one("cuda", "all", "tf32"),
    "new, matmul tf32": new_for_one("cuda", "matmul", "tf32"),
    "new, conv tf32": new_for_one("cuda", "conv", "tf32"),
    "new, conv ieee": new_for_one("cuda", "conv", "ieee"),
    "new, CPU bf16": new_for_one("mkldnn", "matmul", "bf16"),
    "both": both,
    "the rest": lambda: (
        setattr(PRODUCTS, "allow_fp16_reduced_precision_reduction", False),
        setattr(PRODUCTS, "allow_fp16_accumulation", True),
        setattr(torch.backends.cudnn, "benchmark", True),
    ),
}


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("before", BEFORE)
def test_the_switches_hold_within_and_are_restored_whatever_api_was_used_before(before: str, tf32: bool) -> None:
    BEFORE[before]()
    found = state()
    with exact_products(tf32):
        within = state()
        assert {within[f"cuda.{op}"] for op in ("matmul", "conv")} == {"tf32" if tf32 else "ieee"}
        assert {within[f"mkldnn.{op}"] for op in ("matmul", "conv")} == {"ieee"}
        assert within["_get_cublas_allow_tf32"] is tf32  # torch.compile reads it in some versions, and it raises where the two APIs differ
        assert within["_get_cudnn_allow_tf32"] is tf32
        assert within["_get_float32_matmul_precision"] == ("high" if tf32 else "highest")
        assert [within[name][0] for name in REDUCTIONS] == [False, False]
        assert (within["accumulation"], within["benchmark"], within["deterministic"]) == (False, False, True)
    assert state() == found


@pytest.mark.parametrize("before", BEFORE)
def test_what_is_inherited_is_inherited_afterwards(before: str) -> None:
    """A value that an operation took from its parent must not become the operation's own."""

    def follows() -> list[dict[str, Any]]:
        seen = []
        for key in (("generic", "all"), ("cuda", "all")):
            kept = SWITCHES._get_fp32_precision_getter("generic", "all") if key[0] == "generic" else "none"
            for value in ("ieee", "tf32"):
                SWITCHES._set_fp32_precision_setter(*key, value)
                seen.append(state())
            SWITCHES._set_fp32_precision_setter(*key, kept)
        return seen

    BEFORE[before]()
    expected = follows()
    BEFORE[before]()
    with exact_products():
        pass
    assert follows() == expected


def test_they_are_restored_after_an_error() -> None:
    torch.set_float32_matmul_precision("high")
    found = state()
    with pytest.raises(ValueError, match="enough"), exact_products():
        raise ValueError("enough")
    assert state() == found


def test_a_block_within_a_block_decides_and_gives_back() -> None:
    with exact_products():
        with exact_products(tf32=True):
            assert PRODUCTS.fp32_precision == "tf32"
        assert PRODUCTS.fp32_precision == "ieee"


def test_a_thread_that_ends_first_does_not_end_it_for_another() -> None:
    torch.set_float32_matmul_precision("high")
    found, entered, leave = state(), threading.Event(), threading.Event()

    def other() -> None:
        with exact_products():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    with exact_products():
        leave.set()
        thread.join()
        assert PRODUCTS.fp32_precision == "ieee"
    assert state() == found


def test_torch_exports_and_compiles_within() -> None:
    """Both read the old switches, which raise where the new ones differ."""
    module, x = torch.nn.Conv2d(3, 4, 3).eval(), torch.ones(1, 3, 8, 8)
    for tf32 in (False, True):
        with exact_products(tf32), torch.no_grad():
            torch.export.export(module, (x,))
            assert BACKENDS.cudnn.conv.fp32_precision == ("tf32" if tf32 else "ieee")  # export sets and restores switches of its own
            assert torch.compile(module, backend="eager", dynamic=False)(x).equal(module(x))


def test_a_fresh_process_is_as_it_was() -> None:
    code = """
import torch
from difffeat.engines.torch_precision import exact_products
def seen():
    backends = torch.backends
    return (backends.fp32_precision, backends.cudnn.fp32_precision, backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision,
            backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())
before = seen()
for tf32 in (False, True):
    with exact_products(tf32):
        pass
    assert seen() == before, (tf32, seen(), before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
