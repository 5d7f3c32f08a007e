"""The samples table's digests are those of its rows one by one, however they are computed."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difffeat.runtime.blobs import BytesBlob, UrlBlob
from difffeat.runtime.samples import Sample
from difffeat.runtime.table import COLUMNS, renamed, row_digests, sample_columns

TEXT = st.text(st.characters(codec="utf-8"))
STRINGS = st.lists(TEXT, max_size=3)
ROW = st.tuples(TEXT, st.none() | TEXT, st.integers(0, 2**62), STRINGS, st.none() | STRINGS, STRINGS)


@given(st.lists(ROW, max_size=6))
def test_a_row_digest_is_that_of_the_rows_json(rows: list[tuple[object, ...]]) -> None:
    columns = {name: [row[place] for row in rows] for place, name in enumerate(COLUMNS)}
    written = [list(row) if row[-1] else list(row[:-1]) for row in rows]  # without unknown classes a row is what it was before there were any
    expected = [hashlib.sha256(json.dumps(row, separators=(",", ":")).encode()).digest() for row in written]
    assert row_digests(columns) == expected


def image(identity: str, place: str | None, size: int = 1, caption: str = "a cat") -> Sample:
    return Sample(identity, None if place is None else BytesBlob(b"x" * size), place, (caption,), ("cat",))


STORED = [image("0", "a.tar/0.png"), image("1", "a.tar/1.png", 2)]


@pytest.mark.parametrize(
    ("listed", "pairs"),
    [
        ([image("a/0", "a.tar/0.png"), image("b/0", "b.tar/0.png"), image("a/1", "a.tar/1.png", 2)], [(0, 2), (1, 4)]),
        ([image("0", "a.tar/0.png"), image("a/1", "a.tar/1.png", 2)], [(1, 2)]),
        ([*STORED, image("b/0", "b.tar/0.png")], []),
        ([image("0", "a.tar/0.png"), image("copy", "a.tar/0.png")], []),
        ([image("a/0", "a.tar/0.png"), image("a/1", "a.tar/1.png", 3)], [(0, 2)]),
        ([image("c0", "a.tar/0.png", caption="another caption")], []),
        ([image("c0", None)], []),
    ],
    ids=["renamed", "one of two", "kept", "a second of it", "one of other bytes", "another caption", "no image"],
)
def test_samples_that_only_their_ids_make_new_are_found(listed: list[Sample], pairs: list[tuple[int, int]]) -> None:
    place = {sample.id: index for index, sample in enumerate(listed)}
    new = [sample for sample in listed if sample.id not in {old.id for old in STORED}]
    places = [*(place.get(sample.id) for sample in STORED), *(place[sample.id] for sample in new)]
    assert renamed(sample_columns([*STORED, *new]), len(STORED), places) == pairs


def test_names_without_a_size_say_nothing() -> None:
    stored, new = ([Sample(name, UrlBlob("http://host/0.png"), "http://host/0.png")] for name in ("a", "b"))
    assert renamed(sample_columns([*stored, *new]), 1, [None, 0]) == []
