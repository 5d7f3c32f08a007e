"""The doctor says what this machine's units are good for."""

from __future__ import annotations

import pytest
import torch

from difffeat.export import layers
from difffeat.workflows.building import run_doctor


@pytest.mark.parametrize(
    ("units", "said"),
    [
        ((), "cpu"),
        ((torch.bfloat16,), "cpu, which has units for bf16 (export with --dtype bf16)"),
        ((torch.bfloat16, torch.float16), "cpu, which has units for fp16 and bf16 (export with --dtype bf16)"),
    ],
)
@pytest.mark.parametrize("cuda", [True, False])
def test_units_for_low_precision_are_named_with_or_without_a_gpu(
    units: tuple[torch.dtype, ...], said: str, cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "CPU_TYPES", frozenset({torch.float32, *units}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    words = run_doctor()["engines"]["torch"]
    assert words.startswith("runs on cuda and " + said if cuda else f"runs on {said}; not on cuda: ")
