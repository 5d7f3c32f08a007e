"""The latent cache: a store of clean latents, so that a grid over timesteps and blocks costs one VAE pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from difffeat.errors import RecipeMismatch, SampleError
from difffeat.recipe import GraphRecipe, RunRecipe
from difffeat.runtime.store import Store

TAP = "latents"


class LatentCache:
    """Latents by sample id.

    **Arguments:** `path` a store made by a `latents` graph; `recipe` of the graph that will take the latents; `run` its run recipe.

    Raises StoreError with its subclasses, RecipeMismatch when the cache was made otherwise than this extraction would make its latents.
    """

    def __init__(self, path: Path, recipe: GraphRecipe, run: RunRecipe) -> None:
        store = Store.open(path)
        if TAP not in store.taps:
            raise RecipeMismatch(f"{path} holds {', '.join(store.taps[:3])}, no latents. Make a cache with an artifact of --graph latents.")
        _check(path, store, recipe, run)
        side = recipe.architecture["input_size"]
        self.shape = (recipe.architecture["in_channels"], side, side)
        self.fingerprint = store.fingerprint
        self._latents, self._valid = store[TAP], store.valid
        self._rows = {name: row for row, name in enumerate(store.ids)}

    def get(self, sample_id: str) -> np.ndarray:
        """Clean latents of a sample, float32 [C, S, S]. Raises SampleError when the cache lacks it."""
        row = self._rows.get(sample_id)
        if row is None:
            raise SampleError("the latent cache does not hold this sample. Make the cache from the same source.")
        if not self._valid[row]:
            raise SampleError("the sample was quarantined when the latent cache was made; its reason stands in that store's quarantine.jsonl.")
        return np.asarray(self._latents[row], np.float32).reshape(self.shape)


def _check(path: Path, store: Store, recipe: GraphRecipe, run: RunRecipe) -> None:
    cached, cached_run = store.recipe.graph, store.recipe.run
    wanted = {
        "weights.vae": (cached.weights.get("vae"), recipe.weights.get("vae", cached.weights.get("vae"))),
        "input_size": (cached.architecture.get("input_size"), recipe.architecture.get("input_size")),
        "in_channels": (cached.architecture.get("in_channels"), recipe.architecture.get("in_channels")),
        "preprocessing": (cached_run.preprocessing, run.preprocessing),
    }
    for name, (has, needs) in wanted.items():
        if has != needs:
            raise RecipeMismatch(f"the latent cache {path} was made with {name} = {has!r}, this extraction needs {needs!r}. Make another cache.")
