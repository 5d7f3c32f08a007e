"""Which GPUs TensorRT-RTX is for: the one table of them, and the words for those that it refuses."""

from __future__ import annotations

from difffeat.engines.driver import Gpu
from difffeat.errors import ProviderMissing

TURING = (7, 5)
CAPABILITIES = (TURING, (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities for which TensorRT-RTX builds, as its enumeration `ComputeCapability` names them; 9.0 (H100) and 10.0 (B200) are not there."""


def supported(gpu: Gpu) -> bool:
    """Whether TensorRT-RTX runs on a GPU."""
    return gpu.capability in CAPABILITIES


def takes_ahead(gpu: Gpu) -> bool:
    """Whether a GPU runs plans that are built ahead of time, for no GPU in particular: all but Turing's.

    See "CPU-Only AOT and TensorRT-RTX Engines" in the manual of TensorRT-RTX.
    """
    return supported(gpu) and gpu.capability != TURING


def built_for(gpu: Gpu | None) -> tuple[int, int] | None:
    """The compute capability that the builder must be told: its plans leave out Turing unless they are built for it alone."""
    return TURING if gpu is not None and gpu.capability == TURING else None


def listed(capabilities: tuple[tuple[int, int], ...] = CAPABILITIES) -> str:
    """Compute capabilities in words."""
    *first, last = (f"{major}.{minor}" for major, minor in capabilities)
    return f"{', '.join(first)} and {last}"


def require_supported(gpu: Gpu, device: str) -> None:
    """Raises ProviderMissing for a GPU that TensorRT-RTX does not run on, before anything is built for it."""
    if not supported(gpu):
        raise ProviderMissing(
            f"TensorRT-RTX does not run on {device} ({gpu}): it is for GPUs of compute capability {listed()}. "
            f"Use --engine torch --device {device}, or --engine trt after pip install 'difffeat[tensorrt]' -c constraints.txt."
        )
