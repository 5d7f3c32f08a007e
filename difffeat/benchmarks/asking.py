"""What a benchmark may be asked for: refused before anything is loaded, exported or timed."""

from __future__ import annotations

from collections.abc import Iterable

from difffeat.engines.driver import gpu_number, probe_driver
from difffeat.engines.onnxruntime_engine import import_onnxruntime
from difffeat.engines.tensorrt_build import import_builder
from difffeat.errors import ConfigError, ProviderMissing


def require_counts(**counts: int | None) -> None:
    """Raises ConfigError for an option that counts something and is below 1; None is left to us."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {count}.")


def require_known(option: str, asked: Iterable[str], known: Iterable[str]) -> None:
    """Raises ConfigError for a name that the option does not know, or for none at all."""
    asked, known = tuple(asked), tuple(known)
    if not asked or set(asked) - set(known):
        wrong = ", ".join(map(repr, sorted(set(asked) - set(known)))) or "nothing"
        raise ConfigError(f"{option} takes {', '.join(known)}; got {wrong}.")


def require_family(benchmark: str, model: str, family: str) -> None:
    """Raises ConfigError where a benchmark is not for what a model takes, by its name."""
    takes = {"dit": "images", "plaid": "captions"}
    instead = {"dit": "bench throughput or text", "plaid": "bench throughput, grid or extract"}
    if any(model.startswith(other) for other in takes if other != family):
        raise ConfigError(f"bench {benchmark} is for models of {takes[family]}, and {model} is none. Its figures come from {instead[family]}.")


def require_device(device: str) -> None:
    """Raises ConfigError for what names no device, ProviderMissing for a GPU that torch, the baseline, does not see."""
    number = gpu_number(device)
    if number is None:
        return
    import torch

    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        why = probe_driver().problem or f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        raise ProviderMissing(f"{device} was asked for, but {why}. Pass --device cpu, or run difffeat doctor.")


def require_engine(engine: str, device: str) -> None:
    """Raises ConfigError for what names no device, MissingExtra where the engine's package is not installed, ProviderMissing where the driver lists
    no such GPU or this ONNX Runtime has no CUDA. What torch sees is for `require_device`.
    """
    number = gpu_number(device)
    if number is None or engine == "torch":
        return
    if engine == "ort":
        offered = import_onnxruntime().get_available_providers()
        if "CUDAExecutionProvider" not in offered:
            raise ProviderMissing(
                f"{device} was asked for, but this onnxruntime offers {', '.join(offered)}. "
                "Install difffeat[gpu] in place of difffeat[cpu], or pass --engine torch or --device cpu."
            )
    else:
        import_builder(engine)
    driver = probe_driver()
    if driver.problem is not None or number >= len(driver.gpus):
        why = driver.problem or f"the driver lists {len(driver.gpus)} GPUs"
        raise ProviderMissing(f"{device} was asked for, but {why}. Pass --device cpu, or run difffeat doctor.")


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas, with or without blanks around them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
