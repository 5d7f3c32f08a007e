"""Per-timestep inputs of sweeps and denoisers, computed in float64 at export, so that the runtime needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from difffeat.recipe import GraphRecipe, ddim_path


def dit_sweep_table(weights: Any, recipe: GraphRecipe, label: int) -> dict[str, np.ndarray]:
    """Per-timestep inputs of the sweep graph, computed in float64."""
    from difffeat.export.fold import dit_modulation
    from difffeat.export.schedule import dit_noise_level

    levels = [dit_noise_level(t) for t in recipe.timesteps]
    blocks = max(recipe.blocks)
    modulation = [dit_modulation(weights.tensors, weights.config, t, label, blocks).numpy() for t in recipe.timesteps]
    return _table(recipe, levels, modulation=np.stack(modulation))


def plaid_sweep_table(weights: Any, recipe: GraphRecipe) -> dict[str, np.ndarray]:
    """The same of a text sweep."""
    from difffeat.export.fold import plaid_gamma_embedding, plaid_input_scale, plaid_schedule

    schedule = plaid_schedule(weights.tensors)
    levels = [schedule.noise_level(t) for t in recipe.timesteps]
    scale = np.array([[plaid_input_scale(level, weights.config.embed_dim)] for level in levels])
    embedding = np.stack([plaid_gamma_embedding(weights.tensors, level).numpy() for level in levels])
    return _table(recipe, levels, input_scale=scale, gamma_embedding=embedding)


def denoiser_timesteps(recipe: GraphRecipe) -> list[float]:
    """Every timestep at which the denoiser is asked or whose level a sample passes, ascending, 0 among them."""
    paths = [ddim_path(recipe.family, t, recipe.options["ddim_steps"]) for t in recipe.timesteps] if recipe.noising == "ddim" else [recipe.timesteps]
    return sorted({0.0, *(t for path in paths for t in path)})


def dit_denoiser_table(weights: Any, recipe: GraphRecipe, label: int) -> dict[str, np.ndarray]:
    """`timesteps` [T], `alpha` and `sigma` float64 [T], `modulation` [T, L, 6, D], `final_modulation` [T, 2, D]."""
    from difffeat.export.fold import dit_final_modulation, dit_modulation
    from difffeat.export.schedule import dit_noise_level

    timesteps, config = denoiser_timesteps(recipe), weights.config
    modulation = [dit_modulation(weights.tensors, config, t, label, config.depth).float().numpy() for t in timesteps]
    final = [dit_final_modulation(weights.tensors, config, t, label).float().numpy() for t in timesteps]
    return _levels(timesteps, [dit_noise_level(t) for t in timesteps]) | {"modulation": np.stack(modulation), "final_modulation": np.stack(final)}


def plaid_denoiser_table(weights: Any, recipe: GraphRecipe) -> dict[str, np.ndarray]:
    """`timesteps` [T], `alpha` and `sigma` float64 [T], `input_scale` and `prior` [T, 1], `gamma_embedding` [T, D]; `embeddings` [V, E]."""
    from difffeat.export.fold import plaid_gamma_embedding, plaid_input_scale, plaid_schedule
    from difffeat.export.plaid import normalise_rows

    timesteps, schedule = denoiser_timesteps(recipe), plaid_schedule(weights.tensors)
    levels = [schedule.noise_level(t) for t in timesteps]
    return _levels(timesteps, levels) | {
        "input_scale": np.array([[plaid_input_scale(level, weights.config.embed_dim)] for level in levels], np.float32),
        "prior": np.array([[level.alpha / level.sigma**2] for level in levels], np.float32),
        "gamma_embedding": np.stack([plaid_gamma_embedding(weights.tensors, level).float().numpy() for level in levels]),
        "embeddings": normalise_rows(weights.tensors["embedding_matrix.matrix"].double()).float().numpy(),
    }


def _levels(timesteps: Sequence[float], levels: Sequence[Any]) -> dict[str, np.ndarray]:
    columns = {"timesteps": timesteps, "alpha": [level.alpha for level in levels], "sigma": [level.sigma for level in levels]}
    found: dict[str, np.ndarray] = {name: np.array(values, np.float64) for name, values in columns.items()}
    return found


def _table(recipe: GraphRecipe, levels: Sequence[Any], **per_timestep: np.ndarray) -> dict[str, np.ndarray]:
    table: dict[str, np.ndarray] = {"timesteps": np.array(recipe.timesteps, np.float64)}
    if not recipe.noised_outside:
        table["alpha"] = np.array([[level.alpha] for level in levels], np.float32)
    if recipe.noising == "random":
        table["sigma"] = np.array([[level.sigma] for level in levels], np.float32)
    return table | {name: np.ascontiguousarray(value, np.float32) for name, value in per_timestep.items()}
