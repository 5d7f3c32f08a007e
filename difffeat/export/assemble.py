"""From a recipe to the module of its graph, still without weights; to be filled from a checkpoint (export) or from a graph's own weights (torch
engine).
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from difffeat.export.folded import DiTTrunk, PlaidTrunk
from difffeat.export.graph import (
    FromLatentsGraph,
    GraphSpec,
    ImageGraph,
    LatentsGraph,
    MeanSweepGraph,
    MeanTextSweepGraph,
    Noising,
    SweepGraph,
    TextGraph,
    TextSweepGraph,
)
from difffeat.export.precision import set_precision
from difffeat.export.schedule import NoiseLevel
from difffeat.export.vae import VaeEncoder, downsampling
from difffeat.recipe import GraphRecipe

EXAMPLE_BATCH = 2
EXAMPLE_LENGTH = 5


def build_module(recipe: GraphRecipe, latents: bool = False) -> nn.Module:
    """The module of a graph in its precision, its parameters unset. `latents`: that of the `latents.onnx` beside it."""
    return set_precision(_shell(recipe, latents), recipe)


def _shell(recipe: GraphRecipe, latents: bool) -> nn.Module:
    if latents or recipe.kind == "latents":
        return LatentsGraph(_encoder(recipe))
    if recipe.family == "plaid":
        return _text_module(recipe)
    trunk = dit_trunk(recipe)
    if recipe.kind == "sweep":
        return SweepGraph(trunk) if recipe.noising == "random" else MeanSweepGraph(trunk)
    if recipe.kind == "from-latents":
        return FromLatentsGraph(trunk, noising(recipe))
    return ImageGraph(_encoder(recipe), trunk, noising(recipe))


def _encoder(recipe: GraphRecipe) -> VaeEncoder:
    return VaeEncoder(recipe.architecture["vae"], flat_norms=recipe.precision == "fp32")


def _text_module(recipe: GraphRecipe) -> nn.Module:
    trunk = plaid_trunk(recipe)
    if recipe.kind == "text-sweep":
        return TextSweepGraph(trunk) if recipe.noising == "random" else MeanTextSweepGraph(trunk)
    return TextGraph(trunk, noising(recipe))


def dit_trunk(recipe: GraphRecipe) -> DiTTrunk:
    """The truncated DiT of a recipe, its parameters unset."""
    a = SimpleNamespace(**recipe.architecture)
    return DiTTrunk(
        width=a.width,
        heads=a.heads,
        patch=a.patch,
        in_channels=a.in_channels,
        input_size=a.input_size,
        mlp_ratio=a.mlp_ratio,
        mlp_norm_eps=1e-6 if a.timestep_embedding == "original" else 1e-5,
        taps=recipe.blocks,
        pooling=recipe.pooling,
        swept=recipe.kind == "sweep",
    )


def plaid_trunk(recipe: GraphRecipe) -> PlaidTrunk:
    """The truncated Plaid of a recipe, its parameters unset."""
    a = SimpleNamespace(**recipe.architecture)
    return PlaidTrunk(
        width=a.width,
        vocab=a.vocab,
        embed_dim=a.embed_dim,
        max_length=a.max_length,
        taps=recipe.blocks,
        pooling=recipe.pooling,
        swept=recipe.kind == "text-sweep",
    )


def noising(recipe: GraphRecipe) -> Noising:
    """The noising of a graph at one timestep."""
    level = NoiseLevel.from_log_snr(recipe.timesteps[0], recipe.log_snr[0])
    return Noising(level.alpha, level.sigma, constant_noise(recipe) if recipe.noising == "constant" else None)


def constant_noise(recipe: GraphRecipe) -> Tensor:
    """The one noise tensor that `noising=constant` bakes in, the same for every sample: [1, C, S, S] or [1, 1, E]."""
    shape = (1, 1, recipe.architecture["embed_dim"]) if recipe.family == "plaid" else (1, *latent_shape(recipe))
    generator = np.random.Generator(np.random.Philox(recipe.noise_seed or 0))
    return torch.tensor(generator.standard_normal(shape), dtype=torch.float32)


def latent_shape(recipe: GraphRecipe) -> tuple[int, int, int]:
    """[C, S, S]."""
    side = recipe.architecture["input_size"]
    return recipe.architecture["in_channels"], side, side


def image_side(recipe: GraphRecipe) -> int:
    """Height and width of `pixels`."""
    return recipe.architecture["input_size"] * downsampling(recipe.architecture["vae"])


def graph_spec(recipe: GraphRecipe, module: nn.Module, latents: bool = False) -> GraphSpec:
    """Inputs, dynamic axes and output names of a graph."""
    feeds = example_feeds(recipe, latents)
    per_sample = {"pixels", "latents", "noise", "tokens", "lengths"}
    dynamic = {name: {0: "batch"} for name in feeds if name in per_sample}
    if recipe.family == "plaid":
        for name in ("tokens", "noise"):
            if name in feeds:
                dynamic[name][1] = "length"
    outputs = ["latents"] if latents or recipe.kind == "latents" else [f"b{block}" for block in recipe.blocks]
    return GraphSpec(module, feeds, dynamic, outputs)


def example_feeds(recipe: GraphRecipe, latents: bool = False) -> dict[str, Tensor]:
    """Inputs of the right names, types and shapes, in the order of the graph's signature."""
    if recipe.family == "plaid":
        return _text_feeds(recipe)
    batch, shape, side = EXAMPLE_BATCH, latent_shape(recipe), 0
    feeds: dict[str, Tensor] = {}
    if latents or recipe.kind in ("image", "latents"):
        side = image_side(recipe)
        feeds["pixels"] = torch.zeros(batch, side, side, 3, dtype=torch.uint8)
    else:
        feeds["latents"] = torch.zeros(batch, *shape)
    if latents or recipe.kind == "latents":
        return feeds
    if recipe.noising == "random":
        feeds["noise"] = torch.zeros(batch, *shape)
    if recipe.kind == "sweep":
        feeds["alpha"] = torch.ones(1)
        if recipe.noising == "random":
            feeds["sigma"] = torch.ones(1)
        feeds["modulation"] = torch.ones(max(recipe.blocks), 6, recipe.architecture["width"])
    return feeds


def _text_feeds(recipe: GraphRecipe) -> dict[str, Tensor]:
    batch, length = EXAMPLE_BATCH, EXAMPLE_LENGTH
    feeds = {"tokens": torch.zeros(batch, length, dtype=torch.int64), "lengths": torch.full((batch,), length)}
    random = recipe.noising == "random"
    if random:
        feeds["noise"] = torch.zeros(batch, length, recipe.architecture["embed_dim"])
    if recipe.kind == "text-sweep":
        feeds["alpha"] = torch.ones(1)
        if random:
            feeds["sigma"] = torch.ones(1)
        feeds["input_scale"] = torch.ones(1)
        feeds["gamma_embedding"] = torch.ones(recipe.architecture["width"])
    return feeds
