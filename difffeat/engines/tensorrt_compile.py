"""The call of TensorRT that compiles: in a thread of its own, so that whoever waits for it hears how far it is, and can stop it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

from difffeat.engines.artifact import load_proto, read_specs
from difffeat.engines.base import TensorSpec
from difffeat.engines.rtx_cards import TURING
from difffeat.errors import EngineError, OutOfMemory

WORKSPACE = 4 << 30
REPORT_SECONDS = 5.0
_MEMORY_WORDS = ("out of memory", "outofmemory", "memoryallocation", "failed to allocate")

Say = Callable[[str], None]
Result = TypeVar("Result")


class Timings(Protocol):
    """Measured timings of kernels, kept between builds."""

    def give(self, config: Any) -> None:
        """Hand what is there to a build."""
        ...

    def keep(self, config: Any) -> None:
        """Write what a build has measured."""
        ...


def compile_graph(
    trt: Any,
    path: Path,
    shapes: Callable[[TensorSpec], tuple[tuple[int, ...], ...]],
    timings: Timings,
    *,
    level: int | None = None,
    capability: tuple[int, int] | None = None,
    select: Callable[[], None] = lambda: None,
    last: float | None = None,
    say: Say = lambda _: None,
) -> memoryview:
    """Parse, one optimisation profile, build, serialise; a line about how far it is at least every `REPORT_SECONDS`.

    **Arguments:** `shapes` min, opt and max shape of an input; `capability` of the GPU that alone is built for, None for the builder's choice;
    `select` makes the GPU the current one of the thread; `last` seconds that a build of a like graph took.

    Raises EngineError (the builder refuses the graph), OutOfMemory. Ctrl-C stops the build.
    """
    progress = Progress()

    def work() -> memoryview:
        select()
        return _built(trt, path, shapes, timings, level, capability, progress)

    def tell(seconds: float) -> None:
        took = "" if last is None else f" (the last build of this graph took {last:.0f} s)"
        say(f"  {seconds:.0f} s: {progress.words()}{took}")

    return told_while(work, progress.stop, tell)


def told_while(work: Callable[[], Result], stop: Callable[[], None], tell: Callable[[float], None]) -> Result:
    """Run `work` in a thread; `tell` how many seconds it runs already, every `REPORT_SECONDS`.

    Whatever ends the waiting (Ctrl-C, or an error of `tell`) calls `stop`, waits for the thread, and is raised.
    """
    started = time.monotonic()
    with ThreadPoolExecutor(1, "build") as pool:
        try:
            running = pool.submit(work)
            while not wait([running], REPORT_SECONDS).done:
                tell(time.monotonic() - started)
            return running.result()
        except BaseException:
            stop()
            raise


class Progress:
    """Phases of a build that are under way, each with the steps it has done, as TensorRT tells them from threads of its own."""

    def __init__(self) -> None:
        self._phases: dict[str, tuple[int, int]] = {}
        self._stopped = False

    def words(self) -> str:
        """The innermost phase under way. Phases are of unlike length, so that a share of one says little about the whole: none is told."""
        phases = list(self._phases.items())
        if not phases:
            return "compiling"
        phase, (done, steps) = phases[-1]
        return f"{phase}, step {done} of {steps}"

    def stop(self) -> None:
        """End the build at its next step."""
        self._stopped = True

    def began(self, phase: str, steps: int) -> None:
        """A phase begins inside of those under way."""
        self._phases[phase] = (0, steps)

    def stepped(self, phase: str, step: int) -> bool:
        """A step of a phase is done; False ends the build."""
        if phase in self._phases:
            self._phases[phase] = (step + 1, self._phases[phase][1])
        return not self._stopped

    def ended(self, phase: str) -> None:
        """A phase is over."""
        self._phases.pop(phase, None)


def _built(
    trt: Any,
    path: Path,
    shapes: Callable[[TensorSpec], tuple[tuple[int, ...], ...]],
    timings: Timings,
    level: int | None,
    capability: tuple[int, int] | None,
    progress: Progress,
) -> memoryview:
    log = make_logger(trt)
    builder = started(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        problems = (parser.get_error(index) for index in range(parser.num_errors))
        told = "; ".join(f"node {p.node_name()!r} ({p.node_operator()}): {p.desc()}" for p in problems)
        raise EngineError(f"TensorRT cannot read {path}: {told or log.told()}. Export the artifact again with this version of difffeat.")
    config = _config(trt, builder, level, capability, progress)
    timings.give(config)
    profile = builder.create_optimization_profile()
    inputs, _ = read_specs(load_proto(path))
    for name, spec in inputs.items():
        if any(isinstance(axis, str) for axis in spec.shape):
            profile.set_shape(name, *shapes(spec))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise native_error(log, f"TensorRT {trt.__version__} cannot build {path}", _advice(capability))
    timings.keep(config)
    return memoryview(plan)


def _advice(capability: tuple[int, int] | None) -> str:
    if capability == TURING:
        return "For compute capability 7.5 TensorRT-RTX compiles graphs of images in fp16 alone: export with --dtype fp16, or take --engine torch."
    return "Export with another --dtype, or take --engine torch."


def _config(trt: Any, builder: Any, level: int | None, capability: tuple[int, int] | None, progress: Progress) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # an fp32 graph means fp32
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    if level is not None:
        config.builder_optimization_level = level
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability[0]}{capability[1]}"), 0)
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, progress)
    return config


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            progress.began(phase, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            return progress.stepped(phase, step)

        def phase_finish(self, phase: str) -> None:
            progress.ended(phase)

    return Monitor()


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps errors for our own messages; TensorRT's would go to the terminal."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.kept: deque[str] = deque(maxlen=3)
            self.warned: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.kept.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warned.append(message)

        def told(self) -> str:
            return "; ".join(self.kept or self.warned) or "it does not say why"

    return Log()


def started(make: Callable[[Any], Result], log: Any) -> Result:
    """A builder or a runtime. Raises EngineError where TensorRT cannot use the GPU (a driver older than it, say): it then warns, and gives none."""
    try:
        return make(log)
    except TypeError as error:  # pybind11's word for a factory that returned nothing
        raise native_error(log, f"TensorRT does not start here ({error})", "Update the NVIDIA driver, and run difffeat doctor.") from error


def native_error(log: Any, what: str, advice: str) -> EngineError:
    """What TensorRT refused, in the words of its log: OutOfMemory where those say so, else EngineError with `advice`."""
    told = log.told()
    if any(word in told.lower() for word in _MEMORY_WORDS):
        return OutOfMemory(f"{what}: the device is out of memory ({told}). Finished shards are kept; free the device, or use a smaller --batch-size.")
    return EngineError(f"{what}: {told}. {advice}")
