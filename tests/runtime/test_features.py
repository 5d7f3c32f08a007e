"""Features behave like the array that was stored, and read only what is looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.errors import ConfigError
from difffeat.runtime.store import Store
from tests.runtime.fake import tree
from tests.runtime.stores import make_store
from tests.runtime.test_store import WHOLE, write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("store") / "store")


KEYS: list[Any] = [
    0, -1, 5, np.int64(7), slice(None), slice(2, 9), slice(9, 2, -2), slice(0, 0), [1, 10, 3, 3], np.array([4, 0]), np.arange(11) % 3 == 0,
    (3, 1), (slice(3, 6), 1), ([8, 2], slice(0, 1)), (slice(None), slice(1, 2)), [], np.array(3), ..., (..., 0), (), [-1, -11], (5, ...),
    ([0, 9], [1, 0]), ([[0, 1], [10, 3]],), np.array([[4], [7]]), ([[4], [7]], [0, 1]), ([0, 9, 5], 1), (slice(None), [1, 0]), ([3, 8], ..., 0),
    np.uint8(4), [True, False] * 5 + [True],
]  # fmt: skip


@pytest.mark.parametrize("tap", WHOLE)
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_features_are_indexed_like_an_array(finished: Path, tap: str, key: Any) -> None:
    np.testing.assert_array_equal(Store.open(finished)[tap][key], WHOLE[tap][key])


@pytest.mark.parametrize("tap", WHOLE)
def test_a_mask_over_all_axes_is_taken_as_in_an_array(finished: Path, tap: str) -> None:
    np.testing.assert_array_equal(Store.open(finished)[tap][WHOLE[tap] % 3 == 0], WHOLE[tap][WHOLE[tap] % 3 == 0])


@pytest.mark.parametrize("row", [11, -12])
@pytest.mark.parametrize("form", [int, lambda row: [0, row], lambda row: np.array([[row]])])
def test_rows_outside_are_an_index_error(finished: Path, row: int, form: Callable[[int], Any]) -> None:
    with pytest.raises(IndexError, match=f"row {row} of 11"):
        _ = Store.open(finished)["b1/t30"][form(row)]


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (None, ConfigError, "not None and not a single True or False"),
        (True, ConfigError, "not None and not a single True or False"),
        ("b1/t30", ConfigError, "rows must be whole numbers, a slice or a mask; got <U6"),
        ([0.5], ConfigError, "rows must be whole numbers, a slice or a mask; got float64"),
        ([[0], [1, 2]], ConfigError, "these lists differ in length"),
        (np.ones(3, bool), IndexError, r"a mask of shape \[3\] does not fit features of shape \[11, 3\]"),
        ((0, 0, 0), IndexError, r"3 indices for features of shape \[11, 3\]"),
    ],
    ids=str,
)
def test_what_is_no_index_is_told(finished: Path, key: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _ = Store.open(finished)["b1/t30"][key]


def test_chunks_cover_all_rows_in_order(finished: Path) -> None:
    chunks = list(Store.open(finished)["b1/t30"].chunks(3))
    assert [start for start, _ in chunks] == [0, 3, 4, 7, 8]
    np.testing.assert_array_equal(np.concatenate([chunk for _, chunk in chunks]), WHOLE["b1/t30"])


def test_torch_sees_the_same_numbers(finished: Path) -> None:
    np.testing.assert_array_equal(Store.open(finished)["b2/t30"].torch().numpy(), WHOLE["b2/t30"])


def test_torch_reads_a_single_shard_where_it_lies_and_writes_nothing_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    given: list[np.ndarray] = []
    original = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: given.append(array) or original(array))
    store = make_store(tmp_path / "store", {"b1/t30": WHOLE["b1/t30"]}, shard=11)
    before = tree(tmp_path / "store")
    tensor = store["b1/t30"].torch()
    assert isinstance(given[0], np.memmap)
    np.testing.assert_array_equal(tensor.numpy(), WHOLE["b1/t30"])
    tensor += 1
    assert tree(tmp_path / "store") == before


def test_shards_are_mapped_read_only_and_copies_are_asked_for(finished: Path) -> None:
    features = Store.open(finished)["b1/t30"]
    part = next(iter(features.chunks()))[1]
    with pytest.raises(ValueError, match="read-only"):
        part[0] = 1
    with pytest.raises(ValueError, match="cannot be an array without a copy"):
        np.array(features, copy=False)
