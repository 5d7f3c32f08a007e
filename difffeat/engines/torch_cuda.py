"""What the torch engine does on a GPU beyond calling a module: batches overlapped with their copies, static compiled shapes, CUDA graphs.

Each slot has buffers of its own, pinned on the host's side. A batch is copied into its slot in a stream beside the work, computed after that copy,
and copied back; meanwhile the host prepares the next batch for the other slot.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from difffeat.engines.base import Pending
from difffeat.engines.torch_card import Card
from difffeat.engines.torch_precision import exact_products

SLOTS = 2
GRAPH_BATCH = 8
"""Largest batch that is replayed from a CUDA graph where the choice is left to us: kernels of larger ones outlast their launch."""
INDUCTOR = {"deterministic": True}
"""No choice of a kernel by a trial on the device, where that shows in the numbers."""
SHAPES = 4096
"""Shapes that may be compiled: more than there are lengths of captions. Dynamo's own limit is 8."""

Feeds = Mapping[str, np.ndarray]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class How:
    """How a module runs on a GPU.

    **Fields:** `compiled` by torch.compile; `graphs` CUDA graphs for every shape (True), none (False), or for batches of up to `GRAPH_BATCH` (None);
    `tf32` lets fp32 products and convolutions be computed in TF32; `attention` name of the backend of `torch.nn.attention.SDPBackend`.
    """

    compiled: bool
    graphs: bool | None
    tf32: bool
    attention: str


class CudaRunner:
    """Batches of a module on one GPU, in the order of submission.

    **Arguments:** `module` on the GPU, in its precision; `batched` an input whose first axis is the batch; `by_blocks` compiles block by block
    instead of whole: for captions, of which every length is a shape of its own, one compiled block serves all blocks; `say` is told before a shape is
    compiled.
    """

    def __init__(
        self,
        torch: Any,
        card: Card,
        module: Any,
        how: How,
        *,
        batched: str,
        by_blocks: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._torch, self._card, self._how, self._batched, self._say = torch, card, how, batched, say
        self._call: Any = module
        if how.compiled:
            self._call = compile_module(torch, module, by_blocks=by_blocks)
        self._slots = [_Slot(torch, card) for _ in range(SLOTS)]
        self._turn, self._trying = 0, False
        # What cuDNN has planned is known to one thread alone, and an extraction has other threads than the one before it.
        self._thread = ThreadPoolExecutor(1, "cuda")
        self._seen: set[Shapes] = set()
        self._graphs: dict[Shapes, _Captured] = {}

    @property
    def copy_seconds(self) -> float:
        """Seconds that the host has spent copying into pinned memory."""
        return sum(slot.copy_seconds for slot in self._slots)

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Inside, nothing is compiled and nothing captured: for shapes that do not come again."""
        self._trying = True
        try:
            yield
        finally:
            self._trying = False

    def submit(self, feeds: Feeds, names: list[str]) -> Pending:
        """Put a batch in; the oldest is waited for where every slot is taken. `names` of the outputs, in the module's order."""
        return self._thread.submit(self._submit, feeds, names).result()

    def close(self) -> None:
        """Wait for what is under way, and free graphs and buffers."""
        try:
            self._thread.submit(self._close).result()
        finally:
            self._thread.shutdown()

    def recover(self) -> None:
        """After an error: wait for what is under way, and give back what torch keeps, so that a smaller batch finds the memory."""
        self._thread.submit(self._recover).result()

    def _submit(self, feeds: Feeds, names: list[str]) -> Pending:
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        with self._card.current(), self._torch.inference_mode(), kernel_settings(self._torch, self._how):
            tensors = slot.load(feeds)
            return slot.fetch(dict(zip(names, self._compute(tensors), strict=True)))

    def _close(self) -> None:
        with self._card.current():
            self._card.drain()
            self._graphs.clear()
            self._slots.clear()
            self._call = None
            self._card.release()

    def _recover(self) -> None:
        with self._card.current():
            for slot in self._slots:
                slot.forget()
            self._graphs.clear()
            self._card.release()

    def _compute(self, tensors: dict[str, Any]) -> Any:
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
        if self._trying:
            with self._torch.compiler.set_stance("force_eager"):
                return self._call(**tensors)
        if shapes not in self._seen:
            if self._how.compiled:
                self._say(f"compiling for {_words(shapes)}, on the first batch of this shape")
            self._seen.add(shapes)
        return self._replayed(shapes, tensors) if self._captures(tensors) else self._call(**tensors)

    def _captures(self, tensors: dict[str, Any]) -> bool:
        return len(tensors[self._batched]) <= GRAPH_BATCH if self._how.graphs is None else self._how.graphs

    def _replayed(self, shapes: Shapes, tensors: dict[str, Any]) -> Any:
        """The first batch of a shape is a replay too, so that all its batches are computed alike."""
        if shapes not in self._graphs:
            inputs = {name: tensor.clone() for name, tensor in tensors.items()}
            self._graphs[shapes] = _Captured(inputs, *self._card.capture(lambda: self._call(**inputs)))
        captured = self._graphs[shapes]
        for name, tensor in tensors.items():
            captured.inputs[name].copy_(tensor)
        captured.replay()
        return captured.outputs


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph with the tensors that it reads and writes."""

    inputs: dict[str, Any]
    replay: Callable[[], None]
    outputs: Any


class _Slot:
    """One batch's way to the GPU and back, and the buffers it goes through; they grow to the largest batch."""

    def __init__(self, torch: Any, card: Card) -> None:
        self._torch, self._card = torch, card
        self._there: dict[str, Any] = {}
        self._here: dict[str, Any] = {}
        self._uploaded: Any = None
        self._pending: Pending | None = None
        self.copy_seconds = 0.0

    def load(self, feeds: Feeds) -> dict[str, Any]:
        """Begin the upload; tensors that work put in from now on finds filled. The batch before it in this slot is finished first."""
        self._wait()
        since = time.perf_counter()
        tensors, pairs = {}, []
        for name, array in feeds.items():
            staged = self._sized(self._here, name, array.nbytes, self._card.pinned)
            np.copyto(staged.numpy().view(array.dtype).reshape(array.shape), array)
            target = self._sized(self._there, name, array.nbytes, self._card.memory)
            pairs.append((target, staged))
            tensors[name] = target.view(getattr(self._torch, array.dtype.name)).reshape(array.shape)
        self._uploaded = self._card.upload(pairs)
        self.copy_seconds += time.perf_counter() - since
        self._card.order(self._uploaded)
        return tensors

    def fetch(self, results: dict[str, Any]) -> Pending:
        """Begin the download of outputs, as float32."""
        found = {name: result.float().contiguous() for name, result in results.items()}
        places = {name: self._sized(self._here, f"output {name}", value.nbytes, self._card.pinned) for name, value in found.items()}
        views = {name: places[name].view(self._torch.float32).reshape(value.shape) for name, value in found.items()}
        done = self._card.download([(views[name], value) for name, value in found.items()])

        def finish() -> dict[str, np.ndarray]:
            self._card.wait(done)
            copies = {name: view.numpy().copy() for name, view in views.items()}
            found.clear()
            self._pending = None  # last: until then the next batch of this slot waits, see `Pending`
            return copies

        self._pending = Pending(finish)
        return self._pending

    def forget(self) -> None:
        """Drop the batch under way and the buffers, once no copy uses them any more."""
        with contextlib.suppress(RuntimeError):  # what went wrong is told already, by whoever asks for the results
            self._wait()
        self._pending = self._uploaded = None
        self._there, self._here = {}, {}

    def _wait(self) -> None:
        if (pending := self._pending) is not None:
            pending.result()
        if self._uploaded is not None:
            self._card.wait(self._uploaded)

    def _sized(self, kept: dict[str, Any], name: str, size: int, make: Callable[[int], Any]) -> Any:
        """The first `size` bytes of a buffer that is large enough."""
        if name not in kept or len(kept[name]) < size:
            kept[name] = make(size)
        return kept[name][:size]


@contextlib.contextmanager
def kernel_settings(torch: Any, how: How) -> Iterator[None]:
    """What kernels are chosen by, put back afterwards: they are settings of the process."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    wanted = list(dict.fromkeys([getattr(SDPBackend, how.attention), SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]))
    with contextlib.ExitStack() as stack:
        stack.enter_context(exact_products(tf32=how.tf32))
        stack.enter_context(sdpa_kernel(wanted, set_priority=True))
        if how.compiled:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=SHAPES, accumulated_recompile_limit=SHAPES))
            stack.enter_context(torch.compiler.config.patch(cache_key_tag=how.attention))  # else its cache would not know the one from the other
        yield


def compile_module(torch: Any, module: Any, *, by_blocks: bool = False, backend: str = "inductor") -> Any:
    """The module, to be compiled for each shape when it comes; its own blocks one by one where `by_blocks`."""
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # torch advises what `tf32` is there to decide
    how: dict[str, Any] = {"dynamic": False, "fullgraph": True, "backend": backend} | ({"options": INDUCTOR} if backend == "inductor" else {})
    if not by_blocks:
        return torch.compile(module, **how)
    for block in module.trunk.blocks:
        block.compile(**how)
    return module


def _words(shapes: Shapes) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes)


def choose_attention(torch: Any, place: Any, tokens: tuple[int, int, int] | None, dtype: Any) -> str:
    """The backend of attention on a GPU, by name, from what it supports: not by a trial, so that every run of a store chooses alike.

    With a mask (captions) cuDNN makes a plan for each new shape, which takes hundreds of milliseconds: memory-efficient attention there. So in fp32,
    which the others do not compute.

    **Arguments:** `place` the device; `tokens` heads, length and width of a head of a graph without a mask, None for captions; `dtype` of products.
    """
    if tokens is None or dtype == torch.float32 or place.type != "cuda":
        return "EFFICIENT_ATTENTION"
    heads, length, width = tokens
    q = torch.empty(1, heads, length, width, dtype=dtype, device=place)
    asked = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)
    if torch.backends.cuda.can_use_cudnn_attention(asked):
        return "CUDNN_ATTENTION"
    return "FLASH_ATTENTION" if torch.backends.cuda.can_use_flash_attention(asked) else "EFFICIENT_ATTENTION"


def suit_gpu(torch: Any, module: Any) -> None:
    """Have a module's products take bias and GELU along, and its autoencoder, if that is in fp16, attend by two plain products; in place.

    One head of 512 fits neither cuDNN's nor flash attention. In bf16 what lies between the two products would be rounded to 8 bits; in fp32 the
    backend that takes any width is as fast.
    """
    from difffeat.export.layers import set_form

    set_form(module, "epilogue")
    for layer in module.modules():
        if getattr(layer, "heads", 0) == 1 and hasattr(layer, "set_processor") and layer.to_q.weight.dtype == torch.float16:
            layer.set_processor(PlainAttention())


class PlainAttention:
    """A processor for diffusers' `Attention`: group norm, one head, softmax(q·kᵀ/√C)·v by batched products, the residual added."""

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None, temb: Any = None) -> Any:
        """[B, C, H, W] to the same shape. An autoencoder has no text, mask or timestep: those are None. Diffusers looks for their names."""
        import torch

        batch, channels, height, width = hidden_states.shape
        x = hidden_states.flatten(2)
        if attn.group_norm is not None:
            x = attn.group_norm(x)
        x = x.transpose(1, 2)
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        # The factor goes into the product: written apart, Inductor would recognise it all as attention, and call the kernel that is slow here.
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=attn.scale)
        y = attn.to_out[0](torch.bmm(scores.softmax(-1), v))
        y = y.transpose(1, 2).reshape(batch, channels, height, width)
        return (y + hidden_states if attn.residual_connection else y) / attn.rescale_output_factor
