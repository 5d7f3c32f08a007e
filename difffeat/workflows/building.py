"""`difffeat build` and `difffeat doctor`: compiling engines, and saying what can run here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from difffeat.engines import Artifact, onnxruntime_cuda, rtx_cards
from difffeat.engines.driver import Driver, probe_driver
from difffeat.engines.tensorrt_build import AHEAD, PACKAGES, build_plan, longest_caption
from difffeat.engines.tensorrt_engine import require_gpu
from difffeat.engines.tensorrt_plans import Profile
from difffeat.workflows.advising import Installed, advise, plans_problem, torch_problem

LIBRARIES = (
    "difffeat", "numpy", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "diffusers", "huggingface_hub", "tokenizers", "tensorrt",
    "tensorrt-rtx", "cuda-bindings",
)  # fmt: skip


def run_build(path: Path, *, engine: str, profile: Profile, level: int | None, device: str | None = None, say: Callable[..., None]) -> dict[str, Any]:
    """Compile every graph of an artifact (autoencoder's and denoiser's beside it too); arguments as the command's options.

    `device` None is the first GPU; TensorRT-RTX builds ahead of time where that is none of its own, and where `device` is `cpu`.

    Raises ConfigError, ProviderMissing, and what `build_plan` raises.
    """
    artifact = Artifact.open(path)
    number = _device(engine, device)
    plans = {graph: build_plan(artifact, engine, profile, graph=graph, level=level, device=number, say=say) for graph in artifact.graphs}
    lines = []
    for graph, plan in plans.items():
        how = "was there already, sealed and fresh" if plan.seconds is None else f"built in {plan.seconds:.1f} s ({plan.reason})"
        lines.append(f"{plan.path}: {graph} graph, {artifact.recipe.precision}, {plan.size / 1e6:.1f} MB, {how}")
    if (longest := longest_caption(artifact)) is not None and (profile.max_length or longest) < longest:
        lines.append(f"extract does not take it: its captions may have all {longest} tokens of the model. Leave out --max-length for extract")
    if any(plan.sidecar["device"] == AHEAD for plan in plans.values()):
        lines.append(_ahead(probe_driver()))
    return {
        "artifact": str(artifact.path),
        "plans": {graph: {"path": str(p.path), "seconds": p.seconds, "reason": p.reason, **p.sidecar} for graph, p in plans.items()},
        "text": "\n".join(lines),
    }


def _device(engine: str, device: str | None) -> int | Literal["ahead"] | None:
    """What `build_plan` is asked for. `cpu` hides the GPUs from TensorRT-RTX: the plan is then for those of other machines."""
    if device is None:
        return None
    return "ahead" if engine == "rtx" and device == "cpu" else require_gpu(engine, device)


def _ahead(driver: Driver) -> str:
    """What a plan is that was built for no GPU in particular, and whether the first one here runs it."""
    portable = rtx_cards.listed(tuple(one for one in rtx_cards.CAPABILITIES if one != rtx_cards.TURING))
    told = f"built ahead of time, for GPUs of compute capability {portable}: this proves that the graph compiles, neither its numbers nor its speed"
    gpu = driver.gpu(0)
    if gpu is None or rtx_cards.takes_ahead(gpu):
        return told
    if rtx_cards.supported(gpu):
        return f"{told}. The GPU here ({gpu}) wants a plan of its own: --device cuda"
    return f"{told}. TensorRT-RTX does not run on the GPU here ({gpu}): extract with --engine torch --device cuda"


def run_doctor() -> dict[str, Any]:
    """Versions, driver, GPUs, for each engine whether it can run here and if not, why and what to do; and which one to take."""
    driver = probe_driver()
    versions = {name: found for name in LIBRARIES if (found := _version(name)) is not None}
    units = _cpu_units()
    installed = _installed(driver)  # asks torch before ONNX Runtime, which loads CUDA's libraries
    engines = {"ort": _ort(installed), "torch": _torch(driver, installed, units), **{name: _tensorrt(name, driver, installed) for name in PACKAGES}}
    advice = advise(driver, installed, units)
    cuda = f"CUDA {driver.version[0]}.{driver.version[1]}" if driver.version else "none"
    lines = [
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}",
        *(f"  {name} {version}" for name, version in versions.items()),
        f"driver: {cuda}{f'; {driver.problem}' if driver.problem else ''}",
        *(f"  {g.name}, compute capability {g.capability[0]}.{g.capability[1]}, {g.memory / 2**30:.0f} GiB" for g in driver.gpus),
        *(f"{name}: {said}" for name, said in engines.items()),
        f"take: {advice}",
    ]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "driver": {"cuda": driver.version, "gpus": [vars(g) for g in driver.gpus], "problem": driver.problem},
        "engines": engines,
        "advice": vars(advice),
        "text": "\n".join(lines),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _installed(driver: Driver) -> Installed:
    """What of each engine is there, asked of the packages themselves."""
    cuda, cards = _torch_cuda()
    return Installed(
        torch=importlib.util.find_spec("torch") is not None,
        torch_cuda=cuda,
        torch_cards=cards,
        ort=importlib.util.find_spec("onnxruntime") is not None,
        ort_cuda_problem=_ort_cuda_problem(driver),
        tensorrt=importlib.util.find_spec(PACKAGES["trt"][0]) is not None,
        rtx=importlib.util.find_spec(PACKAGES["rtx"][0]) is not None,
        bindings=_version("cuda-bindings") or "",
    )


def _torch_cuda() -> tuple[str, tuple[str, ...]]:
    """CUDA version and compute capabilities that torch is built for; empty without torch, or without CUDA in it."""
    if importlib.util.find_spec("torch") is None:
        return "", ()
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a driver that is too old for it; the doctor says so itself
        return torch.version.cuda or "", tuple(torch.cuda.get_arch_list())


def _cpu_units() -> frozenset[str]:
    """Low precisions for whose products the CPU has units, as torch tells; none where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return frozenset()
    from difffeat.export.precision import cpu_computes

    return frozenset(name for name in ("fp16", "bf16") if cpu_computes(name))


def _ort_cuda_problem(driver: Driver) -> str | None:
    """Why ONNX Runtime does not run on the first GPU, with what mends it; None where it does, as far as can be told before a graph is opened."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "not installed (pip install 'difffeat[gpu]' -c constraints.txt)"
    import onnxruntime

    if onnxruntime_cuda.CUDA not in onnxruntime.get_available_providers():
        both = _version("onnxruntime") is not None and _version("onnxruntime-gpu") is not None
        mixed = (
            "onnxruntime and onnxruntime-gpu overwrite each other. Run: pip uninstall onnxruntime onnxruntime-gpu, then "
            "pip install 'difffeat[gpu]' -c constraints.txt"
        )
        return mixed if both else "this is the CPU build; for a GPU install difffeat[gpu] in place of difffeat[cpu]"
    if (why := onnxruntime_cuda.why_not(onnxruntime, onnxruntime_cuda.CUDA, driver)) is not None:
        return why
    return (
        f"{onnxruntime_cuda.CUDNN}, which convolutions need, cannot be loaded. Run: {onnxruntime_cuda.WHEELS}"
        if onnxruntime_cuda.cudnn_missing()
        else None
    )


def _ort(installed: Installed) -> str:
    if not installed.ort:
        return "not installed. Run: pip install 'difffeat[cpu]' -c constraints.txt or, for a GPU, 'difffeat[gpu]'"
    if installed.ort_cuda_problem is None:
        return "runs on cpu and cuda (what really runs is checked at every opening)"
    return f"runs on cpu; not on cuda: {installed.ort_cuda_problem}"


def _torch(driver: Driver, installed: Installed, units: frozenset[str]) -> str:
    if not installed.torch:
        return "not installed. Run: pip install 'difffeat[export]' -c constraints.txt"
    import torch

    low = sorted(units, reverse=True)
    said = f", which has units for {' and '.join(low)} (export with --dtype {low[-1]})" if low else ""
    if torch.cuda.is_available():
        return f"runs on cuda and cpu{said}"
    gpu = driver.gpu(0)
    why = driver.problem if gpu is None else torch_problem(gpu, driver, installed)
    return f"runs on cpu{said}; not on cuda: {(why or 'torch.cuda.is_available() is false').removeprefix('torch: ')}"


def _tensorrt(engine: str, driver: Driver, installed: Installed) -> str:
    """What it can do here: on the first GPU that its plans run on."""
    package, extra = PACKAGES[engine]
    if importlib.util.find_spec(package) is None:
        return f"not installed. Run: pip install 'difffeat[{extra}]' -c constraints.txt"
    if driver.problem is not None:
        return f"builds plans ahead of time (difffeat build); runs none: {driver.problem}" if engine == "rtx" else f"can do nothing: {driver.problem}"
    problems = [plans_problem(engine, gpu, driver, installed) for gpu in driver.gpus]
    if None in problems:
        where = f" on cuda:{problems.index(None)}" if len(problems) > 1 else ""
        images = "; for compute capability 7.5 graphs of images in fp16 alone" if engine == "rtx" and _only_turing(driver) else ""
        return f"builds plans (difffeat build) and runs them{where}{images}"
    why = str(problems[0]).removeprefix(f"{engine}: ")
    if engine == "rtx" and not any(rtx_cards.supported(gpu) for gpu in driver.gpus):
        other = f"it is for GPUs of compute capability {rtx_cards.listed()}"
        return f"builds plans ahead of time for other machines (difffeat build); runs none here: {why}: {other}"
    return f"runs no plans here: {why}"


def _only_turing(driver: Driver) -> bool:
    return all(gpu.capability == rtx_cards.TURING for gpu in driver.gpus if rtx_cards.supported(gpu))
