"""Compiling graphs to TensorRT plans: one adapter for `tensorrt` (10.13 to 11.x) and `tensorrt_rtx`.

Networks are strongly typed: precision is the graph's own, set at export. A plan lies in the artifact under `engines/`, beside a sealed sidecar that
says what it was built from; it is built anew when any of that has changed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from difffeat.engines.artifact import Artifact, load_proto, read_specs, resolve
from difffeat.engines.base import TensorSpec
from difffeat.engines.cuda import Cuda
from difffeat.engines.driver import Driver, probe_driver
from difffeat.engines.seal import is_sealed, seal
from difffeat.errors import ConfigError, EngineError, MissingExtra, ProviderMissing, UntrustedFile
from difffeat.recipe import digest

FORMAT = "difffeat-plan/1"
PACKAGES = {"trt": ("tensorrt", "tensorrt"), "rtx": ("tensorrt_rtx", "rtx")}
"""Engine -> (Python package, extra that installs it)."""
WORKSPACE = 4 << 30
REPORT_SECONDS = 5.0
TIMING_CACHE = "timing.cache"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Smallest, most frequent and largest batch; for text also lengths in tokens."""

    min_batch: int = 1
    opt_batch: int = 32
    max_batch: int = 64
    min_length: int = 1
    opt_length: int = 32
    max_length: int = 128

    def __post_init__(self) -> None:
        for what in ("batch", "length"):
            sizes = [getattr(self, f"{bound}_{what}") for bound in ("min", "opt", "max")]
            if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise ConfigError(f"a profile needs 1 <= min <= opt <= max for its {what}, got {', '.join(map(str, sizes))}")

    def covers(self, batch: int, length: int | None = None) -> bool:
        """Whether batches of this size, and captions of this length, fit."""
        return self.min_batch <= batch <= self.max_batch and (length is None or self.min_length <= length <= self.max_length)

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], ...]:
        """Min, opt and max shape of an input."""
        return tuple(
            tuple(getattr(self, f"{bound}_{axis}") if isinstance(axis, str) else axis for axis in spec.shape) for bound in ("min", "opt", "max")
        )


@dataclass(frozen=True)
class Plan:
    """A compiled engine on disk. `seconds` is None and `reason` empty when it was there already."""

    path: Path
    sidecar: Mapping[str, Any]
    seconds: float | None
    reason: str

    @property
    def identity(self) -> str:
        """File name and SHA-256, as an engine's `identity` has them."""
        return f"{self.path.name} {self.sidecar['sha256']}"

    @property
    def size(self) -> int:
        """Bytes of the plan."""
        return int(self.sidecar["bytes"])


def build_plan(
    artifact: Artifact | str | Path,
    engine: str,
    profile: Profile | None = None,
    *,
    graph: str = "model",
    level: int | None = None,
    device: int = 0,
    say: Say = lambda _: None,
) -> Plan:
    """Compile a graph of an artifact, unless a sealed plan of the same graph, builder, profile and device is there.

    **Arguments:** `engine` `trt` (needs a GPU: plans are tuned on it) or `rtx` (builds on any machine); `level` the builder's optimisation level,
    0..5; `device` number of the GPU, where there is one.

    Raises MissingExtra, ProviderMissing (no GPU), EngineError (the builder refuses the graph), GraphError.
    """
    opened, path = resolve(artifact, graph)
    builder, driver = _builder(engine)
    if engine == "trt" and driver.problem is not None:
        raise ProviderMissing(
            f"TensorRT tunes a plan on the GPU it is for, and {driver.problem}. Build on the machine that will run it, or --engine rtx."
        )
    shape = _fitted(profile or Profile(), opened)
    made_from = {**_made_from(opened, engine, builder, driver, device, graph), "profile": asdict(shape), "level": level}
    target = opened.path / "engines" / f"{digest(made_from)[:16]}.plan"
    found, reason = _existing(target, made_from)
    if found is not None:
        return Plan(target, found, None, "")
    say(f"building {target.name} ({engine} {made_from['version']}): {reason}")
    started = time.perf_counter()
    target.parent.mkdir(exist_ok=True, mode=0o700)
    timings = _TimingCache(target.parent / TIMING_CACHE, {"version": made_from["version"], "device": made_from["device"]}, engine == "trt")
    cuda = Cuda(device, PACKAGES[engine][1]) if device else None
    try:
        content = _compile(builder, path, shape, level, timings, say)
    finally:
        if cuda is not None:
            cuda.close()
    seconds = time.perf_counter() - started
    sidecar = _store(target, content, made_from)
    return Plan(target, sidecar, seconds, reason)


def find_plan(
    artifact: Artifact, engine: str, batch: int, length: int | None = None, *, graph: str = "model", device: int = 0, wanted: str = ""
) -> Plan | None:
    """A sealed plan of this graph, builder and device that covers the batch, tuned as near to it as there is; None where none may be used.

    Of several the one whose SHA-256 is `wanted` is taken, else always the same one.
    """
    builder, driver = _builder(engine)
    made_from = _made_from(artifact, engine, builder, driver, device, graph)
    found: list[Plan] = []
    for beside in sorted((artifact.path / "engines").glob("*.json")):
        stored, _ = _sealed(beside)
        if stored is None or {key: stored.get(key) for key in made_from} != made_from:
            continue
        if Profile(**stored["profile"]).covers(batch, length):
            found.append(Plan(beside.with_suffix(".plan"), stored, None, ""))
    found.sort(key=lambda plan: _rank(plan, batch, wanted))
    return next((plan for plan in found if _is_whole(plan.path, plan.sidecar)), None)


def _rank(plan: Plan, batch: int, wanted: str) -> tuple[Any, ...]:
    profile = plan.sidecar["profile"]
    return plan.sidecar["sha256"] != wanted, abs(profile["opt_batch"] - batch), profile["max_batch"], plan.path.name


def plan_for(
    artifact: Artifact, engine: str, batch: int, *, graph: str = "model", device: int = 0, wanted: str = "", say: Say = lambda _: None
) -> Plan:
    """A plan that serves batches of up to `batch`: found (`wanted` as for `find_plan`), or built on this first use. Errors as for `build_plan`."""
    found = find_plan(artifact, engine, batch, graph=graph, device=device, wanted=wanted)
    if wanted and (found is None or found.sidecar["sha256"] != wanted):
        say(f"the {graph} plan that the store was begun with (SHA-256 {wanted}) is not in {artifact.path / 'engines'}, or may not be used here")
    if found is not None:
        return found
    say(f"no plan serves batches of {batch} on this device yet: compiling one, which takes minutes once (difffeat build does it ahead of time)")
    return build_plan(artifact, engine, Profile(opt_batch=batch, max_batch=batch), graph=graph, device=device, say=say)


def read_plan(plan: Plan) -> bytes:
    """The bytes of a plan, checked against what was sealed in the moment of reading. Raises UntrustedFile."""
    content = plan.path.read_bytes()
    stored, reason = _sealed(plan.path.with_suffix(".json"))
    if stored is None or stored != dict(plan.sidecar) or hashlib.sha256(content).hexdigest() != stored["sha256"]:
        raise UntrustedFile(f"{plan.path} is not the plan that this user sealed ({reason or 'its bytes differ'}). Delete it; it is then built anew.")
    return content


def read_sidecar(path: Path) -> tuple[dict[str, Any] | None, str]:
    """What a plan was built from, if it is whole and sealed by this user; else why it may not be loaded."""
    stored, reason = _sealed(path.with_suffix(".json"))
    if stored is not None and not _is_whole(path, stored):
        return None, f"{path.name} is not the file that was sealed"
    return stored, reason


def import_builder(engine: str) -> Any:
    """The TensorRT package of an engine, or MissingExtra."""
    name, extra = PACKAGES[engine]
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtra(name, extra, f"The engine {engine!r}") from None


def _builder(engine: str) -> tuple[Any, Driver]:
    if engine not in PACKAGES:
        raise ConfigError(f"plans are built for trt or rtx, got {engine!r}")
    return import_builder(engine), probe_driver()


def _fitted(profile: Profile, artifact: Artifact) -> Profile:
    """The profile with lengths no longer than the model takes."""
    longest = artifact.recipe.architecture.get("max_length")
    if longest is None:
        return profile
    return replace(profile, **{f"{bound}_length": min(getattr(profile, f"{bound}_length"), longest) for bound in ("min", "opt", "max")})


def _made_from(artifact: Artifact, engine: str, builder: Any, driver: Driver, device: int, graph: str) -> dict[str, Any]:
    """Everything that a plan's bytes depend on, besides profile and level."""
    gpu = driver.gpus[device] if device < len(driver.gpus) else None
    return {
        "format": FORMAT,
        "engine": engine,
        "version": builder.__version__,
        "device": [gpu.name, list(gpu.capability)] if gpu else ["ahead of time", []],
        "graph": graph,
        "graph_digest": artifact.digest,
        "fingerprint": artifact.recipe.fingerprint,
        "precision": artifact.recipe.precision,
    }


def _existing(target: Path, made_from: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The sidecar of a plan that may be used, or why there is none."""
    beside = target.with_suffix(".json")
    if not target.is_file() or not beside.is_file():
        others = sorted(target.parent.glob("*.plan")) if target.parent.is_dir() else []
        return None, f"none of the {len(others)} plans there is for this graph, builder, profile and device" if others else "there is none yet"
    stored, reason = _sealed(beside)
    if stored is None:
        return None, reason
    if {key: stored.get(key) for key in made_from} != dict(made_from):
        return None, f"{beside.name} is of another build"
    if not _is_whole(target, stored):
        return None, f"{target.name} is not the file that was sealed"
    return stored, ""


def _sealed(beside: Path) -> tuple[dict[str, Any] | None, str]:
    """What a sidecar says, if this user sealed it; else why not."""
    try:
        stored = json.loads(beside.read_bytes())
        mark = stored.pop("seal", None)
        sealed = is_sealed(stored, mark)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None, f"{beside.name} is damaged"
    if not sealed:
        return None, f"{beside.with_suffix('.plan').name} does not carry this user's seal"
    return stored, ""


def _is_whole(target: Path, sidecar: Mapping[str, Any]) -> bool:
    if not target.is_file():
        return False
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sidecar.get("sha256")


def _compile(trt: Any, path: Path, profile: Profile, level: int | None, timings: _TimingCache, say: Say) -> memoryview:
    """Parse, one optimisation profile, build, serialise."""
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        problems = (parser.get_error(index) for index in range(parser.num_errors))
        told = "; ".join(f"node {p.node_name()!r} ({p.node_operator()}): {p.desc()}" for p in problems)
        raise EngineError(f"TensorRT cannot read {path}: {told or log.told()}. Export the artifact again with this version of difffeat.")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # an fp32 graph means fp32
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    if level is not None:
        config.builder_optimization_level = level
    monitor = _monitor(trt, say)
    if monitor is not None:
        config.progress_monitor = monitor
    timings.give(config)
    shapes = builder.create_optimization_profile()
    inputs, _ = read_specs(load_proto(path))
    for name, spec in inputs.items():
        if any(isinstance(axis, str) for axis in spec.shape):
            shapes.set_shape(name, *profile.shapes(spec))
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot build {path}: {log.told()}. Try --dtype fp32, or --engine ort.")
    timings.keep(config)
    return memoryview(plan)


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps errors for our own messages; TensorRT's would go to the terminal."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.kept: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.kept.append(message)

        def told(self) -> str:
            return "; ".join(self.kept[-3:]) or "it does not say why"

    return Log()


def _monitor(trt: Any, say: Say) -> Any:
    """Tells how far a build is and about how long it will take, from the steps of its outermost phase. None where the package has no monitors."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost: tuple[str, int] | None = None
            self.started = self.said = time.monotonic()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if self.outermost is None or not parent:
                self.outermost, self.started = (phase, steps), time.monotonic()

        def step_complete(self, phase: str, step: int) -> bool:
            now = time.monotonic()
            if self.outermost is not None and phase == self.outermost[0] and now - self.said >= REPORT_SECONDS:
                self.said, share = now, (step + 1) / max(1, self.outermost[1])
                say(f"  {phase}: {share:.0%}, about {(now - self.started) * (1 / share - 1):.0f} s left")
            return True

        def phase_finish(self, phase: str) -> None:
            return

    return Monitor()


class _TimingCache:
    """Measured timings of kernels, kept between builds on one device; sealed like a plan, since the library parses them natively."""

    def __init__(self, path: Path, made_for: Mapping[str, Any], wanted: bool) -> None:
        self._path, self._made_for, self._wanted = path, dict(made_for), wanted

    def give(self, config: Any) -> None:
        """Hand what is there to a build."""
        if not self._wanted:
            return
        stored, _ = _sealed(self._path.with_suffix(".json"))
        usable = stored is not None and {key: stored.get(key) for key in self._made_for} == self._made_for and _is_whole(self._path, stored)
        config.set_timing_cache(config.create_timing_cache(self._path.read_bytes() if usable else b""), False)

    def keep(self, config: Any) -> None:
        """Write what a build has measured."""
        if self._wanted and (cache := config.get_timing_cache()) is not None:
            _store(self._path, memoryview(cache.serialize()), self._made_for)


def _store(target: Path, content: memoryview, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """The file, then its sealed sidecar, which is returned; each whole or not there. The folder is the user's alone."""
    sidecar = {**made_from, "bytes": content.nbytes, "sha256": hashlib.sha256(content).hexdigest()}
    target.parent.mkdir(exist_ok=True, mode=0o700)
    sealed = json.dumps({**sidecar, "seal": seal(sidecar)}, indent=2, sort_keys=True).encode() + b"\n"
    for path, data in ((target, content), (target.with_suffix(".json"), sealed)):
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    return sidecar
