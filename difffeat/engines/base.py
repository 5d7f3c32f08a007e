"""What runs a graph: the `Engine` protocol, and the artifact it is opened from.

An engine is opened with `with`; it declares its inputs and outputs and never changes them:

    with open_engine("artifacts/dit-b12-t30", engine="ort") as engine:
        features = engine.run({"pixels": pixels, "noise": noise})["b12"]     # float32 [B, D]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np

from difffeat.errors import BadFeed
from difffeat.recipe import GraphRecipe


@dataclass(frozen=True)
class TensorSpec:
    """Name, NumPy type and shape of one input or output. A `str` in `shape` is a dynamic axis (`batch`, `length`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@runtime_checkable
class Engine(Protocol):
    """A graph that is ready to run."""

    name: str
    """`torch`, `ort`, `trt` or `rtx`."""
    device: str
    """Where it really runs: `cpu` or `cuda:<n>`."""
    precision: str
    """Precision of the arithmetic: `fp32`, `fp16` or `bf16`. Outputs are float32 whatever this says."""
    recipe: GraphRecipe
    digest: str
    """SHA-256 of the graph file(s) it was opened from."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What `run` must be given, by name."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What it gives back, by name."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one batch. Returned arrays belong to the caller.

        Raises BadFeed (missing, surplus, wrong shape or type) and OutOfMemory.
        """
        ...


def check_feeds(specs: Mapping[str, TensorSpec], feeds: Mapping[str, np.ndarray]) -> None:
    """Raises BadFeed unless the feeds are what the graph declares; dynamic axes of one name must agree."""
    if missing := sorted(set(specs) - set(feeds)):
        raise BadFeed(f"the graph needs input {', '.join(missing)}; it was given {', '.join(sorted(feeds)) or 'nothing'}")
    if surplus := sorted(set(feeds) - set(specs)):
        raise BadFeed(f"the graph has no input {', '.join(surplus)}; its inputs are {', '.join(specs)}")
    axes: dict[str, int] = {}
    for name, spec in specs.items():
        array = feeds[name]
        if not isinstance(array, np.ndarray) or array.dtype != np.dtype(spec.dtype):
            raise BadFeed(f"{name} must be a NumPy array of {spec.dtype}, got {getattr(array, 'dtype', type(array).__name__)}")
        fits = len(array.shape) == len(spec.shape) and all(
            size == (axes.setdefault(axis, size) if isinstance(axis, str) else axis) for size, axis in zip(array.shape, spec.shape, strict=True)
        )
        if not fits or 0 in array.shape:
            wanted = ", ".join(map(str, spec.shape))
            known = "".join(f" (here {axis} = {size})" for axis, size in axes.items())
            raise BadFeed(f"{name} must have shape [{wanted}]{known}, got {list(array.shape)}")
    if "tokens" in specs and "lengths" in specs:
        _check_text(feeds["tokens"], feeds["lengths"])


def _check_text(tokens: np.ndarray, lengths: np.ndarray) -> None:
    """What would give wrong features without a word: the mean over too many tokens, ids that count from the table's end."""
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise BadFeed(f"lengths must lie in 1..{tokens.shape[1]}, got {lengths.min()}..{lengths.max()}; padded rows are one token long")
    if tokens.min() < 0:
        raise BadFeed(f"tokens must not be negative, got {tokens.min()}")
