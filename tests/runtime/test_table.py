"""The samples table's digests are those of its rows one by one, however they are computed."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difffeat.runtime.blobs import BytesBlob
from difffeat.runtime.samples import Sample
from difffeat.runtime.table import COLUMNS, renamed, row_digests, sample_columns

TEXT = st.text(st.characters(codec="utf-8"))
STRINGS = st.lists(TEXT, max_size=3)
ROW = st.tuples(TEXT, st.none() | TEXT, st.integers(0, 2**62), STRINGS, st.none() | STRINGS)


@given(st.lists(ROW, max_size=6))
def test_a_row_digest_is_that_of_the_rows_json(rows: list[tuple[object, ...]]) -> None:
    columns = {name: [row[place] for row in rows] for place, name in enumerate(COLUMNS)}
    expected = [hashlib.sha256(json.dumps(list(row), separators=(",", ":")).encode()).digest() for row in rows]
    assert row_digests(columns) == expected


def image(identity: str, place: str | None, size: int = 1, caption: str = "a cat") -> Sample:
    return Sample(identity, None if place is None else BytesBlob(b"x" * size), place, (caption,), ("cat",))


STORED = [image("0", "a.tar/0.png"), image("1", "a.tar/1.png", 2)]


@pytest.mark.parametrize(
    ("listed", "pairs"),
    [
        ([image("a/0", "a.tar/0.png"), image("b/0", "b.tar/0.png"), image("a/1", "a.tar/1.png", 2)], [(0, 0), (1, 2)]),
        ([image("0", "a.tar/0.png"), image("a/1", "a.tar/1.png", 2)], [(1, 1)]),
        ([*STORED, image("b/0", "b.tar/0.png")], []),
        ([image("0", "a.tar/0.png"), image("copy", "a.tar/0.png")], []),
        ([image("a/0", "a.tar/0.png"), image("a/1", "a.tar/1.png", 3)], []),
        ([image("c0", "a.tar/0.png", caption="another caption")], []),
        ([image("c0", None)], []),
    ],
    ids=["renamed", "one of two", "kept", "a second of it", "other bytes", "another caption", "no image"],
)
def test_samples_that_only_their_ids_make_new_are_found(listed: list[Sample], pairs: list[tuple[int, int]]) -> None:
    assert renamed(sample_columns(STORED), sample_columns(listed)) == pairs
