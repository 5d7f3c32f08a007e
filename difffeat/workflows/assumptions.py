"""What a family takes for granted of its weights: schedule, prediction, time, latents, null label. For the recipe, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difffeat.recipe import GraphRecipe

SD_CHANNELS, SD_FACTOR, SD_SCALE = 4, 8, 0.18215
"""Of Stable Diffusion's autoencoder, which made the latents that DiT was trained on."""
FAMILIES = {"dit": "DiT", "plaid": "Plaid"}


def dit_diffusion(weights: Any, vae: Any | None) -> dict[str, Any]:
    """For `GraphRecipe.diffusion`: the family cannot be told from a file's names and shapes, so that what is taken for granted is written down."""
    from difffeat.export.schedule import DIT_STEPS

    config = weights.config
    latents: dict[str, Any] = {"channels": config.in_channels, "side": config.input_size}
    if vae is not None:
        from difffeat.export.vae import downsampling

        factor = downsampling(vae.config)
        latents |= {"factor": factor, "pixels": config.input_size * factor, "scaling_factor": vae.scaling_factor}
        latents |= {"shift_factor": vae.shift_factor} if vae.shift_factor is not None else {}
    elif config.in_channels == SD_CHANNELS:
        latents |= {"factor": SD_FACTOR, "pixels": config.input_size * SD_FACTOR, "scaling_factor": SD_SCALE, "autoencoder": "assumed"}
    found: dict[str, Any] = {
        "schedule": f"linear beta 0.0001..0.02 in {DIT_STEPS} steps, variance preserving",
        "prediction": "epsilon",
        "time": f"0..{DIT_STEPS - 1}, more is noisier",
        "timestep_embedding": config.timestep_embedding,
        "null_label": config.num_classes,
        "latents": latents,
    }
    return found | ({"assumed": list(weights.assumed)} if weights.assumed else {})


def plaid_diffusion(weights: Any) -> dict[str, Any]:
    """The same of a Plaid."""
    low, high = (round(float(weights.tensors[f"gamma_bounds.gamma_{end}"]), 4) for end in (0, 1))
    found: dict[str, Any] = {
        "schedule": f"learned gamma(t) from {low:g} to {high:g}, variance preserving",
        "prediction": "clean embeddings",
        "time": "0..1, more is noisier",
        "latents": {"channels": weights.config.embed_dim},
    }
    return found | ({"assumed": list(weights.assumed)} if weights.assumed else {})


def diffusion_lines(recipe: GraphRecipe) -> list[str]:
    """Family, schedule, label and latents in words; recipes of older exports do not say all of it."""
    family, said = FAMILIES.get(recipe.family, recipe.family), recipe.diffusion
    if not said:
        return [f"family {family}; label {recipe.label}"]
    lines = [f"family {family}: {said.get('schedule')}; predicts {said.get('prediction')}; time {said.get('time')}"]
    if "null_label" in said and recipe.label is not None:
        null = said["null_label"]
        lines.append(f"label {recipe.label}" + (" (the null label)" if recipe.label == null else f" (a class; the null label is {null})"))
    if recipe.family == "dit" and isinstance(said.get("latents"), Mapping):
        lines.append(f"latents {_latents(said['latents'])}")
    return [*lines, *(f"taken for {family} although {words}" for words in said.get("assumed", ()))]


def _latents(said: Mapping[str, Any]) -> str:
    shape = f"{said['channels']} channels of {said['side']} × {said['side']}"
    if "factor" not in said and said["channels"] != SD_CHANNELS:
        return f"{shape}; no autoencoder is given, and Stable Diffusion's has {SD_CHANNELS} channels: which one made these latents is not known"
    if said.get("autoencoder") == "assumed" or "factor" not in said:
        return (
            f"{shape}; no autoencoder is given: Stable Diffusion's is assumed ({said['side'] * SD_FACTOR} pixels at a factor of {SD_FACTOR}, "
            f"scaled by {SD_SCALE})"
        )
    shift = f", shifted by {said['shift_factor']:g}" if said.get("shift_factor") else ""
    pixels = f"{said['pixels']} × {said['pixels']} pixels"
    return f"{shape}, factor {said['factor']}: pictures of {pixels}; scaled by {said['scaling_factor']:g}{shift}"
