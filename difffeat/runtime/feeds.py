"""What an engine is fed for samples of a source, outside an extraction: for calibration and verification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difffeat.engines.base import Engine, TensorSpec
from difffeat.errors import ConfigError
from difffeat.recipe import GraphRecipe, RunRecipe
from difffeat.runtime.batches import make_feeder, per_timestep
from difffeat.runtime.decoding import DecodePool
from difffeat.runtime.inversion import Inversion
from difffeat.runtime.latents import LatentCache
from difffeat.runtime.noise import noise
from difffeat.runtime.preprocess import quiet_pillow
from difffeat.runtime.samples import Sample
from difffeat.runtime.tokens import Captions


@dataclass(frozen=True)
class Fed:
    """The inputs of one run at timestep `t`: sample number `rows[i]` stands at place `places[i]` of the batch; other places are padding."""

    rows: np.ndarray
    places: np.ndarray
    t: float
    feeds: dict[str, np.ndarray]


def fed_batches(
    engine: Engine,
    samples: Sequence[Sample],
    run: RunRecipe,
    *,
    batch_size: int,
    latents_engine: Engine | None = None,
    cache: LatentCache | None = None,
    table: Mapping[str, np.ndarray] | None = None,
    tokenizer: Path | None = None,
    multiple: int = 8,
    invert: Inversion | None = None,
) -> Iterator[Fed]:
    """Every batch of the good samples at every timestep, padded to `batch_size`, as an extraction would feed them (its first draw of noise).

    Without `invert`, a graph whose samples are noised outside is given what they are noised from.

    Samples that cannot be read are in nobody's `rows`; the caller sees by that how many they are.
    """
    captions = open_captions(engine.recipe, run, tokenizer) if engine.recipe.takes_text else None
    feeder = make_feeder(
        engine,
        batch_size=batch_size,
        preprocessing=run.preprocessing,
        pixels=run.pixels,
        latents_engine=latents_engine,
        cache=cache,
        captions=captions,
        multiple=multiple,
    )
    batches, _ = feeder.plan(samples)
    with quiet_pillow(), DecodePool(2) as pool:
        for batch in batches:
            feeder.start(batch, pool)
            prepared = feeder.finish(batch)
            prepared.feeds = feeder.encode(prepared.feeds)
            places = np.flatnonzero(prepared.good)
            if not len(places):
                continue
            ids = [sample.id for sample in batch.samples]
            for t, parameters in per_timestep(engine, table):
                feeds = {**(prepared.feeds if invert is None else invert(prepared.feeds, t or 0.0)), **parameters}
                if "noise" in engine.inputs:
                    feeds["noise"] = batch_noise(engine.inputs["noise"], prepared.feeds, ids, seed=run.seed, t=t or 0.0, draw=0)
                yield Fed(np.asarray(batch.rows)[places], places, t or 0.0, feeds)


def batch_noise(spec: TensorSpec, feeds: Mapping[str, np.ndarray], ids: Sequence[str], *, seed: int, t: float, draw: int) -> np.ndarray:
    """Noise of each sample by its own key, float32 [B, ...]; zeros for padded rows and, in text, beyond each caption."""
    if "tokens" in feeds:
        width = int(spec.shape[2])
        out = np.zeros((*feeds["tokens"].shape, width), np.float32)
        for index, name in enumerate(ids):
            length = int(feeds["lengths"][index])
            out[index, :length] = noise(seed, name, t, draw, (length, width))
        return out
    shape = tuple(int(axis) for axis in spec.shape[1:])
    out = np.zeros((len(next(iter(feeds.values()))), *shape), np.float32)
    for index, name in enumerate(ids):
        out[index] = noise(seed, name, t, draw, shape)
    return out


def open_captions(recipe: GraphRecipe, run: RunRecipe, tokenizer: Path | None) -> Captions:
    """The tokenizer of a text graph with its limits. Raises ConfigError when the artifact has lost it."""
    if tokenizer is None:
        raise ConfigError("a text graph needs its tokenizer.json; the artifact has lost it. Export it again.")
    architecture = recipe.architecture
    return Captions(tokenizer, max_length=architecture["max_length"], vocab=architecture["vocab"], protocol=run.captions, truncate=run.truncate)
