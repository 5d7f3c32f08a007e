"""`difffeat bench extract`: from JPEGs to a store, against the bare engine on the same batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.benchmarks.asking import require_counts, require_family
from difffeat.benchmarks.throughput import export_for_timing, write_result
from difffeat.benchmarks.timing import Timing, compare, machine, ratios
from difffeat.engines import Artifact, Engine, open_engine
from difffeat.recipe import RunRecipe
from difffeat.runtime.extract import decode_workers, extract
from difffeat.runtime.feeds import fed_batches
from difffeat.runtime.preprocess import decode
from difffeat.runtime.progress import Summary
from difffeat.runtime.samples import Source
from difffeat.runtime.sources import open_source
from difffeat.workflows.loading import load_backbone

BARE = "bare engine on the same batches"
DECODE = "decoding alone"
WHOLE = "difffeat extract: read, decode, noise, engine, write"
LIMIT = 0.95
PHOTO = (640, 480)
"""The most frequent size in COCO."""

Say = Callable[..., None]


def run_extraction(
    model: str, weights: str | None, *, vae: str | None, block: int | None, images: int, batch_size: int, repeats: int, threads: int,
    num_workers: int | None, output: Path | None, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Time the whole way from JPEG files to a finished store beside the engine alone and decoding alone; arguments as the command's options.

    Raises ConfigError for counts below 1 and models of captions.
    """
    require_counts(images=images, batch_size=batch_size, repeats=repeats, threads=threads, num_workers=num_workers)
    require_family("extract", model, "dit")
    backbone = load_backbone(model, weights, vae=vae)
    chosen = backbone.default_block() if block is None else block
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        base = Path(folder)
        artifact = export_for_timing(backbone, chosen, base / "artifact", say)
        say(f"writing {images} JPEGs of {PHOTO[0]}×{PHOTO[1]} pixels")
        photos = write_photos(base / "photos", images)
        source = open_source(photos)
        engine = stack.enter_context(open_engine(artifact, threads=threads))
        summaries: list[Summary] = []
        candidates = {
            BARE: _bare(artifact, engine, source, batch_size),
            DECODE: _decode(engine, photos, decode_workers(num_workers)),
            WHOLE: lambda: summaries.append(_extract(artifact, engine, source, base / f"store-{len(summaries)}", batch_size, num_workers)),
        }
        say(f"timing {repeats} rounds at batch {batch_size} on {threads} threads")
        timings = compare(candidates, repeats)
    result = _result(artifact, timings, summaries[-repeats:], images, batch_size, threads)
    if output is not None:
        write_result(result, output)
    return result


def write_photos(folder: Path, count: int) -> Path:
    """Seeded JPEGs that take about as long to decode as photographs: smooth shapes with texture, quality 90."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(17))
    width, height = PHOTO
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(PHOTO, Image.Resampling.BICUBIC)
        textured = np.asarray(coarse, np.float32) + rng.normal(0, 8, (height, width, 1))
        Image.fromarray(np.clip(textured, 0, 255).astype(np.uint8)).save(folder / f"{index:06d}.jpg", quality=90)
    return folder


def _bare(artifact: Artifact, engine: Engine, source: Source, batch_size: int) -> Callable[[], None]:
    """The engine alone: batches decoded and noised ahead of time."""
    batches = [fed.feeds for fed in fed_batches(engine, source.samples, RunRecipe(), batch_size=batch_size, table=artifact.sweep_table())]

    def run() -> None:
        for feeds in batches:
            engine.run(feeds)

    return run


def _decode(engine: Engine, photos: Path, workers: int) -> Callable[[], None]:
    """Files to pixels, by as many threads as extraction has, and nothing beside them."""
    size, preprocessing = int(engine.inputs["pixels"].shape[1]), RunRecipe().preprocessing

    def run() -> None:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(lambda file: decode(file.read_bytes(), size, preprocessing), sorted(photos.iterdir())):
                pass

    return run


def _extract(artifact: Artifact, engine: Engine, source: Source, out: Path, batch_size: int, num_workers: int | None) -> Summary:
    return extract(engine, source, out, table=artifact.sweep_table(), batch_size=batch_size, num_workers=num_workers)


def _result(artifact: Artifact, timings: list[Timing], summaries: list[Summary], images: int, batch_size: int, threads: int) -> dict[str, Any]:
    share = 1.0 / ratios(timings, BARE)[WHOLE]
    stages = {name: float(np.median([summary.stages[name] for summary in summaries])) for name in summaries[0].stages}
    medians = {timing.name: timing.median / images for timing in timings}
    shared, reached = 1 / (medians[BARE] + medians[DECODE]), (medians[BARE] + medians[DECODE]) / medians[WHOLE]
    recipe = artifact.recipe
    lines = [
        f"{recipe.backbone}, block {recipe.blocks[0]}: {images} JPEGs of {PHOTO[0]}×{PHOTO[1]}, batch {batch_size}, {threads} threads, "
        f"median of {len(timings[0].seconds)} paired rounds",
        *(f"  {name:55} {1 / seconds:9.2f} images/s" for name, seconds in medians.items()),
        f"  {share:.1%} of the bare engine's rate (aim {LIMIT:.0%}); seconds of the main loop by stage: "
        + ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items())
        + f"; slowest: {summaries[-1].bottleneck}",
        f"  engine and decoding one after the other on the same cores would make {shared:.2f} images/s; extraction reaches {reached:.1%} of that",
    ]
    return {
        "benchmark": "extract",
        "backbone": recipe.backbone,
        "origin": recipe.origin,
        "blocks": list(recipe.blocks),
        "images": images,
        "batch_size": images,
        "run_batch_size": batch_size,
        "threads": threads,
        "machine": machine(),
        "seconds": {timing.name: list(timing.seconds) for timing in timings},
        "share_of_bare_engine": share,
        "rate_sharing_the_cores": shared,
        "share_of_rate_sharing_the_cores": reached,
        "stages": stages,
        "bottleneck": summaries[-1].bottleneck,
        "text": "\n".join(lines),
    }
