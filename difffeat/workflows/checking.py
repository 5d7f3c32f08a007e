"""Holding graphs against the unfolded fp32 network: seeded inputs, parity of the finished file, and what low precision must leave in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from difffeat.engines import Artifact, open_engine
from difffeat.engines.parity import ParityReport, TapParity, compare, statistics
from difffeat.recipe import GraphRecipe, tap_name
from difffeat.runtime.inversion import Inversion, open_inversion

CHECK_SEED = 20250915
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
"""Largest relative L2 of a tap against the unfolded fp32 network, by precision."""
JUDGES = {"fp32": ("ort",), "fp16": ("torch", "ort"), "bf16": ("torch",)}
"""Engines that a file is checked in. torch rounds at each operation; ONNX Runtime's CPU provider computes fp16 graphs in fp32 and has no bf16."""

Feeds = Mapping[str, np.ndarray]
Fill = Callable[[Any, str], None]


def measure_parity(artifact: Artifact, feeds: Feeds, expected: Feeds) -> ParityReport:
    """Run the finished graphs on the same inputs as the reference and compare; of several engines the worst counts."""
    precision = artifact.recipe.precision
    worst: dict[str, TapParity] = {}
    for name in JUDGES[precision]:
        for tap, value in _run(artifact, feeds, name).items():
            found = compare(value, expected[tap])
            if tap not in worst or (found.nonfinite, found.relative_l2) > (worst[tap].nonfinite, worst[tap].relative_l2):
                worst[tap] = found
    samples = len(next(iter(feeds.values())))
    return ParityReport(", ".join(JUDGES[precision]), "cpu", precision, TOLERANCES[precision], samples, worst)


def _run(artifact: Artifact, feeds: Feeds, engine_name: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    clean = feeds
    if artifact.latents_graph is not None:
        with open_engine(artifact, engine_name, graph="latents") as engine:
            found |= engine.run({"pixels": feeds["pixels"]})
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(artifact, engine_name))
        table = artifact.sweep_table()
        invert = open_inversion(artifact, stack, engine_name)
        for index, t in enumerate(artifact.recipe.timesteps or (None,)):
            if invert is not None:
                feeds = {**clean, **invert(clean, t or 0.0)}
            given = {name: feeds[name] if name in feeds else table[name][index] for name in engine.inputs}  # type: ignore[index]
            outputs = engine.run(given)
            found |= outputs if t is None else {tap_name(int(name[1:]), t): value for name, value in outputs.items()}
    return found


def worst_sample(found: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Relative L2 of the worst sample, and how many values are not finite."""
    parity = compare(found, expected)
    return parity.relative_l2, parity.nonfinite


def standardised(found: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Relative L2 on standardised features, and how many values are not finite."""
    measured = statistics(found, expected)
    return measured.standardised_l2, measured.nonfinite


@dataclass(frozen=True)
class Parts:
    """The graphs of an export as torch modules, to be run part by part in any precision.

    **Fields:** `fill` gives a part's module its weights; `table` of a sweep; `denoiser_table` of samples that are noised outside.
    """

    fill: Fill
    table: Feeds | None = None
    denoiser_table: Feeds | None = None

    def module(self, recipe: GraphRecipe, part: str = "model") -> Any:
        """A part's module in the recipe's precision, filled."""
        from difffeat.export.assemble import build_module

        module = build_module(recipe, part)
        self.fill(module, part)
        return module.eval()

    def latents(self, recipe: GraphRecipe, feeds: Feeds) -> np.ndarray:
        """What the autoencoder makes of `pixels`."""
        return run_eager(self.module(recipe, "latents"), {"pixels": feeds["pixels"]})[0]

    def noised(self, recipe: GraphRecipe, feeds: Feeds) -> dict[float, dict[str, np.ndarray]]:
        """Timestep -> what the denoiser makes of clean inputs; nothing where the graph needs none."""
        if self.denoiser_table is None:
            return {}
        module, name = self.module(recipe, "denoiser"), "denoised" if recipe.family == "plaid" else "epsilon"
        inversion = Inversion(recipe, self.denoiser_table, lambda given: {name: run_eager(module, given)[0]})
        return {t: inversion(feeds, t) for t in recipe.timesteps}

    def taps(self, recipe: GraphRecipe, feeds: Feeds, noised: Mapping[float, Feeds]) -> dict[str, np.ndarray]:
        """Every tap of a recipe."""
        from difffeat.export.assemble import example_feeds

        module, names, found = self.module(recipe), list(example_feeds(recipe)), {}
        for index, t in enumerate(recipe.timesteps):
            known = {**feeds, **noised.get(t, {})}
            outputs = run_eager(module, {name: known[name] if name in known else self.table[name][index] for name in names})  # type: ignore[index]
            found |= {tap_name(block, t): value for block, value in zip(recipe.blocks, outputs, strict=True)}
        return found


def promote(
    recipe: GraphRecipe,
    feeds: Feeds,
    parts: Parts,
    reference: Callable[[GraphRecipe], Feeds],
    say: Callable[[str], None],
    distance: Callable[[np.ndarray, np.ndarray], tuple[float, int]] = worst_sample,
    tolerance: float | None = None,
) -> GraphRecipe:
    """The recipe with every part in fp32 that does not hold in its precision: autoencoder, denoiser, and block after block the first one that fails.

    Judged in torch, which rounds at each operation, at every block, on the given inputs; blocks start from latents in fp32, so that each part is
    judged by itself. A block that fails makes the next ones fail: the first is promoted and the rest looked at again.
    """
    from difffeat.export.precision import DENOISER, VAE, with_promoted

    limit = TOLERANCES[recipe.precision] if tolerance is None else tolerance
    whole = recipe if recipe.kind == "latents" else replace(recipe, blocks=tuple(range(max(recipe.blocks) + 1)))
    expected = reference(whole)

    def keep(part: int | str, what: str, error: float, nonfinite: int) -> None:
        nonlocal recipe, whole
        say(f"{what} differs by {error:.1e} in {recipe.precision} ({nonfinite} non-finite): kept in fp32")
        recipe, whole = with_promoted(recipe, [part]), with_promoted(whole, [part])

    if "latents" in expected:
        error, nonfinite = distance(parts.latents(recipe, feeds), expected["latents"])
        if nonfinite or error > limit:
            keep(VAE, "the autoencoder", error, nonfinite)
    if recipe.kind == "latents":
        return recipe
    if recipe.kind == "image":
        whole = replace(whole, kind="from-latents")
        feeds = {**feeds, "latents": expected["latents"]}
    noised = parts.noised(exact(recipe), feeds)
    if noised:
        error, nonfinite = _furthest(parts.noised(recipe, feeds), noised, distance)
        if nonfinite or error > limit:
            keep(DENOISER, "the denoiser", error, nonfinite)
    while (bad := _first_failing_block(whole, parts.taps(whole, feeds, noised), expected, distance, limit)) is not None:
        keep(bad[0], f"block {bad[0]}", *bad[1:])
    return recipe


def exact(recipe: GraphRecipe) -> GraphRecipe:
    """The same graph in fp32."""
    from difffeat.export.precision import PROMOTED

    return replace(recipe, precision="fp32", options={key: value for key, value in recipe.options.items() if key != PROMOTED})


def _furthest(
    found: Mapping[float, Feeds], expected: Mapping[float, Feeds], distance: Callable[[np.ndarray, np.ndarray], tuple[float, int]]
) -> tuple[float, int]:
    """Largest distance, and largest count of non-finite values, of what a denoiser makes (latents, first guesses) at any timestep."""
    both = [distance(value[name], expected[t][name]) for t, value in found.items() for name in value if name in ("latents", "selfcond")]
    return max(error for error, _ in both), max(count for _, count in both)


def _first_failing_block(
    whole: GraphRecipe, found: Feeds, expected: Feeds, distance: Callable[[np.ndarray, np.ndarray], tuple[float, int]], limit: float
) -> tuple[int, float, int] | None:
    """The first block, not promoted yet, beyond the limit at any timestep: its number, its distance, its non-finite values."""
    from difffeat.export.precision import promoted

    for block in whole.blocks:
        for t in whole.timesteps:
            error, nonfinite = distance(found[tap_name(block, t)], expected[tap_name(block, t)])
            if block > 0 and block not in promoted(whole) and (nonfinite or error > limit):
                return block, error, nonfinite
    return None


def run_eager(module: Any, feeds: Feeds) -> list[np.ndarray]:
    """Outputs of a module in torch, as float32."""
    import torch

    with torch.inference_mode():
        results = module(**{name: torch.tensor(value) for name, value in feeds.items()})
    return [result.float().numpy() for result in results]


def check_images(recipe: GraphRecipe, samples: int) -> dict[str, np.ndarray]:
    """Seeded inputs for the parity check: images with structure at every scale, latents and noise of unit variance."""
    from difffeat.export.assemble import image_side, latent_shape

    rng = np.random.Generator(np.random.Philox(CHECK_SEED))
    feeds: dict[str, np.ndarray] = {}
    if "vae" in recipe.architecture:
        side = image_side(recipe)
        coarse = rng.uniform(0, 255, (samples, 8, 8, 3)).repeat(-(-side // 8), axis=1).repeat(-(-side // 8), axis=2)[:, :side, :side]
        feeds["pixels"] = np.clip(coarse + rng.normal(0, 16, coarse.shape), 0, 255).astype(np.uint8)
    feeds["latents"] = rng.standard_normal((samples, *latent_shape(recipe)), dtype=np.float32)
    feeds["noise"] = rng.standard_normal((samples, *latent_shape(recipe)), dtype=np.float32)
    return feeds


def check_captions(recipe: GraphRecipe, samples: int) -> dict[str, np.ndarray]:
    """Seeded tokens of several lengths, from one token to 24, padded rows among them."""
    rng = np.random.Generator(np.random.Philox(CHECK_SEED))
    lengths = np.linspace(24, 1, samples).round().astype(np.int64)
    tokens = rng.integers(0, recipe.architecture["vocab"], (samples, 24))
    noise = rng.standard_normal((samples, 24, recipe.architecture["embed_dim"]), dtype=np.float32)
    return {"tokens": tokens, "lengths": lengths, "noise": noise}
