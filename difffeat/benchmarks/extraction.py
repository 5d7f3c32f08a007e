"""`difffeat bench extract`: from JPEGs to a store, against the bare engine on the same batches."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.benchmarks.asking import require_counts, require_family
from difffeat.benchmarks.target import Target
from difffeat.benchmarks.throughput import export_for_timing, write_result
from difffeat.benchmarks.timing import Timing, compare, machine, on_card, ratios
from difffeat.engines import Artifact, Engine, Pending
from difffeat.recipe import RunRecipe
from difffeat.runtime.extract import decode_workers, extract
from difffeat.runtime.feeds import fed_batches
from difffeat.runtime.preprocess import decode
from difffeat.runtime.progress import Summary
from difffeat.runtime.samples import Source
from difffeat.runtime.sources import open_source
from difffeat.workflows.loading import load_backbone

BARE = "bare engine on the same batches, one by one"
SUBMITTED = "bare engine on the same batches, overlapped"
DECODE = "decoding alone"
WHOLE = "difffeat extract: read, decode, noise, engine, write"
LIMIT, LIMIT_ON_CARD = 0.95, 0.90
"""Share of the bare engine's rate that extraction should reach."""
DISTINCT = 256
PHOTO = (640, 480)
"""The most frequent size in COCO."""

Say = Callable[..., None]
Batches = list[dict[str, np.ndarray]]


def run_extraction(
    model: str, weights: str | None, *, vae: str | None, block: int | None, images: int, batch_size: int, repeats: int, threads: int,
    num_workers: int | None, output: Path | None, say: Say, engine: str = "ort", device: str | None = None, dtype: str = "fp32",
) -> dict[str, Any]:  # fmt: skip
    """Time the whole way from JPEG files to a finished store beside the engine alone and decoding alone; arguments as the command's options.

    Raises ConfigError for counts below 1 and models of captions; for the engine and its device as `Target.checked`.
    """
    require_counts(images=images, batch_size=batch_size, repeats=repeats, num_workers=num_workers)
    require_family("extract", model, "dit")
    target = Target.checked(engine=engine, device=device, dtype=dtype, threads=threads)
    backbone = load_backbone(model, weights, vae=vae)
    chosen = backbone.default_block() if block is None else block
    with tempfile.TemporaryDirectory() as folder:
        artifact = export_for_timing(backbone, chosen, Path(folder) / "artifact", say, dtype=dtype)
        result = time_extraction(artifact, target, images=images, batch_size=batch_size, repeats=repeats, num_workers=num_workers, say=say)
    if output is not None:
        write_result(result, output)
    return result


@dataclass(frozen=True)
class Measured:
    """What was timed: rounds of every candidate, the summaries of the extractions, and how many batches the engine keeps under way."""

    timings: list[Timing]
    summaries: list[Summary]
    depth: int


def time_extraction(
    artifact: Artifact,
    target: Target,
    *,
    images: int,
    batch_size: int,
    repeats: int,
    num_workers: int | None = None,
    say: Say = lambda *_, **__: None,
) -> dict[str, Any]:
    """Time an exported image graph from JPEG files, which are made here, to a finished store, beside the engine alone and decoding alone.

    The engine alone runs the same batches, decoded and noised ahead of time: one by one, and, where it keeps more than one under way, overlapped by
    `submit` as an extraction does it. The share is of the faster of the two.

    **Arguments:** `num_workers` threads that decode, None for our choice. Errors as for `open_engine` and `extract`.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        base = Path(folder)
        say(f"writing {images} JPEGs of {PHOTO[0]}×{PHOTO[1]} pixels")
        photos = write_photos(base / "photos", images)
        source = open_source(photos)
        engine = target.open(artifact, stack, batch_size=batch_size, say=say)
        batches = [fed.feeds for fed in fed_batches(engine, source.samples, RunRecipe(), batch_size=batch_size, table=artifact.sweep_table())]
        summaries: list[Summary] = []
        candidates: dict[str, Callable[[], object]] = {BARE: lambda: one_by_one(engine, batches)}
        if engine.depth > 1:
            candidates[SUBMITTED] = lambda: overlapped(engine, batches)
        decoding = {DECODE: _decode(engine, photos, decode_workers(num_workers))}
        if not on_card(target.device):  # beside a card it would be a pause in every round, in which the clocks fall
            candidates |= decoding
        candidates[WHOLE] = lambda: summaries.append(_extract(artifact, engine, source, base / f"store-{len(summaries)}", batch_size, num_workers))
        say(f"timing {repeats} rounds at batch {batch_size} in {target.describe(artifact)}")
        timings = compare(candidates, repeats, device=target.device)
        if DECODE not in candidates:
            timings += compare(decoding, repeats)
        depth = engine.depth
    return _result(artifact, target, Measured(timings, summaries[-repeats:], depth), images, batch_size)


def one_by_one(engine: Engine, batches: Batches) -> None:
    """Run batches one after the other, each waited for."""
    for feeds in batches:
        engine.run(feeds)


def overlapped(engine: Engine, batches: Batches) -> None:
    """Submit batches, as many under way as the engine allows, and wait for all of them."""
    under_way: deque[Pending] = deque()
    for feeds in batches:
        under_way.append(engine.submit(feeds))
        while len(under_way) >= engine.depth:
            under_way.popleft().result()
    while under_way:
        under_way.popleft().result()


def write_photos(folder: Path, count: int) -> Path:
    """Seeded JPEGs that take about as long to decode as photographs: smooth shapes with texture, quality 90. After `DISTINCT` they come again."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(17))
    width, height = PHOTO
    for index in range(min(count, DISTINCT)):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(PHOTO, Image.Resampling.BICUBIC)
        textured = np.asarray(coarse, np.float32) + rng.normal(0, 8, (height, width, 1))
        Image.fromarray(np.clip(textured, 0, 255).astype(np.uint8)).save(folder / f"{index:06d}.jpg", quality=90)
    for index in range(DISTINCT, count):
        shutil.copyfile(folder / f"{index % DISTINCT:06d}.jpg", folder / f"{index:06d}.jpg")
    return folder


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


def _result(artifact: Artifact, target: Target, measured: Measured, images: int, batch_size: int) -> dict[str, Any]:
    timings, summaries, recipe = measured.timings, measured.summaries, artifact.recipe
    medians = {timing.name: timing.median / images for timing in timings}
    bare = min((name for name in (BARE, SUBMITTED) if name in medians), key=lambda name: medians[name])
    share, limit = 1.0 / ratios(timings, bare)[WHOLE], LIMIT_ON_CARD if on_card(target.device) else LIMIT
    stages = {name: float(np.median([summary.stages.get(name, 0.0) for summary in summaries])) for name in summaries[0].stages}
    title = (
        f"{recipe.backbone}, block {recipe.blocks[0]}, {target.describe(artifact)}: {images} JPEGs of {PHOTO[0]}×{PHOTO[1]}, batch {batch_size}, "
        f"median of {len(timings[0].seconds)} paired rounds"
    )
    lines = [
        title,
        *(f"  {name:55} {1 / seconds:9.2f} images/s {seconds * 1e6:12.1f} µs an image" for name, seconds in medians.items()),
        f"  {share:.1%} of the bare engine's rate (aim {limit:.0%}); seconds of the main loop by stage: "
        + ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items())
        + f"; slowest: {summaries[-1].bottleneck}",
    ]
    shared: dict[str, float] = {}
    if SUBMITTED in medians:
        lines.append(f"  {measured.depth} batches under way make the bare engine {medians[BARE] / medians[SUBMITTED]:.2f} × as fast as one by one")
    if not on_card(target.device):
        rate = 1 / (medians[bare] + medians[DECODE])
        shared = {"rate_sharing_the_cores": rate, "share_of_rate_sharing_the_cores": 1 / medians[WHOLE] / rate}
        reached = shared["share_of_rate_sharing_the_cores"]
        lines.append(
            f"  engine and decoding one after the other on the same cores would make {rate:.2f} images/s; extraction reaches {reached:.1%} of that"
        )
    return {
        "benchmark": "extract",
        "backbone": recipe.backbone,
        "origin": recipe.origin,
        "blocks": list(recipe.blocks),
        "images": images,
        "batch_size": images,
        "run_batch_size": batch_size,
        **target.facts(artifact),
        "depth": measured.depth,
        "machine": machine(target.device),
        "seconds": {timing.name: list(timing.seconds) for timing in timings},
        "bare_engine": bare,
        "share_of_bare_engine": share,
        "limit": limit,
        **shared,
        "stages": stages,
        "bottleneck": summaries[-1].bottleneck,
        "text": "\n".join(lines),
    }
