"""Two stores are compared as NumPy would do it at once, whatever their order, and CKA is what Kornblith et al. say it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.errors import ConfigError
from difffeat.runtime import compare as module
from difffeat.runtime.compare import Moments, TapDifference, compare_stores
from tests.runtime.stores import make_store

RNG = np.random.default_rng(3)
COUNT, WIDTH = 23, 6
X = RNG.standard_normal((COUNT, WIDTH)).astype(np.float32) + np.float32(2)
Y = (X + 0.3 * RNG.standard_normal((COUNT, WIDTH))).astype(np.float32)
IDS = [f"s{row}" for row in range(COUNT)]


def tap_of(a: Path, b: Path, **options: Any) -> TapDifference:
    (only,) = compare_stores(a, b, **options).taps
    return only


def pair(tmp_path: Path, x: np.ndarray, y: np.ndarray) -> TapDifference:
    make_store(tmp_path / "a", {"b1/t30": x})
    make_store(tmp_path / "b", {"b1/t30": y}, shard=5)
    return tap_of(tmp_path / "a", tmp_path / "b")


def reference_cka(x: np.ndarray, y: np.ndarray) -> float:
    """By Gram matrices [n, n], with HSIC: the other way round than the code under test."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, other = (centre @ (values @ values.T) @ centre for values in (x.astype(np.float64), y.astype(np.float64)))
    return float((k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum()))


@pytest.mark.parametrize("block_bytes", [1, 500, 1 << 20])
def test_every_number_is_numpys(block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    found = pair(tmp_path, X, Y)
    x, y = X.astype(np.float64), Y.astype(np.float64)
    norm_x, norm_y = np.sqrt((x * x).sum(1)), np.sqrt((y * y).sum(1))
    cosine = (x * y).sum(1) / (norm_x * norm_y)
    assert found.rows == COUNT
    assert found.norm_a == pytest.approx(norm_x.mean(), rel=1e-12)
    assert found.norm_b == pytest.approx(norm_y.mean(), rel=1e-12)
    assert found.norm_ratio == pytest.approx(norm_y.mean() / norm_x.mean(), rel=1e-12)
    assert found.relative_l2 == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert found.max_difference == pytest.approx(np.abs(x - y).max(), rel=1e-12)
    assert found.cosine is not None
    assert found.cosine["mean"] == pytest.approx(cosine.mean(), rel=1e-12)
    assert (found.cosine["min"], found.cosine["worst"]) == (pytest.approx(cosine.min(), rel=1e-12), IDS[int(cosine.argmin())])
    for percent in (1, 5, 50):
        assert found.cosine[f"p{percent}"] == pytest.approx(np.percentile(cosine, percent), rel=1e-12)
    assert found.cka == pytest.approx(reference_cka(X, Y), rel=1e-9)
    assert 0.5 < reference_cka(X, Y) < 0.999


def test_a_store_against_itself_differs_in_nothing(tmp_path: Path) -> None:
    found = pair(tmp_path, X, X)
    assert (found.relative_l2, found.max_difference, found.norm_ratio) == (0.0, 0.0, 1.0)
    assert found.cka == pytest.approx(1, abs=1e-12)
    assert found.cosine is not None
    assert found.cosine["min"] == pytest.approx(1, abs=1e-12)


def test_cka_does_not_see_rotation_scale_or_shift(tmp_path: Path) -> None:
    rotation = np.linalg.qr(RNG.standard_normal((WIDTH, WIDTH)))[0]
    usual = pair(tmp_path / "usual", X, Y)
    turned = pair(tmp_path / "turned", X, (37 * Y @ rotation + 5).astype(np.float32))
    assert turned.cka == pytest.approx(usual.cka, abs=1e-5)
    assert turned.relative_l2 is not None
    assert usual.relative_l2 is not None
    assert turned.relative_l2 > 10 * usual.relative_l2


def test_cka_tells_unrelated_features_from_related_ones() -> None:
    rng = np.random.default_rng(0)
    x, unrelated = (rng.standard_normal((400, 4)) for _ in range(2))
    moments = Moments(4, 4)
    for start in range(0, 400, 64):
        moments.add(x[start : start + 64], unrelated[start : start + 64])
    cka = moments.cka()
    assert cka == pytest.approx(reference_cka(x, unrelated), rel=1e-9)
    assert cka is not None
    assert cka < 0.05


def test_a_large_offset_costs_no_precision() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1000, 3)), rng.standard_normal((1000, 3))
    y[:, 0] += x[:, 0]
    plain, shifted = Moments(3, 3), Moments(3, 3)
    for start in range(0, 1000, 7):
        plain.add(x[start : start + 7], y[start : start + 7])
        shifted.add(x[start : start + 7] + 1e6, y[start : start + 7] - 1e6)
    assert shifted.cka() == pytest.approx(plain.cka(), rel=1e-6)


def test_order_and_shards_change_nothing_after_the_join(tmp_path: Path) -> None:
    order = RNG.permutation(COUNT)
    make_store(tmp_path / "a", {"b1/t30": X})
    make_store(tmp_path / "b", {"b1/t30": Y})
    make_store(tmp_path / "shuffled", {"b1/t30": Y[order]}, ids=[IDS[row] for row in order], shard=7)
    assert tap_of(tmp_path / "a", tmp_path / "shuffled") == tap_of(tmp_path / "a", tmp_path / "b")


def test_widths_may_differ_and_leave_norms_and_cka(tmp_path: Path) -> None:
    wide = np.concatenate([Y, Y], axis=1)
    found = pair(tmp_path, X, wide)
    assert (found.shape_a, found.shape_b) == ((6,), (12,))
    assert (found.cosine, found.relative_l2, found.max_difference) == (None, None, None)
    assert found.cka == pytest.approx(reference_cka(X, wide), rel=1e-9)
    assert found.norm_ratio == pytest.approx(np.linalg.norm(wide, axis=1).mean() / np.linalg.norm(X, axis=1).mean(), rel=1e-6)


def test_ids_of_one_store_only_and_quarantined_ones_are_left_out_and_named(tmp_path: Path) -> None:
    make_store(tmp_path / "a", {"b1/t30": X[:20]}, ids=IDS[:20], bad=[4])
    make_store(tmp_path / "b", {"b1/t30": Y[3:]}, ids=IDS[3:], bad=[6])
    found = compare_stores(tmp_path / "a", tmp_path / "b")
    assert found.joined.only_a == ("s0", "s1", "s2")
    assert found.joined.only_b == ("s20", "s21", "s22")
    assert found.joined.set_aside == ("s4", "s9")
    kept = [row for row in range(3, 20) if row not in (4, 9)]
    assert found.taps[0].rows == len(kept)
    assert found.taps[0].cka == pytest.approx(reference_cka(X[kept], Y[kept]), rel=1e-9)


def test_taps_in_common_are_compared_and_others_named_or_paired(tmp_path: Path) -> None:
    make_store(tmp_path / "a", {"b1/t30": X, "b2/t30": Y})
    make_store(tmp_path / "b", {"b1/t30": X, "b9/t30": Y})
    found = compare_stores(tmp_path / "a", tmp_path / "b")
    assert [tap.tap_a for tap in found.taps] == ["b1/t30"]
    assert (found.taps_only_a, found.taps_only_b) == (("b2/t30",), ("b9/t30",))
    paired = tap_of(tmp_path / "a", tmp_path / "b", taps=["b2/t30=b9/t30"])
    assert (paired.tap_a, paired.tap_b, paired.relative_l2) == ("b2/t30", "b9/t30", 0.0)


def test_differences_of_the_recipe_are_told_field_by_field(tmp_path: Path) -> None:
    make_store(tmp_path / "a", {"b1/t30": X})
    make_store(tmp_path / "b", {"b1/t30": X}, label=3)
    assert compare_stores(tmp_path / "a", tmp_path / "b").recipe == ("recipe.graph.label: None -> 3",)
    assert compare_stores(tmp_path / "a", tmp_path / "a").recipe == ()


def test_features_that_do_not_vary_have_no_cka_and_zeros_no_cosine(tmp_path: Path) -> None:
    constant = np.full((COUNT, WIDTH), 0.1, np.float32)
    found = pair(tmp_path / "constant", X, constant)
    assert (found.cka, found.note) == (None, "no CKA: one side does not vary")
    zero = pair(tmp_path / "zero", np.zeros_like(X), X)
    assert (zero.cosine, zero.relative_l2, zero.norm_ratio) == (None, None, None)
    some = X.copy()
    some[5] = 0
    partly = pair(tmp_path / "some", some, X)
    assert partly.cosine is not None
    assert partly.cosine["zero_rows"] == 1
    assert np.isfinite(partly.cosine["mean"])


def test_too_wide_a_tap_has_no_cka_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CKA_WIDTH", 5)
    found = pair(tmp_path, X, Y)
    assert found.cka is None
    assert found.note == "no CKA: a row has 6 numbers, more than 5; export with --pooling mean or max"


def test_nothing_in_common_is_an_error_that_shows_a_way(tmp_path: Path) -> None:
    make_store(tmp_path / "a", {"b1/t30": X})
    make_store(tmp_path / "b", {"b2/t30": X})
    make_store(tmp_path / "c", {"b1/t30": X}, ids=[f"other{row}" for row in range(COUNT)])
    with pytest.raises(ConfigError, match=r"no tap in common. Name a pair: --taps b1/t30=b2/t30"):
        compare_stores(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConfigError, match=r"share no sample id: one begins with 's0', the other with 'other0'"):
        compare_stores(tmp_path / "a", tmp_path / "c")
    with pytest.raises(ConfigError, match=r"a has no tap 'b7/t30'; it has b1/t30"):
        compare_stores(tmp_path / "a", tmp_path / "a", taps=["b7/t30"])


def test_where_no_sample_is_good_in_both_nothing_is_said_to_be_equal(tmp_path: Path) -> None:
    make_store(tmp_path / "a", {"b1/t30": X[:6]}, ids=IDS[:6], bad=[0, 1, 2])
    make_store(tmp_path / "b", {"b1/t30": Y[:6]}, ids=IDS[:6], bad=[3, 4, 5])
    with pytest.raises(
        ConfigError, match=r"of the 6 samples that .*a and .*b share, each is in quarantine in one of them: nothing can be compared\."
    ):
        compare_stores(tmp_path / "a", tmp_path / "b")
