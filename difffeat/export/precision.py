"""Low precision, typed at export: matrix products and convolutions in fp16 or bf16, everything that sums or normalises in fp32.

What stays an fp32 island: LayerNorm, RMSNorm and rotation, the residual stream, the patch and token embeddings (a few channels wide), the last map of
the autoencoder, pooling. Any block can be promoted to fp32 whole; the recipe's `options` name the promoted ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from difffeat.export import layers
from difffeat.export.layers import Affine
from difffeat.recipe import GraphRecipe

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROMOTED = "fp32_parts"
"""Where the recipe's options name the promoted parts."""
VAE, DENOISER = "vae", "denoiser"
"""Names of the autoencoder and the denoiser among the promoted parts; the others are numbers of blocks, of trunk and denoiser alike."""


def cpu_computes(precision: str) -> bool:
    """Whether this CPU has units for the products of a precision; see `layers.CPU_TYPES`."""
    return DTYPES[precision] in layers.CPU_TYPES


def promoted(recipe: GraphRecipe) -> tuple[int | str, ...]:
    """Parts of a low-precision graph that are kept in fp32."""
    return tuple(recipe.options.get(PROMOTED, ()))


def with_promoted(recipe: GraphRecipe, parts: Iterable[int | str]) -> GraphRecipe:
    """The recipe with these parts in fp32, besides what it has there."""
    from dataclasses import replace

    both = sorted({*promoted(recipe), *parts}, key=str)
    return replace(recipe, options={**recipe.options, PROMOTED: both})


def set_precision(module: nn.Module, recipe: GraphRecipe, part: str = "model") -> nn.Module:
    """Give a graph's module the types of its recipe, in place, before it is filled (so that weights are rounded once, from float64 or fp32)."""
    dtype, kept = DTYPES[recipe.precision], promoted(recipe)
    if dtype == torch.float32 or (part == DENOISER and DENOISER in kept):
        return module
    shell: Any = cast("Any", module)
    if hasattr(shell, "vae") and VAE not in kept:
        shell.vae.encoder.to(dtype)
    blocks: Iterable[nn.Module] = shell.trunk.blocks if hasattr(shell, "trunk") else ()
    for number, block in enumerate(blocks, 1):
        if number not in kept:
            for layer in block.modules():
                if isinstance(layer, Affine):
                    layer.to(dtype)
    return module
