"""What the parity check counts as equal, on arrays small enough to do by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from difffeat.engines.parity import TOLERANCE, ParityReport, TapParity, compare
from difffeat.errors import ParityError

GOOD = TapParity(relative_l2=1e-7, cosine=1.0, max_abs=1e-6, nonfinite=0)
BAD = TapParity(relative_l2=0.25, cosine=0.9, max_abs=1.0, nonfinite=0)


def report(**taps: TapParity) -> ParityReport:
    return ParityReport("ort", "cpu", "fp32", TOLERANCE, 3, taps)


def test_equal_arrays_are_equal() -> None:
    x = np.array([[3.0, 4.0], [1.0, 0.0]], np.float32)
    assert compare(x, x) == TapParity(0.0, 1.0, 0.0, 0)


def test_the_worst_sample_decides() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 2.0]])
    found = np.array([[3.0, 4.0], [1.0, 2.0]])
    parity = compare(found, reference)
    assert parity.relative_l2 == pytest.approx(1 / 2)
    assert parity.cosine == pytest.approx(2 / math.sqrt(5))
    assert parity.max_abs == 1.0


def test_one_bad_sample_among_many_is_not_averaged_away() -> None:
    reference = np.ones((1000, 4))
    found = reference.copy()
    found[500] *= 1.01
    assert compare(found, reference).relative_l2 == pytest.approx(0.01)


def test_features_of_several_axes_are_compared_by_sample() -> None:
    reference = np.arange(1, 25, dtype=np.float32).reshape(2, 3, 4)
    found = reference.copy()
    found[0, 2, 3] += 1
    assert compare(found, reference).relative_l2 == pytest.approx(1 / np.linalg.norm(reference[0]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    reference = np.ones((2, 3), np.float32)
    found = reference.copy()
    found[1, 2] = value
    parity = compare(found, reference)
    assert parity.nonfinite == 1
    assert not parity.within(math.inf)
    assert math.isfinite(parity.relative_l2)


def test_a_reference_that_is_not_finite_never_passes() -> None:
    assert not compare(np.ones((1, 2)), np.array([[1.0, np.nan]])).within(1.0)


def test_the_difference_of_large_floats_is_taken_in_float64() -> None:
    reference = np.full((1, 4), 3e38, np.float32)
    assert compare(-reference, reference).relative_l2 == pytest.approx(2.0)


def test_zero_features_equal_zero_features_and_nothing_else() -> None:
    zero = np.zeros((1, 3))
    assert compare(zero, zero).within(TOLERANCE)
    assert not compare(np.full((1, 3), 1e-3), zero).within(TOLERANCE)


def test_other_shapes_are_told() -> None:
    with pytest.raises(ParityError, match=r"the engine gave shape \[2, 3\], the reference \[2, 4\]"):
        compare(np.zeros((2, 3)), np.zeros((2, 4)))


def test_a_report_within_tolerance_asks_for_nothing() -> None:
    fine = report(**{"b1/t0": GOOD})
    fine.require()
    assert fine.passed
    assert json.loads(json.dumps(fine.to_dict()))["taps"]["b1/t0"]["relative_l2"] == 1e-7


def test_a_report_names_the_first_bad_tap_and_how_many_there_are() -> None:
    failed = report(**{"b1/t0": GOOD, "b2/t0": BAD, "b3/t0": BAD})
    assert not failed.passed
    assert failed.to_dict()["passed"] is False
    with pytest.raises(ParityError) as caught:
        failed.require()
    assert str(caught.value) == (
        "2 of 3 taps are beyond the tolerance 1e-05 against the unfolded fp32 torch module; the first is b2/t0: relative L2 2.50e-01, "
        "cosine 0.900000, "
        "0 non-finite values. The artifact is not usable; please report it with the versions that difffeat inspect prints."
    )


def test_the_tolerance_itself_is_within_tolerance() -> None:
    assert TapParity(TOLERANCE, 1.0, 0.0, 0).within(TOLERANCE)
    assert not TapParity(math.nextafter(TOLERANCE, 1), 1.0, 0.0, 0).within(TOLERANCE)
