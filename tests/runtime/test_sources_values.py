"""Lists, numbers, truth and nothing are read as what they are, however data frames, arrays and spreadsheets spell them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difffeat.errors import SampleError
from difffeat.runtime.sources_values import bit, is_null, text_list, whole


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("['cat', 'dog']", ["cat", "dog"]),
        ('["cat", "dog"]', ["cat", "dog"]), ("['cat' 'dog']", ["cat", "dog"]), ("['cat'\n 'dog']", ["cat", "dog"]),
        ("('cat',)", ["cat"]), ("{'cat', 'dog'}", ["cat", "dog"]), ("[cat, sea lion]", ["cat", "sea lion"]), ("[sea lion]", ["sea lion"]),
        ("array(['cat', 'dog'], dtype='<U3')", ["cat", "dog"]), ("array([1, 0], dtype=int64)", [1, 0]), ("[np.int64(3), np.str_('cat')]", [3, "cat"]),
        ("[3 0 7]", [3, 0, 7]), ("[0 1\n 2]", [0, 1, 2]), ("[0. 1. 1.]", [0, 1, 1]), ("[True False]", [True, False]), ("[nan, 'a']", [None, "a"]),
        ("[]", []), ("[None]", [None]), ("['it\\'s' \"a, b\"]", ["it's", "a, b"]), (" [ 3  0] ", [3, 0]),
        ("set()", []), ("frozenset()", []), ("frozenset({'cat'})", ["cat"]),
    ],
)  # fmt: skip
def test_a_text_that_spells_a_list_is_that_list(text: str, parts: list[Any]) -> None:
    assert text_list(text) == parts


@pytest.mark.parametrize("text", ["cat", "(unknown)", "{cat}", "(a, b)", "['unclosed]", "", "[", "a [b]", "[a] b"])
def test_a_text_that_only_looks_like_a_list_is_a_text(text: str) -> None:
    assert text_list(text) is None


@pytest.mark.parametrize(("text", "parts"), [("['a', 'b']", ["a", "b"]), ("[a b]", None), ("[1, 2]", None), ("[]", []), ("set()", None)])
def test_captions_are_only_lists_of_quoted_texts(text: str, parts: list[str] | None) -> None:
    assert text_list(text, strict=True) == parts


@pytest.mark.parametrize(
    ("text", "message"), [("[0 1 ... 1 0]", "was cut short where it was printed"), ("{'cat': 1}", "a mapping stands where a list")]
)
def test_what_lost_its_content_is_refused(text: str, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        text_list(text)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1)))
def test_what_python_writes_of_texts_is_read_back(parts: list[str]) -> None:
    assert text_list(repr(parts)) == parts
    assert text_list(repr(parts), strict=True) == parts


@given(st.text())
def test_any_text_is_a_list_a_text_or_a_typed_error(text: str) -> None:
    try:
        found = text_list(f"[{text}]")
    except SampleError:
        return
    assert found is None or isinstance(found, list)


@pytest.mark.parametrize("value", [None, "", "  ", "nan", "NaN", "None", "NULL", "null", "NA", "<NA>", "N/A", "#N/A", float("nan"), Decimal("nan")])
def test_nothing_is_nothing_in_every_spelling(value: Any) -> None:
    assert is_null(value)
    assert bit(value) == -1


@pytest.mark.parametrize("value", ["none", "0", 0, False, "nano", [], "na"])
def test_what_may_be_something_is_kept(value: Any) -> None:
    assert not is_null(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", 1),
        ("1.0", 1),
        (1.0, 1),
        (True, 1),
        ("TRUE", 1),
        ("true", 1),
        ("0.0", 0),
        ("False", 0),
        (0, 0),
        ("-1.0", -1),
        (-1, -1),
        ("2", None),
        (0.5, None),
    ],
)
def test_bits_are_read_in_every_spelling(value: Any, expected: int | None) -> None:
    assert bit(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [("3.0", "3"), (3.0, 3), ("3.5", "3.5"), (3.5, 3.5), ("v1.0", "v1.0"), ("tRue", "tRue"), ("TRUE", "True")]
)
def test_numbers_without_a_fraction_are_whole(value: Any, expected: Any) -> None:
    assert whole(value) == expected
