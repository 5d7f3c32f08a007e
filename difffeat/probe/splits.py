"""One split for all verbs: which samples train, which choose, and which are scored once.

The side of a sample is a function of its id and the seed alone: SHA-256 of both, read as a number in 0..1, below `fractions[2]` is test, from
1 - `fractions[1]` on validation, and train between. So `probe`, `fuse` and `search` hold out the same samples, whatever rows a join drops, however a
store grows, and in whichever order two stores list them; and the rows of validation are the same with a test store of its own and without.

The price is that sizes vary as coin tosses do (15 % of 1 000 rows are 150 give or take 11). Sorting within strata would give exact shares, but every
row that is added or dropped would move others across the cuts, and a tap that was chosen on a row would then be tested on it. Two repairs remain,
both of the rows that need them alone and counted: a class with at least one positive for each part has one in each, where that takes it from no other
class, and no part is empty. They look at all rows of the store (of a pair, at those of the image store, or of the one that has labels), not at those
that a join leaves, so that they too are the same in every verb on that store.

Rows of the same image (the same bytes; in a text store, captions of the same image) are one sample under several ids: they go to one side together,
by the first of their ids. The same image encoded anew cannot be told from another one, and a text store alone does not know which of its files
hold the same image: where that matters, give the splits of the image store to both (`splits`, `--splits FILE`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.cautions import cautions, require_distinct_classes, require_learnable
from difffeat.probe.data import FeatureMatrix, FeatureStore
from difffeat.probe.optim import check_seed
from difffeat.probe.sameness import content_groups, engine_notes, left_out, require_apart, require_same, told

VERSION = "difffeat-split/1"
SPLITS = ("train", "validation", "test")
FRACTIONS = (0.7, 0.15, 0.15)


@dataclass(frozen=True)
class Part:
    """Rows of a store that serve as one split. `name`: train, validation or test; `source` says in words where they are from."""

    name: str
    store: FeatureStore
    rows: np.ndarray
    source: str

    @property
    def labels(self) -> np.ndarray:
        """[m, C] of the rows."""
        labels = labels_of(self.store)
        if labels is None:
            raise ProbeError(f"the {self.name} store has no labels. Extract it from a source that has them.")
        return np.asarray(labels)[self.rows]

    @property
    def ids(self) -> list[str]:
        """Sample ids of the rows."""
        ids = list(self.store.ids)
        return [ids[row] for row in self.rows.tolist()]

    def features(self, tap: str) -> FeatureMatrix:
        """The store's features of a tap; select `rows` from them."""
        return self.store[tap]


@dataclass(frozen=True)
class Sides:
    """The part of each row, int8 [n] (a place in `SPLITS`, -1 for none), how many rows repeat another's image, how many samples were moved."""

    part: np.ndarray
    repeated: int = 0
    moved: int = 0

    def rows(self, name: str) -> np.ndarray:
        """The rows of a part, ascending."""
        return np.flatnonzero(self.part == SPLITS.index(name))


def labels_of(store: Any) -> Any:
    """What probes take as labels [n, C]: 1, 0 and, where a store says so, -1 for a cell that nobody knows; None where the store has none."""
    targets = getattr(store, "targets", None)
    return store.labels if targets is None else targets


def usable_rows(store: FeatureStore) -> np.ndarray:
    """Rows whose sample is valid and whose labels are known, int64 [m]. Raises ProbeError when there are none, or no labels."""
    if store.labels is None:
        raise ProbeError("this store has no labels, so nothing can be probed. Extract it from a source that has them.")
    rows = np.flatnonzero(np.asarray(store.valid) & np.asarray(store.labelled))
    if len(rows) == 0:
        raise ProbeError(f"this store has no valid sample with known labels: of {len(store)}, {told(left_out(store))}. Look at difffeat store info.")
    return rows


def split_rows(
    labels: Any, *, fractions: Sequence[float] = FRACTIONS, seed: int = 0, ids: Sequence[str] | None = None, groups: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Positions of train, validation and test, each int64 ascending; together every row once.

    **Arguments:** `labels` multi-hot [n, C]; `ids` of the rows, which decide their sides (their numbers when None); `groups` int [n]: rows of equal
    numbers go to one side. Raises ProbeError when a split would be empty.
    """
    names = [str(row) for row in range(len(labels))] if ids is None else list(ids)
    sides = split_sides(names, labels, fractions=fractions, seed=seed, groups=groups)
    return {name: sides.rows(name) for name in SPLITS}


def split_sides(
    ids: Sequence[str],
    labels: Any,
    *,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    groups: np.ndarray | None = None,
    used: np.ndarray | None = None,
) -> Sides:
    """The side of every row. `used` bool [n]: the rows that will be used, of which no part may be empty (all when None).

    Raises ProbeError when there are fewer samples than parts, ConfigError for fractions that are none.
    """
    check_fractions(fractions)
    check_seed(seed)
    positive = np.asarray(labels) == 1
    if positive.ndim != 2 or len(positive) != len(ids):
        raise ProbeError(f"labels must be multi-hot [{len(ids)}, C], got shape {list(positive.shape)}")
    numbers, keys = _samples(ids, groups)
    draw = positions(keys, seed)
    part = np.zeros(len(keys), np.int8)
    part[draw >= 1 - fractions[1]] = 1
    part[draw < fractions[2]] = 2
    wanted = [place for place in range(3) if fractions[place] > 0]
    has = positive if len(keys) == len(ids) else _any_of(positive, numbers)
    first = part.copy()
    _serve_classes(part, has, draw, wanted)
    present = np.ones(len(keys), bool) if used is None else np.bincount(numbers, np.asarray(used), len(keys)) > 0
    _serve_parts(part, draw, present, wanted, fractions)
    return Sides(part[numbers], len(ids) - len(keys), int((part != first).sum()))


def drawn_rows(store: FeatureStore, rows: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """`count` of the rows, drawn by their ids and the seed, ascending; all of them where there are no more. The draw nests: fewer are among more.

    A class of which some row is left has one in the draw where `count` allows it: what a hundred rows lack they cannot teach.
    """
    if count is None:
        return rows
    if isinstance(count, bool) or count < 1:
        raise ConfigError(f"max_rows must be at least 1, got {count}")
    check_seed(seed)
    if count >= len(rows):
        return rows
    ids = list(store.ids)
    order = np.argsort(positions([ids[row] for row in rows.tolist()], seed), kind="stable")
    positive = np.asarray(labels_of(store))[rows[order]] == 1
    firsts = np.unique(positive.argmax(axis=0)[positive.any(axis=0)])[:count]
    rest = np.setdiff1d(np.arange(len(rows)), firsts, assume_unique=True)[: count - len(firsts)]
    return np.sort(rows[order[np.concatenate([firsts, rest])]])


def check_fractions(fractions: Sequence[float]) -> None:
    """Raises ConfigError unless they are three shares, train's above 0."""
    if len(fractions) != 3 or not all(0 <= share <= 1 for share in fractions) or not np.isclose(sum(fractions), 1):
        raise ConfigError(f"fractions must be three numbers that sum to 1, got {list(fractions)}")
    if fractions[0] == 0:
        raise ConfigError("the first of the fractions is train's share and must be above 0")


def positions(keys: Sequence[str], seed: int) -> np.ndarray:
    """A number in 0..1 for each key, float64 [n]: the same for the same key and seed, wherever it stands."""
    prefix = f"{VERSION}\n{seed}\n".encode()
    digests = b"".join(hashlib.sha256(prefix + key.encode("utf-8", "surrogatepass")).digest()[:8] for key in keys)
    return np.frombuffer(digests, ">u8").astype(np.float64) / 2.0**64


def _samples(ids: Sequence[str], groups: np.ndarray | None) -> tuple[np.ndarray, list[str]]:
    """(number of each row's sample, key of each sample): the shortest of the ids of a group, of equally long ones the first."""
    if groups is None:
        return np.arange(len(ids)), list(ids)
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    keys: dict[int, str] = {}
    for number, id_ in zip(numbers.tolist(), ids, strict=True):
        known = keys.get(number)
        if known is None or (len(id_), id_) < (len(known), known):
            keys[number] = id_
    return numbers, [keys[number] for number in range(len(keys))]


def _any_of(positive: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Bool [samples, C]: the classes that some row of a sample has."""
    first = np.unique(numbers, return_index=True)[1]
    has = positive[first]
    others = np.ones(len(numbers), bool)
    others[first] = False
    for row in np.flatnonzero(others).tolist():
        has[numbers[row]] |= positive[row]
    return has


def _serve_classes(part: np.ndarray, has: np.ndarray, draw: np.ndarray, wanted: Sequence[int]) -> None:
    """Move samples so that each class with at least as many as there are parts has one in each, unless that takes the last one of another class."""
    if len(wanted) < 2:
        return
    total = has.sum(axis=0)
    counts = np.stack([has[part == place].sum(axis=0) for place in range(3)])
    served = total >= len(wanted)
    lacking = np.flatnonzero(served & (counts[list(wanted)] == 0).any(axis=0))
    for column in lacking[np.argsort(total[lacking], kind="stable")].tolist():
        for place in wanted:
            if counts[place, column]:
                continue
            donor = int(counts[:, column].argmax())
            candidates = np.flatnonzero(has[:, column] & (part == donor))
            # A class that is served elsewhere keeps one where it is.
            spared = [c for c in candidates.tolist() if not (served & has[c] & (counts[donor] < 2)).any()]
            if spared:
                chosen = min(spared, key=lambda c: draw[c])
                part[chosen] = place
                counts[donor] -= has[chosen]
                counts[place] += has[chosen]


def _serve_parts(part: np.ndarray, draw: np.ndarray, present: np.ndarray, wanted: Sequence[int], fractions: Sequence[float]) -> None:
    """Move a sample into each part that is empty, out of the largest. Raises ProbeError where there are fewer samples than parts."""
    count = int(present.sum())
    if count < len(wanted):
        place = wanted[count]
        raise ProbeError(f"{count} rows are too few for a {SPLITS[place]} split of {fractions[place]:g} (rows of the same image count once)")
    for place in wanted:
        if not (present & (part == place)).any():
            donor = int(np.bincount(part[present], minlength=3).argmax())
            rows = np.flatnonzero(present & (part == donor))
            part[rows[draw[rows].argmin()]] = place


@dataclass(frozen=True)
class Parts(Mapping[str, Part]):
    """Train, validation and test by name; `record` says as plain JSON types how they were made, `notes` in sentences what a reader must know."""

    parts: Mapping[str, Part]
    record: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Part:
        return self.parts[name]

    def __iter__(self) -> Any:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def make_parts(
    train: FeatureStore,
    *,
    validation: FeatureStore | None = None,
    test: FeatureStore | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    allow_mixed: bool = False,
    allow_shared: bool = False,
    splits: Mapping[str, str] | None = None,
) -> Parts:
    """Train, validation and test, each a store of its own where given, else a seeded share of the training store.

    **Arguments:** `splits` id -> train, validation or test, instead of the seed's choice. The shares of splits that have a store of their own go to
    train. Raises ProbeError when stores differ in classes or, unless `allow_mixed`, in their recipe (such features must not meet in one probe), and,
    unless `allow_shared`, when two splits share a sample.
    """
    require_distinct_classes(train.classes, "training")
    given = {"validation": validation, "test": test}
    for name, own in given.items():
        if own is not None:
            require_same(train, own, name, allow_mixed=allow_mixed)
    rows = usable_rows(train)
    used = np.zeros(len(train), bool)
    used[rows] = True
    sides, source = sides_of(train, used, given, fractions=fractions, seed=seed, splits=splits)
    parts = {}
    for name in SPLITS:
        own = given.get(name)
        if own is not None:
            parts[name] = Part(name, own, usable_rows(own), "a store of its own")
        else:
            mine = sides.rows(name)[used[sides.rows(name)]]
            whole = len(mine) == len(rows)
            parts[name] = Part(name, train, mine, "a store of its own" if whole else source)
    notes = _apart(train, parts, allow_shared=allow_shared)
    record = split_record(
        {name: (part.ids, part.source) for name, part in parts.items()}, sides, fractions, seed, splits is not None, allow_shared, notes
    )
    require_learnable(parts["train"].labels, train.classes)
    notes += cautions({name: part.labels for name, part in parts.items() if len(part.rows)}, train.classes)
    own = [note for name, store in given.items() if store is not None for note in engine_notes(train, store, name)]
    return Parts(parts, record, (*side_notes(sides), *own, *notes))


def _apart(train: FeatureStore, parts: Mapping[str, Part], *, allow_shared: bool) -> list[str]:
    """Checks that no sample stands in two parts. A store of its own is held against all rows that are used of the training store."""
    shares = {name: part for name, part in parts.items() if part.store is train}
    own = {name: part for name, part in parts.items() if part.store is not train}
    rows = np.concatenate([part.rows for part in shares.values()])
    compared = [(train, rows, "train", part) for part in own.values()]
    compared += [(a.store, a.rows, a.name, b) for same in (shares, own) for a, b in itertools.combinations(same.values(), 2)]
    notes = []
    for store, first, name, part in compared:
        notes += require_apart(store, first, part.store, part.rows, (name, part.name), allow_shared=allow_shared)
    return notes


def sides_of(
    store: FeatureStore,
    used: np.ndarray,
    given: Mapping[str, Any],
    *,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    splits: Mapping[str, str] | None = None,
    groups: np.ndarray | None = None,
) -> tuple[Sides, str]:
    """(side of each row of a store, where that is from, in words). `given`: part -> its own store, or None; such parts take no share."""
    if splits is not None:
        return _sides_by_file(store, used, given, splits), "the splits that were given"
    check_fractions(fractions)
    shares = [0.0 if given.get(name) is not None else float(fractions[SPLITS.index(name)]) for name in SPLITS[1:]]
    labels = np.where(np.asarray(store.labelled)[:, None], np.asarray(labels_of(store)), 0)
    groups = content_groups(store) if groups is None else groups
    sides = split_sides(store.ids, labels, fractions=(1 - sum(shares), *shares), seed=seed, groups=groups, used=used)
    return sides, f"a share of the training store, seed {seed}"


def _sides_by_file(store: FeatureStore, used: np.ndarray, given: Mapping[str, Any], splits: Mapping[str, str]) -> Sides:
    part = np.array([SPLITS.index(splits[id_]) if id_ in splits else -1 for id_ in store.ids], np.int8)
    found = {name: int((used & (part == SPLITS.index(name))).sum()) for name in SPLITS}
    if not any(found.values()):
        raise ProbeError(
            f"the splits name none of the usable samples of this store: they name {next(iter(splits), 'nothing')!r}, ..., the store has "
            f"{store.ids[0]!r}, ... A suffix or a folder in an id counts."
        )
    for name in SPLITS[1:]:
        if given.get(name) is not None and found[name]:
            raise ConfigError(
                f"the splits call {found[name]} rows of the training store {name}, and a {name} store was given as well. Leave one of them out."
            )
    if not found["train"]:
        raise ProbeError(f"the splits name no usable row of this store for train ({', '.join(f'{n} {name}' for name, n in found.items())})")
    return Sides(part)


def side_notes(sides: Sides) -> list[str]:
    """What happened while rows were given their sides, in sentences."""
    told_ = []
    if sides.repeated:
        told_.append(f"{sides.repeated} rows repeat the image of another row: rows of the same image stand in one split together")
    if sides.moved:
        told_.append(f"{sides.moved} samples were moved so that each part, and each class with enough positives in each part, has one")
    if unnamed := int((sides.part < 0).sum()):
        told_.append(f"{unnamed} rows stand in no split, because the splits that were given do not name them")
    return told_


def split_record(
    parts: Mapping[str, tuple[Sequence[str], str]],
    sides: Sides,
    fractions: Sequence[float],
    seed: int,
    by_file: bool,
    allow_shared: bool,
    shared: Sequence[str],
) -> dict[str, Any]:
    """How a split was made and which samples it holds, as plain JSON types. `parts`: name -> (ids, where they are from)."""
    return {
        "version": VERSION,
        "rule": "the splits that were given" if by_file else "by a digest of each sample's id and the seed",
        "seed": seed,
        "fractions": [float(share) for share in fractions],
        "parts": {name: {"rows": len(ids), "from": source, "ids_sha256": ids_digest(ids)} for name, (ids, source) in parts.items()},
        "rows_that_repeat_an_image": sides.repeated,
        "samples_moved": sides.moved,
        "allow_shared": allow_shared,
        "shared": list(shared),
    }


def ids_digest(ids: Sequence[str]) -> str:
    """SHA-256 of the sorted ids, one a line: equal where two splits hold the same samples, in whatever order."""
    return hashlib.sha256("\n".join(sorted(ids)).encode("utf-8", "surrogatepass")).hexdigest()
