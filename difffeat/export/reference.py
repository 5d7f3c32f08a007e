# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# To a type checker every attribute of an nn.Module is `Tensor | Module`.
"""The reference that every exported graph is held against: the *unfolded* backbones in fp32, as published, run in torch block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from difffeat.export.dit import DiT, timestep_frequencies
from difffeat.export.fold import plaid_schedule
from difffeat.export.layers import pool_masked, pool_tokens
from difffeat.export.plaid import Plaid, normalise_rows
from difffeat.export.schedule import NoiseLevel, dit_noise_level


def load_into(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give a module built on the meta device its tensors, without copying them."""
    state = {name: tensors[name] for name in module.state_dict()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def unfolded_dit(weights: Any) -> DiT:
    """The published network with the tensors of `DiTWeights` (shared, not copied)."""
    with torch.device("meta"):
        model = DiT.from_config(weights.config)
    model.t_embedder.frequencies = torch.tensor(timestep_frequencies(weights.config.timestep_embedding))
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
    weights: Any, latents: Tensor, noise: Tensor | None, *, timesteps: tuple[float, ...], label: int, blocks: tuple[int, ...], pooling: str
) -> Iterator[tuple[int, float, Tensor]]:
    """Yields (block, t, pooled [B, ...]); z_t = α_t·z + σ_t·ε, ε zero where there is no noise."""
    model = unfolded_dit(weights)
    for t in timesteps:
        level = dit_noise_level(t)
        z = level.alpha * latents if noise is None else level.alpha * latents + level.sigma * noise
        stream = model.residual_stream(z, torch.full((len(z),), int(t)), torch.full((len(z),), label))
        for block, x in zip(range(max(blocks) + 1), stream, strict=False):
            if block in blocks:
                yield block, t, pool_tokens(x, pooling)


@torch.inference_mode()
def plaid_taps(
    weights: Any, tokens: Tensor, lengths: Tensor, noise: Tensor | None, *, timesteps: tuple[float, ...], blocks: tuple[int, ...], pooling: str
) -> Iterator[tuple[int, float, Tensor]]:
    """Yields (block, t, pooled [B, D]); padding masked."""
    model, schedule = unfolded_plaid(weights), plaid_schedule(weights.tensors)
    embeddings = normalise_rows(weights.tensors["embedding_matrix.matrix"])[tokens]
    mask = torch.arange(tokens.shape[1])[None, :] < lengths[:, None]
    for t in timesteps:
        level: NoiseLevel = schedule.noise_level(t)
        z = level.alpha * embeddings if noise is None else level.alpha * embeddings + level.sigma * noise
        stream = model.residual_stream(z, torch.full((len(z),), -level.log_snr, dtype=torch.float64), mask)
        for block, x in zip(range(max(blocks) + 1), stream, strict=False):
            if block in blocks:
                yield block, t, pool_masked(x, mask, lengths, pooling)
