"""`difffeat bench grid`: what a grid of timesteps × blocks costs, against the passes that it cannot do without."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.benchmarks.asking import require_counts, require_family
from difffeat.benchmarks.throughput import write_result
from difffeat.benchmarks.timing import compare, machine, ratios
from difffeat.engines import Artifact, open_engine
from difffeat.runtime.batches import per_timestep
from difffeat.workflows.exporting import ExportOptions, export_dit
from difffeat.workflows.loading import load_backbone

TIMESTEPS = (0, 10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500)
GRID = "difffeat: one VAE pass, one sweep pass a timestep, every tap"
BOUND = "one VAE pass and one truncated pass a timestep, one tap each"
LIMIT = 1.1


def run_grid(
    model: str, weights: str | None, *, vae: str | None, blocks: int | None, batch_size: int, repeats: int, threads: int, output: Path | None,
    say: Callable[..., None],
) -> dict[str, Any]:  # fmt: skip
    """Time a grid over the paper's twelve timesteps and blocks 1 to `blocks` (default: the paper's relative depth), in ONNX Runtime.

    The bound runs the graph with one timestep baked in, which has no modulations to multiply, as often as there are timesteps.

    Raises ConfigError for counts below 1 and models of captions.
    """
    require_counts(blocks=blocks, batch_size=batch_size, repeats=repeats, threads=threads)
    require_family("grid", model, "dit")
    backbone = load_backbone(model, weights, vae=vae)
    last = backbone.default_block() if blocks is None else blocks
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        base = Path(folder)
        sweep = _export(backbone, base / "sweep", "sweep", tuple(range(1, last + 1)), TIMESTEPS, say)
        fixed = _export(backbone, base / "fixed", "from-latents", (last,), (30,), say)
        candidates = _candidates(sweep, fixed, batch_size, threads, stack)
        say(f"timing {repeats} rounds at batch {batch_size} on {threads} threads")
        timings = compare(candidates, repeats)
    cost = ratios(timings, BOUND)[GRID]
    result = {
        "benchmark": "grid",
        "backbone": backbone.weights.config.name,
        "origin": backbone.weights.origin,
        "timesteps": list(TIMESTEPS),
        "blocks": last,
        "batch_size": batch_size,
        "threads": threads,
        "machine": machine(),
        "seconds": {timing.name: list(timing.seconds) for timing in timings},
        "cost_over_bound": cost,
        "limit": LIMIT,
    }
    medians = {timing.name: timing.median / batch_size for timing in timings}
    result["text"] = (
        f"{result['backbone']}: {len(TIMESTEPS)} timesteps × {last} blocks = {len(TIMESTEPS) * last} taps, {medians[GRID]:.3f} s an image; "
        f"the bound of one VAE pass and {len(TIMESTEPS)} truncated passes takes {medians[BOUND]:.3f} s: {cost:.3f} × (limit {LIMIT})"
    )
    if output is not None:
        write_result(result, output)
    return result


def _export(backbone: Any, out: Path, kind: str, blocks: tuple[int, ...], timesteps: tuple[int, ...], say: Callable[..., None]) -> Artifact:
    options = ExportOptions(kind=kind, blocks=blocks, timesteps=tuple(map(float, timesteps)), noising="random")
    return export_dit(backbone.weights, backbone.vae, options, out, say=say, check_samples=2).artifact


def _candidates(sweep: Artifact, fixed: Artifact, batch_size: int, threads: int, stack: ExitStack) -> dict[str, Callable[[], object]]:
    vae, swept = (stack.enter_context(open_engine(sweep, threads=threads, graph=graph)) for graph in ("latents", "model"))
    single = stack.enter_context(open_engine(fixed, threads=threads))
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
