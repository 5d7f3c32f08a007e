"""Products of torch in full precision, and the same from run to run: switched on for a block of code, and then as they were.

torch has two sets of switches for TF32. The old ones (`allow_tf32`, `set_float32_matmul_precision`) and the new ones (`fp32_precision`) keep values
of their own. Where the two differ, reading the old one raises RuntimeError, and parts of torch still read it: torch.export, and torch.compile for
some products. So both are set here, and agree. Source: `aten/src/ATen/Context.cpp` of torch.

One thing cannot be restored: in torch 2.13 cuDNN's switches have a default of their own, which gives way to `torch.backends.fp32_precision`. When any
of them has been set, by torch.export too, there is no way back to it. They are left at `tf32`: the default means that where nothing else is set.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
"""A parent comes before its children: an operation that says `none` takes its backend's value, and a backend that says `none` the generic one."""
_CUDNN = (("cuda", "conv"), ("cuda", "rnn"))
_MATMUL = (("cuda", "matmul"), ("mkldnn", "matmul"))
_OPERATIONS = (*_MATMUL, *_CUDNN, ("mkldnn", "conv"))
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
    cudnn: bool
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
    """Reads the switches. Parents and operations are changed where that is needed to see what is behind them; `_set` follows."""
    import torch

    switches: Any = torch._C
    precisions = {}
    for key in _PARENTS:
        precisions[key] = switches._get_fp32_precision_getter(*key)
        switches._set_fp32_precision_setter(*key, "none")
    precisions |= {key: switches._get_fp32_precision_getter(*key) for key in _OPERATIONS}
    for key in _MATMUL:  # with these the old switch can be read whatever it says
        switches._set_fp32_precision_setter(*key, "ieee")
    products: Any = torch.backends.cuda.matmul
    return _Before(
        precisions=precisions,
        matmul=switches._get_float32_matmul_precision(),
        cudnn=_old_cudnn(switches),
        reductions={name: _reduction(products, name) for name in _HALVES},
        accumulation=products.allow_fp16_accumulation,
        benchmark=torch.backends.cudnn.benchmark,
        deterministic=torch.backends.cudnn.deterministic,
    )


def _old_cudnn(switches: Any) -> bool:
    """The old switch of cuDNN. It can be read where the new ones say the same, and raises where they do not."""
    for key in _CUDNN:
        switches._set_fp32_precision_setter(*key, "tf32")
    try:
        return switches._get_cudnn_allow_tf32()
    except RuntimeError:
        return False


def _reduction(products: Any, name: str) -> Any:
    """As it can be set again: with its second value, whether the sum may be split, where this torch has one."""
    split = getattr(products, f"{name}_split_k", None)
    return getattr(products, name) if split is None else (getattr(products, name), split)


def _set(tf32: bool) -> None:
    """Parents first: an operation whose old switch is turned off takes its value from them."""
    import torch

    switches: Any = torch._C
    wanted = {"generic": "ieee", "cuda": "tf32" if tf32 else "ieee", "mkldnn": "ieee"}
    for backend, operation in _PARENTS:
        switches._set_fp32_precision_setter(backend, operation, wanted[backend])
    switches._set_cublas_allow_tf32(tf32)
    switches._set_cudnn_allow_tf32(tf32)
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
    switches._set_float32_matmul_precision(before.matmul)  # the old switches write the new ones too
    switches._set_cudnn_allow_tf32(before.cudnn)
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
