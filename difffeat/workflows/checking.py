"""Holding graphs against the unfolded fp32 network: seeded inputs, parity of the finished file, and what low precision must leave in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from difffeat.engines import Artifact, open_engine
from difffeat.engines.parity import ParityReport, TapParity, compare, statistics
from difffeat.recipe import GraphRecipe, tap_name

CHECK_SEED = 20250915
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
"""Largest relative L2 of a tap against the unfolded fp32 network, by precision."""
JUDGES = {"fp32": ("ort",), "fp16": ("torch", "ort"), "bf16": ("torch",)}
"""Engines that a file is checked in. torch rounds at each operation; ONNX Runtime's CPU provider computes fp16 graphs in fp32 and has no bf16."""

Feeds = Mapping[str, np.ndarray]
Fill = Callable[[Any, bool], None]


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
    if artifact.latents_graph is not None:
        with open_engine(artifact, engine_name, graph="latents") as engine:
            found |= engine.run({"pixels": feeds["pixels"]})
    with open_engine(artifact, engine_name) as engine:
        table = artifact.sweep_table()
        for index, t in enumerate(artifact.recipe.timesteps or (None,)):
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


def promote(
    recipe: GraphRecipe,
    feeds: Feeds,
    table: Feeds | None,
    fill: Fill,
    reference: Callable[[GraphRecipe], Feeds],
    build: Callable[..., Any],
    say: Callable[[str], None],
    distance: Callable[[np.ndarray, np.ndarray], tuple[float, int]] = worst_sample,
    tolerance: float | None = None,
) -> GraphRecipe:
    """The recipe with every part in fp32 that does not hold in its precision: the autoencoder, and block after block the first one that fails.

    Judged in torch, which rounds at each operation, at every block, on the seeded inputs; blocks start from the reference's latents, so that each
    part is judged by itself. A block that fails makes the next ones fail: the first is promoted and the rest looked at again.
    """
    from difffeat.export.precision import VAE, with_promoted

    limit = TOLERANCES[recipe.precision] if tolerance is None else tolerance
    whole = recipe if recipe.kind == "latents" else replace(recipe, blocks=tuple(range(max(recipe.blocks) + 1)))
    expected = reference(whole)
    if "latents" in expected:
        error, nonfinite = distance(run_eager(build(recipe, latents=True), fill, True, {"pixels": feeds["pixels"]})[0], expected["latents"])
        if nonfinite or error > limit:
            say(f"the autoencoder differs by {error:.1e} in {recipe.precision} ({nonfinite} non-finite): kept in fp32")
            recipe, whole = with_promoted(recipe, [VAE]), with_promoted(whole, [VAE])
    if recipe.kind == "latents":
        return recipe
    if recipe.kind == "image":
        whole = replace(whole, kind="from-latents")
        feeds = {**feeds, "latents": expected["latents"]}
    while (bad := _first_failing_block(whole, feeds, table, expected, fill, build, distance, limit)) is not None:
        number, error, nonfinite = bad
        say(f"block {number} differs by {error:.1e} in {recipe.precision} ({nonfinite} non-finite): kept in fp32")
        recipe, whole = with_promoted(recipe, [number]), with_promoted(whole, [number])
    return recipe


def _first_failing_block(
    whole: GraphRecipe,
    feeds: Feeds,
    table: Feeds | None,
    expected: Feeds,
    fill: Fill,
    build: Callable[..., Any],
    distance: Callable[[np.ndarray, np.ndarray], tuple[float, int]],
    limit: float,
) -> tuple[int, float, int] | None:
    """The first block, not promoted yet, beyond the limit at any timestep: its number, its distance, its non-finite values."""
    from difffeat.export.assemble import example_feeds
    from difffeat.export.precision import promoted

    module, names = build(whole), list(example_feeds(whole))
    filled = False
    failing: dict[int, tuple[float, int]] = {}
    for index, t in enumerate(whole.timesteps):
        given = {name: feeds[name] if name in feeds else table[name][index] for name in names}  # type: ignore[index]
        outputs = run_eager(module, None if filled else fill, False, given)
        filled = True
        for block, value in zip(whole.blocks, outputs, strict=True):
            error, nonfinite = distance(value, expected[tap_name(block, t)])
            if nonfinite or error > limit:
                failing.setdefault(block, (error, nonfinite))
    left = [block for block in sorted(failing) if block > 0 and block not in promoted(whole)]
    return (left[0], *failing[left[0]]) if left else None


def run_eager(module: Any, fill: Fill | None, latents: bool, feeds: Feeds) -> list[np.ndarray]:
    """Outputs of a module in torch, as float32; filled first where `fill` is given."""
    import torch

    if fill is not None:
        fill(module, latents)
    with torch.inference_mode():
        results = module.eval()(**{name: torch.tensor(value) for name, value in feeds.items()})
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
