"""The real artifact through the real engine: batches, JPEGs to a store, the same killed and resumed, captions of four lengths."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.benchmarks.baselines import HOOK, TRUNCATED, eager_by_batch
from difffeat.benchmarks.extraction import one_by_one, overlapped, time_extraction, write_photos
from difffeat.benchmarks.gpu.journal import Journal
from difffeat.benchmarks.gpu.prepared import open_backbone, open_prepared
from difffeat.benchmarks.gpu.sizes import Sizes
from difffeat.benchmarks.target import Target
from difffeat.benchmarks.throughput import random_feeds, time_artifact
from difffeat.benchmarks.timing import compare
from difffeat.engines import Engine
from difffeat.engines.parity import compare as against
from difffeat.engines.torch_precision import exact_products

ROUNDS_OF_BATCHES = 8
SHARD = 64


def target_of(sizes: Sizes, threads: int) -> Target:
    """Torch on the card, in fp16."""
    return Target(engine="torch", device=sizes.device, dtype="fp16", threads=threads)


def run_engine(journal: Journal, sizes: Sizes, folder: Path, engines: tuple[str, ...], threads: int) -> None:
    """The step on batches through the engine: all candidates from latents, then `run` against `submit` from latents and from pixels.

    torch.compile of the unfolded network has its row in the step `trunk`.
    """
    import torch

    torch._dynamo.reset()
    artifact = open_prepared(folder, "dit-latents-fp16")
    backbone = open_backbone(folder, sizes, "dit")
    result = time_artifact(
        backbone, artifact, batch_size=sizes.latents_batch, repeats=sizes.repeats, threads=threads, device=sizes.device, engines=engines,
        say=_say,
    )  # fmt: skip
    del backbone
    journal.text(result["text"])
    journal.note(
        "throughput from latents",
        **{name: result[name] for name in ("backbone", "median_per_sample", "share_of_matrix_rate", "batch_size", "not_run")},
    )
    for start, batch in (("latents", sizes.latents_batch), ("pixels", sizes.pixels_batch)):
        with ExitStack() as stack:
            artifact = open_prepared(folder, f"dit-{start}-fp16")
            opened = target_of(sizes, threads).open(artifact, stack, batch_size=batch, say=_say)
            _overlap(journal, sizes, opened, start, [random_feeds(artifact, batch, seed=seed) for seed in range(ROUNDS_OF_BATCHES)])


def _overlap(journal: Journal, sizes: Sizes, engine: Engine, start: str, batches: list[dict[str, np.ndarray]]) -> None:
    batch = len(next(iter(batches[0].values())))
    ways = {f"from {start}, run": lambda: one_by_one(engine, batches), f"from {start}, submit": lambda: overlapped(engine, batches)}
    for timing in compare(ways, sizes.repeats, device=sizes.device):
        journal.rate(timing.name, timing, batch * len(batches), backbone=engine.recipe.backbone, batch_size=batch, depth=engine.depth)


def run_extract(journal: Journal, sizes: Sizes, folder: Path, threads: int) -> None:
    """The step from JPEG files to a finished store, beside the engine alone."""
    artifact = open_prepared(folder, "dit-pixels-fp16")
    result = time_extraction(
        artifact, target_of(sizes, threads), images=sizes.images, batch_size=sizes.pixels_batch, repeats=min(3, sizes.repeats), say=_say
    )
    journal.text(result["text"])
    kept = ("backbone", "seconds", "share_of_bare_engine", "bare_engine", "stages", "bottleneck", "images", "run_batch_size")
    journal.note("JPEGs to a store", **{name: result[name] for name in kept})


def run_resume(journal: Journal, sizes: Sizes, folder: Path, work: Path) -> None:
    """The step on an extraction that is killed and goes on: the store's bytes against those of one that ran through."""
    artifact, photos = folder / "dit-pixels-fp16", work / "photos"
    if not photos.is_dir():
        write_photos(photos, sizes.resumed)
    seconds = _extracted(artifact, photos, work / "whole", sizes)
    with (work / "killed.log").open("w") as log:
        running = subprocess.Popen(_command(artifact, photos, work / "resumed", sizes), stdout=log, stderr=log)
        receipts = work / "resumed" / "receipts"
        while running.poll() is None and not any(receipts.glob("*.json")):
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        running.wait()
    done = len(list(receipts.glob("*.json")))
    mine = _shards(work / "whole")
    if not 1 <= done < len(mine):
        raise SystemExit(f"killed with {done} of {len(mine)} shards, which shows nothing; it said: {(work / 'killed.log').read_text()[-2000:]}")
    again = _extracted(artifact, photos, work / "resumed", sizes)
    theirs = _shards(work / "resumed")
    journal.note(
        "killed and resumed", backbone=open_prepared(folder, "dit-pixels-fp16").recipe.backbone, same_bytes=mine == theirs, shards=len(mine),
        done_when_killed=done, seconds_whole=round(seconds, 1), seconds_resumed=round(again, 1), images=sizes.resumed,
    )  # fmt: skip
    if mine != theirs:
        raise SystemExit("a store that was killed and resumed differs from one that ran through")


def _command(artifact: Path, photos: Path, out: Path, sizes: Sizes) -> list[str]:
    options = [
        "--engine",
        "torch",
        "--device",
        sizes.device,
        "--batch-size",
        str(sizes.pixels_batch),
        "--shard-size",
        str(min(SHARD, sizes.resumed // 4)),
    ]
    return [sys.executable, "-m", "difffeat.cli", "extract", str(artifact), str(photos), "-o", str(out), *options]


def _extracted(artifact: Path, photos: Path, out: Path, sizes: Sizes) -> float:
    started = time.monotonic()
    subprocess.run(_command(artifact, photos, out, sizes), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def _shards(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((store / "shards").iterdir())}


def run_plaid(journal: Journal, sizes: Sizes, folder: Path, threads: int) -> None:
    """The step on captions: eager with a hook, eager stopped and ours, at several lengths."""
    import torch

    torch._dynamo.reset()
    torch.set_num_threads(threads)
    artifact, batch = open_prepared(folder, "plaid-tokens-fp16"), sizes.captions_batch
    backbone = open_backbone(folder, sizes, "plaid")
    batches = [random_feeds(artifact, batch, length=length) for length in sizes.lengths]
    with ExitStack() as stack:
        stack.enter_context(exact_products())
        engine = target_of(sizes, threads).open(artifact, stack, batch_size=batch, say=_say)
        (output,) = engine.outputs
        exact = [own[TRUNCATED]() for own in eager_by_batch(backbone, artifact, batches, device=sizes.device, precision="fp32")]
        eager = eager_by_batch(backbone, artifact, batches, device=sizes.device, precision="fp16")
        for length, feeds, expected, theirs in zip(sizes.lengths, batches, exact, eager, strict=True):
            runs: dict[str, Any] = {name: theirs[name] for name in (HOOK, TRUNCATED)}
            runs["ours, torch"] = lambda feeds=feeds: engine.run(feeds)[output]
            found = {name: against(np.asarray(run()), expected).relative_l2 for name, run in runs.items()}
            for timing in compare(runs, sizes.repeats, device=sizes.device):
                journal.rate(
                    f"{length} tokens, {timing.name}", timing, batch, backbone=artifact.recipe.backbone, length=length, relative_l2=found[timing.name]
                )


def _say(message: str, **_: Any) -> None:
    print(message, file=sys.stderr, flush=True)
