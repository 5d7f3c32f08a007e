# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# To a type checker every attribute of an nn.Module is `Tensor | Module`.
"""The reference that every exported graph is held against: the *unfolded* backbones in fp32, as published, run in torch block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from difffeat.export.dit import DiT, TimestepEmbedder, timestep_frequencies
from difffeat.export.fold import plaid_schedule
from difffeat.export.layers import pool_masked, pool_tokens
from difffeat.export.plaid import Plaid, normalise_rows
from difffeat.export.schedule import NoiseLevel, PlaidSchedule, dit_noise_level
from difffeat.recipe import ddim_path


def load_into(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give a module built on the meta device its tensors, without copying them."""
    state = {name: tensors[name] for name in module.state_dict()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def unfolded_dit(weights: Any) -> DiT:
    """The published network with the tensors of `DiTWeights` (shared, not copied)."""
    with torch.device("meta"):
        model = DiT.from_config(weights.config)
    for module in model.modules():
        if isinstance(module, TimestepEmbedder):
            module.frequencies = torch.tensor(timestep_frequencies(weights.config.timestep_embedding))
    load_into(model, weights.tensors)
    return model


def unfolded_plaid(weights: Any) -> Plaid:
    """The published network with the tensors of `PlaidWeights` (shared, not copied)."""
    with torch.device("meta"):
        model = Plaid.from_config(weights.config)
    load_into(model, {name.removeprefix("model."): tensor for name, tensor in weights.tensors.items() if name.startswith("model.")})
    return model


def unfolded_vae(vae: Any) -> nn.Module:
    """Diffusers' AutoencoderKL with the encoder's tensors of `VAEWeights`; its decoder stays on the meta device."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        model = AutoencoderKL(**vae.config)
    own = {name for name in model.state_dict() if name.startswith(("encoder.", "quant_conv."))}
    model.load_state_dict({name: vae.tensors[name] for name in own}, strict=False, assign=True)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def encode(vae: Any, pixels_BHW3: Tensor) -> Tensor:
    """Clean latents as diffusers computes them: (posterior mean − shift) × scaling factor."""
    x = pixels_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    mean = unfolded_vae(vae).encode(x).latent_dist.mean
    return (mean - (vae.shift_factor or 0.0)) * vae.scaling_factor


@torch.inference_mode()
def dit_taps(
    weights: Any,
    latents: Tensor,
    noise: Tensor | None,
    *,
    timesteps: tuple[float, ...],
    label: int,
    blocks: tuple[int, ...],
    pooling: str,
    ddim_steps: int | None = None,
) -> Iterator[tuple[int, float, Tensor]]:
    """Yields (block, t, pooled [B, ...]); z_t = α_t·z + σ_t·ε, ε zero where there is no noise; by inversion where `ddim_steps` is given."""
    model = unfolded_dit(weights)
    for t in timesteps:
        level = dit_noise_level(t)
        if ddim_steps is not None:
            z = inverted_dit(model, latents, t, ddim_steps, label)
        else:
            z = level.alpha * latents if noise is None else level.alpha * latents + level.sigma * noise
        stream = model.residual_stream(z, torch.full((len(z),), int(t)), torch.full((len(z),), label))
        for block, x in zip(range(max(blocks) + 1), stream, strict=False):
            if block in blocks:
                yield block, t, pool_tokens(x, pooling)


@torch.inference_mode()
def plaid_taps(
    weights: Any,
    tokens: Tensor,
    lengths: Tensor,
    noise: Tensor | None,
    *,
    timesteps: tuple[float, ...],
    blocks: tuple[int, ...],
    pooling: str,
    ddim_steps: int | None = None,
    self_conditioning: bool = False,
) -> Iterator[tuple[int, float, Tensor]]:
    """Yields (block, t, pooled [B, D]); padding masked; inversion and the denoiser's first guess where they are asked for."""
    model, schedule = unfolded_plaid(weights), plaid_schedule(weights.tensors)
    table = normalise_rows(weights.tensors["embedding_matrix.matrix"])
    embeddings = table[tokens]
    mask = torch.arange(tokens.shape[1])[None, :] < lengths[:, None]
    for t in timesteps:
        level: NoiseLevel = schedule.noise_level(t)
        if ddim_steps is not None:
            z = inverted_plaid(model, schedule, embeddings, table, mask, t, ddim_steps)
        else:
            z = level.alpha * embeddings if noise is None else level.alpha * embeddings + level.sigma * noise
        gamma = torch.full((len(z),), -level.log_snr, dtype=torch.float64)
        guess = model(z, gamma, table, mask).softmax(-1) @ table if self_conditioning else None
        stream = model.residual_stream(z, gamma, mask, guess)
        for block, x in zip(range(max(blocks) + 1), stream, strict=False):
            if block in blocks:
                yield block, t, pool_masked(x, mask, lengths, pooling)


def inverted_dit(model: DiT, latents: Tensor, t: float, steps: int, label: int) -> Tensor:
    """z_t by deterministic inversion (Song et al. 2021, eq. 12 with σ = 0): from the clean latent, the predicted noise carried to the next level."""
    z, alpha, sigma = latents, 1.0, 0.0
    path = ddim_path("dit", t, steps)
    for here, there in pairwise(path):
        whole = torch.full((len(z),), int(here)), torch.full((len(z),), label)
        epsilon = model(z, *whole)[:, : z.shape[1]]
        clean = (z - sigma * epsilon) / alpha
        level = dit_noise_level(there)
        alpha, sigma = level.alpha, level.sigma
        z = alpha * clean + sigma * epsilon
    return z


def inverted_plaid(model: Plaid, schedule: PlaidSchedule, embeddings: Tensor, table: Tensor, mask: Tensor, t: float, steps: int) -> Tensor:
    """z_t from z_0 = α₀·e: x̂ = denoise(z), ε̂ = (z − α·x̂)/σ, and on to the next level; no self-conditioning on the way."""
    path = ddim_path("plaid", t, steps)
    level = schedule.noise_level(path[0])
    z = level.alpha * embeddings
    for there in path[1:]:
        gamma = torch.full((len(z),), -level.log_snr, dtype=torch.float64)
        clean = model(z, gamma, table, mask).softmax(-1) @ table
        epsilon = (z - level.alpha * clean) / level.sigma
        level = schedule.noise_level(there)
        z = level.alpha * clean + level.sigma * epsilon
    return z
