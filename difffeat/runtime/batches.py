"""From samples to what an engine is fed: one small class per modality, all with the same shape.

A feeder cuts a shard's rows into batches (`plan`), starts their preparation in the decode pool (`start`), and gives the finished inputs (`finish`).
A sample that fails keeps its place in the batch as zeros, so that its neighbours do not shift.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from difffeat.engines.base import Engine
from difffeat.errors import ConfigError, EngineError, SampleError
from difffeat.recipe import tap_name
from difffeat.runtime.blobs import is_remote
from difffeat.runtime.decoding import FETCHES, DecodePool
from difffeat.runtime.latents import LatentCache
from difffeat.runtime.preprocess import decode
from difffeat.runtime.samples import Sample
from difffeat.runtime.tokens import Captions, batches_by_length, pad_tokens

_Read = tuple[bytes | SampleError, float]
_Decoded = tuple[np.ndarray | SampleError, str, list[str], float]


@dataclass(frozen=True)
class Failure:
    """Why a sample went to quarantine. `row` counts within the rows that were planned together."""

    row: int
    id: str
    stage: str
    error: SampleError

    def entry(self, first_row: int, rows: np.ndarray) -> dict[str, Any]:
        """As it stands in the receipt: `rows` are those that were planned, counted within their shard, which begins at `first_row`."""
        kind = type(self.error).__name__
        return {"row": first_row + int(rows[self.row]), "id": self.id, "stage": self.stage, "error": kind, "message": str(self.error)}


@dataclass
class Batch:
    """A planned batch: rows within the shard, the samples there, and the length of a text batch."""

    rows: np.ndarray
    samples: Sequence[Sample]
    length: int = 0
    pending: list[Future[Any]] = field(default_factory=list)


@dataclass
class Prepared:
    """Inputs for the engine (without noise and timestep parameters), which of the batch's rows are good, and the digest of what was read.

    `remarks` pairs a sample's id with what was not plain about it; `seconds` is what the preparation took, summed over the threads that did it;
    `tokens` of captions, and how many of them are unknown.
    """

    feeds: dict[str, np.ndarray]
    good: np.ndarray
    failures: list[Failure]
    inputs: list[str]
    seconds: float = 0.0
    remarks: list[tuple[str, str]] = field(default_factory=list)
    tokens: int = 0
    unknown: int = 0


class Feeder(Protocol):
    """What the extraction needs of a modality."""

    def plan(self, samples: Sequence[Sample]) -> tuple[list[Batch], list[Failure]]:
        """The batches of a shard, and samples that are already known to be bad."""
        ...

    def start(self, batch: Batch, pool: DecodePool) -> None:
        """Begin the preparation."""
        ...

    def finish(self, batch: Batch) -> Prepared:
        """Wait for it."""
        ...

    def encode(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the main graph takes, by way of the graph before it (the VAE) where there is one. Called in the thread that runs the engine."""
        ...


class ImageFeeder:
    """Decoded, preprocessed pixels; through the VAE's graph where the main graph takes latents."""

    def __init__(self, engine: Engine, batch_size: int, preprocessing: str, pixels: str, latents_engine: Engine | None = None) -> None:
        self._batch_size, self._preprocessing, self._pixels, self._latents = batch_size, preprocessing, pixels, latents_engine
        self._side = int((latents_engine or engine).inputs["pixels"].shape[1])

    def plan(self, samples: Sequence[Sample]) -> tuple[list[Batch], list[Failure]]:
        return _in_order(samples, self._batch_size), []

    def start(self, batch: Batch, pool: DecodePool) -> None:
        batch.pending = [self._begin(sample, pool) for sample in batch.samples]

    def finish(self, batch: Batch) -> Prepared:
        pixels = np.zeros((self._batch_size, self._side, self._side, 3), np.uint8)
        prepared = Prepared({"pixels": pixels}, np.zeros(len(batch.rows), bool), [], [])
        for index, (row, sample, future) in enumerate(zip(batch.rows, batch.samples, batch.pending, strict=True)):
            result, digest, remarks, seconds = future.result()
            prepared.seconds += seconds
            prepared.remarks += [(sample.id, remark) for remark in remarks]
            prepared.inputs.append(digest)
            if isinstance(result, SampleError):
                prepared.failures.append(Failure(int(row), sample.id, "decode", result))
            else:
                pixels[index], prepared.good[index] = result, True
        batch.pending = []
        return prepared

    def encode(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return feeds if self._latents is None else self._latents.run(feeds)

    def _begin(self, sample: Sample, pool: DecodePool) -> Future[_Decoded]:
        if sample.image is not None and is_remote(sample.image):
            return pool.fetch(_read, sample, FETCHES, then=self._decode)
        return pool.submit(lambda: self._decode(_read(sample, 1)))

    def _decode(self, read: _Read) -> _Decoded:
        """Pixels or what is wrong with them, SHA-256 of the file, what was not plain, seconds."""
        data, seconds = read
        if isinstance(data, SampleError):
            return data, "", [], seconds
        since, digest, remarks = time.perf_counter(), hashlib.sha256(data).hexdigest(), list[str]()
        try:
            pixels: np.ndarray | SampleError = decode(data, self._side, self._preprocessing, self._pixels, remarks)
        except SampleError as error:
            pixels, remarks = _alone(error), []
        return pixels, digest, remarks, seconds + time.perf_counter() - since


def _read(sample: Sample, at_once: int) -> _Read:
    """The bytes of an image or why they cannot be had, and its share of the seconds where so many are read at once."""
    since = time.perf_counter()
    try:
        if sample.image is None:
            raise SampleError("the sample has no image. Add one, or leave it out of the image store.")
        data: bytes | SampleError = sample.image.read()
    except SampleError as error:
        data = _alone(error)
    return data, (time.perf_counter() - since) / at_once


def _alone(error: SampleError) -> SampleError:
    """The error without its traceback and causes, whose frames hold the bytes that were read: it is kept until its shard is written."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


class CachedLatentsFeeder:
    """Clean latents out of a latent cache, by sample id."""

    def __init__(self, cache: LatentCache, batch_size: int) -> None:
        self._cache, self._batch_size = cache, batch_size

    def plan(self, samples: Sequence[Sample]) -> tuple[list[Batch], list[Failure]]:
        return _in_order(samples, self._batch_size), []

    def start(self, batch: Batch, pool: DecodePool) -> None:
        return

    def finish(self, batch: Batch) -> Prepared:
        since = time.perf_counter()
        latents = np.zeros((self._batch_size, *self._cache.shape), np.float32)
        prepared = Prepared({"latents": latents}, np.zeros(len(batch.rows), bool), [], [])
        for index, (row, sample) in enumerate(zip(batch.rows, batch.samples, strict=True)):
            digest = ""
            try:
                latents[index], digest = self._cache.get(sample.id)
                prepared.good[index] = True
            except SampleError as error:
                prepared.failures.append(Failure(int(row), sample.id, "latents", error))
            prepared.inputs.append(digest)
        prepared.seconds = time.perf_counter() - since
        return prepared

    def encode(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return feeds


class TextFeeder:
    """Token ids in batches of like length."""

    def __init__(self, captions: Captions, batch_size: int, multiple: int) -> None:
        self._captions, self._batch_size, self._multiple = captions, batch_size, multiple
        self._ids: dict[str, tuple[np.ndarray, int]] = {}

    def plan(self, samples: Sequence[Sample]) -> tuple[list[Batch], list[Failure]]:
        rows, failures, ids = [], [], []
        for row, sample in enumerate(samples):
            try:
                ids.append(self._captions.encode_counted(sample))
                rows.append(row)
            except SampleError as error:
                failures.append(Failure(row, sample.id, "caption", error))
        self._ids |= {samples[row].id: own for row, own in zip(rows, ids, strict=True)}
        if not rows:
            return [], failures
        kept = np.array(rows)
        planned = batches_by_length(np.array([len(own) for own, _ in ids]), self._batch_size, self._multiple)
        return [Batch(kept[part], [samples[row] for row in kept[part]], length) for part, length in planned], failures

    def start(self, batch: Batch, pool: DecodePool) -> None:
        return

    def finish(self, batch: Batch) -> Prepared:
        counted = [self._ids.pop(sample.id) for sample in batch.samples]
        ids = [own for own, _ in counted]
        tokens, lengths = pad_tokens(ids, self._batch_size, batch.length)
        inputs = [hashlib.sha256(own.astype("<i8").tobytes()).hexdigest() for own in ids]
        prepared = Prepared({"tokens": tokens, "lengths": lengths}, np.ones(len(batch.rows), bool), [], inputs)
        prepared.tokens, prepared.unknown = sum(map(len, ids)), sum(unknown for _, unknown in counted)
        return prepared

    def encode(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return feeds


def _in_order(samples: Sequence[Sample], batch_size: int) -> list[Batch]:
    return [
        Batch(np.arange(start, min(start + batch_size, len(samples))), samples[start : start + batch_size])
        for start in range(0, len(samples), batch_size)
    ]


def make_feeder(
    engine: Engine,
    *,
    batch_size: int,
    preprocessing: str,
    pixels: str,
    latents_engine: Engine | None,
    cache: LatentCache | None,
    captions: Captions | None,
    multiple: int,
) -> Feeder:
    """The feeder for an engine's inputs. Raises ConfigError when a graph that takes latents has neither a VAE nor a cache."""
    if captions is not None:
        return TextFeeder(captions, batch_size, multiple)
    if "pixels" in engine.inputs:
        return ImageFeeder(engine, batch_size, preprocessing, pixels)
    if cache is not None:
        return CachedLatentsFeeder(cache, batch_size)
    if latents_engine is None:
        raise ConfigError("this graph takes latents, and its artifact holds no VAE: pass --latents CACHE, or export it with --vae.")
    return ImageFeeder(engine, batch_size, preprocessing, pixels, latents_engine)


def per_timestep(engine: Engine, table: Mapping[str, np.ndarray] | None) -> list[tuple[float | None, dict[str, np.ndarray]]]:
    """(timestep, its parameters) for each run of a batch: one run for a graph with its timestep baked in, one for each row of a sweep's table."""
    if table is None:
        timesteps = engine.recipe.timesteps
        return [(timesteps[0] if timesteps else None, {})]
    names = [name for name in engine.inputs if name in table]
    return [(float(t), {name: table[name][index] for name in names}) for index, t in enumerate(table["timesteps"])]


def tap_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Every tap and the shape of one row of it. Raises EngineError where rows would differ in shape."""
    shapes = {name: tuple(int(axis) for axis in spec.shape[1:]) for name, spec in engine.outputs.items()}
    if any(isinstance(axis, str) for spec in engine.outputs.values() for axis in spec.shape[1:]):
        raise EngineError(
            "this graph's outputs vary in shape from sample to sample; the store holds fixed shapes. Export with --pooling mean or max."
        )
    if engine.recipe.kind == "latents":
        return {"latents": (int(np.prod(shapes["latents"])),)}
    return {tap_name(block, t): shapes[f"b{block}"] for t in engine.recipe.timesteps for block in engine.recipe.blocks}
