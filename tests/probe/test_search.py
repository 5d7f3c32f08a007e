"""The searches find what they promise to find, count what they spend, and say what the assumption cost."""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.search import Grid, check_unimodal, grid_search, halving, is_unimodal, local_search
from difffeat.recipe import parse_tap, tap_name

IMAGE = Grid((0, 2, 4, 6, 8), (0, 10, 30, 100))
TEXT = Grid((1, 2, 3), (0, 0.05, 0.1))


def _image(block: int, t: float) -> float:
    return 0.6 - 0.01 * (block - 4) ** 2 - 0.0001 * abs(t - 30)


def _text(block: int, t: float) -> float:
    return 0.5 - 0.02 * abs(block - 2) - t


def _pair(image_tap: str, text_tap: str) -> float:
    """Fused, the best image block is one step past the image's own peak."""
    (block, t), text = parse_tap(image_tap), parse_tap(text_tap)
    return _image(block - 2, t) + _text(*text)


def test_local_search_evaluates_each_tap_once_and_then_only_pairs_around_the_peaks() -> None:
    found = local_search(_image, _text, _pair, image_grid=IMAGE, text_grid=TEXT)
    kinds = [evaluation.kind for evaluation in found.trace]
    assert kinds == ["image"] * 20 + ["text"] * 9 + ["pair"] * (9 * 6)
    assert found.counts == {"image": 20, "text": 9, "pair": 54, "total": 83}
    assert [evaluation.order for evaluation in found.trace] == list(range(83))
    image_taps = {evaluation.taps[0] for evaluation in found.trace if evaluation.kind == "pair"}
    assert image_taps == {tap_name(block, t) for block in (2, 4, 6) for t in (10, 30, 100)}
    assert (found.image_tap, found.text_tap) == ("b6/t30", "b2/t0")
    assert found.value == pytest.approx(1.1)
    assert found.surfaces["image"][2, 2] == _image(4, 30)


def test_regret_is_0_where_the_neighbourhood_holds_the_best_pair() -> None:
    everything = grid_search(_pair, image_grid=IMAGE, text_grid=TEXT)
    assert everything.counts["total"] == 20 * 9
    assert (everything.regret, everything.exhaustive_best) == (0, ("b6/t30", "b2/t0"))
    found = local_search(_image, _text, _pair, image_grid=IMAGE, text_grid=TEXT, exhaustive=everything.pairs)
    assert (found.regret, found.exhaustive_best) == (0, ("b6/t30", "b2/t0"))


def test_regret_is_what_a_best_pair_far_from_both_peaks_is_worth() -> None:
    def deceptive(image_tap: str, text_tap: str) -> float:
        return 2.0 if (image_tap, text_tap) == ("b0/t0", "b3/t0.1") else _pair(image_tap, text_tap)

    everything = grid_search(deceptive, image_grid=IMAGE, text_grid=TEXT)
    found = local_search(_image, _text, deceptive, image_grid=IMAGE, text_grid=TEXT, exhaustive=everything.pairs)
    assert found.exhaustive_best == ("b0/t0", "b3/t0.1")
    assert found.regret == pytest.approx(2.0 - 1.1)


def test_regret_is_measured_on_the_exhaustive_grid_alone() -> None:
    """A search that overrates what it finds must not look better than it is."""
    everything = grid_search(_pair, image_grid=IMAGE, text_grid=TEXT)
    found = local_search(_image, _text, lambda i, j: 5.0 + (i == "b4/t30"), image_grid=IMAGE, text_grid=TEXT, exhaustive=everything.pairs)
    assert found.image_tap == "b4/t30"
    assert found.value == 6.0
    assert found.regret == pytest.approx(everything.value - _pair("b4/t30", found.text_tap))
    assert found.regret is not None
    assert found.regret > 0


def test_radii_widen_and_narrow_the_neighbourhood() -> None:
    narrow = local_search(_image, _text, _pair, image_grid=IMAGE, text_grid=TEXT, block_radius=0, t_radius=0)
    assert (narrow.counts["pair"], narrow.image_tap) == (1, "b4/t30")
    wide = local_search(_image, _text, _pair, image_grid=IMAGE, text_grid=TEXT, block_radius=9, t_radius=9)
    assert wide.counts["pair"] == 180
    assert local_search(_image, _text, _pair, image_grid=IMAGE, text_grid=TEXT, t_radius=0).counts["pair"] == 3 * 3


def test_equal_values_go_to_the_smaller_block_then_the_smaller_timestep() -> None:
    found = local_search(lambda b, t: 1.0, lambda b, t: 1.0, lambda i, j: 1.0, image_grid=IMAGE, text_grid=TEXT)
    assert (found.image_tap, found.text_tap) == ("b0/t0", "b1/t0")
    halved = halving(lambda i, j, /, *, budget: 1.0, image_grid=Grid((2, 10), (0,)), text_grid=TEXT, min_budget=10, max_budget=90)
    assert (halved.image_tap, halved.text_tap) == ("b2/t0", "b1/t0")  # 2 before 10: by number, not by name


def test_halving_spends_more_rows_on_fewer_pairs() -> None:
    asked: list[tuple[str, str, int]] = []

    def evaluate(image_tap: str, text_tap: str, /, *, budget: int) -> float:
        asked.append((image_tap, text_tap, budget))
        return _pair(image_tap, text_tap)

    everything = grid_search(_pair, image_grid=IMAGE, text_grid=TEXT)
    found = halving(evaluate, image_grid=IMAGE, text_grid=TEXT, min_budget=100, max_budget=900, eta=3, exhaustive=everything.pairs)
    budgets = [budget for *_, budget in asked]
    assert budgets == [100] * 180 + [300] * 60 + [900] * 20
    assert found.training_rows == sum(budgets)
    assert (found.image_tap, found.text_tap, found.regret) == ("b6/t30", "b2/t0", 0)
    second = {asked[i][:2] for i in range(180, 240)}
    assert second == set(sorted(everything.pairs, key=lambda pair: -everything.pairs[pair])[:60])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 2000), st.integers(1, 2000), st.integers(2, 5), st.integers(0, 10**6))
def test_halving_ends_on_the_full_budget_with_the_best_of_those_left(n: int, a: int, b: int, eta: int, seed: int) -> None:
    low, high = min(a, b), max(a, b)
    taps = [tap_name(block, 0) for block in range(n)]
    worth = dict(zip(taps, np.random.default_rng(seed).permutation(n), strict=True))
    found = halving(
        lambda i, j, /, *, budget: worth[i],
        image_grid=Grid.of_taps(taps),
        text_grid=Grid((1,), (0,)),
        min_budget=low,
        max_budget=high,
        eta=eta,
    )
    budgets = [evaluation.budget or 0 for evaluation in found.trace]
    assert budgets == sorted(budgets)
    assert budgets[-1] == high
    assert budgets[0] >= low
    assert worth[found.image_tap] == n - 1


def test_candidates_replace_the_grid() -> None:
    few = [("b6/t30", "b2/t0"), ("b0/t0", "b1/t0")]
    found = halving(lambda i, j, /, *, budget: _pair(i, j), image_grid=IMAGE, text_grid=TEXT, min_budget=5, max_budget=50, candidates=few)
    assert {evaluation.taps for evaluation in found.trace} == set(few)
    assert found.image_tap == "b6/t30"


def test_unimodality_is_checked_row_by_row_and_column_by_column() -> None:
    surface = np.array([[1, 2, 1], [1, 0.5, 1], [3, 2, 1.0]])
    check = check_unimodal(surface, Grid((1, 2, 3), (0, 10, 30)))
    assert check.broken_blocks == (2,)
    assert check.broken_timesteps == (10,)
    assert not check.holds
    assert check_unimodal(surface, Grid((1, 2, 3), (0, 10, 30)), tolerance=1.5).holds
    found = local_search(_image, _text, _pair, image_grid=IMAGE, text_grid=TEXT)
    assert found.unimodality["image"].holds


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=7))
def test_unimodal_means_that_some_split_rises_and_then_falls(values: list[int]) -> None:
    def monotone(part: list[int], sign: int) -> bool:
        return all(sign * (b - a) >= 0 for a, b in itertools.pairwise(part))

    expected = any(monotone(values[: k + 1], 1) and monotone(values[k:], -1) for k in range(len(values)))
    assert is_unimodal(np.array(values)) == expected


def test_a_grid_is_read_from_the_taps_of_a_store() -> None:
    grid = Grid.of_taps(["b12/t30", "b4/t0.05", "b4/t0"])
    assert grid == Grid((4, 12), (0, 0.05, 30))
    assert grid.taps[:3] == ("b4/t0", "b4/t0.05", "b4/t30")
    assert grid.around(4, 0, block_radius=1, t_radius=1) == ("b4/t0", "b4/t0.05", "b12/t0", "b12/t0.05")


def test_results_are_plain_json() -> None:
    found = local_search(_image, _text, _pair, image_grid=IMAGE, text_grid=TEXT)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["best"] == {"image": "b6/t30", "text": "b2/t0", "value": found.value}
    assert len(data["trace"]) == 83
    assert data["regret"] is None


def test_errors_say_what_is_wrong() -> None:
    cases = [
        (
            lambda: local_search(lambda b, t: math.nan, _text, _pair, image_grid=IMAGE, text_grid=TEXT),
            ProbeError,
            "the evaluation of b0/t0 gave nan",
        ),
        (lambda: Grid((4, 2), (0,)), ConfigError, "blocks of a grid must be ascending and distinct, got [4, 2]"),
        (lambda: Grid((4,), ()), ConfigError, "timesteps of a grid must be ascending and distinct, got []"),
        (
            lambda: local_search(_image, _text, _pair, image_grid=IMAGE, text_grid=TEXT, exhaustive={("b0/t0", "b1/t0"): 1.0}),
            ProbeError,
            "the exhaustive grid lacks the pair b6/t30 and b2/t0 that the search found",
        ),
        (
            lambda: halving(lambda i, j, /, *, budget: 0.0, image_grid=IMAGE, text_grid=TEXT, min_budget=9, max_budget=3),
            ConfigError,
            "halving needs 1 <= min_budget",
        ),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=re.escape(message)):
            call()
