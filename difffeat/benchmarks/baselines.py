"""What ours is compared with: the unfolded networks as people run them, in eager torch, compiled, and naively exported to ONNX."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines import Artifact
from difffeat.workflows.loading import Backbone

HOOK = "eager torch, whole backbone with a hook"
TRUNCATED = "eager torch, stopped after the block"
CHANNELS_LAST = "eager torch, stopped, channels-last VAE"
COMPILED = "torch.compile, stopped after the block"
NAIVE = "unfolded export, ONNX Runtime"

Run = Callable[[], np.ndarray]
Candidates = dict[str, Run]


def eager_candidates(
    backbone: Backbone, artifact: Artifact, feeds: Mapping[str, np.ndarray], *, device: str = "cpu", precision: str = "fp32", compiled: bool = False
) -> Candidates:
    """The unfolded network in torch on the same inputs: run to its end with a hook on the block, as is today's habit, and stopped after the block.

    **Arguments:** `compiled` adds torch.compile, which takes a minute to warm up. On a GPU the inputs are uploaded in every run and the features come
    back, as in extraction.
    """
    build = _dit if backbone.family == "dit" else _plaid
    found = build(backbone, artifact, feeds, device, _dtype(precision))
    if not compiled:
        found.pop(COMPILED)
    return found


def _dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def _dit(backbone: Backbone, artifact: Artifact, feeds: Mapping[str, np.ndarray], device: str, dtype: Any) -> dict[str, Any]:
    import torch

    from difffeat.export.reference import unfolded_dit
    from difffeat.export.schedule import dit_noise_level

    recipe = artifact.recipe
    model = _placed(unfolded_dit(backbone.weights), device, dtype)
    vaes: dict[bool, Any] = {}
    if recipe.kind == "image":
        assert backbone.vae is not None
        vaes[False] = _placed(_encoder(backbone.vae), device, dtype)
        vaes[True] = copy.deepcopy(vaes[False]).to(memory_format=torch.channels_last)
    level, block = dit_noise_level(recipe.timesteps[0]), recipe.blocks[0]
    host = {name: torch.tensor(value) for name, value in feeds.items()}
    size = len(next(iter(host.values())))
    t, label = torch.full((size,), int(level.t), device=device), torch.full((size,), recipe.label or 0, device=device)

    def noisy(channels_last: bool) -> Any:
        noise = host["noise"].to(device, dtype)
        if recipe.kind == "image":
            x = host["pixels"].to(device).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            latents = vaes[channels_last](x)
        else:
            latents = host["latents"].to(device, dtype)
        return level.alpha * latents + level.sigma * noise

    def stopped(z: Any) -> Any:
        conditioning = model.conditioning(t, label)
        x = model.x_embedder(z) + model.pos_embed
        for layer in model.blocks[:block]:
            x = layer(x, conditioning)
        return x.mean(1)

    compiled = torch.compile(lambda: stopped(noisy(False)))
    found = {
        HOOK: _hooked(model, block, lambda: model(noisy(False), t, label)),
        TRUNCATED: _run(lambda: stopped(noisy(False))),
        COMPILED: _run(compiled),
    }
    return found | ({CHANNELS_LAST: _run(lambda: stopped(noisy(True)))} if vaes else {})


def _encoder(vae: Any) -> Any:
    """Diffusers' encoder and its quantisation convolution as one module: pixels in −1..1 to scaled latents."""
    import torch

    from difffeat.export.reference import unfolded_vae

    whole = unfolded_vae(vae)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder: Any = whole.encoder
            self.quant_conv: Any = whole.quant_conv

        def forward(self, x: Any) -> Any:
            h: Any = self.encoder(x)
            if self.quant_conv is not None:
                h = self.quant_conv(h)
            return (h.chunk(2, dim=1)[0] - (vae.shift_factor or 0.0)) * vae.scaling_factor

    return Encoder().eval()


def eager_captions(
    backbone: Backbone, artifact: Artifact, batches: Iterable[Mapping[str, np.ndarray]], *, device: str = "cpu", precision: str = "fp32"
) -> Candidates:
    """`eager_candidates` over several batches of captions one after the other, all through one model; features as from one batch."""
    each = eager_by_batch(backbone, artifact, batches, device=device, precision=precision)
    return {name: partial(_one_after_the_other, [own[name] for own in each]) for name in (HOOK, TRUNCATED)}


def eager_by_batch(
    backbone: Backbone, artifact: Artifact, batches: Iterable[Mapping[str, np.ndarray]], *, device: str = "cpu", precision: str = "fp32"
) -> list[Candidates]:
    """The same, each batch by itself."""
    placed = _plaid_model(backbone, device, _dtype(precision))
    return [_plaid_candidates(placed, artifact, feeds, device) for feeds in batches]


def _one_after_the_other(runs: list[Run]) -> np.ndarray:
    return np.concatenate([run() for run in runs])


def _plaid(backbone: Backbone, artifact: Artifact, feeds: Mapping[str, np.ndarray], device: str, dtype: Any) -> dict[str, Any]:
    return _plaid_candidates(_plaid_model(backbone, device, dtype), artifact, feeds, device)


def _plaid_model(backbone: Backbone, device: str, dtype: Any) -> tuple[Any, Any]:
    """The unfolded network and its embedding table, on the device and in the type."""
    from difffeat.export.plaid import normalise_rows
    from difffeat.export.reference import unfolded_plaid

    model = _placed(unfolded_plaid(backbone.weights), device, dtype)
    return model, normalise_rows(backbone.weights.tensors["embedding_matrix.matrix"]).to(device, dtype)


def _plaid_candidates(placed: tuple[Any, Any], artifact: Artifact, feeds: Mapping[str, np.ndarray], device: str) -> dict[str, Any]:
    import torch

    block, (model, table) = artifact.recipe.blocks[0], placed
    host = {name: torch.tensor(value) for name, value in feeds.items()}
    gamma = torch.full((len(host["tokens"]),), -artifact.recipe.log_snr[0], dtype=torch.float64, device=device)
    alpha = float(torch.sigmoid(-gamma[0]).sqrt())

    def inputs() -> tuple[Any, Any]:
        tokens, lengths = host["tokens"].to(device), host["lengths"].to(device)
        return alpha * table[tokens], torch.arange(tokens.shape[1], device=device)[None] < lengths[:, None]

    def pooled(x: Any, mask: Any) -> Any:
        return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    def whole() -> Any:
        z, mask = inputs()
        return model(z, gamma, table, mask)

    def stopped() -> Any:
        z, mask = inputs()
        for index, x in zip(range(block + 1), model.residual_stream(z, gamma, mask), strict=False):
            if index == block:
                return pooled(x, mask)
        return None

    hooked = _hooked(model, block, whole, lambda x: pooled(x, inputs()[1]))
    return {HOOK: hooked, TRUNCATED: _run(stopped), COMPILED: _run(torch.compile(stopped))}


def _placed(model: Any, device: str, dtype: Any) -> Any:
    """On the device and in the type; a copy only where that changes anything.

    The frequencies of a timestep's embedding keep their type, as in the published code, which computes them in fp32 whatever the network's type.
    """
    embedder = getattr(model, "t_embedder", None)
    frequencies = None if embedder is None else embedder.frequencies
    placed = model.to(device, dtype)
    if frequencies is not None:
        placed.t_embedder.frequencies = frequencies.to(device)
    return placed


def _hooked(model: Any, block: int, forward: Callable[[], Any], pool: Callable[[Any], Any] | None = None) -> Callable[[], Any]:
    def run() -> Any:
        kept: list[Any] = []
        handle = _tapped(model, block, lambda x: kept.append(pool(x) if pool else x.mean(1)))
        try:
            forward()
        finally:
            handle.remove()
        return kept[0]

    return _run(run)


def _tapped(model: Any, block: int, take: Callable[[Any], None]) -> Any:
    """The hook that sees the residual stream after `block` blocks; the embedding is what the first block is given."""
    if block == 0:
        return model.blocks[0].register_forward_pre_hook(lambda _, given: take(given[0]))
    return model.blocks[block - 1].register_forward_hook(lambda _, __, out: take(out))


def _run(forward: Callable[[], Any]) -> Callable[[], np.ndarray]:
    """Without gradients, the features back on the host: what is timed ends when they are there."""
    import torch

    def run() -> np.ndarray:
        with torch.inference_mode():
            return forward().float().cpu().numpy()

    return run


def naive_candidate(backbone: Backbone, artifact: Artifact, feeds: Mapping[str, np.ndarray], folder: Path, threads: int) -> Candidates:
    """The unfolded, truncated network exported as it is, timestep and label as inputs, in ONNX Runtime with its default settings. DiT only."""
    if backbone.family != "dit":
        return {}
    import onnxruntime
    import torch

    from difffeat.export.graph import quietly
    from difffeat.export.reference import unfolded_dit
    from difffeat.export.schedule import dit_noise_level

    recipe = artifact.recipe
    level, block = dit_noise_level(recipe.timesteps[0]), recipe.blocks[0]
    model = unfolded_dit(backbone.weights)
    model.blocks = model.blocks[:block]
    encoder = _encoder(backbone.vae) if recipe.kind == "image" else None
    names = ("pixels" if encoder is not None else "latents", "noise")

    class Naive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.model = encoder, model

        def forward(self, x: Any, noise: Any, t: Any, label: Any) -> Any:
            latents = self.encoder(x.permute(0, 3, 1, 2).float() / 127.5 - 1.0) if self.encoder is not None else x
            *_, last = self.model.residual_stream(level.alpha * latents + level.sigma * noise, t, label)
            return last.mean(1)

    size = len(feeds["noise"])
    given = (*(torch.tensor(feeds[name]) for name in names), torch.full((size,), int(level.t)), torch.full((size,), recipe.label or 0))
    path = folder / "naive.onnx"
    with quietly():
        torch.onnx.export(Naive().eval(), given, str(path), dynamo=True, verbose=False, external_data=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fed = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), given, strict=True)}
    return {NAIVE: lambda: np.asarray(session.run(None, fed)[0])}
