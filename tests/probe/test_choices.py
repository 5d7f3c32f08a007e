"""What a probe chose is said beside its numbers."""

from __future__ import annotations

import warnings

import pytest
from sklearn.exceptions import ConvergenceWarning

from difffeat.errors import ProbeWarning
from difffeat.probe.choices import choice_of, choice_text, is_at_edge, warnings_kept
from difffeat.probe.linear import LinearProbe
from difffeat.probe.logistic import LogisticProbe
from difffeat.probe.ridge import RidgeProbe


@pytest.mark.parametrize(("probe", "name"), [(LinearProbe(epochs=3), "lr"), (RidgeProbe(), "alpha"), (LogisticProbe(), "c")])
def test_the_choice_is_one_of_its_candidates(probe, name: str, make_problem) -> None:
    train, held = make_problem(), make_problem(n=100, seed=1)
    with warnings_kept():
        probe.fit(train.x, train.y, classes=["a", "b", "c", "d"], validation=(held.x, held.y))
    choice = choice_of(probe)
    assert (choice["name"], choice["on"]) == (name, "validation")
    assert len(choice["candidates"]) == len(choice["mAP"]) > 3
    assert choice["mAP"][choice["candidates"].index(choice["value"])] == pytest.approx(max(choice["mAP"]))
    assert choice_text(choice) == f"{name} {choice['value']:.3g}"


def test_what_was_given_is_told_apart(make_problem) -> None:
    train = make_problem()
    choice = choice_of(RidgeProbe(alphas=[0.5]).fit(train.x, train.y))
    assert choice == {"name": "alpha", "value": 0.5, "on": "nothing: alpha was given", "candidates": [], "mAP": []}
    assert choice_text(choice) == "alpha 0.5 (given)"


def test_an_edge_is_one_where_more_might_be_had() -> None:
    grid = (0.01, 1.0, 0.1)
    assert is_at_edge(0.01, grid, [0.9, 0.7, 0.8])
    assert is_at_edge(1.0, grid, [0.7, 0.9, 0.8])
    assert not is_at_edge(0.1, grid, [0.7, 0.8, 0.9])
    assert not is_at_edge(0.01, grid, [0.9, 0.7, 0.8999])  # flat: nothing is lost beyond the edge
    assert not is_at_edge(1.0, (1.0,), [0.9])


def test_warnings_of_fits_are_kept_and_others_pass() -> None:
    def fit() -> list[str]:
        with warnings_kept() as kept:
            warnings.warn("falling", ProbeWarning, stacklevel=1)
            warnings.warn("too few iterations", ConvergenceWarning, stacklevel=1)
            warnings.warn("other", RuntimeWarning, stacklevel=1)
        return kept

    with pytest.warns(RuntimeWarning, match="other"):
        assert fit() == ["too few iterations"]
