"""From a recipe to the module of its graph, still without weights; to be filled from a checkpoint (export) or from a graph's own weights (torch
engine).
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from difffeat.export.folded import DiTTrunk, PlaidTrunk
from difffeat.export.graph import (
    GIVEN_TEXT,
    DiTDenoiserGraph,
    FromLatentsGraph,
    GivenGraph,
    GivenSweepGraph,
    GraphSpec,
    ImageGraph,
    LatentsGraph,
    MeanSweepGraph,
    MeanTextSweepGraph,
    Noising,
    PlaidDenoiserGraph,
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


def build_module(recipe: GraphRecipe, part: str = "model") -> nn.Module:
    """The module of a graph in its precision, its parameters unset; `part` `model`, or `latents` and `denoiser` for the graphs beside it."""
    return set_precision(_shell(recipe, part), recipe, part)


def _shell(recipe: GraphRecipe, part: str) -> nn.Module:
    if part == "denoiser":
        return _denoiser(recipe)
    if part == "latents" or recipe.kind == "latents":
        return LatentsGraph(_encoder(recipe))
    if recipe.family == "plaid":
        return _text_module(recipe)
    trunk = dit_trunk(recipe)
    if recipe.noised_outside:
        return GivenSweepGraph(trunk) if recipe.kind == "sweep" else GivenGraph(trunk)
    if recipe.kind == "sweep":
        return SweepGraph(trunk) if recipe.noising == "random" else MeanSweepGraph(trunk)
    if recipe.kind == "from-latents":
        return FromLatentsGraph(trunk, noising(recipe))
    return ImageGraph(_encoder(recipe), trunk, noising(recipe))


def _encoder(recipe: GraphRecipe) -> VaeEncoder:
    return VaeEncoder(recipe.architecture["vae"], flat_norms=recipe.precision == "fp32")


def _denoiser(recipe: GraphRecipe) -> nn.Module:
    """The whole backbone, its timestep an input."""
    whole = replace(recipe, blocks=(recipe.architecture["depth"],))
    if recipe.family == "plaid":
        return PlaidDenoiserGraph(plaid_trunk(whole, swept=True, self_conditioned=True), recipe.architecture["vocab"])
    return DiTDenoiserGraph(dit_trunk(replace(whole, pooling="tokens"), swept=True), recipe.architecture["patch"], recipe.architecture["in_channels"])


def _text_module(recipe: GraphRecipe) -> nn.Module:
    if recipe.noised_outside:
        return GIVEN_TEXT[recipe.kind == "text-sweep", recipe.self_conditioned](plaid_trunk(recipe, embedded=False))
    trunk = plaid_trunk(recipe)
    if recipe.kind == "text-sweep":
        return TextSweepGraph(trunk) if recipe.noising == "random" else MeanTextSweepGraph(trunk)
    return TextGraph(trunk, noising(recipe))


def dit_trunk(recipe: GraphRecipe, swept: bool | None = None) -> DiTTrunk:
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
        swept=recipe.kind == "sweep" if swept is None else swept,
    )


def plaid_trunk(recipe: GraphRecipe, *, swept: bool | None = None, self_conditioned: bool | None = None, embedded: bool = True) -> PlaidTrunk:
    """The truncated Plaid of a recipe, its parameters unset. `embedded`: tokens enter it, and it holds their embeddings."""
    a = SimpleNamespace(**recipe.architecture)
    return PlaidTrunk(
        width=a.width,
        vocab=a.vocab if embedded else None,
        embed_dim=a.embed_dim,
        max_length=a.max_length,
        taps=recipe.blocks,
        pooling=recipe.pooling,
        swept=recipe.kind == "text-sweep" if swept is None else swept,
        self_conditioned=recipe.self_conditioned if self_conditioned is None else self_conditioned,
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


def graph_spec(recipe: GraphRecipe, module: nn.Module, part: str = "model") -> GraphSpec:
    """Inputs, dynamic axes and output names of a graph."""
    feeds = example_feeds(recipe, part)
    per_sample = {"pixels", "latents", "noise", "tokens", "lengths", "selfcond"}
    dynamic = {name: {0: "batch"} for name in feeds if name in per_sample}
    if recipe.family == "plaid":
        for name in ("tokens", "noise", "latents", "selfcond"):
            if name in feeds:
                dynamic[name][1] = "length"
    outputs = ["latents"] if part == "latents" or recipe.kind == "latents" else [f"b{block}" for block in recipe.blocks]
    if part == "denoiser":
        outputs = ["denoised" if recipe.family == "plaid" else "epsilon"]
    return GraphSpec(module, feeds, dynamic, outputs)


def example_feeds(recipe: GraphRecipe, part: str = "model") -> dict[str, Tensor]:
    """Inputs of the right names, types and shapes, in the order of the graph's signature."""
    if part == "denoiser":
        return _denoiser_feeds(recipe)
    if recipe.family == "plaid":
        return _text_feeds(recipe)
    latents = part == "latents"
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
        if not recipe.noised_outside:
            feeds["alpha"] = torch.ones(1)
        if recipe.noising == "random":
            feeds["sigma"] = torch.ones(1)
        feeds["modulation"] = torch.ones(max(recipe.blocks), 6, recipe.architecture["width"])
    return feeds


def _text_feeds(recipe: GraphRecipe) -> dict[str, Tensor]:
    batch, length = EXAMPLE_BATCH, EXAMPLE_LENGTH
    if recipe.noised_outside:
        return _given_text_feeds(recipe)
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


def _given_text_feeds(recipe: GraphRecipe) -> dict[str, Tensor]:
    latents = torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH, recipe.architecture["embed_dim"])
    feeds = {"latents": latents, "lengths": torch.full((EXAMPLE_BATCH,), EXAMPLE_LENGTH)}
    if recipe.kind == "text-sweep":
        feeds |= {"input_scale": torch.ones(1), "gamma_embedding": torch.ones(recipe.architecture["width"])}
    return feeds | ({"selfcond": latents.clone()} if recipe.self_conditioned else {})


def _denoiser_feeds(recipe: GraphRecipe) -> dict[str, Tensor]:
    width = recipe.architecture["width"]
    if recipe.family == "plaid":
        latents = torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH, recipe.architecture["embed_dim"])
        lengths = torch.full((EXAMPLE_BATCH,), EXAMPLE_LENGTH)
        scalars = {"input_scale": torch.ones(1), "gamma_embedding": torch.ones(width), "prior": torch.ones(1)}
        return {"latents": latents, "lengths": lengths, **scalars, "selfcond": latents.clone()}
    latents = torch.zeros(EXAMPLE_BATCH, *latent_shape(recipe))
    return {"latents": latents, "modulation": torch.ones(recipe.architecture["depth"], 6, width), "final_modulation": torch.ones(2, width)}
