"""Train, validation and test of an image and a text store joined by id: what `fuse` and `search` share, so that both hold out the same samples."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from difffeat.errors import ConfigError
from difffeat.probe.fusion import Join, join
from difffeat.probe.sameness import content_groups
from difffeat.probe.splits import FRACTIONS, SPLITS, Sides, side_notes, sides_of, split_record
from difffeat.runtime.store import Store
from difffeat.workflows.pairs import Split

Pair = tuple[Store, Store]


@dataclass(frozen=True)
class PairSplits:
    """Train, validation and test of a pair of stores.

    **Fields:** `parts` by name; `summary` of the joins in words; `record` of the split as plain JSON types; `notes` that a reader must know.
    """

    parts: Mapping[str, Split]
    summary: str
    record: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def ids(self) -> dict[str, list[str]]:
        """Sample ids of each part."""
        return {name: split.ids for name, split in self.parts.items()}


def pair_splits(
    stores: Pair,
    *,
    validation: Pair | None = None,
    test: Pair | None = None,
    seed: int = 0,
    splits: Mapping[str, str] | None = None,
    allow_shared: bool = False,
) -> PairSplits:
    """The rows that both stores of a pair have, split as `difffeat.probe.splits` splits a store's, or as `splits` (id -> part) says.

    Raises ProbeError where stores do not belong together, or where two parts share an image (unless `allow_shared`).
    """
    given = {"validation": validation, "test": test}
    joined = join(*stores)
    if joined.labels is None:
        raise ConfigError("neither store has labels, so nothing can be trained. Extract from a source that has them.")
    whole, parts, notes = Split(joined, np.arange(len(joined))), {}, []
    for name, pair in given.items():
        if pair is not None:
            parts[name] = Split.whole(*pair)
            notes += whole.require_comparable(parts[name], name, allow_shared=allow_shared)
    sides, source, joined_sides = _sides(joined, given, seed, splits)
    parts = {name: parts.get(name) or Split(joined, np.flatnonzero(joined_sides == place)) for place, name in enumerate(SPLITS)}
    for first, second in itertools.combinations(SPLITS, 2):
        own = [given.get(name) is not None for name in (first, second)]
        if all(own) or (splits is not None and not any(own)):  # an own store was held against all joined rows, and shares are apart by their making
            notes += parts[first].require_apart(parts[second], (first, second), allow_shared=allow_shared)
    sources = {name: source if given.get(name) is None else "stores of their own" for name in SPLITS}
    held = {name: (parts[name].ids, sources[name]) for name in SPLITS}
    record = split_record(held, sides, FRACTIONS, seed, splits is not None, allow_shared, notes)
    joins = [joined.summary(), *(f"{name}: {parts[name].joined.summary()}" for name, pair in given.items() if pair is not None)]
    return PairSplits(parts, "; ".join(joins), record, (*side_notes(sides), *notes))


def _sides(joined: Join, given: Mapping[str, Any], seed: int, splits: Mapping[str, str] | None) -> tuple[Sides, str, np.ndarray]:
    """(sides of all rows of the store that has labels, where they are from, the side of each joined row).

    The image store's labels and rows decide where it has labels, as they do when it is probed alone.
    """
    image, text = joined.image_store, joined.text_store
    leads = image if image.labels is not None and np.asarray(image.labelled).any() else text
    rows = joined.image_rows if leads is image else joined.text_rows
    used = np.zeros(len(leads), bool)
    used[rows] = True
    groups = content_groups(image)
    if leads is text and groups is not None:
        by_id = dict(zip(image.ids, groups.tolist(), strict=True))
        groups = np.array([by_id.get(id_, len(by_id) + row) for row, id_ in enumerate(text.ids)], np.int64)
    sides, source = sides_of(leads, used, given, seed=seed, splits=splits, groups=groups)
    return sides, source.replace("the training store", "the joined rows"), sides.part[rows]
