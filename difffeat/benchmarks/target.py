"""What our graph is timed in: engine, device, precision and threads; combinations that cannot be are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from difffeat.benchmarks.asking import require_counts, require_device, require_engine, require_known
from difffeat.engines import ENGINES, Artifact, Engine, EngineOptions, open_engine
from difffeat.errors import ConfigError

DTYPES = ("fp32", "fp16", "bf16")
ENGINE_NAMES = {"ort": "ONNX Runtime", "torch": "torch", "trt": "TensorRT", "rtx": "TensorRT-RTX"}
GPU_ONLY = ("trt", "rtx")


@dataclass(frozen=True, kw_only=True)
class Target:
    """**Fields:** `engine` one of `ENGINES`; `device` `cpu`, `cuda` or `cuda:<n>`; `dtype` that the graph is exported in; `threads` of the CPU."""

    engine: str = "ort"
    device: str = "cpu"
    dtype: str = "fp32"
    threads: int = 2

    @classmethod
    def checked(cls, *, engine: str, device: str | None, dtype: str, threads: int, eager: bool = False) -> Self:
        """The target that was asked for; where `device` is None the engine's own: `cuda` for trt and rtx, else `cpu`.

        **Arguments:** `eager` says that eager torch runs beside ours on the same device.

        Raises ConfigError for what names nothing or cannot be, MissingExtra and ProviderMissing for what is not here.
        """
        require_counts(threads=threads)
        require_known("--engine", [engine], ENGINES)
        require_known("--dtype", [dtype], DTYPES)
        chosen = ("cuda" if engine in GPU_ONLY else "cpu") if device is None else device
        if engine in GPU_ONLY and chosen == "cpu":
            raise ConfigError(f"--engine {engine} runs on GPUs only. Pass --device cuda, or --engine ort or torch for the CPU.")
        if engine == "ort" and dtype == "bf16" and chosen == "cpu":
            raise ConfigError("ONNX Runtime has no bf16 on CPUs. Pass --engine torch, or --dtype fp32 or fp16.")
        if eager or engine == "torch":
            require_device(chosen)
        require_engine(engine, chosen)
        return cls(engine=engine, device=chosen, dtype=dtype, threads=threads)

    @property
    def label(self) -> str:
        """Ours, as a candidate's name begins."""
        return f"difffeat, {ENGINE_NAMES[self.engine]}"

    def describe(self, artifact: Artifact) -> str:
        """Engine, device, precision of the graph and threads, for a title."""
        return f"{ENGINE_NAMES[self.engine]} on {self.device} in {artifact.recipe.precision}, {self.threads} threads"

    def facts(self, artifact: Artifact) -> dict[str, Any]:
        """The same, for a result's JSON."""
        return {"engine": self.engine, "device": self.device, "precision": artifact.recipe.precision, "threads": self.threads}

    def open(self, artifact: Artifact, stack: ExitStack, *, batch_size: int, graph: str = "model", say: Callable[..., None]) -> Engine:
        """A graph of an artifact, opened in `stack` for batches of this size. Errors as for `open_engine`."""
        options = EngineOptions(batch=batch_size)
        opened = open_engine(artifact, self.engine, device=self.device, threads=self.threads, graph=graph, options=options, say=say)
        return stack.enter_context(opened)
