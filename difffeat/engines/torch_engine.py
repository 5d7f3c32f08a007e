"""Graphs in PyTorch, on a CPU or a GPU: the folded module rebuilt from the recipe, its weights read back out of the ONNX file."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from difffeat.engines.artifact import Artifact, load_proto, read_initializers, read_specs
from difffeat.engines.base import EngineOptions, Pending, Submitting, check_feeds
from difffeat.engines.driver import gpu_identity, gpu_number, probe_driver
from difffeat.engines.torch_card import Card
from difffeat.engines.torch_cuda import SLOTS, CudaRunner, How, choose_attention, suit_gpu
from difffeat.errors import ConfigError, EngineError, ForeignGraph, MissingExtra, OutOfMemory, ProviderMissing
from difffeat.recipe import GraphRecipe

_MEMORY_WORDS = re.compile(
    r"allocate memory|out.of.memory|not enough memory|bad_alloc|ALLOC(ATION)?_FAILED|MemoryAllocation|CUBLAS_STATUS_NOT_INITIALIZED"
    r"|unable to find an engine to execute|unable to find a valid cuDNN algorithm",
    re.IGNORECASE,
)
"""Of torch, CUDA's libraries and triton. cuBLAS cannot begin, and cuDNN finds no engine, where their workspace finds no room; what they said is told
too, for where it was something else.
"""


class TorchEngine(Submitting):
    """`Engine` over the folded torch module.

    **Arguments:** as for `OrtEngine`; `threads` sets torch's threads for the whole process while the engine runs; of the options `compile` (left to
    us: on a GPU), `channels_last`, `cuda_graphs` and `tf32` (on a GPU); `say` is told before a shape is compiled.

    Raises MissingExtra, ProviderMissing, ForeignGraph (weights that do not fit the recipe), OutOfMemory, ConfigError (a GPU's option on a CPU).
    """

    name = "torch"

    def __init__(
        self,
        artifact: Artifact,
        graph: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        options: EngineOptions | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        torch = _import_torch()
        chosen = options or EngineOptions()
        self._torch, self._threads = torch, threads
        self.device = _checked_device(torch, device)
        _require_gpu_for(chosen, self.device)
        self.recipe, self.precision, self.digest = artifact.recipe, artifact.recipe.precision, artifact.digest
        self.inputs, self.outputs = read_specs(load_proto(graph))
        self._runner: CudaRunner | None = None
        with _failures_told(torch, self.device):
            self._module: Any = _filled_module(artifact, graph, self.device)
            if chosen.channels_last:
                self._module.to(memory_format=torch.channels_last)
            if self.device == "cpu":
                self._call: Any = torch.compile(self._module) if chosen.compile else self._module
                self.identity: Mapping[str, str] = chosen.switched(*(["compile"] if chosen.compile else []), "channels_last")
            else:
                self._open_on_gpu(Card(torch, int(self.device.partition(":")[2])), chosen, say)

    def _open_on_gpu(self, card: Card, options: EngineOptions, say: Callable[[str], None]) -> None:
        torch, dtype = self._torch, {"fp16": self._torch.float16, "bf16": self._torch.bfloat16}.get(self.precision, self._torch.float32)
        self._module.to(card.place)
        suit_gpu(torch, self._module)
        heads = None if self.recipe.takes_text or not hasattr(self._module, "trunk") else _image_heads(self.recipe)
        compiled = options.compile is not False
        how = How(
            compiled=compiled, graphs=options.cuda_graphs, tf32=options.tf32, attention=choose_attention(torch, card.place, heads, dtype)
        )  # fmt: skip
        batched = next(name for name, spec in self.inputs.items() if spec.shape and spec.shape[0] == "batch")
        self._runner = CudaRunner(torch, card, self._module, how, batched=batched, by_blocks=self.recipe.takes_text, say=say)
        self._call, self.depth, self.static_shapes = self._module, SLOTS, compiled
        self.identity = gpu_identity(self.device) | _libraries(torch, compiled) | {"compile": str(compiled).lower(), "attention": how.attention}
        self.identity |= options.switched("channels_last", "cuda_graphs", "tf32")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._runner is not None:
            with _failures_told(self._torch, self.device):
                self._runner.close()
        self._module = self._call = self._runner = None

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """See `Engine.trial`."""
        with self._runner.trial() if self._runner is not None else contextlib.nullcontext():
            yield

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        self._check(feeds)
        return self._submitted(feeds).result() if self._runner is not None else self._run_on_cpu(feeds)

    def submit(self, feeds: Mapping[str, np.ndarray]) -> Pending:
        """See `Engine.submit`."""
        self._check(feeds)
        if self._runner is not None:
            return self._submitted(feeds)
        found = self._run_on_cpu(feeds)
        return Pending(lambda: found)

    def _check(self, feeds: Mapping[str, np.ndarray]) -> None:
        if self._call is None:
            raise EngineError("this engine is closed. Open it again with open_engine(...).")
        check_feeds(self.inputs, feeds)

    def _run_on_cpu(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        torch, before = self._torch, self._torch.get_num_threads()
        try:
            torch.set_num_threads(self._threads or before)
            with torch.inference_mode(), _failures_told(torch, self.device):
                results = self._call(**{name: torch.tensor(array) for name, array in feeds.items()})
                return {name: result.float().numpy() for name, result in zip(self.outputs, results, strict=True)}
        finally:
            torch.set_num_threads(before)

    def _submitted(self, feeds: Mapping[str, np.ndarray]) -> Pending:
        assert self._runner is not None
        runner = self._runner

        def finish() -> dict[str, np.ndarray]:
            with self._recovering(runner):
                return pending.result()

        with self._recovering(runner):
            pending = runner.submit(feeds, list(self.outputs))
            self.copy_seconds = runner.copy_seconds
        return Pending(finish)

    @contextlib.contextmanager
    def _recovering(self, runner: CudaRunner) -> Iterator[None]:
        """Errors of ours; where memory ran out, what is held is given back, so that a smaller batch may fit."""
        try:
            with _failures_told(self._torch, self.device):
                yield
        except OutOfMemory:
            runner.recover()
            raise


def _filled_module(artifact: Artifact, graph: Path, device: str) -> Any:
    """The module of a graph with the graph's weights, on the CPU."""
    from difffeat.export.assemble import build_module

    try:
        module: Any = build_module(artifact.recipe, next(part for part, path in artifact.graphs.items() if path == graph))
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        if _MEMORY_WORDS.search(str(error)):
            raise
        raise ForeignGraph(f"{graph}: its recipe describes no network ({type(error).__name__}: {error}). Export it again.") from error
    if device == "cpu":
        _lay_out_for_cpu(module)
    _load(module, read_initializers(graph), graph)
    return module.eval()


def _image_heads(recipe: GraphRecipe) -> tuple[int, int, int]:
    """Heads of an image backbone, tokens that they attend to, width of a head."""
    a = recipe.architecture
    return a["heads"], (a["input_size"] // a["patch"]) ** 2, a["width"] // a["heads"]


def _libraries(torch: Any, compiled: bool) -> dict[str, str]:
    """Versions of what computes on a GPU besides torch itself."""
    found = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    if compiled:
        try:
            import triton
        except ImportError:
            raise MissingExtra("triton", "export", "torch.compile on a GPU (which --no-compile leaves out)") from None
        found["triton"] = triton.__version__
    return found


def _require_gpu_for(options: EngineOptions, device: str) -> None:
    for name in ("tf32", "cuda_graphs"):
        if getattr(options, name) and device == "cpu":
            raise ConfigError(f"--{name.replace('_', '-')} is for a GPU, and this engine runs on the CPU. Pass --device cuda, or leave it out.")


@contextlib.contextmanager
def _failures_told(torch: Any, device: str) -> Iterator[None]:
    """Torch's errors as ours: OutOfMemory for its own exception, for the CPU's allocator and for cuBLAS and cuDNN, which have none of their own."""
    try:
        yield
    except (RuntimeError, IndexError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or _MEMORY_WORDS.search(str(error)):
            raise OutOfMemory(f"{device} is out of memory ({error}). Finished shards are kept; use a smaller --batch-size.") from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise EngineError(f"torch.compile failed: {error}. Pass --no-compile; on a GPU it needs triton and a C compiler.") from error
        raise EngineError(f"torch failed: {error}") from error


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
    """`cpu` or `cuda:<n>`. Raises ConfigError for what names no device, ProviderMissing for a GPU that torch does not see, with the reason."""
    if (number := gpu_number(device)) is None:
        return "cpu"
    if torch.cuda.is_available() and number < torch.cuda.device_count():
        return f"cuda:{number}"
    why = probe_driver().problem
    if why is None and torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA (PyPI's wheels for Linux are built with it)"
    if why is None:
        why = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees {torch.cuda.device_count()} GPUs"
    raise ProviderMissing(f"{device} was asked for, but {why}. Run difffeat doctor, or pass --device cpu.")
