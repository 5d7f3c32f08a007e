"""What must agree, and what must not, between stores that meet in one probe: classes and recipes the same, samples apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from difffeat.errors import ProbeError
from difffeat.probe.data import FeatureStore
from difffeat.runtime.manifest import differences

_SHOWN = 5


def require_same(train: FeatureStore, other: FeatureStore, name: str, *, allow_mixed: bool = False) -> None:
    """Raises ProbeError when a store has other classes than the training store, or another order of them, or (unless `allow_mixed`) another recipe.

    **Arguments:** `name` of the other store, for messages.
    """
    require_same_classes(train.classes, other.classes, name)
    if not allow_mixed:
        require_same_recipe(train, other, name, " (from Python, allow_mixed=True lets them meet)")


def require_same_classes(train: Sequence[str], other: Sequence[str], name: str) -> None:
    """Raises ProbeError unless the columns of both stores' labels mean the same classes in the same order."""
    mine, theirs = tuple(train), tuple(other)
    if mine == theirs:
        return
    lacking, surplus = [c for c in mine if c not in set(theirs)], [c for c in theirs if c not in set(mine)]
    told = [f"it lacks {_few(lacking)}"] * bool(lacking) + [f"it alone has {_few(surplus)}"] * bool(surplus)
    if not told:
        place = next(column for column, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1])
        told = [f"the same ones in another order, from class {place} on: {mine[place]!r} there, {theirs[place]!r} here"]
    raise ProbeError(
        f"the {name} store has other classes than the training store ({len(theirs)} against {len(mine)}): {'; '.join(told)}. "
        "Extract both with the same --classes FILE, one name a line."
    )


def require_same_recipe(train: FeatureStore, other: FeatureStore, name: str, otherwise: str = "") -> None:
    """Raises ProbeError, naming the fields that differ, when two stores hold features of different recipes; `otherwise` ends the remedy."""
    if train.fingerprint == other.fingerprint:
        return
    lines = differences(*(dict(store.manifest).get("recipe", {}) for store in (train, other)))
    more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
    raise ProbeError(
        "\n  ".join(
            [
                f"the {name} store was made by another recipe ({other.fingerprint[:12]}) than the training store ({train.fingerprint[:12]}). "
                f"Extract both with the same artifact and options{otherwise}. They differ in:",
                *(lines[:20] or ["fields that their manifests do not show"]),
                *more,
            ]
        )
    )


def require_apart(first: FeatureStore, first_rows: np.ndarray, second: FeatureStore, second_rows: np.ndarray, names: tuple[str, str]) -> None:
    """Raises ProbeError when samples of one split stand in the other as well: what was trained or chosen on them would be scored on them.

    The same sample is one of the same id that was read from the same bytes (an image's file, a caption's tokens): unrelated data sets may both
    have a `00000`, and two samples may have the same words.
    """
    if first is second and not np.intersect1d(first_rows, second_rows).size:
        return  # ids are unique in a store
    ids, others = first.ids, second.ids
    places = {others[row]: row for row in second_rows.tolist()}
    alike = [(row, places[ids[row]]) for row in first_rows.tolist() if ids[row] in places]
    if not alike:
        return
    mine, theirs = np.array(alike).T
    same = (np.asarray(first.inputs[mine]) == np.asarray(second.inputs[theirs])).all(axis=1)
    if same.any():
        example = ids[int(mine[same][0])]
        raise ProbeError(
            f"{int(same.sum())} samples of the {names[1]} split are in the {names[0]} split as well, for example {example!r} (same id, same "
            f"content): scores on them would flatter. Extract the {names[1]} store from samples that the {names[0]} store does not have."
        )


def left_out(store: FeatureStore) -> dict[str, int]:
    """How many rows of a store cannot be used, by reason; each row counts once."""
    valid, labelled = np.asarray(store.valid), np.asarray(store.labelled)
    return {"in quarantine": int((~valid).sum()), "whose labels are unknown": int((valid & ~labelled).sum())}


def told(dropped: dict[str, int]) -> str:
    """The counts in words; empty where nothing was left out."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)


def _few(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
