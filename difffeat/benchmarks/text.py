"""`difffeat bench text`: captions of many lengths, in buckets of like length against padding all to the longest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.benchmarks.asking import require_counts, require_family
from difffeat.benchmarks.baselines import eager_captions
from difffeat.benchmarks.target import Target
from difffeat.benchmarks.throughput import export_for_timing, quantised_for_timing, write_result
from difffeat.benchmarks.timing import Timing, compare, in_microseconds, machine, ratios, table
from difffeat.engines import Artifact, Engine
from difffeat.engines.torch_precision import exact_products
from difffeat.errors import ConfigError
from difffeat.runtime.tokens import batches_by_length, pad_tokens
from difffeat.workflows.loading import Backbone, load_backbone

BUCKETED = "buckets of like length"
PADDED = "padded to the longest"
"""What follows ours in a candidate's name."""
INT8 = "difffeat, ONNX Runtime int8, buckets"
SHORTEST, LONGEST = 10, 70
MULTIPLE = 8

Say = Callable[..., None]
Batches = list[dict[str, np.ndarray]]


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
    threads: int, int8: bool, output: Path | None, say: Say, engine: str = "ort", device: str | None = None, dtype: str = "fp32",
) -> dict[str, Any]:  # fmt: skip
    """Time a set of captions through eager Plaid, padded to the longest, and through ours in buckets; arguments as the command's options.

    Raises ConfigError for counts below 1, models of images, and int8 of anything but ONNX Runtime in fp32 on the CPU; for the engine and its device
    as `Target.checked`.
    """
    require_counts(captions=captions, batch_size=batch_size, repeats=repeats)
    require_family("text", model, "plaid")
    target = Target.checked(engine=engine, device=device, dtype=dtype, threads=threads, eager=True)
    if int8:
        require_int8(target)
    backbone = load_backbone(model, weights, tokenizer=tokenizer)
    chosen = backbone.default_block() if block is None else block
    lengths = caption_lengths(captions, min(LONGEST, backbone.weights.config.max_length))
    with tempfile.TemporaryDirectory() as folder:
        artifact = export_for_timing(backbone, chosen, Path(folder) / "artifact", say, dtype=dtype)
        result = time_captions(artifact, target, lengths, batch_size=batch_size, repeats=repeats, backbone=backbone, int8=int8, say=say)
    if output is not None:
        write_result(result, output)
    return result


def require_int8(target: Target) -> None:
    """Raises ConfigError where a target cannot stand beside int8."""
    if (target.engine, target.device, target.dtype) != ("ort", "cpu", "fp32"):
        raise ConfigError(
            f"int8 is made from an fp32 graph and runs in ONNX Runtime on the CPU. Leave --int8 out, or --engine {target.engine}, "
            f"--device {target.device} and --dtype {target.dtype}."
        )


def time_captions(
    artifact: Artifact,
    target: Target,
    lengths: np.ndarray,
    *,
    batch_size: int,
    repeats: int,
    backbone: Backbone | None = None,
    int8: bool = False,
    say: Say = lambda *_, **__: None,
) -> dict[str, Any]:
    """Time an exported text graph over captions of random tokens, in buckets of like length and padded to the longest.

    **Arguments:** `lengths` in tokens, [captions]; `backbone` also times its unfolded network in eager torch, in the graph's precision on the same
    device, padded to the longest; `int8` also times the graph quantised (an fp32 graph in ONNX Runtime on the CPU). All in torch runs under
    `exact_products`.

    Raises ConfigError for int8 of another target; errors as for `open_engine`.
    """
    import torch

    torch.set_num_threads(target.threads)
    rng = np.random.Generator(np.random.Philox(7))
    ids = [rng.integers(0, artifact.recipe.architecture["vocab"], int(length)) for length in lengths]
    padded, buckets = list(_padded(ids, batch_size)), list(_bucketed(ids, batch_size))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(exact_products())
        candidates: dict[str, Callable[[], object]] = {}
        if backbone is not None:
            eager = eager_captions(backbone, artifact, padded, device=target.device, precision=artifact.recipe.precision)
            candidates |= {f"{name}, padded": run for name, run in eager.items()}
        if int8:
            require_int8(target)
            say("quantising")
            low = quantised_for_timing(artifact, padded[0], Path(folder) / "int8")
            candidates[INT8] = _ours(target.open(low, stack, batch_size=batch_size, say=say), buckets)
        engine = target.open(artifact, stack, batch_size=batch_size, say=say)
        candidates[f"{target.label}, {PADDED}"] = _ours(engine, padded)
        candidates[f"{target.label}, {BUCKETED}"] = _ours(engine, buckets)
        say(f"timing {repeats} rounds over {len(ids)} captions at batch {batch_size} in {target.describe(artifact)}")
        timings = compare(candidates, repeats, device=target.device)
    return _result(artifact, target, timings, lengths, batch_size)


def _result(artifact: Artifact, target: Target, timings: list[Timing], lengths: np.ndarray, batch_size: int) -> dict[str, Any]:
    percentiles = {str(q): float(np.percentile(lengths, q)) for q in (0, 25, 50, 75, 100)}
    captions, best, recipe = len(lengths), f"{target.label}, {BUCKETED}", artifact.recipe
    unit = "microseconds" if in_microseconds(timings, captions, target.device) else "seconds"
    title = (
        f"{recipe.backbone}, block {recipe.blocks[0]}, {target.describe(artifact)}: {unit} per caption, {captions} captions of "
        f"{percentiles['0']:.0f} to {percentiles['100']:.0f} tokens (median {percentiles['50']:.0f}), batch {batch_size}, "
        f"median of {len(timings[0].seconds)} paired rounds"
    )
    return {
        "benchmark": "text",
        "backbone": recipe.backbone,
        "origin": recipe.origin,
        "blocks": list(recipe.blocks),
        "captions": captions,
        "batch_size": captions,
        "run_batch_size": batch_size,
        "length_percentiles": percentiles,
        **target.facts(artifact),
        "machine": machine(target.device),
        "seconds": {timing.name: list(timing.seconds) for timing in timings},
        "ours_is_faster_by": ratios(timings, best),
        "text": "\n".join([title, *table(timings, captions, best, "caption", device=target.device)]),
    }


def _padded(ids: list[np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    longest = max(len(own) for own in ids)
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        tokens, lengths = pad_tokens(part, len(part), longest)
        yield {"tokens": tokens, "lengths": lengths}


def _bucketed(ids: list[np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    for rows, length in batches_by_length(np.array([len(own) for own in ids]), batch_size, MULTIPLE):
        tokens, lengths = pad_tokens([ids[row] for row in rows], len(rows), length)
        yield {"tokens": tokens, "lengths": lengths}


def _ours(engine: Engine, batches: Batches) -> Callable[[], object]:
    return lambda: [engine.run(feeds) for feeds in batches]
