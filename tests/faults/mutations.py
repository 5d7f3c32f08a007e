"""Valid documents, spoiled a little: what a parser is most easily fooled by."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**70, 10**400, -(2**70), 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "\x00", "0", "-1", "none", "../../x", "/dev/zero", "é" * 50, "\ud800", "a" * 5000,
    [], {}, [[]], [{}], {"": None}, [1, 2, 3], ["a"], {"a": {"b": []}}, [[[[[[[[[[]]]]]]]]]],
]  # fmt: skip


def paths(document: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a JSON document."""
    inside = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    return [here, *(path for key, value in inside for path in paths(value, (*here, key)))]


@st.composite
def spoiled_json(draw: st.DrawFn, document: Any) -> bytes:
    """The document with one to three of its values replaced, removed, repeated, renamed or moved."""
    spoiled = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(spoiled)))
        spoiled = _spoil(draw, spoiled, path)
    return json.dumps(spoiled).encode()


def _spoil(draw: st.DrawFn, document: Any, path: tuple[Any, ...]) -> Any:
    if not path:
        return copy.deepcopy(draw(st.sampled_from([[document], {"": document}, *NASTY])))
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "move"]))
    if kind == "replace":
        parent[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    elif kind == "remove":
        del parent[key]
    elif kind == "wrap":
        parent[key] = [parent[key]]
    elif isinstance(parent, dict):
        parent[draw(st.sampled_from([f"{key}_", "", *parent]))] = parent.pop(key)
    else:
        parent.append(parent[key])
    return document


@st.composite
def spoiled_bytes(draw: st.DrawFn, content: bytes, most: int = 4) -> bytes:
    """The bytes with a few of them flipped, removed, inserted, repeated or cut off."""
    spoiled = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, max(0, len(spoiled) - 1)))
        kind = draw(st.sampled_from(["flip", "flip", "set", "insert", "remove", "repeat", "cut", "zero"]))
        length = draw(st.integers(1, 16))
        if kind == "flip" and spoiled:
            spoiled[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and spoiled:
            spoiled[place] = draw(st.integers(0, 255))
        elif kind == "insert":
            spoiled[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "remove":
            del spoiled[place : place + length]
        elif kind == "repeat":
            spoiled[place:place] = spoiled[place : place + length]
        elif kind == "cut":
            del spoiled[place:]
        else:
            spoiled[place : place + length] = bytes(min(length, len(spoiled) - place))
    return bytes(spoiled)
