"""`--batch-size auto`: the batch size of the largest rate, found on the real engine by a short doubling run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from difffeat.errors import OutOfMemory
from difffeat.runtime.batches import Batch, Prepared
from difffeat.runtime.decoding import DecodePool
from difffeat.runtime.feeding import Feeding
from difffeat.runtime.feeds import batch_noise
from difffeat.runtime.preprocess import quiet_pillow
from difffeat.runtime.samples import Sample

LARGEST, USUAL = 256, 32
GAIN = 1.03
"""A doubling that gains less than this is none; after two of them in a row nothing larger is tried."""
_SECONDS, _RUNS = 0.5, 5
"""A size is timed for so long at least, or for so many runs."""


def probe_batch_size(feeding: Feeding, samples: Sequence[Sample], *, largest: int = LARGEST, say: Callable[[str], None] = lambda _: None) -> int:
    """The smallest size whose rate no larger one betters by more than `GAIN`, of 1, 2, 4, ... up to `largest` or what holds all samples.

    Each size is timed on the longest of its batches, so that what fits here fits later, and without compilation, which would be lost on all sizes but
    one (see `Engine.trial`). A device without memory ends the probe, not the run.

    Raises OutOfMemory where not even one sample fits; else what the engine raises.
    """
    best, rate, idle, size = USUAL, 0.0, 0, 1
    while size <= largest and idle < 2 and (size == 1 or size < 2 * len(samples)):
        try:
            with feeding.trial():
                seconds = _seconds(feeding, samples, size)
        except OutOfMemory:
            if size == 1:
                raise
            say(f"batch size {size}: out of memory")
            break
        if seconds is None:
            say(f"none of the first {LARGEST} samples can be read, so no batch size can be timed; taking {USUAL}")
            break
        say(f"batch size {size}: {size / seconds:.1f} samples/s")
        if size / seconds > rate * GAIN:
            best, rate, idle = size, size / seconds, 0
        else:
            idle += 1
        size *= 2
    return best


def _seconds(feeding: Feeding, samples: Sequence[Sample], size: int) -> float | None:
    """Median time of a batch through the engine, after one run that is not counted; None where there is no batch."""
    feeder = feeding.feeder(size)
    batches, _ = feeder.plan(samples[:LARGEST])
    if not batches:
        return None
    batch = batches[-1]
    with quiet_pillow(), DecodePool(2) as pool:
        feeder.start(batch, pool)
        prepared = feeder.finish(batch)
    noise = _noise(feeding, batch, prepared)
    times: list[float] = []
    while len(times) <= 1 or (len(times) <= _RUNS and sum(times[1:]) < _SECONDS):
        since = time.perf_counter()
        feeds = feeder.encode(prepared.feeds)
        for t, parameters in feeding.runs:
            feeding.engine.run({**feeding.at(t, feeds), **parameters, **noise})
        times.append(time.perf_counter() - since)
    return float(np.median(times[1:]))


def _noise(feeding: Feeding, batch: Batch, prepared: Prepared) -> dict[str, np.ndarray]:
    if "noise" not in feeding.engine.inputs:
        return {}
    ids = [sample.id for sample in batch.samples]
    return {"noise": batch_noise(feeding.engine.inputs["noise"], prepared.feeds, ids, seed=feeding.run.seed, t=0.0, draw=0)}
