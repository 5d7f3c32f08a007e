"""An engine with all that its feeds are made of: what an extraction, a measurement and a worker have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines import Artifact, EngineOptions, open_engine
from difffeat.engines.base import Engine
from difffeat.errors import ConfigError
from difffeat.recipe import GraphRecipe, RunRecipe
from difffeat.runtime.batches import Feeder, make_feeder, per_timestep
from difffeat.runtime.feeds import open_captions
from difffeat.runtime.inversion import Inversion, open_inversion
from difffeat.runtime.latents import LatentCache
from difffeat.runtime.tokens import Captions

Runs = list[tuple[float | None, dict[str, np.ndarray]]]


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """**Fields:** `engine` open; `run` recipe; `latents_engine` the VAE's graph, `cache` of latents in its place; `captions` of a text graph; `runs`
    (timestep, parameters) of each run of a batch; `invert` where samples go through the denoiser first; `multiple` that text is padded to.
    """

    engine: Engine
    run: RunRecipe
    latents_engine: Engine | None = None
    cache: LatentCache | None = None
    captions: Captions | None = None
    runs: Runs = field(default_factory=list)
    invert: Inversion | None = None
    multiple: int = 8

    @classmethod
    def of(
        cls,
        engine: Engine,
        run: RunRecipe,
        *,
        latents_engine: Engine | None = None,
        latent_cache: Path | None = None,
        table: Mapping[str, np.ndarray] | None = None,
        tokenizer: Path | None = None,
        invert: Inversion | None = None,
        multiple: int = 8,
    ) -> Feeding:
        """Raises ConfigError where the artifact has lost its table or its tokenizer, or latents come from nowhere; StoreError and RecipeMismatch for
        an unfit cache.
        """
        recipe = engine.recipe
        if recipe.kind.endswith("sweep") and table is None:
            raise ConfigError("a sweep graph needs its table.safetensors; the artifact has lost it. Export it again.")
        if recipe.noised_outside and invert is None:
            raise ConfigError("samples of this graph go through its denoiser first: pass invert=open_inversion(artifact, stack, engine).")
        made = cls(
            engine=engine,
            run=run,
            latents_engine=latents_engine,
            cache=None if latent_cache is None else LatentCache(latent_cache, recipe, run),
            captions=open_captions(recipe, run, tokenizer) if recipe.takes_text else None,
            runs=per_timestep(engine, table),
            invert=invert,
            multiple=multiple,
        )
        made.feeder(1)  # what cannot be fed is told before anything is written
        return made

    def feeder(self, batch_size: int) -> Feeder:
        """Cuts samples into batches of this size and prepares them. Raises ConfigError where latents come from nowhere."""
        return make_feeder(
            self.engine,
            batch_size=batch_size,
            preprocessing=self.run.preprocessing,
            pixels=self.run.pixels,
            latents_engine=self.latents_engine,
            cache=self.cache,
            captions=self.captions,
            multiple=self.multiple,
        )

    @property
    def beside(self) -> dict[str, Mapping[str, str]]:
        """Identities of the engines that samples go through before this one, by the part of their graph."""
        first = {"latents": self.latents_engine if self.cache is None else None, "denoiser": self.invert}
        return {part: one.identity for part, one in first.items() if one is not None}

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """See `Engine.trial`; of every engine that samples go through."""
        with ExitStack() as stack:
            for engine in (self.engine, self.latents_engine, self.invert):
                if engine is not None:
                    stack.enter_context(engine.trial())
            yield

    def at(self, t: float | None, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the engine takes at a timestep, out of a batch's clean inputs: those themselves, or what the denoiser makes of them."""
        return feeds if self.invert is None else self.invert(feeds, t or 0.0)

    @property
    def options(self) -> dict[str, Any]:
        """What of it belongs into a manifest."""
        return feeding_options(self.engine.recipe, self.multiple, self.cache)


def feeding_options(recipe: GraphRecipe, multiple: int, cache: LatentCache | None) -> dict[str, Any]:
    """How samples are fed, as far as it may show in a feature's bytes."""
    return ({"length_multiple": multiple} if recipe.takes_text else {}) | ({} if cache is None else {"latent_cache": cache.fingerprint})


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How to open an artifact for an extraction; small and plain, so that it can be handed to a worker.

    **Fields:** `artifact` folder; `engine`, `device`, `threads` and `options` as for `open_engine`; `latent_cache` in place of the VAE's graph.
    """

    artifact: Path
    engine: str = "ort"
    device: str | None = None
    threads: int | None = None
    options: EngineOptions = field(default_factory=EngineOptions)
    latent_cache: Path | None = None

    def open(self, stack: ExitStack, say: Any = lambda _: None) -> tuple[Engine, dict[str, Any]]:
        """The engine, opened in `stack`, and what goes with it: keywords of `extract` and of `Feeding.of`. Errors as for `open_engine`."""
        artifact = Artifact.open(self.artifact)
        how: dict[str, Any] = {"device": self.device, "threads": self.threads, "options": self.options, "say": say}
        engine = stack.enter_context(open_engine(artifact, self.engine, **how))
        vae = None
        if "pixels" not in engine.inputs and artifact.latents_graph is not None and self.latent_cache is None:
            vae = stack.enter_context(open_engine(artifact, self.engine, graph="latents", **how))
        beside = {"latents_engine": vae, "latent_cache": self.latent_cache, "table": artifact.sweep_table(), "tokenizer": artifact.tokenizer}
        return engine, {**beside, "invert": open_inversion(artifact, stack, self.engine, **how)}
