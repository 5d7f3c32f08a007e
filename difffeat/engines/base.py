"""What runs a graph: the `Engine` protocol, and the artifact it is opened from.

An engine is opened with `with`; it declares its inputs and outputs and never changes them:

    with open_engine("artifacts/dit-b12-t30", engine="ort") as engine:
        features = engine.run({"pixels": pixels, "noise": noise})["b12"]     # float32 [B, D]
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from difffeat.errors import BadFeed, ConfigError
from difffeat.recipe import GraphRecipe


@dataclass(frozen=True)
class TensorSpec:
    """Name, NumPy type and shape of one input or output. A `str` in `shape` is a dynamic axis (`batch`, `length`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine runs a graph, where it has a choice. None of it is part of a feature's recipe; what of it may show in a feature's last bits is
    part of the engine's `identity`: a store goes on with the same choice or not at all.

    **Fields:** `compile` torch.compile (torch; None: on a GPU yes, on a CPU no); `channels_last` convolutions with channels innermost (torch); `tf32`
    fp32 products and convolutions in TF32, on a GPU (torch); `tensorrt_provider` ONNX Runtime's own TensorRT provider on CUDA (ort); `cuda_graphs`
    replayed for shapes that come again (trt, rtx, and torch on a GPU; None: torch for small batches, the others never); `batch` largest batch, for a
    plan that is built on first use (trt, rtx); `winograd` the autoencoder's 3 × 3 convolutions in a quarter of their products, on the CPU (ort; see
    `winograd`); `plans` SHA-256 of the plan that is preferred for a graph, by the graph's part (trt, rtx).
    """

    compile: bool | None = None
    channels_last: bool = False
    tf32: bool = False
    tensorrt_provider: bool = False
    cuda_graphs: bool | None = None
    batch: int = 32
    winograd: bool = True
    plans: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*SWITCHES, "winograd"):
            if not isinstance(getattr(self, name), bool | None):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise ConfigError(f"batch must be a whole number of at least 1, got {self.batch!r}.")

    def switched(self, *names: str) -> dict[str, str]:
        """Those of the named switches that are not at their default, as an engine's `identity` has them."""
        default = EngineOptions()
        return {name: str(getattr(self, name)).lower() for name in names if getattr(self, name) != getattr(default, name)}

    def switches(self) -> dict[str, bool]:
        """What was chosen by options of the command line, by their names here."""
        default = EngineOptions()
        return {name: getattr(self, name) for name in SWITCHES if getattr(self, name) != getattr(default, name)}

    def require_for(self, engine: str) -> None:
        """Raises ConfigError when an option is set that this engine does not have."""
        for option in self.switches():
            if engine not in SWITCHES[option]:
                owners = ", ".join(SWITCHES[option])
                raise ConfigError(f"--{option.replace('_', '-')} is for --engine {owners}; this is {engine}. Leave it out.")


SWITCHES = {
    "compile": ("torch",),
    "channels_last": ("torch",),
    "tf32": ("torch",),
    "tensorrt_provider": ("ort",),
    "cuda_graphs": ("torch", "trt", "rtx"),
}
"""Those of `EngineOptions` that are options of the command line -> the engines that have them."""


def recorded_switches(engine: Mapping[str, str]) -> dict[str, bool]:
    """The switches that an engine's `identity` has, by their names in `EngineOptions`."""
    return {name: engine[name] == "true" for name in SWITCHES if engine.get(name) in ("true", "false")}


class Pending:
    """A batch under way. It may be asked for by several threads: whoever needs its buffers waits for whoever is reading them."""

    def __init__(self, finish: Callable[[], dict[str, np.ndarray]]) -> None:
        self._finish: Callable[[], dict[str, np.ndarray]] | None = finish
        self._found: dict[str, np.ndarray] = {}
        self._reading = threading.Lock()

    def result(self) -> dict[str, np.ndarray]:
        """Its outputs, as `Engine.run` returns them; waits until they are there."""
        with self._reading:
            if self._finish is not None:
                self._found, self._finish = self._finish(), None
            return self._found


class Submitting:
    """`Engine.submit` over `run`: computed at once, or, after `overlap`, by a thread of its own while the host prepares the next batch."""

    depth = 1
    copy_seconds = 0.0
    static_shapes = False
    identity: Mapping[str, str] = MappingProxyType({})
    _worker: ThreadPoolExecutor | None = None

    def overlap(self) -> None:
        """For devices other than the CPU: `run` waits there without Python's lock."""
        self._worker, self.depth = ThreadPoolExecutor(1, "engine"), 2

    def submit(self: Any, feeds: Mapping[str, np.ndarray]) -> Pending:
        """See `Engine.submit`."""
        if self._worker is not None:
            return Pending(self._worker.submit(self.run, feeds).result)
        found = self.run(feeds)
        return Pending(lambda: found)

    def trial(self) -> contextlib.AbstractContextManager[Any]:
        """See `Engine.trial`."""
        return contextlib.nullcontext()

    def stop(self) -> None:
        """Wait for what is under way. What is submitted afterwards goes to `run`, which says that the engine is closed."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None


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
    identity: Mapping[str, str]
    """What else the bytes of its features depend on, by name: GPU, plan, switches that are not at their default. Empty for a plain run on a CPU."""
    depth: int
    """Batches that may be under way at once."""
    copy_seconds: float
    """Seconds that `run` has spent copying to the device so far, where that is told apart from computing; else 0."""

    static_shapes: bool
    """Whether each new shape costs a compilation: whoever has batches of many sizes pads them to one."""

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

    def submit(self, feeds: Mapping[str, np.ndarray]) -> Pending:
        """Begin a batch; up to `depth` may be under way. Outputs come in the order of submission. Errors as for `run`, here or at `result`."""
        ...

    def trial(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, shapes may come that do not come again: nothing is compiled for them. Rates are those of the engine without compilation."""
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
