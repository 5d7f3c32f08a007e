"""Which engine to take on a machine, and why: from what its driver, its packages and its CPU say, and from nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from difffeat.engines import rtx_cards
from difffeat.engines.driver import Driver, Gpu

_HALF = (7, 0)
"""First compute capability with units for products in fp16; below it half precision gains nothing."""
_NATIVE = (7, 5)
"""First compute capability that TensorRT 10.13 to 11 supports."""
_TRITON = (7, 0)
"""First compute capability that torch.compile's code generator supports."""
_INT8 = "int8, by difffeat quantize, is faster still, and further from fp32"


@dataclass(frozen=True, kw_only=True)
class Installed:
    """What of each engine is there. `torch_cuda` and `torch_cards`: CUDA version and compute capabilities that torch is built for, as it names them
    (`13.0`; `sm_90`, `compute_120`), empty for torch without CUDA; `ort_cuda_problem` why ONNX Runtime does not run on the GPU, None where it does;
    `bindings` version of cuda-bindings, which run plans, empty where they are not installed.
    """

    torch: bool = False
    torch_cuda: str = ""
    torch_cards: tuple[str, ...] = ()
    ort: bool = False
    ort_cuda_problem: str | None = "onnxruntime is not installed"
    tensorrt: bool = False
    rtx: bool = False
    bindings: str = ""


@dataclass(frozen=True)
class Advice:
    """Options of `difffeat extract` (`engine`, `device`) and of `difffeat export` (`dtype`), and why these."""

    engine: str
    device: str
    dtype: str
    why: str

    def __str__(self) -> str:
        return f"--engine {self.engine} --device {self.device}, of an artifact exported with --dtype {self.dtype}: {self.why}"


def advise(driver: Driver, installed: Installed, cpu_units: frozenset[str] = frozenset()) -> Advice:
    """The fastest engine that runs here, on the first GPU where there is one; else on the CPU.

    `cpu_units`: low precisions (`fp16`, `bf16`) for whose products the CPU has units.
    """
    gpu = driver.gpu(0)
    if gpu is None:
        return _on_cpu(installed, cpu_units, driver.problem or "the NVIDIA driver lists no GPU", "cpu")
    problems: list[str] = []
    for engine, problem, reason in _candidates(gpu, driver, installed):
        if problem is None:
            why = f"{gpu}; {reason}{''.join(f'; {one}' for one in problems)}"
            return Advice(engine, "cuda", "fp16" if gpu.capability >= _HALF else "fp32", why)
        problems.append(problem)
    return _on_cpu(installed, cpu_units, f"no engine is ready for {gpu}; the nearest is {torch_problem(gpu, driver, installed)}", "export")


def _candidates(gpu: Gpu, driver: Driver, installed: Installed) -> list[tuple[str, str | None, str]]:
    """Engine, why it does not run on the GPU (None where it does), what speaks for it; the fastest first.

    For Turing TensorRT-RTX compiles graphs of images in fp16 alone, so torch comes before it there.
    """
    rtx = ("rtx", plans_problem("rtx", gpu, driver, installed), "TensorRT-RTX is for this GPU, and compiles in seconds")
    torch = ("torch", torch_problem(gpu, driver, installed), _of_torch(gpu))
    return [
        ("trt", plans_problem("trt", gpu, driver, installed), "TensorRT tunes a plan for this GPU"),
        *((torch, rtx) if gpu.capability == rtx_cards.TURING else (rtx, torch)),
        ("ort", installed.ort_cuda_problem and f"ort: {installed.ort_cuda_problem}", "ONNX Runtime runs the graph as it is"),
    ]


def _of_torch(gpu: Gpu) -> str:
    if gpu.capability < _TRITON:
        return f"with --no-compile, since triton is for compute capability {_TRITON[0]}.{_TRITON[1]} and later"
    return "torch compiles the graph for this GPU"


def plans_problem(engine: str, gpu: Gpu, driver: Driver, installed: Installed) -> str | None:
    """Why plans of `trt` or `rtx` do not run on a GPU, with what mends it; None where they do."""
    there, extra = (installed.tensorrt, "tensorrt") if engine == "trt" else (installed.rtx, "rtx")
    if engine == "rtx" and not rtx_cards.supported(gpu):
        return "rtx: TensorRT-RTX does not run on this GPU"
    if engine == "trt" and gpu.capability < _NATIVE:
        return f"trt: TensorRT is for compute capability {_NATIVE[0]}.{_NATIVE[1]} and later"
    if not there:
        return f"{engine}: not installed (pip install 'difffeat[{extra}]' -c constraints.txt)"
    if not installed.bindings:
        return f"{engine}: cuda-bindings is not installed (pip install 'difffeat[{extra}]' -c constraints.txt)"
    major = int(installed.bindings.partition(".")[0])
    if driver.version is not None and driver.version[0] < major:
        version = f"{driver.version[0]}.{driver.version[1]}"
        return (
            f"{engine}: cuda-bindings {installed.bindings} is for CUDA {major} and the driver supports {version} "
            f"(update the driver, or pip install 'cuda-bindings<{driver.version[0] + 1}')"
        )
    return None


def torch_problem(gpu: Gpu, driver: Driver, installed: Installed) -> str | None:
    """Why torch does not run on a GPU, with what mends it; None where it does."""
    if not installed.torch:
        return "torch: not installed (pip install 'difffeat[export]' -c constraints.txt)"
    if not installed.torch_cuda:
        return "torch: this one is built without CUDA (install one from PyPI, whose wheels for Linux are for CUDA)"
    if driver.version is not None and driver.version[0] < int(installed.torch_cuda.partition(".")[0]):
        version = f"{driver.version[0]}.{driver.version[1]}"
        mend = f"update the driver, or install a torch for CUDA {driver.version[0]}"
        return f"torch: it is built for CUDA {installed.torch_cuda} and the driver supports {version} ({mend})"
    if not _has_kernels(gpu.capability, installed.torch_cards):
        return f"torch: it is built for {', '.join(installed.torch_cards)} and not for this GPU (install another version of torch)"
    return None


def _has_kernels(capability: tuple[int, int], cards: tuple[str, ...]) -> bool:
    """Whether there is code for a GPU: machine code (sm_) of its own generation, or an intermediate form (compute_), that is no newer.

    Of an architecture with the letter a (sm_90a) the code runs on that one alone.
    """
    if not cards:  # torch does not say
        return True
    for card in cards:
        kind, _, number = card.partition("_")
        digits = number.rstrip("af")
        has = (int(digits[:-1]), int(digits[-1]))
        same = has == capability if number.endswith("a") else has[0] == capability[0] and has <= capability
        if same or (kind == "compute" and number == digits and has <= capability):
            return True
    return False


def _on_cpu(installed: Installed, cpu_units: frozenset[str], why: str, extra: str) -> Advice:
    """`extra` that is to be installed first where no engine is there."""
    if installed.torch and "bf16" in cpu_units:
        return Advice("torch", "cpu", "bf16", f"{why}; this CPU has units for bf16, which ONNX Runtime does not use ({_INT8})")
    if installed.ort:
        return Advice("ort", "cpu", "fp32", f"{why}; on this CPU ONNX Runtime is the fastest in fp32 ({_INT8})")
    if installed.torch:
        return Advice("torch", "cpu", "fp32", f"{why}; ONNX Runtime would be faster in fp32 (pip install 'difffeat[cpu]' -c constraints.txt)")
    return Advice("ort", "cpu", "fp32", f"{why}; no engine is installed yet (pip install 'difffeat[{extra}]' -c constraints.txt)")
