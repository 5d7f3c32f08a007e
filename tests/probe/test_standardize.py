"""Standardisation gathers moments in pieces and does not stumble over constant dimensions."""

from __future__ import annotations

import re

import numpy as np
import pytest

from difffeat.errors import ProbeError
from difffeat.probe import data
from difffeat.probe.standardize import Standardizer, moments


def test_moments_in_pieces_are_the_moments_of_the_whole(monkeypatch: pytest.MonkeyPatch, read_in_pieces: type) -> None:
    monkeypatch.setattr(data, "CHUNK_BYTES", 4 * 5 * 7)
    x = np.random.default_rng(0).normal(1000, 0.5, (103, 5)).astype(np.float32)
    held = read_in_pieces(x)
    mean, variance = moments(held)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(variance, x.astype(np.float64).var(axis=0), rtol=1e-10)
    assert held.largest == 7


def test_standardised_features_have_mean_0_and_deviation_1() -> None:
    x = np.random.default_rng(0).normal(3, 20, (500, 4)).astype(np.float16)
    z = Standardizer.fit(x).transform(x)
    assert z.dtype == np.float32
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5, 1e-20])
def test_a_constant_dimension_becomes_0(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(data, "CHUNK_BYTES", 4 * 2 * 3)
    x = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    x[:, 1] = value
    fitted = Standardizer.fit(x)
    assert fitted.scale[1] == 1
    np.testing.assert_allclose(fitted.transform(x)[:, 1], 0, atol=1e-6)


def test_only_the_selected_rows_count() -> None:
    x = np.array([[1.0], [3.0], [1e6]], np.float32)
    assert Standardizer.fit(x, np.array([0, 1])).mean[0] == 2


def test_folding_gives_the_same_scores_from_raw_features(make_problem) -> None:
    x = make_problem().x
    fitted, rng = Standardizer.fit(x), np.random.default_rng(0)
    weights, bias = rng.normal(size=(12, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    matrix, shifted = fitted.fold(weights, bias)
    np.testing.assert_allclose(x.astype(np.float64) @ matrix + shifted, fitted.transform(x) @ weights + bias, atol=1e-4)


def test_features_that_are_not_finite_are_named_by_row() -> None:
    x = np.zeros((10, 3), np.float32)
    x[7, 1] = np.nan
    with pytest.raises(ProbeError, match=r"the features of row 7 hold NaN or infinity\. Leave out the rows where store\.valid is False"):
        Standardizer.fit(x)
    with pytest.raises(ProbeError, match="row 7"):
        Standardizer.fit(x, np.array([2, 7]))
    Standardizer.fit(x, np.array([2, 3]))


@pytest.mark.parametrize(
    ("x", "rows", "message"),
    [
        (np.zeros((2, 3, 4)), None, "a probe needs features [n, D], got shape [2, 3, 4]. Extract with --pooling mean, max or grid."),
        (np.zeros((0, 4)), None, "there are no features to read: shape [0, 4]"),
        (np.zeros((4, 4)), np.array([4]), "row 4 was asked for, but there are 4 rows of features"),
        (np.zeros((4, 4)), np.ones(4, bool), "rows must be a list of row numbers, got bool of shape [4]"),
        (np.zeros((4, 4)), np.array([], int), "no rows were selected"),
    ],
)
def test_unreadable_features_are_refused(x: np.ndarray, rows: np.ndarray | None, message: str) -> None:
    with pytest.raises(ProbeError, match=re.escape(message)):
        Standardizer.fit(x, rows)


def test_another_width_is_refused() -> None:
    fitted = Standardizer.fit(np.random.default_rng(0).normal(size=(5, 3)))
    with pytest.raises(ProbeError, match=r"fitted on 3 dimensions, these features have shape \[5, 4\]"):
        fitted.transform(np.zeros((5, 4), np.float32))
