"""What runs a graph. `open_engine` is the way in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from difffeat.engines.artifact import Artifact, require_typed, resolve
from difffeat.engines.base import Engine, EngineOptions, Pending, TensorSpec
from difffeat.errors import ConfigError

__all__ = ["ENGINES", "Artifact", "Engine", "EngineOptions", "Pending", "TensorSpec", "open_engine"]

ENGINES = ("ort", "torch", "trt", "rtx")
MOST_THREADS = 1024


def open_engine(
    artifact: Artifact | str | Path,
    engine: str = "ort",
    *,
    device: str | None = None,
    threads: int | None = None,
    graph: str = "model",
    options: EngineOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Open a graph of an artifact for running; use the result with `with`.

    **Arguments:** `engine` one of `ENGINES`; `device` `cpu`, `cuda`, `cuda:<n>` (None: `cpu` for ort and torch, `cuda` for trt and rtx); `graph`
    `model`, or `latents` for the VAE beside a graph that takes latents. trt and rtx compile a plan on first use, which `say` is told.

    Raises ConfigError, ProviderMissing, GraphError and EngineError with their subclasses.
    """
    chosen = options or EngineOptions()
    if engine not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ConfigError(f"--threads must lie in 1..{MOST_THREADS}, got {threads}; leave it out for the runtime's choice")
    chosen.require_for(engine)
    opened, path = resolve(artifact, graph)
    if engine != "ort":
        require_typed(opened)
    if engine in ("trt", "rtx"):
        return _tensorrt(opened, engine, graph, "cuda" if device is None else device, chosen, say)
    if engine == "torch":
        from difffeat.engines.torch_engine import TorchEngine

        return TorchEngine(opened, path, device="cpu" if device is None else device, threads=threads, options=chosen, say=say)
    from difffeat.engines.onnxruntime_engine import OrtEngine

    return OrtEngine(opened, path, device="cpu" if device is None else device, threads=threads, options=chosen)


def _tensorrt(artifact: Artifact, engine: str, graph: str, device: str, options: EngineOptions, say: Callable[[str], None]) -> Any:
    from difffeat.engines.tensorrt_build import import_builder, plan_for
    from difffeat.engines.tensorrt_engine import TensorRtEngine, require_gpu

    import_builder(engine)
    number = require_gpu(engine, device)
    plan = plan_for(artifact, engine, options.batch, graph=graph, device=number, wanted=options.plans.get(graph, ""), say=say)
    return TensorRtEngine(artifact, graph, plan, engine=engine, device=device, cuda_graphs=bool(options.cuda_graphs))
