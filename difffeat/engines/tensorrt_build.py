"""TensorRT plans of an artifact's graphs: one adapter for `tensorrt` (10.13 to 11.x) and `tensorrt_rtx`.

Networks are strongly typed: precision is the graph's own, set at export. A plan lies in the artifact under `engines/`, beside a sealed sidecar that
says what it was built from; it is built anew when any of that has changed.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from difffeat.engines import rtx_cards
from difffeat.engines.artifact import Artifact, require_typed, resolve
from difffeat.engines.cuda import Cuda
from difffeat.engines.driver import Driver, Gpu, probe_driver
from difffeat.engines.seal import require_key
from difffeat.engines.tensorrt_compile import compile_graph
from difffeat.engines.tensorrt_plans import FOLDER, TIMING_CACHE, Plan, Profile, Say, TimingCache, existing, is_whole, last_seconds, one_build
from difffeat.engines.tensorrt_plans import sealed as sealed_sidecar
from difffeat.engines.tensorrt_plans import store as store_plan
from difffeat.errors import ConfigError, EngineError, MissingExtra, ProviderMissing
from difffeat.recipe import digest

FORMAT = "difffeat-plan/1"
PACKAGES = {"trt": ("tensorrt", "tensorrt"), "rtx": ("tensorrt_rtx", "rtx")}
"""Engine -> (Python package, extra that installs it)."""
LEVELS = (0, 5)
AHEAD: list[Any] = ["ahead of time", []]
"""What a sidecar names in place of a GPU, for a plan that was built for none in particular."""
_AGAIN = "pip install --force-reinstall 'difffeat[{}]' -c constraints.txt"
_NO_CAPTIONS = 128
"""Longest length in the profile of a graph that has no lengths."""


def build_plan(
    artifact: Artifact | str | Path,
    engine: str,
    profile: Profile | None = None,
    *,
    graph: str = "model",
    level: int | None = None,
    device: int | Literal["ahead"] | None = None,
    say: Say = lambda _: None,
) -> Plan:
    """Compile a graph of an artifact, unless a sealed plan of the same graph, builder, profile and device is there.

    **Arguments:** `engine` `trt` (needs a GPU: plans are tuned on it) or `rtx` (builds on any machine); `level` the builder's optimisation level,
    0..5; `device` number of the GPU, or `ahead` (rtx) for a plan that is for no GPU in particular. None: the first GPU that the engine
    runs on; rtx builds ahead of time where there is none, since such a plan is still good for the GPUs of other machines.

    Raises MissingExtra, ProviderMissing (no GPU, none of that number, or one that rtx does not run on), ConfigError (int8, a level that there is
    not, `ahead` for trt, no key to seal with), OutOfMemory, EngineError (the builder refuses the graph), GraphError.
    """
    opened, path = resolve(artifact, graph)
    require_typed(opened)
    if level is not None and not LEVELS[0] <= level <= LEVELS[1]:
        raise ConfigError(f"the builder's level lies in {LEVELS[0]}..{LEVELS[1]}, got {level}; leave it out for the builder's own.")
    builder, driver = _builder(engine)
    number = _target(engine, driver, device)
    gpu = None if number is None else driver.gpus[number]
    require_key()  # ahead of minutes of work that could then not be sealed
    shape = _fitted(profile or Profile(), opened)
    made_from = {**_made_from(opened, engine, builder, gpu, graph), "profile": asdict(shape), "level": level}
    target = opened.path / FOLDER / f"{digest(made_from)[:16]}.plan"
    if (found := existing(target, made_from)[0]) is not None:  # also where the folder may only be read
        return Plan(target, found, None, "")
    target.parent.mkdir(exist_ok=True, mode=0o700)
    with one_build(target.parent, say):
        found, reason = existing(target, made_from)
        if found is not None:
            return Plan(target, found, None, "")
        say(f"building {target.name} ({engine} {made_from['version']}): {reason}")
        started = time.perf_counter()
        content = _compiled(builder, path, shape, made_from, gpu, number or 0, target.parent, say)
        seconds = time.perf_counter() - started
        return Plan(target, store_plan(target, content, {**made_from, "seconds": round(seconds, 1)}), seconds, reason)


def _compiled(
    builder: Any, path: Path, shape: Profile, made_from: Mapping[str, Any], gpu: Gpu | None, device: int, folder: Path, say: Say
) -> memoryview:
    """The plan's bytes, built on the device where that is not the first, with the kernel timings that lie in the folder."""
    engine, level = made_from["engine"], made_from["level"]
    timings = TimingCache(folder / TIMING_CACHE, {"version": made_from["version"], "device": made_from["device"]}, engine == "trt")
    like = {name: value for name, value in made_from.items() if name not in ("profile", "level")}
    cuda, only = Cuda(device, PACKAGES[engine][1]) if device else None, rtx_cards.built_for(gpu) if engine == "rtx" else None
    try:
        return compile_graph(
            builder, path, shape.shapes, timings, level=level, capability=only, last=last_seconds(folder, like),
            select=(lambda: None) if cuda is None else cuda.select, say=say,
        )  # fmt: skip
    finally:
        if cuda is not None:
            cuda.close()


def find_plan(
    artifact: Artifact, engine: str, batch: int, length: int | None = None, *, graph: str = "model", device: int = 0, wanted: str = ""
) -> Plan | None:
    """A sealed plan of this graph, builder and device that covers the batch, tuned as near to it as there is; None where none may be used.

    One for this GPU comes before one that was built ahead of time, which TensorRT-RTX takes to GPUs that it lists. Of several the one whose SHA-256
    is `wanted` is taken, else always the same one.
    """
    builder, driver = _builder(engine)
    gpu = driver.gpu(device)
    made_from = _made_from(artifact, engine, builder, gpu, graph)
    ahead = {**made_from, "device": AHEAD} if engine == "rtx" and gpu is not None and rtx_cards.takes_ahead(gpu) else made_from
    found: list[Plan] = []
    for beside in sorted((artifact.path / FOLDER).glob("*.json")):
        stored, _ = sealed_sidecar(beside)
        if stored is None or {key: stored.get(key) for key in made_from} not in (made_from, ahead):
            continue
        if Profile(**stored["profile"]).covers(batch, length):
            found.append(Plan(beside.with_suffix(".plan"), stored, None, ""))
    found.sort(key=lambda plan: _rank(plan, batch, wanted))
    return next((plan for plan in found if is_whole(plan.path, plan.sidecar)), None)


def _rank(plan: Plan, batch: int, wanted: str) -> tuple[Any, ...]:
    stored, profile = plan.sidecar, plan.sidecar["profile"]
    return stored["sha256"] != wanted, stored["device"] == AHEAD, abs(profile["opt_batch"] - batch), profile["max_batch"], plan.path.name


def plan_for(
    artifact: Artifact, engine: str, batch: int, *, graph: str = "model", device: int = 0, wanted: str = "", say: Say = lambda _: None
) -> Plan:
    """A plan that serves batches of up to `batch`, of captions as long as the model takes: found (`wanted` as for `find_plan`), or built on this
    first use. Errors as for `build_plan`.
    """
    longest = longest_caption(artifact)
    found = find_plan(artifact, engine, batch, longest, graph=graph, device=device, wanted=wanted)
    if wanted and (found is None or found.sidecar["sha256"] != wanted):
        say(f"the {graph} plan that the store was begun with (SHA-256 {wanted}) is not in {artifact.path / FOLDER}, or may not be used here")
    if found is not None:
        return found
    captions = "" if longest is None else f" and captions of up to {longest} tokens"
    served = f"batches of {batch}{captions}"
    say(f"no plan serves {served} on this device yet: compiling one, which takes minutes once (difffeat build does it ahead of time)")
    return build_plan(artifact, engine, Profile(opt_batch=batch, max_batch=batch), graph=graph, device=device, say=say)


def longest_caption(artifact: Artifact) -> int | None:
    """Most tokens of a caption that the model takes; None for images."""
    return artifact.recipe.architecture.get("max_length") if artifact.recipe.takes_text else None


def import_builder(engine: str) -> Any:
    """The TensorRT package of an engine. Raises MissingExtra, and EngineError where it is there and cannot be loaded (a library of it is missing)."""
    name, extra = PACKAGES[engine]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise EngineError(f"{name} is installed, and lacks {error.name}. Run: {_AGAIN.format(extra)}") from error
        raise MissingExtra(name, extra, f"The engine {engine!r}") from None
    except (ImportError, OSError) as error:
        raise EngineError(f"{name} is installed, and cannot be loaded: {error}. Run: {_AGAIN.format(extra)}") from error


def _builder(engine: str) -> tuple[Any, Driver]:
    if engine not in PACKAGES:
        raise ConfigError(f"plans are built for trt or rtx, got {engine!r}")
    return import_builder(engine), probe_driver()


def _target(engine: str, driver: Driver, device: int | Literal["ahead"] | None) -> int | None:
    """Number of the GPU that a plan is for; None for a plan that is for none in particular."""
    if device == "ahead":
        if engine != "rtx":
            raise ConfigError("only TensorRT-RTX builds ahead of time: TensorRT tunes a plan on the GPU it is for. Name a GPU, or pass --engine rtx.")
        return None
    if engine == "trt" and driver.problem is not None:
        raise ProviderMissing(
            f"TensorRT tunes a plan on the GPU it is for, and {driver.problem}. Build on the machine that will run it, or --engine rtx."
        )
    if device is None:
        return 0 if engine == "trt" else next((number for number, gpu in enumerate(driver.gpus) if rtx_cards.supported(gpu)), None)
    if (gpu := driver.gpu(device)) is None:
        raise ProviderMissing(f"cuda:{device} was asked for, but the driver lists {len(driver.gpus)} GPUs. Run difffeat doctor.")
    if engine == "rtx":
        rtx_cards.require_supported(gpu, f"cuda:{device}")
    return device


def _fitted(profile: Profile, artifact: Artifact) -> Profile:
    """The profile with lengths no longer than the model takes."""
    longest = longest_caption(artifact)
    if longest is None:
        return replace(profile, min_length=1, opt_length=32, max_length=_NO_CAPTIONS)
    most = min(profile.max_length or longest, longest)
    return replace(profile, min_length=min(profile.min_length, most), opt_length=min(profile.opt_length, most), max_length=most)


def _made_from(artifact: Artifact, engine: str, builder: Any, gpu: Gpu | None, graph: str) -> Mapping[str, Any]:
    """Everything that a plan's bytes depend on, besides profile and level."""
    return {
        "format": FORMAT,
        "engine": engine,
        "version": builder.__version__,
        "device": [gpu.name, list(gpu.capability)] if gpu else AHEAD,
        "graph": graph,
        "graph_digest": artifact.digest,
        "fingerprint": artifact.recipe.fingerprint,
        "precision": artifact.recipe.precision,
    }
