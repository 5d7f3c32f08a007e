"""Plans of TensorRT and TensorRT-RTX, run: sealed, on the device they were built for, copies overlapped with compute.

Each slot has an execution context, a stream, and buffers of its own for the profile's largest shapes, pinned on the host's side. A batch is copied
in, computed and copied out in its slot's stream, while the host prepares the next one for the other slot.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from difffeat.engines.artifact import Artifact, load_proto, read_specs, resolve
from difffeat.engines.base import Pending, TensorSpec, check_feeds
from difffeat.engines.cuda import Cuda
from difffeat.engines.driver import gpu_number, probe_driver
from difffeat.engines.rtx_cards import require_supported
from difffeat.engines.tensorrt_build import PACKAGES, import_builder
from difffeat.engines.tensorrt_compile import make_logger, native_error, started
from difffeat.engines.tensorrt_plans import Plan, Profile, read_plan
from difffeat.errors import BadFeed, ConfigError, EngineError, OutOfMemory, ProviderMissing

SLOTS = 2
KEPT_GRAPHS = 8
Feeds = Mapping[str, np.ndarray]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class TensorRtEngine:
    """`Engine` over a sealed plan.

    **Arguments:** `plan` from `build_plan` or `find_plan`; `device` `cuda` or `cuda:<n>`; `cuda_graphs` replays captured CUDA graphs where shapes
    come again; `slots` batches under way at once.

    Raises ProviderMissing (no GPU), MissingExtra, UntrustedFile (the plan is not what was sealed), OutOfMemory, EngineError.
    """

    static_shapes = False

    def __init__(
        self, artifact: Artifact, graph: str, plan: Plan, *, engine: str, device: str = "cuda", cuda_graphs: bool = False, slots: int = SLOTS
    ) -> None:
        self.name, self.recipe, self.precision, self.digest = engine, artifact.recipe, artifact.recipe.precision, artifact.digest
        self.inputs, self.outputs = read_specs(load_proto(resolve(artifact, graph)[1]))
        self.profile, self.depth = Profile(**plan.sidecar["profile"]), slots
        number = require_gpu(engine, device)
        self.device = f"cuda:{number}"
        self.identity: Mapping[str, str] = {"gpu": str(probe_driver().gpus[number]), "plan": plan.identity}
        trt = import_builder(engine)
        content = read_plan(plan)
        self._cuda = Cuda(number, PACKAGES[engine][1])
        self._slots: list[_Slot] = []
        self._turn, self.copy_seconds, self._submitting = 0, 0.0, threading.Lock()
        try:
            self._log = make_logger(trt)  # the runtime does not keep its logger alive
            self._runtime: Any = started(trt.Runtime, self._log)
            self._engine: Any = self._runtime.deserialize_cuda_engine(content)
            if self._engine is None:
                raise native_error(self._log, f"{self.name} cannot load {plan.path}", "Delete it; it is then built anew.")
            self._check_names(plan)
            self._slots = [self._slot(trt, cuda_graphs) for _ in range(slots)]
        except BaseException as error:
            self._release_after(error)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._engine is not None and error is not None:
            self._release_after(error)
        elif self._engine is not None:
            self._release()

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        return self.submit(feeds).result()

    def submit(self, feeds: Feeds) -> Pending:
        """See `Engine.submit`; at most `depth` batches are under way, the oldest is waited for."""
        if self._engine is None:
            raise EngineError("this engine is closed. Open it again with open_engine(...).")
        check_feeds(self.inputs, feeds)
        self._check_profile(feeds)
        self._cuda.select()  # a stage of an extraction runs in a thread of its own, whose current device is the first
        with self._submitting:
            slot = self._slots[self._turn]
            self._turn = (self._turn + 1) % len(self._slots)
            pending = slot.start(feeds)
            self.copy_seconds = sum(slot.copy_seconds for slot in self._slots)
            return pending

    def trial(self) -> contextlib.AbstractContextManager[Any]:
        """See `Engine.trial`: the plan is there already."""
        return contextlib.nullcontext()

    def _slot(self, trt: Any, cuda_graphs: bool) -> _Slot:
        make = self._maker(trt, cuda_graphs)

        def context() -> Any:
            made = make()
            if made is None:
                raise OutOfMemory(
                    f"{self.device} has no room for another execution context ({self._log.told()}). Build a plan with a smaller --max-batch."
                )
            return made

        graphs = KEPT_GRAPHS if cuda_graphs and self.name == "trt" else 0
        return _Slot(self._cuda, context, self.inputs, self.outputs, self.profile, graphs, self._log)

    def _maker(self, trt: Any, cuda_graphs: bool) -> Callable[[], Any]:
        """What makes execution contexts for one slot.

        TensorRT-RTX compiles kernels for a shape when it comes. Left to itself it does so behind the first batches and changes kernels when it is
        done, so that features would depend on how fast that is; here it is done first. It captures CUDA graphs by itself. Native TensorRT wants a
        context for each graph: those of a slot run one after the other, and share the memory of their activations.
        """
        if self.name == "rtx":
            config = self._engine.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if cuda_graphs:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            return lambda: self._engine.create_execution_context(runtime_config=config)
        if not cuda_graphs:
            return self._engine.create_execution_context
        size = max(1, int(self._engine.device_memory_size_v2))
        memory = self._cuda.device_memory(size)

        def sharing() -> Any:
            context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is not None:
                context.set_device_memory(memory, size)
            return context

        return sharing

    def _check_names(self, plan: Plan) -> None:
        found = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        if found != {*self.inputs, *self.outputs}:
            raise EngineError(
                f"{plan.path} has inputs and outputs {sorted(found)}, its graph has {sorted({*self.inputs, *self.outputs})}. Delete it."
            )

    def _check_profile(self, feeds: Feeds) -> None:
        for name, spec in self.inputs.items():
            low, _, high = self.profile.shapes(spec)
            if all(a <= size <= b for a, size, b in zip(low, feeds[name].shape, high, strict=True)):
                continue
            small = any(size < a for a, size in zip(low, feeds[name].shape, strict=True))
            raise BadFeed(
                f"{name} has shape {list(feeds[name].shape)}; this plan was built for {list(low)} to {list(high)}. "
                f"Build another: difffeat build with {'a smaller --min-batch' if small else '--max-batch or --max-length'}."
            )

    def _release(self) -> None:
        """Slots first: their contexts use the engine's memory. Everything is given up even where the device no longer answers."""
        slots, self._slots = self._slots, []
        with contextlib.ExitStack() as stack:
            stack.callback(self._cuda.close)
            stack.callback(self._forget)
            for slot in slots:
                stack.callback(slot.close)
            self._cuda.select()  # TensorRT wants what it made for a device to be given up while that is the current one

    def _release_after(self, error: BaseException) -> None:
        """The same where an error is on its way: what a broken device says when it is given up is noted on it."""
        try:
            self._release()
        except EngineError as second:
            error.add_note(str(second))

    def _forget(self) -> None:
        self._engine = self._runtime = None


class _Slot:
    """One batch's way through the device, and the buffers it goes through.

    **Arguments:** `context` makes an execution context; `graphs` how many shapes are replayed from CUDA graphs: the first ones that come again.
    Others are computed as without, since making a context anew whenever shapes take turns would cost more than it gains.
    """

    def __init__(
        self,
        cuda: Cuda,
        context: Callable[[], Any],
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        profile: Profile,
        graphs: int,
        log: Any,
    ) -> None:
        self._cuda, self._outputs, self._log, self._graphs = cuda, outputs, log, graphs
        self._stream = cuda.stream()
        self._buffers = {name: _Buffer(cuda, spec, profile) for name, spec in (*inputs.items(), *outputs.items())}
        self._make: Callable[[], Any] | None = context
        self._main: _Context | None = self._context(captures=False)
        self._own: dict[Shapes, _Context] = {}
        self._seen: set[Shapes] = set()
        self._pending: Pending | None = None
        self.copy_seconds = 0.0

    def start(self, feeds: Feeds) -> Pending:
        """Put a batch into the stream; the one before it in this slot is finished first."""
        if (pending := self._pending) is not None:
            pending.result()
        shapes = {name: tuple(array.shape) for name, array in feeds.items()}
        context = self._context_for(tuple(shapes.items()))
        context.reshape(shapes)
        since = time.perf_counter()
        for name, array in feeds.items():
            self._buffers[name].write(array, self._stream)
        self.copy_seconds += time.perf_counter() - since
        context.enqueue(self._stream)
        wanted = {name: _sized(spec, shapes, context.shape(name)) for name, spec in self._outputs.items()}
        for name, shape in wanted.items():
            self._buffers[name].fetch(shape, self._stream)
        self._pending = Pending(lambda: self._finish(wanted))
        return self._pending

    def close(self) -> None:
        own = list(self._own.values())
        try:
            self._cuda.wait(self._stream)
            for context in own:
                context.close()
        finally:
            self._own, self._main, self._make = {}, None, None

    def _finish(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        self._cuda.wait(self._stream)
        found = {name: self._buffers[name].read(shape) for name, shape in wanted.items()}
        self._pending = None  # last: until then the next batch of this slot waits, see `Pending`
        return found

    def _context_for(self, shapes: Shapes) -> _Context:
        """The shapes' own one where they are replayed, else the one that takes any."""
        if shapes in self._seen and shapes not in self._own and len(self._own) < self._graphs:
            self._own[shapes] = self._context(captures=True)
        self._seen.add(shapes)
        assert self._main is not None
        return self._own.get(shapes, self._main)

    def _context(self, captures: bool) -> _Context:
        assert self._make is not None
        return _Context(self._cuda, self._make(), self._buffers, self._log, captures)


class _Context:
    """An execution context on a slot's buffers; one that captures is for one set of shapes: a graph is worth nothing once its context has others."""

    def __init__(self, cuda: Cuda, context: Any, buffers: Mapping[str, _Buffer], log: Any, captures: bool) -> None:
        self._cuda, self._context, self._log, self._captures = cuda, context, log, captures
        for name, buffer in buffers.items():
            self._accept(context.set_tensor_address(name, buffer.device), f"an address for {name}")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._runs, self._graph = 0, None

    def reshape(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Set the shapes of the inputs, where they are others than before."""
        if shapes == self._shapes:
            return
        for name, shape in shapes.items():
            self._accept(self._context.set_input_shape(name, shape), f"shape {list(shape)} for {name}")
        self._shapes = shapes

    def shape(self, name: str) -> Any:
        """Of an output, as TensorRT infers it."""
        return self._context.get_tensor_shape(name)

    def enqueue(self, stream: Any) -> None:
        """Compute, or replay. The first run allocates and is not captured."""
        if self._captures and self._runs == 1:
            self._graph = self._cuda.capture(stream, lambda: self._execute(stream))
        if self._graph is not None:
            self._cuda.replay(self._graph, stream)
        else:
            self._execute(stream)
        self._runs += 1

    def close(self) -> None:
        """Free the graph."""
        if self._graph is not None:
            self._cuda.forget(self._graph)
            self._graph = None

    def _execute(self, stream: Any) -> None:
        self._accept(self._context.execute_async_v3(int(stream)), "the batch")

    def _accept(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise native_error(self._log, f"TensorRT refused {what}", "Delete the artifact's engines folder; plans are then built anew.")


class _Buffer:
    """Pinned host memory and device memory of one input or output, at the profile's largest shape."""

    def __init__(self, cuda: Cuda, spec: TensorSpec, profile: Profile) -> None:
        self._cuda, self._dtype = cuda, np.dtype(spec.dtype)
        size = math.prod(profile.shapes(spec)[2]) * self._dtype.itemsize
        self.device = cuda.device_memory(size)
        self._host, self._view = cuda.pinned(size)

    def write(self, array: np.ndarray, stream: Any) -> None:
        np.copyto(self._view[: array.nbytes].view(self._dtype).reshape(array.shape), array)
        self._cuda.upload(self.device, self._host, array.nbytes, stream)

    def fetch(self, shape: tuple[int, ...], stream: Any) -> None:
        self._cuda.download(self._host, self.device, math.prod(shape) * self._dtype.itemsize, stream)

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """A copy: the buffer is used again."""
        return self._view[: math.prod(shape) * self._dtype.itemsize].view(self._dtype).reshape(shape).copy()


def require_gpu(engine: str, device: str) -> int:
    """The device's number. Raises ConfigError (no name of a GPU), and ProviderMissing where the driver has no such GPU, or one that the engine does
    not run on, before anything of TensorRT is touched: that could crash, and a plan would be built for nothing.
    """
    if (number := gpu_number(device)) is None:
        raise ConfigError(f"--engine {engine} runs on a GPU: --device cuda or cuda:<n>, got {device!r}.")
    driver = probe_driver()
    if driver.problem is not None:
        raise ProviderMissing(f"engine {engine} needs an NVIDIA GPU, and {driver.problem}. Use --engine ort, or run difffeat doctor.")
    if (gpu := driver.gpu(number)) is None:
        raise ProviderMissing(f"{device} was asked for, but the driver lists {len(driver.gpus)} GPUs. Run difffeat doctor.")
    if engine == "rtx":
        require_supported(gpu, device)
    return number


def _sized(spec: TensorSpec, shapes: Mapping[str, tuple[int, ...]], told: Any) -> tuple[int, ...]:
    """The true shape of an output, as TensorRT infers it from the inputs' shapes."""
    shape = tuple(int(axis) for axis in told)
    if len(shape) != len(spec.shape) or min(shape, default=1) < 0:
        raise EngineError(f"TensorRT gives output {spec.name} the shape {list(shape)} for inputs {dict(shapes)}. Please report it.")
    return shape
