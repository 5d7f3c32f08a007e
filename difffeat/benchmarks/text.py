"""`difffeat bench text`: captions of many lengths, in buckets of like length against padding all to the longest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.benchmarks.asking import require_counts, require_family
from difffeat.benchmarks.baselines import HOOK, TRUNCATED, eager_candidates
from difffeat.benchmarks.throughput import export_for_timing, quantised_for_timing, write_result
from difffeat.benchmarks.timing import compare, machine, ratios, table
from difffeat.engines import Artifact, Engine, open_engine
from difffeat.runtime.tokens import batches_by_length, pad_tokens
from difffeat.workflows.loading import Backbone, load_backbone

BUCKETED = "difffeat, ONNX Runtime, buckets of like length"
PADDED = "difffeat, ONNX Runtime, padded to the longest"
INT8 = "difffeat, ONNX Runtime int8, buckets"
SHORTEST, LONGEST = 10, 70
MULTIPLE = 8


def caption_lengths(count: int, longest: int = LONGEST) -> np.ndarray:
    """Seeded lengths in tokens between 10 and `longest`, most of them short: 10 plus a gamma variable of shape 2 and scale 8, int64 [count].

    One of them is the longest, as in any large set of captions.
    """
    rng = np.random.Generator(np.random.Philox(11))
    lengths = np.clip(np.round(min(SHORTEST, longest) + rng.gamma(2.0, 8.0, count)), 1, longest).astype(np.int64)
    lengths[0] = longest
    return lengths


def run_text(
    model: str, weights: str | None, *, tokenizer: str | None, block: int | None, captions: int, batch_size: int, repeats: int,
    threads: int, int8: bool, output: Path | None, say: Callable[..., None],
) -> dict[str, Any]:  # fmt: skip
    """Time a set of captions through eager Plaid, padded to the longest, and through ours in buckets; arguments as the command's options.

    Raises ConfigError for counts below 1 and models of images.
    """
    require_counts(captions=captions, batch_size=batch_size, repeats=repeats, threads=threads)
    require_family("text", model, "plaid")
    backbone = load_backbone(model, weights, tokenizer=tokenizer)
    chosen = backbone.default_block() if block is None else block
    lengths = caption_lengths(captions, min(LONGEST, backbone.weights.config.max_length))
    rng = np.random.Generator(np.random.Philox(7))
    ids = [rng.integers(0, backbone.weights.config.vocab, int(length)) for length in lengths]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        artifact = export_for_timing(backbone, chosen, Path(folder) / "artifact", say)
        candidates = _eager(backbone, artifact, ids, batch_size, threads)
        if int8:
            say("quantising")
            low = quantised_for_timing(artifact, next(_padded(ids, batch_size)), Path(folder) / "int8")
            candidates[INT8] = _ours(stack.enter_context(open_engine(low, threads=threads)), list(_bucketed(ids, batch_size)))
        engine = stack.enter_context(open_engine(artifact, threads=threads))
        candidates[PADDED] = _ours(engine, list(_padded(ids, batch_size)))
        candidates[BUCKETED] = _ours(engine, list(_bucketed(ids, batch_size)))
        say(f"timing {repeats} rounds over {captions} captions at batch {batch_size} on {threads} threads")
        timings = compare(candidates, repeats)
    percentiles = {str(q): float(np.percentile(lengths, q)) for q in (0, 25, 50, 75, 100)}
    title = (
        f"{artifact.recipe.backbone}, block {chosen}: seconds per caption, {captions} captions of {percentiles['0']:.0f} to "
        f"{percentiles['100']:.0f} tokens (median {percentiles['50']:.0f}), batch {batch_size}, {threads} threads, median of {repeats} paired rounds"
    )
    result = {
        "benchmark": "text",
        "backbone": artifact.recipe.backbone,
        "origin": artifact.recipe.origin,
        "blocks": [chosen],
        "captions": captions,
        "batch_size": captions,
        "run_batch_size": batch_size,
        "length_percentiles": percentiles,
        "threads": threads,
        "machine": machine(),
        "seconds": {timing.name: list(timing.seconds) for timing in timings},
        "ours_is_faster_by": ratios(timings, BUCKETED),
        "text": "\n".join([title, *table(timings, captions, BUCKETED, "caption")]),
    }
    if output is not None:
        write_result(result, output)
    return result


def _padded(ids: list[np.ndarray], batch_size: int) -> Any:
    longest = max(len(own) for own in ids)
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        tokens, lengths = pad_tokens(part, len(part), longest)
        yield {"tokens": tokens, "lengths": lengths}


def _bucketed(ids: list[np.ndarray], batch_size: int) -> Any:
    for rows, length in batches_by_length(np.array([len(own) for own in ids]), batch_size, MULTIPLE):
        tokens, lengths = pad_tokens([ids[row] for row in rows], len(rows), length)
        yield {"tokens": tokens, "lengths": lengths}


def _ours(engine: Engine, batches: list[dict[str, np.ndarray]]) -> Callable[[], object]:
    return lambda: [engine.run(feeds) for feeds in batches]


def _eager(backbone: Backbone, artifact: Artifact, ids: list[np.ndarray], batch_size: int, threads: int) -> dict[str, Callable[[], object]]:
    """The eager candidates over every padded batch."""
    import torch

    torch.set_num_threads(threads)
    batches = [eager_candidates(backbone, artifact, feeds) for feeds in _padded(ids, batch_size)]
    return {f"{name}, padded": _each([batch[name] for batch in batches]) for name in (HOOK, TRUNCATED)}


def _each(runs: list[Callable[[], object]]) -> Callable[[], object]:
    return lambda: [run() for run in runs]
