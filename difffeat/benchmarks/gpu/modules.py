"""Trunk and encoder alone, weights drawn on the device: the unfolded network as people run it, and ours in every form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from difffeat.benchmarks.gpu.ceilings import attempt, square_rate
from difffeat.benchmarks.gpu.journal import Journal
from difffeat.benchmarks.gpu.sizes import Sizes
from difffeat.benchmarks.timing import device_seconds
from difffeat.engines.torch_cuda import How, choose_attention, compile_module, kernel_settings, suit_gpu
from difffeat.engines.torch_precision import exact_products

TIMESTEP = 30
ENCODER_GFLOP = 272.722
"""Of the SD encoder on an image of 256 × 256 pixels: convolutions and attention."""
PREDICTED = {
    "fp16 eager, whole network with a hook": 545.0,
    "fp16 eager, stopped": 235.0,
    "fp16 ours, compiled": 190.0,
    "fp16 ours, compiled, a CUDA graph": 185.0,
    "fp16 eager, NCHW": 1065.0,
    "fp16 compiled, NCHW": 740.0,
}
"""µs an image at full size on an H100 (batch 64 of latents, 32 of pixels), reckoned from bytes and FLOPs before anything was run on one."""


@dataclass(frozen=True)
class Table:
    """What the rows of one table share.

    **Fields:** `gflop` of one sample; `reference` outputs in fp32; `ceiling` FLOP/s of square products in the row's type.
    """

    journal: Journal
    sizes: Sizes
    batch: int
    gflop: float
    reference: Any
    ceiling: float

    def row(self, name: str, run: Callable[[], Any]) -> None:
        """Time one form; one that fails costs its own line."""
        attempt(self.journal, name, lambda _: self._time(name, run))

    def _time(self, name: str, run: Callable[[], Any]) -> None:
        with exact_products():
            found = run()
            timing = device_seconds(run, self.sizes.device, warm=self.sizes.warm, seconds=self.sizes.seconds)
        found = found[0] if isinstance(found, tuple) else found
        error = float((found.float() - self.reference).norm() / self.reference.norm())
        known = {"predicted_us": PREDICTED[name]} if name in PREDICTED and self.sizes.device != "cpu" else {}
        self.journal.rate(name, timing, self.batch, gflop=self.gflop, ceiling=self.ceiling, relative_l2=error, **known)


def run_trunk(journal: Journal, sizes: Sizes, dtypes: tuple[str, ...]) -> None:
    """The step on the blocks, from latents: eager with a hook, eager stopped, compiled, ours in every form."""
    import torch

    nets = Networks(torch, sizes, sizes.latents_batch)
    with torch.inference_mode(), exact_products():
        reference = nets.stopped(nets.whole, torch.float32)()
        for dtype in dtypes:
            kind = _kind(torch, dtype)
            table = Table(journal, sizes, sizes.latents_batch, sizes.trunk_gflop, reference, square_rate(sizes, dtype))
            theirs = copy.deepcopy(nets.whole).to(kind)
            theirs.t_embedder.frequencies = nets.whole.t_embedder.frequencies
            table.row(f"{dtype} eager, whole network with a hook", nets.hooked(theirs, kind))
            table.row(f"{dtype} eager, stopped", nets.stopped(theirs, kind))
            table.row(f"{dtype} eager, stopped, compiled", nets.stopped(theirs, kind, compiled=True))
            ours = nets.ours(dtype)
            best = choose_attention(torch, torch.device(sizes.device), nets.heads, kind)
            table.row(f"{dtype} ours, eager", nets.runs(ours, best))
            for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
                if backend != best:
                    table.row(f"{dtype} ours, eager, {backend.lower()}", nets.runs(ours, backend))
            table.row(f"{dtype} ours, compiled", nets.runs(ours, best, compiled=True))
            table.row(f"{dtype} ours, compiled, GELU left to Inductor", nets.runs(ours, best, compiled=True, epilogues=False))
            if sizes.device != "cpu":
                table.row(f"{dtype} ours, compiled, a CUDA graph", nets.replayed(ours, best))


def run_batches(journal: Journal, sizes: Sizes) -> None:
    """The step on batch sizes: eager stopped, ours compiled, ours from a CUDA graph."""
    import torch

    for batch in sizes.batches:
        nets = Networks(torch, sizes, batch)
        with torch.inference_mode(), exact_products():
            table = Table(journal, sizes, batch, sizes.trunk_gflop, nets.stopped(nets.whole, torch.float32)(), square_rate(sizes, "fp16"))
            theirs = copy.deepcopy(nets.whole).half()
            theirs.t_embedder.frequencies = nets.whole.t_embedder.frequencies
            table.row(f"batch {batch}, eager, stopped", nets.stopped(theirs, torch.float16))
            ours, best = nets.ours("fp16"), choose_attention(torch, torch.device(sizes.device), nets.heads, torch.float16)
            table.row(f"batch {batch}, ours, eager", nets.runs(ours, best))
            table.row(f"batch {batch}, ours, compiled", nets.runs(ours, best, compiled=True))
            if sizes.device != "cpu":
                table.row(f"batch {batch}, ours, compiled, a CUDA graph", nets.replayed(ours, best))


def run_encoder(journal: Journal, sizes: Sizes, dtypes: tuple[str, ...]) -> None:
    """The step on the autoencoder's encoder, from pixels: layouts, cuDNN's own choice, compiled, both forms of its attention."""
    import torch

    from difffeat.export.vae import VaeEncoder

    torch._dynamo.reset()
    with torch.device(sizes.device):
        encoder = draw(torch, VaeEncoder(sizes.vae))
        pixels = torch.randint(0, 256, (sizes.pixels_batch, sizes.pixels, sizes.pixels, 3), dtype=torch.uint8)
    gflop = ENCODER_GFLOP if sizes.device != "cpu" else 0.0
    with torch.inference_mode(), exact_products():
        reference = torch.cat([encoder(part) for part in pixels.split(4)])
        for dtype in dtypes:
            table = Table(journal, sizes, sizes.pixels_batch, gflop, reference, square_rate(sizes, dtype))
            low = copy.deepcopy(encoder)
            low.encoder.to(_kind(torch, dtype))
            _encoder_rows(torch, table, dtype, low, pixels)


def _encoder_rows(torch: Any, table: Table, dtype: str, low: Any, pixels: Any) -> None:
    innermost, plain = copy.deepcopy(low).to(memory_format=torch.channels_last), copy.deepcopy(low)
    suit_gpu(torch, plain)
    table.row(f"{dtype} eager, NCHW", lambda: low(pixels))
    table.row(f"{dtype} eager, NCHW, attention by plain products", lambda: plain(pixels))
    table.row(f"{dtype} eager, channels last", lambda: innermost(pixels))

    def trialled() -> Any:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
            return innermost(pixels)

    table.row(f"{dtype} eager, channels last, cuDNN chooses by a trial", trialled)
    settings = How(compiled=True, graphs=False, tf32=False, attention="EFFICIENT_ATTENTION")
    for name, module in (("compiled, NCHW", plain), ("compiled, channels last", copy.deepcopy(plain).to(memory_format=torch.channels_last))):
        compiled = compile_module(torch, module, backend=table.sizes.compiler)

        def run(compiled: Any = compiled) -> Any:
            with kernel_settings(torch, settings):
                return compiled(pixels)

        table.row(f"{dtype} {name}", run)


class Networks:
    """The unfolded DiT and ours with the same weights, drawn on the device, and one batch of random latents and noise."""

    def __init__(self, torch: Any, sizes: Sizes, batch: int) -> None:
        from difffeat.export.dit import DiT
        from difffeat.export.schedule import dit_noise_level

        torch._dynamo.reset()
        self._torch, self._sizes, config = torch, sizes, sizes.dit
        self._level = dit_noise_level(TIMESTEP)
        with torch.device(sizes.device), torch.no_grad():
            self.whole = DiT.from_config(config)
            positions = self.whole.pos_embed.clone()
            draw(torch, self.whole).pos_embed.copy_(positions)
            self.latents, self.noise = (torch.randn(batch, 4, config.input_size, config.input_size) for _ in range(2))
            self._t, self._label = torch.full((batch,), TIMESTEP), torch.full((batch,), config.num_classes)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Heads, tokens, width of a head."""
        dit = self._sizes.dit
        return dit.heads, self._sizes.tokens, dit.width // dit.heads

    def ours(self, dtype: str) -> Any:
        """The folded, truncated graph from latents, in its precision."""
        from difffeat.export.fold import dit_modulation, fill_dit
        from difffeat.export.folded import DiTTrunk
        from difffeat.export.graph import FromLatentsGraph, Noising
        from difffeat.export.precision import set_precision

        config, block, tensors = self._sizes.dit, self._sizes.block, self.whole.state_dict()
        with self._torch.device(self._sizes.device), self._torch.no_grad():
            trunk = DiTTrunk(
                width=config.width, heads=config.heads, patch=config.patch, in_channels=4, input_size=config.input_size, mlp_ratio=4,
                mlp_norm_eps=1e-6, taps=(block,), pooling="mean", swept=False,
            )  # fmt: skip
            fill_dit(trunk, tensors, dit_modulation(tensors, config, TIMESTEP, config.num_classes, block))
            graph = FromLatentsGraph(trunk, Noising(self._level.alpha, self._level.sigma))
            set_precision(graph, cast("Any", SimpleNamespace(precision=dtype, options={})))
            suit_gpu(self._torch, graph)
            return graph.eval()

    def stopped(self, model: Any, kind: Any, *, compiled: bool = False) -> Callable[[], Any]:
        """The unfolded network, left after the block; as torch.compile makes it by default where `compiled`."""
        z, noise = self.latents.to(kind), self.noise.to(kind)

        def run() -> Any:
            conditioning = model.conditioning(self._t, self._label)
            x = model.x_embedder(self._level.alpha * z + self._level.sigma * noise) + model.pos_embed
            for layer in model.blocks[: self._sizes.block]:
                x = layer(x, conditioning)
            return x.mean(1)

        return self._torch.compile(run, dynamic=False, backend=self._sizes.compiler) if compiled else run

    def hooked(self, model: Any, kind: Any) -> Callable[[], Any]:
        """The unfolded network to its end, with a hook on the block."""
        z, noise = self.latents.to(kind), self.noise.to(kind)

        def run() -> Any:
            kept: list[Any] = []
            handle = model.blocks[self._sizes.block - 1].register_forward_hook(lambda _, __, out: kept.append(out.mean(1)))
            try:
                model(self._level.alpha * z + self._level.sigma * noise, self._t, self._label)
            finally:
                handle.remove()
            return kept[0]

        return run

    def runs(self, module: Any, attention: str, *, compiled: bool = False, epilogues: bool = True) -> Callable[[], Any]:
        """Ours under the engine's own settings."""
        how = How(compiled=compiled, graphs=False, tf32=False, attention=attention)
        if not epilogues:
            module = without_epilogues(module)
        call = compile_module(self._torch, module, backend=self._sizes.compiler) if compiled else module

        def run() -> Any:
            with kernel_settings(self._torch, how):
                return call(self.latents, self.noise)

        return run

    def replayed(self, module: Any, attention: str) -> Callable[[], Any]:
        """Ours, compiled and replayed from a CUDA graph, which is captured in the first run."""
        from difffeat.engines.torch_card import Card

        captured: list[tuple[Callable[[], None], Any]] = []

        def run() -> Any:
            if not captured:
                card = Card(self._torch, self._torch.cuda.current_device())
                captured.append(card.capture(self.runs(module, attention, compiled=True)))
            replay, outputs = captured[0]
            replay()
            return outputs

        return run


def without_epilogues(module: Any) -> Any:
    """A copy whose products take neither bias nor GELU along: what Inductor makes of them itself."""
    from difffeat.export.layers import set_form

    found = copy.deepcopy(module)
    set_form(found, "plain")
    return found


def draw(torch: Any, module: Any, seed: int = 0) -> Any:
    """Random weights in place, on the module's device: matrices scaled by their fan-in, norms about one."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, scale, generator=generator)
    return module.eval().requires_grad_(False)


def _kind(torch: Any, dtype: str) -> Any:
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
