"""`difffeat bench throughput`: inputs to features, as people do it today and as difffeat does, in one run at equal threads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.benchmarks.timing import Timing, compare, machine, ratios, table
from difffeat.engines import Artifact, open_engine
from difffeat.recipe import format_timestep
from difffeat.workflows.exporting import ExportOptions, export_dit, export_plaid
from difffeat.workflows.loading import Backbone, load_backbone

ORT = "difffeat, ONNX Runtime fp32"
TORCH = "difffeat, folded, eager torch fp32"
HOOK = "eager torch, whole backbone with a hook"
TRUNCATED = "eager torch, stopped after the block"
CAPTION_LENGTH = 32


def run_throughput(
    model: str,
    weights: str | None,
    *,
    vae: str | None,
    block: int | None,
    batch_size: int,
    repeats: int,
    threads: int,
    output: Path | None,
    say: Callable[..., None],
) -> dict[str, Any]:
    """Export the graph into a temporary folder and time it beside eager torch; arguments as the command's options."""
    backbone = load_backbone(model, weights, vae=vae)
    chosen = backbone.default_block() if block is None else block
    with tempfile.TemporaryDirectory() as folder:
        artifact = export_for_timing(backbone, chosen, Path(folder) / "artifact", say)
        say(f"timing {repeats} rounds at batch {batch_size} on {threads} threads")
        result = time_artifact(backbone, artifact, batch_size=batch_size, repeats=repeats, threads=threads)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({k: v for k, v in result.items() if k != "text"}, indent=2) + "\n")
    return result


def export_for_timing(backbone: Backbone, block: int, out: Path, say: Callable[..., None]) -> Artifact:
    """The image graph at t = 30, or the text graph at t = 0."""
    if backbone.family == "dit":
        options = ExportOptions(kind="image", blocks=(block,), timesteps=(30,), noising="random")
        return export_dit(backbone.weights, backbone.vae, options, out, say=say, check_samples=2).artifact
    options = ExportOptions(kind="text", blocks=(block,), timesteps=(0,), noising="mean")
    assert backbone.tokenizer is not None
    return export_plaid(backbone.weights, backbone.tokenizer, options, out, say=say, check_samples=2).artifact


def time_artifact(
    backbone: Backbone, artifact: Artifact, *, batch_size: int, repeats: int, threads: int, torch_engine: bool = True
) -> dict[str, Any]:
    """Time an exported graph beside the eager, unfolded network on the same random inputs (never zeros)."""
    import torch

    torch.set_num_threads(threads)
    feeds = random_feeds(artifact, batch_size)
    candidates = eager_candidates(backbone, artifact, feeds)
    with ExitStack() as stack:
        if torch_engine:
            folded = stack.enter_context(open_engine(artifact, "torch", threads=threads))
            candidates[TORCH] = lambda: folded.run(feeds)
        ort = stack.enter_context(open_engine(artifact, "ort", threads=threads))
        candidates[ORT] = lambda: ort.run(feeds)
        timings = compare(candidates, repeats)
    return _result(artifact, timings, batch_size, threads)


def random_feeds(artifact: Artifact, batch_size: int) -> dict[str, np.ndarray]:
    """Seeded random inputs for a graph."""
    rng = np.random.Generator(np.random.Philox(7))
    with open_engine(artifact, "ort", threads=1) as engine:
        specs = engine.inputs
    sizes = {"batch": batch_size, "length": CAPTION_LENGTH}
    feeds: dict[str, np.ndarray] = {}
    for name, spec in specs.items():
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        if name == "pixels":
            feeds[name] = rng.integers(0, 256, shape, np.uint8)
        elif name == "tokens":
            feeds[name] = rng.integers(0, artifact.recipe.architecture["vocab"], shape)
        elif name == "lengths":
            feeds[name] = np.full(shape, CAPTION_LENGTH)
        else:
            feeds[name] = rng.standard_normal(shape, dtype=np.float32)
    return feeds


def eager_candidates(backbone: Backbone, artifact: Artifact, feeds: dict[str, np.ndarray]) -> dict[str, Callable[[], object]]:
    """The unfolded network in eager torch: run to its end with a hook on the block, as is today's habit, and stopped after the block."""
    return _eager_dit(backbone, artifact, feeds) if backbone.family == "dit" else _eager_plaid(backbone, artifact, feeds)


def _eager_dit(backbone: Backbone, artifact: Artifact, feeds: dict[str, np.ndarray]) -> dict[str, Callable[[], object]]:
    import torch

    from difffeat.export.reference import unfolded_dit, unfolded_vae
    from difffeat.export.schedule import dit_noise_level

    model, vae = unfolded_dit(backbone.weights), unfolded_vae(backbone.vae)
    level, block = dit_noise_level(artifact.recipe.timesteps[0]), artifact.recipe.blocks[0]
    pixels, noise = torch.tensor(feeds["pixels"]), torch.tensor(feeds["noise"])
    t, label = torch.full((len(pixels),), int(level.t)), torch.full((len(pixels),), artifact.recipe.label or 0)
    scaling = backbone.vae.scaling_factor  # type: ignore[union-attr]

    def noisy() -> Any:
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        return level.alpha * scaling * vae.encode(x).latent_dist.mean + level.sigma * noise  # type: ignore[operator]

    @torch.inference_mode()
    def whole() -> Any:
        kept: list[Any] = []
        handle = model.blocks[block - 1].register_forward_hook(lambda _, __, out: kept.append(out.mean(1)))
        try:
            model(noisy(), t, label)
        finally:
            handle.remove()
        return kept[0]

    @torch.inference_mode()
    def truncated() -> Any:
        for index, x in zip(range(block + 1), model.residual_stream(noisy(), t, label), strict=False):
            if index == block:
                return x.mean(1)
        return None

    return {HOOK: whole, TRUNCATED: truncated}


def _eager_plaid(backbone: Backbone, artifact: Artifact, feeds: dict[str, np.ndarray]) -> dict[str, Callable[[], object]]:
    import torch

    from difffeat.export.plaid import normalise_rows
    from difffeat.export.reference import unfolded_plaid

    model, block = unfolded_plaid(backbone.weights), artifact.recipe.blocks[0]
    table = normalise_rows(backbone.weights.tensors["embedding_matrix.matrix"])
    tokens, lengths = torch.tensor(feeds["tokens"]), torch.tensor(feeds["lengths"])
    mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
    gamma = torch.full((len(tokens),), -artifact.recipe.log_snr[0], dtype=torch.float64)
    alpha = torch.sigmoid(-gamma[0]).sqrt().float()

    @torch.inference_mode()
    def whole() -> Any:
        kept: list[Any] = []
        handle = model.blocks[block - 1].register_forward_hook(lambda _, __, out: kept.append(out.mean(1)))
        try:
            model(alpha * table[tokens], gamma, table, mask)
        finally:
            handle.remove()
        return kept[0]

    @torch.inference_mode()
    def truncated() -> Any:
        for index, x in zip(range(block + 1), model.residual_stream(alpha * table[tokens], gamma, mask), strict=False):
            if index == block:
                return x.mean(1)
        return None

    return {HOOK: whole, TRUNCATED: truncated}


def _result(artifact: Artifact, timings: list[Timing], batch_size: int, threads: int) -> dict[str, Any]:
    recipe = artifact.recipe
    per = f"caption of {CAPTION_LENGTH} tokens" if recipe.family == "plaid" else "image"
    title = (
        f"{recipe.backbone}, block {recipe.blocks[0]}, t = {format_timestep(recipe.timesteps[0])}: seconds per {per}, batch {batch_size}, {threads} "
        f"threads, "
        f"median of {len(timings[0].seconds)} paired rounds"
    )
    return {
        "benchmark": "throughput",
        "backbone": recipe.backbone,
        "blocks": list(recipe.blocks),
        "origin": recipe.origin,
        "fingerprint": recipe.fingerprint,
        "batch_size": batch_size,
        "threads": threads,
        "machine": machine(),
        "seconds": {timing.name: list(timing.seconds) for timing in timings},
        "median_per_sample": {timing.name: timing.median / batch_size for timing in timings},
        "ours_is_faster_by": ratios(timings, ORT),
        "text": "\n".join([title, *table(timings, batch_size, ORT, "image" if recipe.family == "dit" else "caption")]),
    }
