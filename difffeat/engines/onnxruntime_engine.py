"""Graphs in ONNX Runtime. The provider that really runs is checked: asked for a GPU and given a CPU is an error, never a slow surprise."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from difffeat.engines import onnxruntime_cuda, winograd
from difffeat.engines.artifact import Artifact, load_proto, read_specs
from difffeat.engines.base import EngineOptions, Submitting, check_feeds
from difffeat.engines.driver import gpu_identity, gpu_number, probe_driver
from difffeat.errors import ConfigError, EngineError, MissingExtra, OutOfMemory, ProviderMissing

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": onnxruntime_cuda.CUDA}
_EXACT = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
"""Of the CUDA provider: fp32 means fp32, and convolutions take the algorithm that a table names, not the one that was fastest in a trial just now."""
_TF32 = "NVIDIA_TF32_OVERRIDE"
_TENSORRT = onnxruntime_cuda.TENSORRT
_MEMORY_WORDS = ("failed to allocate", "out of memory", "bad_alloc", "bad allocation", "status_alloc_failed")


class OrtEngine(Submitting):
    """`Engine` over an ONNX Runtime session.

    **Arguments:** `artifact`; `graph` the file to run; `device` `cpu`, `cuda` or `cuda:<n>`; `threads` for one operator (None: the runtime's choice);
    of the options `tensorrt_provider`, which compiles inside ONNX Runtime (its build wants TensorRT 10) and keeps no plan on disk. It has no option
    against TF32: the process's NVIDIA_TF32_OVERRIDE is set to 0, which holds for all of NVIDIA's libraries in it.

    Raises MissingExtra, ProviderMissing (no such GPU, or a driver or library that is missing or too old), ConfigError (NVIDIA_TF32_OVERRIDE asks for
    TF32), OutOfMemory, EngineError (the runtime refuses the graph).
    """

    name = "ort"

    def __init__(
        self, artifact: Artifact, graph: Path, *, device: str = "cpu", threads: int | None = None, options: EngineOptions | None = None
    ) -> None:
        runtime = import_onnxruntime()
        self.recipe, self.precision = artifact.recipe, artifact.recipe.precision
        self.digest = artifact.digest
        options, model = options or EngineOptions(), load_proto(graph)
        self.inputs, self.outputs = read_specs(model)
        provider, settings = provider_for(device, options)
        available = runtime.get_available_providers()
        if provider not in available:
            raise ProviderMissing(
                f"{provider} was asked for (device {device}), but this onnxruntime offers {', '.join(available)}. "
                "Install difffeat[gpu] in place of difffeat[cpu], or pass --device cpu."
            )
        if provider == _TENSORRT:
            forbid_tf32()
        if provider != _PROVIDERS["cpu"] and (why := onnxruntime_cuda.why_not(runtime, provider, probe_driver(), int(settings["device_id"]))):
            raise ProviderMissing(f"{provider} was asked for (device {device}), but {why}. Or pass --engine torch, or --device cpu.")
        self._runtime = runtime
        filters = winograd.rewrite(model, graph) if options.winograd and provider == _PROVIDERS["cpu"] else {}
        self._rewritten = bool(filters)
        self._session = self._open(graph, provider, settings, threads, (model, filters) if filters else None)
        self.device = self._true_device(provider, settings)
        self.identity: Mapping[str, str] = gpu_identity(self.device) | options.switched("winograd" if self.device == "cpu" else "tensorrt_provider")
        if self.device != "cpu":
            self.overlap()

    def _open(
        self, graph: Path, provider: str, options: dict[str, str], threads: int | None, rewritten: tuple[Any, dict[str, np.ndarray]] | None
    ) -> Any:
        """A session of the file, or of what it was rewritten to: that model and the weights that are not in the file."""
        settings = self._runtime.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.force_spinning_stop", "1")  # between batches its threads would burn the cores that decode
        settings.use_deterministic_compute = provider != _PROVIDERS["cpu"]  # else sums on a GPU may come in any order
        behind = [(_PROVIDERS["cuda"], {**options, **_EXACT})] if provider == _TENSORRT else []
        if threads is not None:
            settings.intra_op_num_threads = threads
        source: str | bytes = str(graph)
        if rewritten is not None:
            model, weights = rewritten
            source = model.SerializeToString()
            settings.add_external_initializers(list(weights), [self._runtime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()])
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
        try:
            providers = [(provider, options), *behind]
            session = self._runtime.InferenceSession(source, settings, providers=providers, enable_fallback=0)  # else it prints, and hides the error
        except Exception as error:  # the runtime's exception classes share no base
            if self.precision == "bf16" and "NOT_IMPLEMENTED" in str(error):
                raise EngineError(f"ONNX Runtime has no bf16 here ({error}). Pass --engine torch, or export with --dtype fp16.") from error
            raise _translated(error, f"ONNX Runtime cannot open {graph}") from error
        session.disable_fallback()
        return session

    def _true_device(self, provider: str, options: dict[str, str]) -> str:
        assert self._session is not None
        running = self._session.get_providers()
        if running[0] != provider:
            raise ProviderMissing(
                f"{provider} was asked for, but the session runs on {running[0]}: the driver or a CUDA library is missing. "
                "Run difffeat doctor, or pass --engine torch, or --device cpu."
            )
        return "cpu" if provider == _PROVIDERS["cpu"] else f"cuda:{options.get('device_id', '0')}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self._session = None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        if self._session is None:
            raise EngineError("this engine is closed. Open it again with open_engine(...).")
        check_feeds(self.inputs, feeds)
        names = list(self.outputs)
        try:
            results = self._run_bound(feeds, names) if self.device != "cpu" else self._run_pieces(feeds, names)
        except Exception as error:  # the runtime's exception classes share no base
            raise _translated(error, "ONNX Runtime failed") from error
        return {name: np.asarray(result, np.float32) for name, result in zip(names, results, strict=True)}

    def _run_pieces(self, feeds: Mapping[str, np.ndarray], names: list[str]) -> list[np.ndarray]:
        """The batch at once, or `winograd.PIECE` samples at a time where transformed tiles of a whole batch would fall out of every cache."""
        assert self._session is not None
        batched = [name for name, spec in self.inputs.items() if spec.shape and spec.shape[0] == "batch"]
        size = len(feeds[batched[0]]) if batched else 1
        step = winograd.PIECE if self._rewritten else size
        pieces = [{**feeds, **{name: feeds[name][start : start + step] for name in batched}} for start in range(0, size, step)]
        found = [self._session.run(names, piece) for piece in pieces]
        return [np.concatenate(arrays) for arrays in zip(*found, strict=True)] if len(found) > 1 else found[0]

    def _run_bound(self, feeds: Mapping[str, np.ndarray], names: list[str]) -> list[np.ndarray]:
        """Inputs uploaded once and outputs kept on the device until all are there: no copy for each operator's sake."""
        assert self._session is not None
        kind, _, number = self.device.partition(":")
        binding, since = self._session.io_binding(), time.perf_counter()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, self._runtime.OrtValue.ortvalue_from_numpy(array, kind, int(number or 0)))
        self.copy_seconds += time.perf_counter() - since
        for name in names:
            binding.bind_output(name, kind, int(number or 0))
        self._session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()


def import_onnxruntime() -> Any:
    """The onnxruntime package, or MissingExtra."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("onnxruntime", "cpu", "The engine 'ort'") from None
    return onnxruntime


def provider_for(device: str, options: EngineOptions) -> tuple[str, dict[str, str]]:
    """Provider and its settings for a device."""
    number = gpu_number(device)
    if options.tensorrt_provider:
        if number is None:
            raise ConfigError("--tensorrt-provider runs on a GPU. Pass --device cuda.")
        return _TENSORRT, {"device_id": str(number)}
    return (_PROVIDERS["cpu"], {}) if number is None else (_PROVIDERS["cuda"], {"device_id": str(number), **_EXACT})


def forbid_tf32() -> None:
    """For NVIDIA's libraries in this process, which read it when they are first used. Raises ConfigError where the environment asks for TF32."""
    if os.environ.setdefault(_TF32, "0") != "0":
        raise ConfigError(f"{_TF32}={os.environ[_TF32]} lets fp32 be computed as TF32. Unset it: with --tensorrt-provider it must be 0.")


def _translated(error: Exception, what: str) -> EngineError:
    text = str(error)
    if "cudnn is unavailable" in text.lower():
        return ProviderMissing(f"{what}: {onnxruntime_cuda.CUDNN}, which convolutions need, cannot be loaded. Run: {onnxruntime_cuda.WHEELS}")
    if isinstance(error, MemoryError) or any(word in text.lower() for word in _MEMORY_WORDS):
        return OutOfMemory(
            f"{what}: out of memory. Finished shards are kept; run again with a smaller --batch-size and --overwrite, or on a larger device."
        )
    return EngineError(f"{what}: {text}")
