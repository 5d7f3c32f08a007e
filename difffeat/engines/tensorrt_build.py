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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from difffeat.engines.artifact import Artifact, load_proto, read_specs, resolve
from difffeat.engines.base import TensorSpec
from difffeat.engines.driver import Driver, probe_driver
from difffeat.engines.seal import is_sealed, seal
from difffeat.errors import ConfigError, EngineError, MissingExtra, ProviderMissing
from difffeat.recipe import digest

FORMAT = "difffeat-plan/1"
PACKAGES = {"trt": ("tensorrt", "tensorrt"), "rtx": ("tensorrt_rtx", "rtx")}
"""Engine -> (Python package, extra that installs it)."""
WORKSPACE = 4 << 30


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
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Compile a graph of an artifact, unless a sealed plan of the same graph, builder, profile and device is there.

    **Arguments:** `engine` `trt` (needs a GPU: plans are tuned on it) or `rtx` (builds on any machine); `level` the builder's optimisation level,
    0..5.

    Raises MissingExtra, ProviderMissing (no GPU), EngineError (the builder refuses the graph), GraphError.
    """
    if engine not in PACKAGES:
        raise ConfigError(f"plans are built for trt or rtx, got {engine!r}")
    opened, path = resolve(artifact, graph)
    builder = _package(engine)
    driver = probe_driver()
    if engine == "trt" and driver.problem is not None:
        raise ProviderMissing(
            f"TensorRT tunes a plan on the GPU it is for, and {driver.problem}. Build on the machine that will run it, or --engine rtx."
        )
    inputs, _ = read_specs(load_proto(path))
    shape = _fitted(profile or Profile(), opened)
    made_from = _made_from(opened, engine, builder, driver, graph, shape, level)
    folder = opened.path / "engines"
    target = folder / f"{digest(made_from)[:16]}.plan"
    found, reason = _existing(target, made_from)
    if found is not None:
        return Plan(target, found, None, "")
    say(f"building {target.name} ({engine} {made_from['version']}): {reason}")
    started = time.perf_counter()
    content = _compile(builder, path, inputs, shape, level)
    seconds = time.perf_counter() - started
    sidecar = {**made_from, "bytes": content.nbytes, "sha256": hashlib.sha256(content).hexdigest()}
    _store(target, content, sidecar)
    return Plan(target, sidecar, seconds, reason)


def _package(engine: str) -> Any:
    name, extra = PACKAGES[engine]
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtra(name, extra, f"The engine {engine!r}") from None


def _fitted(profile: Profile, artifact: Artifact) -> Profile:
    """The profile with lengths no longer than the model takes."""
    longest = artifact.recipe.architecture.get("max_length")
    if longest is None:
        return profile
    bounded = {f"{bound}_length": min(getattr(profile, f"{bound}_length"), longest) for bound in ("min", "opt", "max")}
    return Profile(**{**asdict(profile), **bounded})


def _made_from(artifact: Artifact, engine: str, builder: Any, driver: Driver, graph: str, profile: Profile, level: int | None) -> dict[str, Any]:
    """Everything that a plan's bytes depend on."""
    device = [driver.gpus[0].name, list(driver.gpus[0].capability)] if driver.gpus else ["ahead of time", []]
    return {
        "format": FORMAT,
        "engine": engine,
        "version": builder.__version__,
        "device": device,
        "graph": graph,
        "graph_digest": artifact.digest,
        "fingerprint": artifact.recipe.fingerprint,
        "precision": artifact.recipe.precision,
        "profile": asdict(profile),
        "level": level,
    }


def _existing(target: Path, made_from: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The sidecar of a plan that may be used, or why there is none."""
    beside = target.with_suffix(".json")
    if not target.is_file() or not beside.is_file():
        others = sorted(target.parent.glob("*.plan")) if target.parent.is_dir() else []
        return None, f"none of the {len(others)} plans there is for this graph, builder, profile and device" if others else "there is none yet"
    try:
        stored = json.loads(beside.read_bytes())
        mark = stored.pop("seal", None)
    except (ValueError, AttributeError, RecursionError):
        return None, f"{beside.name} is damaged"
    if not isinstance(stored, dict) or not is_sealed(stored, mark):
        return None, f"{target.name} does not carry this user's seal"
    if {key: stored.get(key) for key in made_from} != dict(made_from):
        return None, f"{beside.name} is of another build"
    with target.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != stored.get("sha256"):
            return None, f"{target.name} is not the file that was sealed"
    return stored, ""


def _compile(trt: Any, path: Path, inputs: Mapping[str, TensorSpec], profile: Profile, level: int | None) -> memoryview:
    """Parse, one optimisation profile, build, serialise."""
    log = _logger(trt)
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
    shapes = builder.create_optimization_profile()
    for name, spec in inputs.items():
        if any(isinstance(axis, str) for axis in spec.shape):
            shapes.set_shape(name, *profile.shapes(spec))
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot build {path}: {log.told()}. Try --dtype fp32, or --engine ort.")
    return memoryview(plan)


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Keeps errors and warnings for the message of our own error; TensorRT's own would go to the terminal."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.kept: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.kept.append(message)

        def told(self) -> str:
            return "; ".join(self.kept[-3:]) or "it does not say why"

    return Log()


def _store(target: Path, content: memoryview, sidecar: Mapping[str, Any]) -> None:
    """The plan, then its sealed sidecar; each whole or not there. The folder is the user's alone."""
    target.parent.mkdir(exist_ok=True, mode=0o700)
    sealed = json.dumps({**sidecar, "seal": seal(sidecar)}, indent=2, sort_keys=True).encode() + b"\n"
    for path, data in ((target, content), (target.with_suffix(".json"), sealed)):
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
