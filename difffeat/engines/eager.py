"""Graphs in PyTorch, eager or compiled, on CPU or CUDA: the folded module rebuilt from the recipe, its weights read back out of the ONNX file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from difffeat.engines.artifact import Artifact, load_proto, read_initializers, read_specs
from difffeat.engines.base import EngineOptions, Submitting, check_feeds
from difffeat.engines.driver import gpu_identity
from difffeat.errors import ConfigError, EngineError, ForeignGraph, MissingExtra, OutOfMemory, ProviderMissing


class TorchEngine(Submitting):
    """`Engine` over the folded torch module.

    **Arguments:** as for `OrtEngine`; `threads` sets torch's threads for the whole process while the engine runs; of the options `compile` and
    `channels_last`.

    Raises MissingExtra, ProviderMissing, ForeignGraph (weights that do not fit the recipe), OutOfMemory.
    """

    name = "torch"

    def __init__(
        self, artifact: Artifact, graph: Path, *, device: str = "cpu", threads: int | None = None, options: EngineOptions | None = None
    ) -> None:
        torch = _import_torch()
        chosen = options or EngineOptions()
        from difffeat.export.assemble import build_module

        self._torch, self._threads = torch, threads
        self.device = _checked_device(torch, device)
        self.recipe, self.precision, self.digest = artifact.recipe, artifact.recipe.precision, artifact.digest
        self.inputs, self.outputs = read_specs(load_proto(graph))
        try:
            self._module: Any = build_module(artifact.recipe, next(part for part, path in artifact.graphs.items() if path == graph))
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ForeignGraph(f"{graph}: its recipe describes no network ({type(error).__name__}: {error}). Export it again.") from error
        if self.device == "cpu":
            _lay_out_for_cpu(self._module)
        _load(self._module, read_initializers(graph), graph)
        with _memory_told(torch, self.device):
            self._module.eval().to(self.device)
            if chosen.channels_last:
                self._module.to(memory_format=torch.channels_last)
        self._call = torch.compile(self._module) if chosen.compile else self._module
        self.identity: Mapping[str, str] = gpu_identity(self.device) | chosen.switched("compile", "channels_last")
        if self.device != "cpu":
            self.overlap()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self._module = self._call = None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        if self._call is None:
            raise EngineError("this engine is closed. Open it again with open_engine(...).")
        check_feeds(self.inputs, feeds)
        torch, before = self._torch, self._torch.get_num_threads()
        try:
            torch.set_num_threads(self._threads or before)
            with torch.inference_mode(), _memory_told(torch, self.device):
                tensors = {name: torch.tensor(array, device=self.device) for name, array in feeds.items()}
                results = self._call(**tensors)
                return {name: result.float().cpu().numpy() for name, result in zip(self.outputs, results, strict=True)}
        except (RuntimeError, IndexError) as error:
            raise EngineError(f"torch failed: {error}") from error
        finally:
            torch.set_num_threads(before)


@contextlib.contextmanager
def _memory_told(torch: Any, device: str) -> Iterator[None]:
    """Raises OutOfMemory for torch's own exception, and for the CPU's allocator, which has none of its own."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise OutOfMemory(f"{device} is out of memory ({error}). Finished shards are kept; use a smaller --batch-size.") from error
        raise


def _load(module: Any, weights: Mapping[str, np.ndarray], graph: Path) -> None:
    """Copy the graph's initializers into the module; every parameter must be there with its shape."""
    torch = _import_torch()
    with torch.no_grad():
        for name, target in module.state_dict().items():
            if name not in weights or tuple(weights[name].shape) != tuple(target.shape):
                found = list(weights[name].shape) if name in weights else "nothing"
                raise ForeignGraph(f"{graph}: the recipe wants {name} of shape {list(target.shape)}, the graph has {found}. Export it again.")
            target.copy_(_tensor(torch, np.asarray(weights[name])))


def _lay_out_for_cpu(module: Any) -> None:
    """Places to fill with the weights of linears, inputs innermost: CPUs read them in less time for short batches, of captions above all."""
    from difffeat.export.layers import Affine

    for layer in module.modules():
        if isinstance(layer, Affine):
            layer.weight.data = layer.weight.new_empty(layer.weight.shape[::-1]).t()


def _tensor(torch: Any, array: np.ndarray) -> Any:
    """A copy as a torch tensor; NumPy has no bfloat16 of its own, ONNX lends it one that torch does not know."""
    if array.dtype.name == "bfloat16":
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MissingExtra("torch", "export", "The engine 'torch'") from None
    return torch


def _checked_device(torch: Any, device: str) -> str:
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise ConfigError(f"device must be cpu, cuda or cuda:<n>, got {device!r}")
    if kind == "cpu":
        return "cpu"
    if not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count():
        raise ProviderMissing(
            f"{device} was asked for, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices. Pass --device cpu."
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return f"cuda:{number or 0}"
