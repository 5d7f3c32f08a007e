"""Whether the images of a source are those that something was made from. Names and sizes alone do not tell; a few are read and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from difffeat.errors import SampleError, StoreCorrupt, StoreMismatch
from difffeat.runtime.manifest import Manifest, Receipt, shard_path
from difffeat.runtime.samples import Sample
from difffeat.runtime.store import map_shard

LOOKED_AT = 16
"""Images that are read: evenly spread, so that a folder that was exchanged is noticed, and so few that nobody waits for them."""
PATIENCE = 3
"""Images that cannot be read before no more are asked for: behind a URL each takes its time."""
Pairs = Sequence[tuple[int, int]]
Known = Iterable[tuple[Sample, np.ndarray]]
"""Samples with the SHA-256 that is known of their image, uint8 [32]."""


@dataclass
class Testimony:
    """What images say that were read: which have the `same` bytes as is known of them, and which are `others`."""

    same: list[Sample] = field(default_factory=list)
    others: list[Sample] = field(default_factory=list)

    @property
    def against(self) -> Sample | None:
        """An image that speaks against the source. A file that has changed does; of what is fetched or lies in cells, where neither name nor size
        says much and a server may have its reasons, only when most are others.
        """
        local = next((sample for sample in self.others if sample.size >= 0), None)
        return local or (self.others[0] if len(self.others) > len(self.same) else None)


def spread(count: int, most: int = LOOKED_AT) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


def ask(known: Known) -> Testimony:
    """Read and hash the images. What cannot be read any more says nothing, and after `PATIENCE` of them no more are asked for."""
    found, unreadable = Testimony(), 0
    for sample, digest in known:
        if sample.image is None:
            continue
        try:
            same = hashlib.sha256(sample.image.read()).digest() == digest.tobytes()
        except SampleError:
            unreadable += 1
            if unreadable == PATIENCE:
                break
        else:
            (found.same if same else found.others).append(sample)
    return found


def require_same_images(
    store: Path, manifest: Manifest, receipts: Sequence[Receipt], samples: Sequence[Sample], places: Sequence[int | None]
) -> None:
    """Raises StoreMismatch, naming one, where images are others than finished rows were computed from.

    **Arguments:** `receipts` of the shards that are done; `places` which of `samples` each row is, None where the source does not hold it. Nothing is
    said of text (its captions stand in the samples table), nor of images that cannot be read any more: their rows are done.
    """
    if not _has_images(manifest):
        return
    total = np.cumsum([0, *(receipt.rows for receipt in receipts)])
    rows = [_row(receipts, total, number) for number in spread(int(total[-1]))]
    known = ((samples[place], digest) for row, digest in _digests(store, manifest, receipts, rows) if (place := places[row]) is not None)
    if (sample := ask(known).against) is not None:
        how = "although name and size are the same" if sample.size >= 0 else "although its name is the same"
        raise StoreMismatch(
            f"{store}: the image of {sample.id!r} ({sample.locator}) is another one than its features were computed from, {how}. Put the images "
            "back, choose another -o for these, or pass --overwrite to begin anew."
        )


def same_under_other_ids(
    store: Path, manifest: Manifest, receipts: Sequence[Receipt], samples: Sequence[Sample], places: Sequence[int | None], pairs: Pairs
) -> bool:
    """Whether rows that look alike (`pairs` of an older row and one that is to be added) are the same images: all of a few that are read."""
    if not _has_images(manifest):
        return False
    chosen = dict(pairs[number] for number in spread(len(pairs)))
    known = ((samples[place], digest) for row, digest in _digests(store, manifest, receipts, chosen) if (place := places[chosen[row]]) is not None)
    found = ask(known)
    return bool(found.same) and not found.others


def _has_images(manifest: Manifest) -> bool:
    """Whether the rows' digests are those of image files."""
    return not manifest.recipe.graph.takes_text and "latent_cache" not in manifest.options


def _row(receipts: Sequence[Receipt], total: np.ndarray, number: int) -> int:
    """The row that is the `number`th of those that are done."""
    index = int(np.searchsorted(total, number, side="right")) - 1
    return receipts[index].first_row + int(number - total[index])


def _digests(store: Path, manifest: Manifest, receipts: Sequence[Receipt], rows: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(row, SHA-256 of what was read for it) of rows that are done and good. A shard that cannot be read is not asked: verify tells of it."""
    first = np.array([receipt.first_row for receipt in receipts])
    for row in rows:
        index = int(np.searchsorted(first, row, side="right")) - 1
        if index < 0 or row >= first[index] + receipts[index].rows:
            continue
        receipt = receipts[index]
        try:
            arrays = map_shard(shard_path(store, receipt.shard, receipt.generation), manifest, receipt.rows)
        except StoreCorrupt:
            continue
        if arrays["valid"][row - receipt.first_row]:
            yield row, np.asarray(arrays["inputs"][row - receipt.first_row])
