"""Samples through the denoiser ahead of the graph: deterministic inversion (`ddim`), and the first of two passes of self-conditioning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from difffeat.engines.artifact import Artifact
from difffeat.errors import RecipeMismatch
from difffeat.recipe import GraphRecipe, ddim_path

PER_TIMESTEP = ("modulation", "final_modulation", "input_scale", "gamma_embedding", "prior")

Feeds = Mapping[str, np.ndarray]


class Inversion:
    """Turns clean inputs into what a graph takes whose samples are noised outside of it.

    **Arguments:** `recipe` of the graph; `table` as `Artifact.denoiser_table` gives it; `denoise` runs the denoiser graph: inputs to outputs by name;
    `identity` and `trial` of the engine that runs it.

    Each timestep has a path of its own from 0, so that a tap's features do not depend on which other timesteps a sweep holds.
    """

    def __init__(
        self,
        recipe: GraphRecipe,
        table: Feeds,
        denoise: Callable[[Feeds], Feeds],
        identity: Mapping[str, str] = MappingProxyType({}),
        trial: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._denoise, self._recipe, self.identity, self.trial = denoise, recipe, identity, trial
        self._table = {name: table[name] for name in PER_TIMESTEP if name in table}
        self._levels = {float(t): (float(a), float(s)) for t, a, s in zip(table["timesteps"], table["alpha"], table["sigma"], strict=True)}
        self._rows = {t: row for row, t in enumerate(self._levels)}
        self._embeddings = table.get("embeddings")

    def __call__(self, clean: Feeds, t: float) -> dict[str, np.ndarray]:
        """Inputs of the graph at timestep `t`: `latents`, for text with `lengths`, and `selfcond` where it is conditioned on a first guess.

        **Arguments:** `clean` with `latents` [B, C, S, S], or `tokens` and `lengths`.
        """
        if self._embeddings is None:
            return {"latents": self._inverted_image(clean["latents"], t)}
        lengths, embeddings = clean["lengths"], self._embeddings[clean["tokens"]]
        z = self._inverted_text(embeddings, lengths, t) if self._recipe.noising == "ddim" else self._level(t)[0] * embeddings
        feeds = {"latents": z.astype(np.float32), "lengths": lengths}
        if self._recipe.self_conditioned:
            feeds["selfcond"] = self._denoised(feeds["latents"], lengths, t)
        return feeds

    def _inverted_image(self, latents: np.ndarray, t: float) -> np.ndarray:
        """x̂ = (z − σ·ε̂)/α, z' = α'·x̂ + σ'·ε̂, from the clean latent (α = 1, σ = 0)."""
        z, alpha, sigma = latents, 1.0, 0.0
        for here, there in pairwise(ddim_path("dit", t, self._recipe.options["ddim_steps"])):
            epsilon = self._denoise({"latents": z, **self._inputs(here)})["epsilon"]
            clean = (z - sigma * epsilon) / alpha
            alpha, sigma = self._level(there)
            z = (alpha * clean + sigma * epsilon).astype(np.float32)
        return z

    def _inverted_text(self, embeddings: np.ndarray, lengths: np.ndarray, t: float) -> np.ndarray:
        """ε̂ = (z − α·x̂)/σ, z' = α'·x̂ + σ'·ε̂, from α₀·e."""
        path = ddim_path("plaid", t, self._recipe.options["ddim_steps"])
        z = (self._level(path[0])[0] * embeddings).astype(np.float32)
        for here, there in pairwise(path):
            (alpha, sigma), (next_alpha, next_sigma) = self._level(here), self._level(there)
            clean = self._denoised(z, lengths, here)
            z = (next_alpha * clean + next_sigma * (z - alpha * clean) / sigma).astype(np.float32)
        return z

    def _denoised(self, z: np.ndarray, lengths: np.ndarray, t: float) -> np.ndarray:
        return self._denoise({"latents": z, "lengths": lengths, "selfcond": np.zeros_like(z), **self._inputs(t)})["denoised"]

    def _inputs(self, t: float) -> dict[str, np.ndarray]:
        self._level(t)
        return {name: values[self._rows[t]] for name, values in self._table.items()}

    def _level(self, t: float) -> tuple[float, float]:
        if t not in self._levels:
            raise RecipeMismatch(f"the denoiser's table has no timestep {t:g}: files of two exports were mixed; export again into an empty folder.")
        return self._levels[t]


def open_inversion(artifact: Artifact, stack: ExitStack, engine: str, **opening: Any) -> Inversion | None:
    """The inversion of an artifact, its denoiser opened in `stack`; None where the graph needs none. Arguments and errors as for `open_engine`."""
    from difffeat.engines import open_engine

    if not artifact.recipe.noised_outside:
        return None
    denoiser = stack.enter_context(open_engine(artifact, engine, graph="denoiser", **opening))
    return Inversion(artifact.recipe, artifact.denoiser_table(), denoiser.run, denoiser.identity, denoiser.trial)
