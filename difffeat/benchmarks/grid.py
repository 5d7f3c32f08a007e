"""`difffeat bench grid`: what a grid of timesteps × blocks costs, against the passes that it cannot do without."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.benchmarks.asking import require_counts, require_family
from difffeat.benchmarks.target import Target
from difffeat.benchmarks.throughput import write_result
from difffeat.benchmarks.timing import Timing, compare, in_microseconds, machine, ratios, written
from difffeat.engines import Artifact
from difffeat.runtime.batches import per_timestep
from difffeat.workflows.exporting import ExportOptions, export_dit
from difffeat.workflows.loading import Backbone, load_backbone

TIMESTEPS = (0, 10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500)
GRID = "difffeat: one VAE pass, one sweep pass a timestep, every tap"
BOUND = "one VAE pass and one truncated pass a timestep, one tap each"
LIMIT = 1.1

Say = Callable[..., None]


def run_grid(
    model: str, weights: str | None, *, vae: str | None, blocks: int | None, batch_size: int, repeats: int, threads: int, output: Path | None,
    say: Say, engine: str = "ort", device: str | None = None, dtype: str = "fp32",
) -> dict[str, Any]:  # fmt: skip
    """Time a grid over the paper's twelve timesteps and blocks 1 to `blocks` (default: the paper's relative depth); arguments as the command's.

    Raises ConfigError for counts below 1 and models of captions; for the engine and its device as `Target.checked`.
    """
    require_counts(blocks=blocks, batch_size=batch_size, repeats=repeats)
    require_family("grid", model, "dit")
    target = Target.checked(engine=engine, device=device, dtype=dtype, threads=threads)
    backbone = load_backbone(model, weights, vae=vae)
    last = backbone.default_block() if blocks is None else blocks
    with tempfile.TemporaryDirectory() as folder:
        sweep, fixed = export_grid(backbone, last, Path(folder), say, dtype=dtype)
        result = time_grid(sweep, fixed, target, batch_size=batch_size, repeats=repeats, say=say)
    if output is not None:
        write_result(result, output)
    return result


def export_grid(backbone: Backbone, last: int, folder: Path, say: Say, *, dtype: str = "fp32") -> tuple[Artifact, Artifact]:
    """The grid's sweep graph with taps after blocks 1 to `last`, and the bound's graph of one timestep and one tap."""

    def export(kind: str, blocks: tuple[int, ...], timesteps: tuple[int, ...]) -> Artifact:
        options = ExportOptions(kind=kind, blocks=blocks, timesteps=tuple(map(float, timesteps)), noising="random", precision=dtype)
        return export_dit(backbone.weights, backbone.vae, options, folder / kind, say=say, check_samples=2).artifact

    return export("sweep", tuple(range(1, last + 1)), TIMESTEPS), export("from-latents", (last,), (30,))


def time_grid(sweep: Artifact, fixed: Artifact, target: Target, *, batch_size: int, repeats: int, say: Say = lambda *_, **__: None) -> dict[str, Any]:
    """Time a sweep graph over all its timesteps beside its bound, both in the target's engine and from the same random images.

    The bound runs the graph `fixed`, one timestep baked in, which has no modulations to multiply, as often as there are timesteps. Errors as for
    `open_engine`.
    """
    with ExitStack() as stack:
        candidates = _candidates(sweep, fixed, target, batch_size, stack, say)
        say(f"timing {repeats} rounds at batch {batch_size} in {target.describe(sweep)}")
        timings = compare(candidates, repeats, device=target.device)
    return _result(sweep, target, timings, batch_size)


def _candidates(
    sweep: Artifact, fixed: Artifact, target: Target, batch_size: int, stack: ExitStack, say: Say
) -> dict[str, Callable[[], object]]:  # fmt: skip
    vae, swept = (target.open(sweep, stack, batch_size=batch_size, graph=graph, say=say) for graph in ("latents", "model"))
    single = target.open(fixed, stack, batch_size=batch_size, say=say)
    rng = np.random.Generator(np.random.Philox(7))
    pixels = rng.integers(0, 256, (batch_size, *map(int, vae.inputs["pixels"].shape[1:])), np.uint8)
    noise = rng.standard_normal((batch_size, *map(int, single.inputs["noise"].shape[1:])), dtype=np.float32)
    runs = per_timestep(swept, sweep.sweep_table())

    def grid() -> None:
        latents = vae.run({"pixels": pixels})["latents"]
        for _, parameters in runs:
            swept.run({"latents": latents, "noise": noise, **parameters})

    def bound() -> None:
        latents = vae.run({"pixels": pixels})["latents"]
        for _ in runs:
            single.run({"latents": latents, "noise": noise})

    return {GRID: grid, BOUND: bound}


def _result(sweep: Artifact, target: Target, timings: list[Timing], batch_size: int) -> dict[str, Any]:
    recipe, cost = sweep.recipe, ratios(timings, BOUND)[GRID]
    blocks, steps = len(recipe.blocks), len(recipe.timesteps)
    small = in_microseconds(timings, batch_size, target.device)
    grid, bound = (written(timing.median / batch_size, small) for timing in sorted(timings, key=lambda timing: timing.name != GRID))
    text = (
        f"{recipe.backbone} in {target.describe(sweep)}, batch {batch_size}: {steps} timesteps × {blocks} blocks = {steps * blocks} taps, {grid} an "
        f"image; the bound of one VAE pass and {steps} truncated passes takes {bound}: {cost:.3f} × (limit {LIMIT})"
    )
    return {
        "benchmark": "grid",
        "backbone": recipe.backbone,
        "origin": recipe.origin,
        "timesteps": list(recipe.timesteps),
        "blocks": blocks,
        "batch_size": batch_size,
        **target.facts(sweep),
        "machine": machine(target.device),
        "seconds": {timing.name: list(timing.seconds) for timing in timings},
        "cost_over_bound": cost,
        "limit": LIMIT,
        "text": text,
    }
