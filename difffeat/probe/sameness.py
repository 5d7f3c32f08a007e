"""What must agree, and what must not, between stores that meet in one probe: classes and recipes the same, samples apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from difffeat.errors import ProbeError
from difffeat.probe.data import FeatureStore
from difffeat.runtime.manifest import differences

_SHOWN = 5
_EXAMPLES = 3


def require_same(train: FeatureStore, other: FeatureStore, name: str, *, allow_mixed: bool = False) -> None:
    """Raises ProbeError when a store has other classes than the training store, or another order of them, or (unless `allow_mixed`) another recipe.

    **Arguments:** `name` of the other store, for messages.
    """
    require_same_classes(train.classes, other.classes, name)
    if not allow_mixed:
        require_same_recipe(train, other, name, " (from Python, allow_mixed=True lets them meet)")


def require_same_classes(train: Sequence[str], other: Sequence[str], name: str, against: str = "training") -> None:
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
        f"the {name} store has other classes than the {against} store ({len(theirs)} against {len(mine)}): {'; '.join(told)}. "
        "Extract both with the same --classes FILE, one name a line."
    )


def _with_old_defaults(recipe: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with what older versions left out: pictures were read strictly, and weights at a log-SNR say which diffusion it was."""
    graph, run = dict(recipe.get("graph") or {}), dict(recipe.get("run") or {})
    if None in (graph.get("diffusion"), (other.get("graph") or {}).get("diffusion")):
        graph.pop("diffusion", None)
    if run.get("pixels") is None:
        run["pixels"] = "strict"
    return {**recipe, "graph": graph, "run": run}


def require_same_recipe(train: FeatureStore, other: FeatureStore, name: str, otherwise: str = "") -> None:
    """Raises ProbeError, naming the fields that differ, when two stores hold features of different recipes; `otherwise` ends the remedy."""
    if train.fingerprint == other.fingerprint:
        return
    mine, theirs = (dict(store.manifest).get("recipe", {}) for store in (train, other))
    lines = differences(mine, theirs)
    if lines and _with_old_defaults(mine, theirs) == _with_old_defaults(theirs, mine):
        return
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


def modality(store: Any) -> str | None:
    """`text` or `image` as the store's recipe says; None where it says nothing."""
    kind = dict(getattr(store, "manifest", {})).get("recipe", {}).get("graph", {}).get("kind")
    return None if kind is None else "text" if kind in ("text", "text-sweep") else "image"


def require_modalities(image_store: Any, text_store: Any) -> None:
    """Raises ProbeError where the image store holds features of captions, the text store features of images, or both are one store."""
    kinds = modality(image_store), modality(text_store)
    names = _name_of(image_store, "the image store"), _name_of(text_store, "the text store")
    if kinds == ("text", "image"):
        raise ProbeError(
            f"the stores are the wrong way round: {names[0]} holds features of captions and {names[1]} features of images. "
            "Give the image store first, then the text store."
        )
    if kinds[0] == "text":
        raise ProbeError(
            f"{names[0]} was given as the image store, but it holds features of captions, as {names[1]} does: a text store. Give features of images."
        )
    if kinds[1] == "image":
        raise ProbeError(f"{names[1]} was given as the text store, but it holds features of images, as {names[0]} does. Give a text store.")
    if image_store is text_store:
        raise ProbeError(f"{names[0]} was given as the image store and as the text store. Give two stores.")


def require_halves(image: Any, text: Any) -> None:
    """Raises ProbeError where the image half of a pair holds a store's features of captions, or the text half those of images."""
    kinds = [getattr(getattr(half, "origin", None), "modality", None) for half in (image, text)]
    if kinds == ["text", "image"]:
        raise ProbeError("the halves are the wrong way round: the first holds features of captions, the second features of images. Swap them.")
    if kinds[0] == "text" or kinds[1] == "image":
        wrong, found = ("first", "captions") if kinds[0] == "text" else ("second", "images")
        raise ProbeError(f"a pair is features of an image and of text, in this order, but the {wrong} half holds features of {found}")


def require_origin(metadata: Mapping[str, Any], x: Any) -> None:
    """Raises ProbeError where a probe's file tells of which tap and recipe it was fitted, and `x` is a store's features of another one.

    Arrays, which say nothing of themselves, are not refused.
    """
    halves = [x] if not hasattr(x, "image_width") else [x.image, x.text]
    told_taps = str(metadata.get("taps" if len(halves) == 2 else "tap", "")).split(",")
    prints = metadata.get("fingerprints") if len(halves) == 2 else {"features": metadata.get("fingerprint")}
    if not isinstance(prints, Mapping) or len(told_taps) != len(halves):
        return
    names = ["image", "text"] if len(halves) == 2 else ["features"]
    for name, half, tap in zip(names, halves, told_taps, strict=True):
        origin, print_ = getattr(half, "origin", None), prints.get(name)
        if origin is None:
            continue
        differing = [f"tap {origin.tap}, not {tap}"] if tap and origin.tap != tap else []
        differing += [f"a store of recipe {origin.fingerprint[:12]}, not {str(print_)[:12]}"] if print_ and origin.fingerprint != print_ else []
        if differing:
            raise ProbeError(
                f"this probe was fitted on other {'' if name == 'features' else f'{name} '}features: these are of {' and of '.join(differing)}. "
                "Give it the tap and recipe that its metadata_ names, or np.asarray(features) to score these all the same."
            )


def _name_of(store: Any, otherwise: str) -> str:
    path = getattr(store, "path", None)
    return otherwise if path is None else str(path)


def engine_notes(train: Any, other: Any, name: str) -> list[str]:
    """A sentence where two stores of one recipe were computed otherwise: by another engine, or at another precision."""
    mine, theirs = (dict(dict(getattr(store, "manifest", {})).get("engine", {})) for store in (train, other))
    differing = [
        f"{key} {theirs[key]} there, {mine[key]} in train"
        for key in ("name", "precision")
        if key in mine and theirs.get(key) not in (None, mine[key])
    ]
    return [f"the {name} store was computed by another engine ({', '.join(differing)}): features differ by rounding"] if differing else []


def weights_notes(store: Any, name: str) -> list[str]:
    """A sentence where a store's features are those of weights drawn at random, which are for timing and for control."""
    origin = str(dict(getattr(store, "manifest", {})).get("recipe", {}).get("graph", {}).get("origin", "file"))
    return [f"the features of the {name} store are those of random weights ({origin}), not of a trained model"] if origin.startswith("random") else []


def content_groups(store: Any) -> np.ndarray | None:
    """Number of each row's image, int64 [n]; rows of one image have one number. None where no image stands in two rows.

    Images are the same where their bytes are; captions belong to one image where the source names the same one for them (two images may have the
    same caption).
    """
    if modality(store) == "text":
        named = getattr(store, "images", None) or [None] * len(store)
        keys: list[Any] = [row if name is None else name for row, name in enumerate(named)]
    else:
        keys = [row if digest is None else digest for row, digest in enumerate(_digests(store, np.arange(len(store))))]
    numbers: dict[Any, int] = {}
    groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
    return None if len(numbers) == len(groups) else groups


def _digests(store: Any, rows: np.ndarray) -> list[bytes | None]:
    """What was read for each row, as a digest; None where the store does not know."""
    inputs = getattr(store, "inputs", None)
    if inputs is None or len(inputs) != len(store) or len(rows) == 0:
        return [None] * len(rows)
    read = np.ascontiguousarray(inputs[rows], np.uint8)
    width, text = read.shape[1], read.tobytes()
    known = (read != 0).sum(axis=1).tolist()
    return [text[width * row : width * (row + 1)] if known[row] else None for row in range(len(read))]


def require_apart(
    first: FeatureStore,
    first_rows: np.ndarray,
    second: FeatureStore,
    second_rows: np.ndarray,
    names: tuple[str, str],
    *,
    allow_shared: bool = False,
) -> list[str]:
    """Raises ProbeError when samples of one split stand in the other as well: what was trained or chosen on them would be scored on them.

    The same image is one of the same bytes, whatever its id: data sets are cut from one another under other names. The same caption is one of the
    same id and tokens, because two images may have the same words. With `allow_shared` it is not refused. Returns sentences on what is shared and
    allowed, and on what may be shared and cannot be known.
    """
    mine, theirs = _digests(first, first_rows), _digests(second, second_rows)
    first_ids, second_ids = ([store.ids[row] for row in rows.tolist()] for store, rows in ((first, first_rows), (second, second_rows)))
    by_id = dict(zip(first_ids, mine, strict=True))
    by_content = dict(zip(reversed(mine), reversed(first_ids), strict=True))
    by_content.pop(None, None)
    text = modality(first) == "text"
    same, words, reused = [], 0, 0
    for id_, digest in zip(second_ids, theirs, strict=True):
        if id_ in by_id and by_id[id_] == digest:
            same.append((id_, id_))
        elif digest in by_content and not text:
            same.append((by_content[digest], id_))
        else:
            words += digest in by_content
            reused += id_ in by_id
    if same and not allow_shared:
        raise ProbeError(
            f"{_shared(same, names)}: scores on them would flatter. Extract the {names[1]} store from samples that the {names[0]} store does not "
            "have, or go on with --allow-shared (from Python, allow_shared=True), which the result records."
        )
    notes = [f"{_shared(same, names)}: scores on them flatter, and were allowed"] if same else []
    if words:
        notes.append(f"{words} captions of the {names[1]} split stand in the {names[0]} split as well, for other samples")
    if reused and not text:
        notes.append(
            f"{reused} ids of the {names[1]} split stand in the {names[0]} split as well, with other bytes: see that they are other images, for the "
            "same picture encoded anew cannot be told from another one"
        )
    return notes


def _shared(same: Sequence[tuple[str, str]], names: tuple[str, str]) -> str:
    renamed = [pair for pair in same if pair[0] != pair[1]]
    examples = [f"{id_!r} (same id, same content)" for id_, _ in [pair for pair in same if pair[0] == pair[1]][:1]]
    examples += [f"{id_!r}, which is {other!r} in {names[0]} (same content)" for other, id_ in renamed[: _EXAMPLES - len(examples)]]
    return f"{len(same)} samples of the {names[1]} split are in the {names[0]} split as well, for example {'; '.join(examples)}"


def left_out(store: FeatureStore) -> dict[str, int]:
    """How many rows of a store cannot be used, by reason; each row counts once."""
    valid, labelled = np.asarray(store.valid), np.asarray(store.labelled)
    return {"in quarantine": int((~valid).sum()), "whose labels are unknown": int((valid & ~labelled).sum())}


def told(dropped: dict[str, int]) -> str:
    """The counts in words; empty where nothing was left out."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)


def _few(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
