# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false
# To a type checker every attribute of an nn.Module is `Tensor | Module`.
"""Folding: at a fixed timestep and label, everything that adaLN computes is a constant.

1 + scale and shift become the LayerNorm's own affine; the gates go into the linear before the residual; Plaid's residual scale goes into its two
output maps, its input scale into the input map. All in float64, stored in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difffeat.export.dit import timestep_frequencies
from difffeat.export.folded import DiTTrunk, PlaidTrunk
from difffeat.export.layers import Affine
from difffeat.export.plaid import gamma_frequencies, normalise_rows
from difffeat.export.schedule import NoiseLevel, PlaidSchedule

Tensors = Mapping[str, Tensor]

SHIFT_MSA, SCALE_MSA, GATE_MSA, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)


def dit_modulation(tensors: Tensors, config: Any, t: float, label: int, blocks: int) -> Tensor:
    """The six modulations of the first `blocks` blocks at (t, label), float64 [k, 6, D].

    Order: shift, 1 + scale, gate of the attention; shift, 1 + scale, gate of the MLP.
    """
    shared = _silu(dit_conditioning(tensors, config, t, label))
    rows = []
    for index in range(blocks):
        own = f"blocks.{index}."
        activated = _silu(dit_conditioning(tensors, config, t, label, own)) if f"{own}t_embedder.mlp.0.weight" in tensors else shared
        rows.append(_linear(tensors, f"{own}adaLN_modulation.1", activated).reshape(6, -1))
    modulation = torch.stack(rows) if rows else torch.zeros(0, 6, config.width, dtype=torch.float64)
    modulation[:, [SCALE_MSA, SCALE_MLP]] += 1.0
    return modulation


def dit_conditioning(tensors: Tensors, config: Any, t: float, label: int, prefix: str = "") -> Tensor:
    """Time embedding + label embedding, float64 [D]; of the embedders under `prefix`, where a block has its own."""
    angles = t * torch.tensor(timestep_frequencies(config.timestep_embedding))
    hidden = _linear(tensors, f"{prefix}t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))
    return _linear(tensors, f"{prefix}t_embedder.mlp.2", _silu(hidden)) + tensors[f"{prefix}y_embedder.embedding_table.weight"][label].double()


def fill_dit(trunk: DiTTrunk, tensors: Tensors, modulation_k6D: Tensor | None) -> None:
    """Fill a truncated DiT from an original state dict: modulations folded in, or left as inputs where there are none."""
    trunk.patch_embed.weight.copy_(tensors["x_embedder.proj.weight"])
    trunk.patch_embed.bias.copy_(tensors["x_embedder.proj.bias"])
    trunk.pos_embed.copy_(tensors["pos_embed"])
    for index, block in enumerate(trunk.blocks):
        if modulation_k6D is None:
            _fill_dit_block(block, tensors, index, None, None)
            continue
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation_k6D[index]
        block.norm1.weight.copy_(scale_msa)
        block.norm1.bias.copy_(shift_msa)
        block.norm2.weight.copy_(scale_mlp)
        block.norm2.bias.copy_(shift_mlp)
        _fill_dit_block(block, tensors, index, gate_msa, gate_mlp)


def fill_plaid(trunk: PlaidTrunk, tensors: Tensors, depth: int, level: NoiseLevel | None) -> None:
    """Fill a truncated Plaid: input scale and γ embedding of `level` folded in, or left as inputs where it is None.

    `depth` is that of the full model, whose residual scale 1/√L holds for the truncated one too.
    """
    if trunk.embeddings is not None:
        trunk.embeddings.copy_(normalise_rows(tensors["embedding_matrix.matrix"].double()))
    input_scale = 1.0 if level is None else plaid_input_scale(level, trunk.input.weight.shape[0])
    trunk.input.weight.copy_(tensors["model.input_linear.weight"].double().T * input_scale)
    if level is not None and trunk.input.bias is not None:
        trunk.input.bias.copy_(plaid_gamma_embedding(tensors, level))
    if trunk.selfcond is not None:
        trunk.selfcond.weight.copy_(4.0 * tensors["model.selfcond_linear.weight"].double().T)
    residual_scale = torch.tensor(depth**-0.5, dtype=torch.float64)
    for index, block in enumerate(trunk.blocks):
        prefix = f"model.blocks.{index}"
        block.norm1.weight.copy_(tensors[f"{prefix}.rmsnorm1.weight"])
        block.norm2.weight.copy_(tensors[f"{prefix}.rmsnorm2.weight"])
        for target, name, gate in (
            (block.qkv, "attn_qkv", None),
            (block.attn_out, "attn_out", residual_scale),
            (block.fc1, "mlp.fc1", None),
            (block.fc2, "mlp.fc2", residual_scale),
        ):
            _fill_linear(target, tensors[f"{prefix}.{name}.weight"], None, gate)


def dit_final_modulation(tensors: Tensors, config: Any, t: float, label: int) -> Tensor:
    """Shift and 1 + scale of the final layer at (t, label), float64 [2, D]."""
    rows = _linear(tensors, "final_layer.adaLN_modulation.1", _silu(dit_conditioning(tensors, config, t, label))).reshape(2, -1)
    rows[1] += 1.0
    return rows


def fill_dit_denoiser(graph: Any, tensors: Tensors, patch: int, channels: int) -> None:
    """Fill the whole DiT, its modulations left as inputs; of the output channels only the noise."""
    fill_dit(graph.trunk, tensors, None)
    weight, bias = tensors["final_layer.linear.weight"], tensors["final_layer.linear.bias"]
    keep = weight.shape[0] // (patch * patch)
    graph.final.weight.copy_(weight.reshape(patch * patch, keep, -1)[:, :channels].reshape(patch * patch * channels, -1).T)
    graph.final.bias.copy_(bias.reshape(patch * patch, keep)[:, :channels].reshape(-1))


def fill_plaid_denoiser(graph: Any, tensors: Tensors, config: Any) -> None:
    """Fill the whole Plaid with its head, its timestep left as inputs."""
    fill_plaid(graph.trunk, tensors, config.depth, None)
    graph.norm.weight.copy_(tensors["model.output_norm.weight"].double() / (config.width / config.width_base))
    graph.head.weight.copy_(tensors["model.output_linear.weight"].T)
    graph.head.bias.copy_(tensors["model.output_linear.bias"])


def plaid_schedule(tensors: Tensors) -> PlaidSchedule:
    """The learned schedule out of a Plaid checkpoint."""
    w1, b1, w2 = (tensors[f"noise_schedule.{key}"].double().numpy() for key in ("W1", "b1", "W2"))
    return PlaidSchedule(w1, b1, w2, float(tensors["gamma_bounds.gamma_0"]), float(tensors["gamma_bounds.gamma_1"]))


def plaid_input_scale(level: NoiseLevel, embed_dim: int) -> float:
    """1/√(α²/E + σ²)."""
    return float(1.0 / np.sqrt(level.alpha**2 / embed_dim + level.sigma**2))


def plaid_gamma_embedding(tensors: Tensors, level: NoiseLevel) -> Tensor:
    """gamma_linear([sin, cos](f·γ)), float64 [D]."""
    angles = -level.log_snr * torch.tensor(gamma_frequencies())
    return torch.cat([angles.sin(), angles.cos()]) @ tensors["model.gamma_linear.weight"].double().T


def _fill_dit_block(block: Any, tensors: Tensors, index: int, gate_msa: Tensor | None, gate_mlp: Tensor | None) -> None:
    prefix = f"blocks.{index}"
    for target, name, gate in (
        (block.qkv, "attn.qkv", None),
        (block.proj, "attn.proj", gate_msa),
        (block.fc1, "mlp.fc1", None),
        (block.fc2, "mlp.fc2", gate_mlp),
    ):
        _fill_linear(target, tensors[f"{prefix}.{name}.weight"], tensors[f"{prefix}.{name}.bias"], gate)


def _fill_linear(target: Affine, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> None:
    """Copy [out, in] into an Affine's [in, out], output channels multiplied by the gate ([out] or scalar, float64)."""
    if gate is None:
        target.weight.copy_(weight.T)
    else:
        target.weight.copy_(weight.T.double() * gate)
    if bias is not None and target.bias is not None:
        target.bias.copy_(bias if gate is None else bias.double() * gate)


def _linear(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return tensors[f"{name}.weight"].double() @ x + tensors[f"{name}.bias"].double()


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
