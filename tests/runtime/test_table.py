"""The samples table's digests are those of its rows one by one, however they are computed."""

from __future__ import annotations

import hashlib
import json

from hypothesis import given
from hypothesis import strategies as st

from difffeat.runtime.table import COLUMNS, row_digests

TEXT = st.text(st.characters(codec="utf-8"))
STRINGS = st.lists(TEXT, max_size=3)
ROW = st.tuples(TEXT, st.none() | TEXT, st.integers(0, 2**62), STRINGS, st.none() | STRINGS)


@given(st.lists(ROW, max_size=6))
def test_a_row_digest_is_that_of_the_rows_json(rows: list[tuple[object, ...]]) -> None:
    columns = {name: [row[place] for row in rows] for place, name in enumerate(COLUMNS)}
    expected = [hashlib.sha256(json.dumps(list(row), separators=(",", ":")).encode()).digest() for row in rows]
    assert row_digests(columns) == expected
