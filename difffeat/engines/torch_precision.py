"""Products of torch in full precision, and the same from run to run: switched on for a block of code, and then as they were.

torch has two sets of switches for TF32. The old ones (`allow_tf32`, `set_float32_matmul_precision`) and the new ones (`fp32_precision`) keep values
of their own. Where the two differ, reading the old one raises RuntimeError, and torch.compile of torch 2.10 reads the old one of matrix products. So
both are set here, and agree. The old switch of cuDNN stays as it is: torch itself does not read it. Source: `aten/src/ATen/Context.cpp` of torch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
"""A parent comes before its children: an operation that says `none` takes its backend's value, and a backend that says `none` the generic one."""
_OPERATIONS = (("cuda", "matmul"), ("cuda", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv"))
_HALVES = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


@contextlib.contextmanager
def exact_products(tf32: bool = False) -> Iterator[None]:
    """Within the block fp32 products are computed in fp32, sums of fp16 and bf16 products too, and cuDNN takes the same algorithm every time.

    Afterwards every switch is as it was. Blocks may lie within one another and may run in several threads at once: torch has one set of switches for
    the whole process, so the block that was entered last decides, and the last one to end restores.

    **Arguments:** `tf32` lets matrix products and convolutions on CUDA round their fp32 inputs to TF32 (10 bits of mantissa).
    """
    holder = _Holder(tf32)
    _SWITCHES.enter(holder)
    try:
        yield
    finally:
        _SWITCHES.leave(holder)


@dataclass(frozen=True, eq=False)
class _Holder:
    """One block that is being run."""

    tf32: bool


@dataclass(frozen=True)
class _Before:
    """Every switch as it was: values of their own, not those that are inherited."""

    precisions: dict[tuple[str, str], str]
    matmul: str
    reductions: dict[str, Any]
    accumulation: bool
    benchmark: bool
    deterministic: bool


@dataclass
class _Switches:
    """Who holds torch's switches. There is one, because torch has one set for the process."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    holders: list[_Holder] = field(default_factory=list)
    before: _Before | None = None

    def enter(self, holder: _Holder) -> None:
        with self.lock:
            if self.before is None:
                self.before = _read()
                _set(holder.tf32)
            elif self.holders[-1].tf32 != holder.tf32:
                _set(holder.tf32)
            self.holders.append(holder)

    def leave(self, holder: _Holder) -> None:
        with self.lock:
            last = self.holders[-1]
            self.holders.remove(holder)
            if not self.holders:
                before, self.before = self.before, None
                if before is not None:
                    _restore(before)
            elif self.holders[-1].tf32 != last.tf32:
                _set(self.holders[-1].tf32)


_SWITCHES = _Switches()


def _read() -> _Before:
    """Reads the switches. It leaves parents at `none` and operations at `ieee` where that is needed to see them; `_set` follows."""
    import torch

    switches: Any = torch._C
    precisions = {}
    for key in _PARENTS:
        precisions[key] = switches._get_fp32_precision_getter(*key)
        switches._set_fp32_precision_setter(*key, "none")
    precisions |= {key: switches._get_fp32_precision_getter(*key) for key in _OPERATIONS}
    for key in _OPERATIONS:
        if key[1] == "matmul":  # the old switch raises unless the new ones say nothing against it
            switches._set_fp32_precision_setter(*key, "ieee")
    products: Any = torch.backends.cuda.matmul
    return _Before(
        precisions=precisions,
        matmul=switches._get_float32_matmul_precision(),
        reductions={name: _reduction(products, name) for name in _HALVES},
        accumulation=products.allow_fp16_accumulation,
        benchmark=torch.backends.cudnn.benchmark,
        deterministic=torch.backends.cudnn.deterministic,
    )


def _reduction(products: Any, name: str) -> Any:
    """As it can be set again: with its second value, whether the sum may be split, where this torch has one."""
    split = getattr(products, f"{name}_split_k", None)
    return getattr(products, name) if split is None else (getattr(products, name), split)


def _set(tf32: bool) -> None:
    """Operations take their value from their parents where they may: since torch 2.13 cuDNN's has a default that cannot be set again."""
    import torch

    switches: Any = torch._C
    wanted = {"generic": "ieee", "cuda": "tf32" if tf32 else "ieee", "mkldnn": "ieee"}
    for backend, operation in _PARENTS:
        switches._set_fp32_precision_setter(backend, operation, wanted[backend])
    switches._set_cublas_allow_tf32(tf32)
    for backend, operation in _OPERATIONS:
        if switches._get_fp32_precision_getter(backend, operation) != wanted[backend]:
            switches._set_fp32_precision_setter(backend, operation, wanted[backend])
    products: Any = torch.backends.cuda.matmul
    for name in _HALVES:
        setattr(products, name, False)
    products.allow_fp16_accumulation = False
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


def _restore(before: _Before) -> None:
    import torch

    switches: Any = torch._C
    for key in _PARENTS:
        switches._set_fp32_precision_setter(*key, "none")
    switches._set_float32_matmul_precision(before.matmul)  # writes the new switches of both backends too
    for key in _OPERATIONS:
        if switches._get_fp32_precision_getter(*key) != before.precisions[key]:
            switches._set_fp32_precision_setter(*key, before.precisions[key])
    for key in _PARENTS:
        switches._set_fp32_precision_setter(*key, before.precisions[key])
    products: Any = torch.backends.cuda.matmul
    for name, value in before.reductions.items():
        setattr(products, name, value)
    products.allow_fp16_accumulation = before.accumulation
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before.benchmark, before.deterministic
