"""Diffusers' layout of a DiT to the original one, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difffeat.errors import CheckpointMismatch
from difffeat.export.dit import sincos_position_embedding
from difffeat.export.dit_config import MAX_POSITIONS, MAX_TOKENS, DiTConfig, DiTWeights, looks_like
from difffeat.export.safe_files import MAX_BLOCKS, block_count

_EMBEDDER = {
    "timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
}
_BLOCK = {"attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2", "norm1.linear": "adaLN_modulation.1"}
_ENDS = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1", "proj_out_2": "final_layer.linear"}
_CONFIG_MOST = {
    "num_attention_heads": 1 << 12, "attention_head_dim": 1 << 14, "in_channels": 1 << 12, "out_channels": 1 << 13, "num_layers": MAX_BLOCKS,
    "sample_size": 1 << 12, "patch_size": 1 << 8, "num_embeds_ada_norm": 1 << 24,
}  # fmt: skip


def check_config(config: Mapping[str, Any], what: str) -> None:
    """Raises CheckpointMismatch for a number in config.json that no network has, before anything is built of it."""
    for key, most in _CONFIG_MOST.items():
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
            raise CheckpointMismatch(f"{what} says {key} = {repr(value)[:40]}, and a whole number in 1..{most} is expected there.")


def from_diffusers(tensors: Mapping[str, Tensor], folder_config: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """Diffusers' names to the original ones.

    The embedders, which diffusers repeats in every block, are kept once where they are the same; after training with that library they differ, and
    those of block i ≥ 1 are then named `blocks.i.t_embedder.…` and `blocks.i.y_embedder.…`. Positions, which it does not store, are the published
    table.

    Raises CheckpointMismatch naming what is missing, surplus or contradicts config.json.
    """
    left = dict(tensors)
    depth = block_count(tensors, "transformer_blocks.", what)
    if folder_config.get("num_layers", depth) != depth:
        raise CheckpointMismatch(f"{what}: config.json says num_layers = {folder_config['num_layers']}, but the weights have {depth} blocks.")
    found: dict[str, Tensor] = {}
    try:
        for theirs, ours in _ENDS.items():
            for part in ("weight", "bias"):
                found[f"{ours}.{part}"] = left.pop(f"{theirs}.{part}")
        for index in range(depth):
            _convert_block(left, found, index, what)
    except KeyError as error:
        missing = f"missing: {error.args[0]}"
        raise CheckpointMismatch(f"{what} does not fit. {missing}.{looks_like(k for k in tensors if not k.startswith('transformer_'))}") from None
    _settle_embedders(found, depth)
    _check_projection(found["x_embedder.proj.weight"], folder_config, what)
    found["pos_embed"] = _positions(found["x_embedder.proj.weight"], folder_config, what)
    stored = left.pop("pos_embed.pos_embed", None)
    if stored is not None and (stored.numel() != found["pos_embed"].numel() or not _same_positions(stored, found["pos_embed"])):
        raise CheckpointMismatch(f"{what}: pos_embed.pos_embed is not the sine-cosine table of a DiT.")
    if left:
        raise CheckpointMismatch(f"{what} does not fit. surplus: {', '.join(sorted(left)[:4])}.")
    return found


def _same_positions(stored: Tensor, expected: Tensor) -> bool:
    return torch.allclose(stored.reshape(expected.shape), expected, atol=1e-2 if stored.dtype != torch.float32 else 1e-5)


def _check_projection(projection: Tensor, folder_config: Mapping[str, Any], what: str) -> None:
    """The patch embedding against config.json, both named."""
    if projection.ndim != 4 or projection.shape[2] != projection.shape[3] or not projection.numel():
        raise CheckpointMismatch(f"{what}: pos_embed.proj.weight has the shape {list(projection.shape)}, which is no patch embedding.")
    heads, size = folder_config.get("num_attention_heads"), folder_config.get("attention_head_dim")
    claims = {
        "patch_size": (folder_config.get("patch_size"), projection.shape[2]),
        "in_channels": (folder_config.get("in_channels"), projection.shape[1]),
        "num_attention_heads × attention_head_dim": (heads * size if heads and size else None, projection.shape[0]),
    }
    for key, (said, found) in claims.items():
        if said is not None and said != found:
            raise CheckpointMismatch(f"{what}: config.json says {key} = {said}, but the weights have {found}.")


def _positions(projection: Tensor, folder_config: Mapping[str, Any], what: str) -> Tensor:
    size, width, patch = folder_config.get("sample_size"), projection.shape[0], projection.shape[-1]
    if isinstance(size, bool) or not isinstance(size, int) or size < patch or size % patch:
        raise CheckpointMismatch(
            f"{what}: config.json must give the latents' side as sample_size, a multiple of the patch ({patch}); it says {size!r}."
        )
    tokens = (size // patch) ** 2
    if tokens > MAX_TOKENS or tokens * width > MAX_POSITIONS or width % 4:
        raise CheckpointMismatch(f"{what}: config.json says sample_size = {size}: {tokens} tokens of width {width} are not read. Is it in pixels?")
    return torch.tensor(sincos_position_embedding(width, size // patch), dtype=torch.float32)[None]


def _convert_block(left: dict[str, Tensor], found: dict[str, Tensor], index: int, what: str) -> None:
    theirs, ours = f"transformer_blocks.{index}", f"blocks.{index}"
    for part in ("weight", "bias"):
        chunks = [left.pop(f"{theirs}.attn1.to_{name}.{part}") for name in "qkv"]
        if len({chunk.shape for chunk in chunks}) > 1 or not chunks[0].ndim:
            raise CheckpointMismatch(f"{what}: q, k and v of {theirs} have shapes {[list(chunk.shape) for chunk in chunks]}; DiT's are equal.")
        found[f"{ours}.attn.qkv.{part}"] = torch.cat(chunks)
        for source, target in _BLOCK.items():
            found[f"{ours}.{target}.{part}"] = left.pop(f"{theirs}.{source}.{part}")
    for source, target in _EMBEDDER.items():
        found[target if index == 0 else f"{ours}.{target}"] = left.pop(f"{theirs}.norm1.emb.{source}")


def _settle_embedders(found: dict[str, Tensor], depth: int) -> None:
    """Keep the embedders once where all blocks have the same."""
    copies = {f"blocks.{index}.{name}": name for index in range(1, depth) for name in _EMBEDDER.values()}
    if all(found[copy].shape == found[name].shape and torch.equal(found[copy], found[name]) for copy, name in copies.items()):
        for copy in copies:
            del found[copy]


def save_dit_diffusers(weights: DiTWeights, folder: Path) -> None:
    """Write a diffusers `transformer/` folder: safetensors and config.json."""
    from safetensors.torch import save_file

    config, out = weights.config, {}
    for theirs, ours in _ENDS.items():
        for part in ("weight", "bias"):
            out[f"{theirs}.{part}"] = weights.tensors[f"{ours}.{part}"]
    for index in range(config.depth):
        theirs, ours = f"transformer_blocks.{index}", f"blocks.{index}"
        for part in ("weight", "bias"):
            for name, chunk in zip("qkv", weights.tensors[f"{ours}.attn.qkv.{part}"].chunk(3), strict=True):
                out[f"{theirs}.attn1.to_{name}.{part}"] = chunk.contiguous()
            for target, source in _BLOCK.items():
                out[f"{theirs}.{target}.{part}"] = weights.tensors[f"{ours}.{source}.{part}"]
        for target, source in _EMBEDDER.items():
            own = f"blocks.{index}.{source}"
            out[f"{theirs}.norm1.emb.{target}"] = weights.tensors[own if own in weights.tensors else source].clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(out, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(diffusers_config(config), indent=2) + "\n")


def diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """config.json of `DiTTransformer2DModel`."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch,
        "num_embeds_ada_norm": config.num_classes,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }
