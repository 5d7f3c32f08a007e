"""What runs a graph. `open_engine` is the way in."""

from __future__ import annotations

from pathlib import Path

from difffeat.engines.artifact import Artifact, resolve
from difffeat.engines.base import Engine, TensorSpec
from difffeat.errors import ConfigError, NotYetAvailable

__all__ = ["ENGINES", "Artifact", "Engine", "TensorSpec", "open_engine"]

ENGINES = ("ort", "torch", "trt", "rtx")


def open_engine(
    artifact: Artifact | str | Path, engine: str = "ort", *, device: str = "cpu", threads: int | None = None, graph: str = "model"
) -> Engine:
    """Open a graph of an artifact for running; use the result with `with`.

    **Arguments:** `engine` one of `ENGINES`; `device` `cpu`, `cuda`, `cuda:<n>`; `graph` `model`, or `latents` for the VAE beside a graph that takes
    latents.

    Raises ConfigError, NotYetAvailable, GraphError and EngineError with their subclasses.
    """
    if engine in ("trt", "rtx"):
        raise NotYetAvailable(f"engine {engine!r} (TensorRT) comes with the next release; this one runs --engine ort (CPU, CUDA) and --engine torch.")
    if engine not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}; leave it out for the runtime's choice")
    opened, path = resolve(artifact, graph)
    if engine == "torch":
        from difffeat.engines.eager import TorchEngine

        return TorchEngine(opened, path, device=device, threads=threads)
    from difffeat.engines.onnxruntime_engine import OrtEngine

    return OrtEngine(opened, path, device=device, threads=threads)
