"""One decomposition gives scikit-learn's ridge for every alpha, in both the primal and the dual form."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from difffeat.errors import ConfigError, ProbeError, ProbeWarning
from difffeat.probe import data
from difffeat.probe.metrics import mean_average_precision
from difffeat.probe.ridge import RidgeProbe
from difffeat.probe.ridge_solutions import ALPHAS, ridge_path


@pytest.mark.parametrize("n", [300, 8], ids=["primal", "dual"])
@pytest.mark.parametrize("standardize", [True, False])
def test_it_is_scikit_learns_ridge_for_every_alpha(n: int, standardize: bool, make_problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK_BYTES", 4 * 12 * 50)
    problem = make_problem(n=n)
    path = ridge_path(problem.x, problem.y, standardize=standardize)
    x = problem.x.astype(np.float64)
    z = (x - x.mean(axis=0)) / (x.std(axis=0) if standardize else 1)
    for alpha in (1e-4, 0.1, 10.0):
        reference = Ridge(alpha=alpha * n, solver="svd").fit(z, problem.y)
        np.testing.assert_allclose(path.solve(alpha), reference.coef_.T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(path.scores(problem.x, [alpha])[0], reference.predict(z), atol=1e-4)


def test_primal_and_dual_agree_where_they_meet(make_problem) -> None:
    from difffeat.probe.ridge_solutions import _dual, _primal
    from difffeat.probe.standardize import Standardizer

    problem = make_problem(n=40)
    fitted, mean = Standardizer.fit(problem.x), problem.y.mean(axis=0)
    weights = [
        basis @ (targets / (np.maximum(values, 0) + 0.3)[:, None])
        for basis, values, targets in (form(problem.x, None, fitted, problem.y, mean) for form in (_primal, _dual))
    ]
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-10)


def test_alpha_is_the_one_with_the_best_map_on_validation(make_problem) -> None:
    problem, validation = make_problem(n=60, noise=3), make_problem(n=200, noise=3, seed=1)
    probe = RidgeProbe().fit(problem.x, problem.y, validation=(validation.x, validation.y))
    maps = [
        mean_average_precision(validation.y, RidgeProbe(alphas=[alpha]).fit(problem.x, problem.y).decision_function(validation.x)).value
        for alpha in ALPHAS
    ]
    assert probe.validation_map_ == pytest.approx(maps, abs=1e-3)
    assert probe.alpha_ == ALPHAS[int(np.argmax(probe.validation_map_))]
    assert probe.selected_on_ == "validation"


def test_equal_ranks_take_the_smaller_error(make_problem) -> None:
    problem = make_problem(n=200, width=1, classes=1)
    path = ridge_path(problem.x, problem.y)  # one dimension: every alpha ranks alike, and the larger ones answer the mean
    assert path.choose(problem.x, problem.y, [0.1, 10.0, 1.0])[0] == 0.1


def test_a_narrow_grid_whose_alphas_rank_alike_is_said(make_problem) -> None:
    problem, held = make_problem(n=200, width=1, classes=1), make_problem(n=200, width=1, classes=1, seed=1)
    with pytest.warns(ProbeWarning, match=r"alpha 0\.1\.\.10 rank alike, from edge to edge: values beyond may be better"):
        RidgeProbe(alphas=[0.1, 1.0, 10.0]).fit(problem.x, problem.y, classes=["a"], validation=(held.x, 1 - held.y))


def test_without_validation_a_fifth_of_train_is_held_out_and_said_so(make_problem) -> None:
    problem = make_problem()
    probe = RidgeProbe().fit(problem.x, problem.y)
    assert probe.selected_on_ == "a held-out 20% of the training rows"
    final = RidgeProbe(alphas=[probe.alpha_]).fit(problem.x, problem.y)
    np.testing.assert_array_equal(probe.weights_, final.weights_)
    with pytest.raises(ProbeError, match="2 rows are too few to hold some out for choosing alpha"):
        RidgeProbe().fit(problem.x[:2], np.eye(2, dtype=int))


def test_probabilities_are_the_estimates_cut_to_0_and_1(make_problem) -> None:
    problem = make_problem()
    probe = RidgeProbe(alphas=[0.01]).fit(problem.x, problem.y)
    scores = probe.decision_function(problem.x)
    np.testing.assert_allclose(probe.predict_proba(problem.x), np.clip(scores + 0.5, 0, 1))
    np.testing.assert_array_equal(probe.predict(problem.x), (scores > 0).astype(np.uint8))


def test_rows_select_and_no_read_is_large(make_problem, read_in_pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK_BYTES", 4 * 12 * 30)
    problem, rows = make_problem(), np.arange(10, 250, 3)
    held = read_in_pieces(problem.x)
    streamed = RidgeProbe(alphas=[0.1]).fit(held, problem.y[rows], rows=rows)
    whole = RidgeProbe(alphas=[0.1]).fit(problem.x[rows], problem.y[rows])
    np.testing.assert_allclose(streamed.weights_, whole.weights_, atol=1e-6)
    assert held.largest == 30


def _small(make_problem):
    problem = make_problem(n=20)
    return problem.x, problem.y


def test_senseless_alphas_are_refused(make_problem) -> None:
    with pytest.raises(ConfigError, match=r"alphas must be numbers above 0, got \[0\]"):
        RidgeProbe(alphas=[0]).fit(*_small(make_problem))
    problem = make_problem(n=20)
    with pytest.raises(ConfigError, match="alpha must be above 0, got -1"):
        ridge_path(problem.x, problem.y).solve(-1)
