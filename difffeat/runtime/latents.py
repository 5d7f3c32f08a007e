"""The latent cache: a store of clean latents, so that a grid over timesteps and blocks costs one VAE pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from difffeat.errors import RecipeMismatch, SampleError, StoreMismatch
from difffeat.recipe import GraphRecipe, RunRecipe
from difffeat.runtime.samples import Sample
from difffeat.runtime.store import Store
from difffeat.runtime.witness import ask, spread

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
        self._path, self._sizes = path, store.sizes
        self._latents, self._valid, self._inputs = store[TAP], store.valid, store.inputs
        self._rows = {name: row for row, name in enumerate(store.ids)}

    def require_same_images(self, samples: Sequence[Sample], sizes: Sequence[int]) -> None:
        """Raises StoreMismatch where samples of this source are other images than those of their name that the cache was made from.

        All `sizes` in bytes are compared, −1 where nobody knows, and a few images are read and hashed.
        """
        known: list[tuple[int, Sample]] = []
        for sample, size in zip(samples, sizes, strict=True):
            row = self._rows.get(sample.id)
            if row is None or not self._valid[row]:
                continue
            if min(size, self._sizes[row]) >= 0 and size != self._sizes[row]:
                raise self._mismatch(sample, f"it has {size} bytes now, {self._sizes[row]} then")
            known.append((row, sample))
        witnesses = (known[number] for number in spread(len(known)))
        if (changed := ask((sample, np.asarray(self._inputs[row])) for row, sample in witnesses).against) is not None:
            raise self._mismatch(changed, "its bytes are others now")

    def _mismatch(self, sample: Sample, how: str) -> StoreMismatch:
        return StoreMismatch(
            f"the latent cache {self._path} was made from another image than {sample.id!r} ({sample.locator}): {how}. Make a cache from this source."
        )

    def get(self, sample_id: str) -> tuple[np.ndarray, str]:
        """Clean latents of a sample, float32 [C, S, S], and the SHA-256 of the image they are of. Raises SampleError when the cache lacks it."""
        row = self._rows.get(sample_id)
        if row is None:
            raise SampleError("the latent cache does not hold this sample. Make the cache from the same source.")
        if not self._valid[row]:
            raise SampleError("the sample was quarantined when the latent cache was made; its reason stands in that store's quarantine.jsonl.")
        return np.asarray(self._latents[row], np.float32).reshape(self.shape), np.asarray(self._inputs[row]).tobytes().hex()


def _check(path: Path, store: Store, recipe: GraphRecipe, run: RunRecipe) -> None:
    cached, cached_run = store.recipe.graph, store.recipe.run
    wanted = {
        "weights.vae": (cached.weights.get("vae"), recipe.weights.get("vae", cached.weights.get("vae"))),
        "input_size": (cached.architecture.get("input_size"), recipe.architecture.get("input_size")),
        "in_channels": (cached.architecture.get("in_channels"), recipe.architecture.get("in_channels")),
        "preprocessing": (cached_run.preprocessing, run.preprocessing),
        "pixels": (cached_run.pixels, run.pixels),
    }
    for name, (has, needs) in wanted.items():
        if has != needs:
            raise RecipeMismatch(f"the latent cache {path} was made with {name} = {has!r}, this extraction needs {needs!r}. Make another cache.")
