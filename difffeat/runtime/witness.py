"""Whether the images of a source are those that something was made from. Names and sizes alone do not tell; a few are read and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from difffeat.errors import SampleError, StoreCorrupt, StoreMismatch
from difffeat.runtime.manifest import Manifest, Receipt, shard_path
from difffeat.runtime.samples import Sample
from difffeat.runtime.store import map_shard

LOOKED_AT = 16
"""Images that are read: evenly spread, so that a folder that was exchanged is noticed, and so few that nobody waits for them."""


PATIENCE = 3
"""Images that cannot be read before no more are asked for."""


def spread(count: int, most: int = LOOKED_AT) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


def first_changed(known: Iterable[tuple[Sample, np.ndarray]]) -> Sample | None:
    """The first sample whose image hashes to something else than is known of it (uint8 [32]); None where all are the same.

    An image that cannot be read any more says nothing, and after `PATIENCE` of them no more are asked for: behind a URL each takes its time.
    """
    unreadable = 0
    for sample, digest in known:
        if sample.image is None:
            continue
        try:
            if hashlib.sha256(sample.image.read()).digest() != digest.tobytes():
                return sample
        except SampleError:
            unreadable += 1
            if unreadable == PATIENCE:
                return None
    return None


def require_same_images(
    store: Path, manifest: Manifest, receipts: Sequence[Receipt], samples: Sequence[Sample], places: Sequence[int | None]
) -> None:
    """Raises StoreMismatch, naming the first, where an image is another one than a finished row was computed from.

    **Arguments:** `receipts` of the shards that are done; `places` which of `samples` each row is, None where the source does not hold it. Nothing is
    said of text (its captions stand in the samples table), nor of images that cannot be read any more: their rows are done.
    """
    if manifest.recipe.graph.takes_text or "latent_cache" in manifest.options:
        return
    known = ((samples[place], digest) for row, digest in _witnesses(store, manifest, receipts) if (place := places[row]) is not None)
    if (sample := first_changed(known)) is not None:
        raise StoreMismatch(
            f"{store}: the image of {sample.id!r} ({sample.locator}) is another one than its features were computed from, although name and size are "
            "the same. Put the images back, choose another -o for these, or pass --overwrite to begin anew."
        )


def _witnesses(store: Path, manifest: Manifest, receipts: Sequence[Receipt]) -> Iterator[tuple[int, np.ndarray]]:
    """(row, SHA-256 of what was read) of a few rows that are done. A shard that cannot be read is not asked: verify and repair tell of it."""
    total = np.cumsum([0, *(receipt.rows for receipt in receipts)])
    for number in spread(int(total[-1])):
        index = int(np.searchsorted(total, number, side="right")) - 1
        receipt, row = receipts[index], int(number - total[index])
        try:
            arrays = map_shard(shard_path(store, receipt.shard, receipt.generation), manifest, receipt.rows)
        except StoreCorrupt:
            continue
        if arrays["valid"][row]:
            yield receipt.first_row + row, np.asarray(arrays["inputs"][row])
