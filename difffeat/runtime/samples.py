"""A sample and a source: what every reader of sources makes, and all that the extraction knows of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from difffeat.errors import DuplicateSample, EmptySource

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample.

    **Fields:** `id` unique in its source; `image` path of the image or None; `locator` that path as the source names it; `captions`;
    `labels` class names, None where the source has none; `problem` what is wrong with its captions, told in quarantine when they are needed.
    """

    id: str
    image: Path | None = None
    locator: str | None = None
    captions: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    problem: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the image; −1 where there is none."""
        try:
            return -1 if self.image is None else os.stat(self.image).st_size
        except OSError:
            return -1


@dataclass(frozen=True)
class Source:
    """All samples in order.

    **Fields:** `name` what the user gave; `samples`; `classes` of the labels, in the order of the multi-hot columns (empty without labels);
    `ignored` how many files of each suffix were passed over.
    """

    name: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...] = ()
    ignored: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if not self.samples:
            passed = ", ".join(f"{count} × {suffix or 'no suffix'}" for suffix, count in self.ignored.most_common(5))
            raise EmptySource(
                f"{self.name} holds no samples{f' (passed over: {passed})' if passed else ''}. Accepted images: {', '.join(IMAGE_SUFFIXES)}."
            )
        counts = Counter(sample.id for sample in self.samples)
        if len(counts) < len(self.samples):
            twice = [name for name, count in counts.items() if count > 1]
            where = ", ".join(s.locator or "(no image)" for s in self.samples if s.id == twice[0])
            raise DuplicateSample(
                f"{self.name}: {len(twice)} ids occur more than once, the first is {twice[0]!r} ({where}). Rename the files or give ids."
            )

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def has_images(self) -> bool:
        """Whether any sample has an image."""
        return any(sample.image is not None for sample in self.samples)

    @property
    def has_captions(self) -> bool:
        """Whether any sample has a caption, or one that cannot be read."""
        return any(sample.captions or sample.problem for sample in self.samples)


def multi_hot_classes(samples: Iterable[Sample]) -> tuple[str, ...]:
    """All class names that occur, sorted; empty where no sample has labels."""
    return tuple(sorted({label for sample in samples for label in sample.labels or ()}))
