"""Products in low precision: by the CPU's own units where it has them, in fp32 and rounded once where it has not, to the same result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from difffeat.export import layers
from difffeat.export.layers import Affine


@pytest.mark.parametrize("units", [frozenset(), frozenset({torch.bfloat16, torch.float16})], ids=["rounded", "units"])
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=["bf16", "fp16"])
def test_a_product_is_rounded_once(units: frozenset[torch.dtype], dtype: torch.dtype, step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "CPU_TYPES", units)
    generator = torch.Generator().manual_seed(0)
    affine = Affine(257, 33, bias=False)
    affine.weight.copy_(torch.randn(257, 33, generator=generator))
    affine.to(dtype)
    x = torch.randn(5, 257, generator=generator).to(dtype)
    exact = x.double().numpy() @ affine.weight.double().numpy()
    sums = np.abs(x.double().numpy()) @ np.abs(affine.weight.double().numpy()) * 257 * 2.0**-24  # of fp32 sums in any order
    assert np.all(np.abs(affine(x).double().numpy() - exact) <= step * np.abs(exact) + sums)
    assert affine(x).dtype == dtype


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, {torch.float32}),
        ({"avx2": True, "avx512_bf16": False}, {torch.float32}),
        ({"avx512_fp16": True}, {torch.float32}),  # multiplies, but sums in fp16
        ({"avx512_bf16": True}, {torch.float32, torch.bfloat16}),
        ({"amx_bf16": True, "amx_fp16": True}, {torch.float32, torch.bfloat16, torch.float16}),
    ],
)
def test_units_are_those_that_torch_tells(known: dict[str, Any], expected: set[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert layers.cpu_types() == expected


def test_a_torch_that_does_not_tell_is_taken_to_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert layers.cpu_types() == {torch.float32}
