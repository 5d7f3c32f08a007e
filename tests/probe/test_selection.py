"""A penalty or learning rate is chosen on rows kept for it, in bounded memory; what the choice does not show is said."""

from __future__ import annotations

import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score

from difffeat.errors import ProbeError, ProbeWarning
from difffeat.probe import ridge_solutions as ridge_module
from difffeat.probe import training
from difffeat.probe.factory import load_probe
from difffeat.probe.fusion import FusionProbe, PairedFeatures
from difffeat.probe.labels import read_labels
from difffeat.probe.linear import LinearProbe
from difffeat.probe.logistic import CS, LogisticProbe
from difffeat.probe.metrics import mean_average_precision
from difffeat.probe.optim import LRS, loss_and_gradient, sigmoid, simplex
from difffeat.probe.ridge import RidgeProbe
from difffeat.probe.ridge_solutions import ALPHAS, ridge_path
from difffeat.probe.selection import Examples, Judged, column_ap, hold_out
from difffeat.probe.training import still_falling

quiet = pytest.mark.filterwarnings("ignore::difffeat.errors.ProbeWarning")


def test_average_precision_is_scikit_learns_with_ties_and_unknown_cells() -> None:
    rng = np.random.default_rng(0)
    truth, scores = rng.random((80, 6)) < 0.2, rng.integers(0, 12, (80, 6)).astype(np.float32)
    truth[:, 2] = False
    known = rng.random((80, 6)) < 0.8
    for inside in (None, known):
        got = column_ap(truth, scores, inside)
        for c in range(6):
            rows = np.ones(80, bool) if inside is None else inside[:, c]
            expected = average_precision_score(truth[rows, c], scores[rows, c]) if truth[rows, c].any() else np.nan
            assert got[c] == pytest.approx(expected, abs=1e-12, nan_ok=True)


@quiet
def test_every_probe_takes_the_same_validation_rows(make_problem, tmp_path) -> None:
    train, held = make_problem(n=150, noise=2), make_problem(n=100, seed=1, noise=2)
    rows = np.arange(0, 100, 2)
    names = ("a", "b", "c", "d")
    for probe, grid, chosen in ((LinearProbe(epochs=10), LRS, "lr_"), (RidgeProbe(), ALPHAS, "alpha_"), (LogisticProbe(), CS, "c_")):
        fitted = probe.fit(train.x, train.y, classes=names, validation=(held.x, held.y[rows], rows))
        assert fitted.selected_on_ == "validation"
        assert len(fitted.validation_map_) == len(fitted.validation_loss_) == len(grid)
        assert getattr(fitted, chosen) == grid[int(np.argmax(fitted.validation_map_))]
        reached = mean_average_precision(held.y[rows], fitted.decision_function(held.x, rows)).value
        assert max(fitted.validation_map_) == pytest.approx(reached, abs=1e-6)
        again = load_probe(fitted.save(tmp_path / "probe.safetensors"))
        for name in (chosen, "validation_map_", "validation_loss_", "selected_on_", "notes_"):
            assert getattr(again, name) == getattr(fitted, name)


@quiet
def test_rates_tried_side_by_side_are_the_trainings_one_by_one(make_problem, monkeypatch: pytest.MonkeyPatch) -> None:
    train, held = make_problem(n=150, noise=2), make_problem(n=100, seed=1, noise=2)
    pairs = [PairedFeatures(part.x[:, :5], part.x[:, 5:]) for part in (train, held)]
    for stack in (2**29, 1):
        monkeypatch.setattr(training, "STACK_BYTES", stack)
        for make, x, y in ((LinearProbe, train.x, held.x), (FusionProbe, *pairs)):
            settings: dict[str, Any] = {"epochs": 5, "batch_size": 64, "weight_decay": 0.01} | ({"width": 6} if make is FusionProbe else {})
            together = make(**settings).fit(x, train.y, validation=(y, held.y))
            alone = make(**settings, lr=together.lr_).fit(x, train.y)
            np.testing.assert_allclose(together.decision_function(y), alone.decision_function(y), atol=1e-4)
            np.testing.assert_allclose(together.history_, alone.history_, rtol=1e-4)
            assert (alone.selected_on_, alone.validation_map_) == ("nothing: lr was given", [])


@quiet
def test_without_validation_a_fifth_is_held_out_and_all_rows_are_trained_on(make_problem) -> None:
    problem = make_problem(n=200, noise=2)
    for probe, chosen, name in ((LinearProbe(epochs=5), "lr_", "lr"), (LogisticProbe(), "c_", "c")):
        fitted = probe.fit(problem.x, problem.y)
        assert fitted.selected_on_ == "a held-out 20% of the training rows"
        final = type(probe)(**{**probe.settings(), name: getattr(fitted, chosen)}).fit(problem.x, problem.y)
        np.testing.assert_array_equal(fitted.weights_, final.weights_)


def test_rows_are_held_out_of_every_class_by_the_seed() -> None:
    y = np.repeat([0, 1, 2, 3], [60, 30, 9, 1])
    examples = Examples(np.zeros((100, 2)), None, read_labels(y))
    inner, outer = hold_out(examples, 0, "alpha")
    assert inner.rows is not None
    assert outer.rows is not None
    assert np.bincount(y[outer.rows], minlength=4).tolist() == [12, 6, 2, 0]
    assert sorted([*inner.rows.tolist(), *outer.rows.tolist()]) == list(range(100))
    np.testing.assert_array_equal(outer.rows, hold_out(examples, 0, "alpha")[1].rows)
    other = hold_out(examples, 1, "alpha")[1].rows
    assert other is not None
    assert not np.array_equal(outer.rows, other)
    with pytest.raises(ProbeError, match="2 rows are too few to hold some out for choosing lr: pass validation, or a single lr"):
        LinearProbe().fit(np.eye(2), np.array([0, 1]))


def test_validation_that_does_not_fit_is_refused(make_problem) -> None:
    train = make_problem(n=60)
    cases: list[tuple[Any, str]] = [
        ((train.x,), r"validation must be \(features, labels\)"),
        ((train.x[:, :3], train.y), "the training features have 12 dimensions, those of validation 3|X has 3 features"),
        ((train.x, train.y[:5]), "60 validation rows of features but 5 of labels"),
        ((train.x, train.y[:, :2]), "there are 4 names for 2 classes"),
        ((train.x, train.y * 0), "none of the 4 classes has a positive among the 60 validation rows"),
        ((train.x, None), "there are no labels of the validation rows"),
    ]
    for probe in (LinearProbe(epochs=2), RidgeProbe(), LogisticProbe()):
        for validation, message in cases:
            with pytest.raises(ProbeError, match=message):
                probe.fit(train.x, train.y, validation=validation)
    with pytest.raises(ProbeError, match="the validation rows have classes that the training rows lack; those have 'cat', 'dog'"):
        RidgeProbe().fit(train.x, ["cat", "dog"] * 30, validation=(train.x, ["cat", "cow"] * 30))


def test_a_choice_at_either_edge_is_said_unless_its_neighbour_is_as_good(make_problem) -> None:
    train, held = make_problem(n=300), make_problem(n=300, seed=1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 30)) * np.logspace(0, -3.5, 30)
    y = (x[:, -1:] * 10**3.5 + 0.1 * rng.normal(size=(400, 1)) > 0).astype(int)
    mixed = x @ np.linalg.qr(rng.normal(size=(30, 30)))[0]
    with pytest.warns(ProbeWarning, match=r"alpha 1e-08 was chosen at the lower edge of 1e-08\.\.1e-06, and it is better than 1e-06: smaller"):
        edge = RidgeProbe(alphas=[1e-8, 1e-6], standardize=False).fit(mixed[:200], y[:200], classes=["a"], validation=(mixed[200:], y[200:]))
    assert any("alpha" in note for note in edge.notes_)
    rng = np.random.default_rng(4)
    few = rng.normal(size=(600, 12))
    noisy = (few @ rng.normal(size=(12, 4)) + 3 * rng.normal(size=(600, 4)) > 1.5).astype(int)
    with pytest.warns(ProbeWarning, match=r"alpha 0\.1 was chosen at the upper edge of 0\.001\.\.0\.1, and it is better than 0\.01: larger"):
        RidgeProbe(alphas=[0.1, 0.001, 0.01]).fit(few[:14], noisy[:14], validation=(few[14:], noisy[14:]))
    with pytest.warns(ProbeWarning, match=r"lr 0\.1 was chosen at the upper edge of 1e-06\.\.0\.1"):
        LinearProbe(epochs=7, lr=[1e-1, 1e-6]).fit(train.x, train.y, validation=(held.x, held.y))
    one = make_problem(n=200, width=1, classes=1)  # one dimension: every alpha ranks alike
    assert RidgeProbe().fit(one.x, one.y, classes=("a",), validation=(one.x, one.y)).notes_ == ()


def test_an_edge_counts_by_what_lies_beside_it() -> None:
    assert Judged([0.5, 0.4, 0.3], [1, 1, 1], True).at_an_edge(0)
    assert Judged([0.3, 0.4, 0.5], [1, 1, 1], True).at_an_edge(2)
    assert not Judged([0.5, 0.4995, 0.3], [1, 1, 1], True).at_an_edge(0)
    assert not Judged([0.4, 0.5, 0.3], [1, 1, 1], True).at_an_edge(1)
    assert not Judged([0.4], [1], True).at_an_edge(0)
    nan = float("nan")
    assert Judged([nan, 0.4, 0.4], [nan, 2, 1], True).best(last=False) == 2
    assert Judged([0.4, 0.4, 0.4], [2, 1, 3], True).best(last=True) == 1
    assert Judged([0.4, 0.4, 0.4], [1, 1, 3], True).best(last=True) == 1
    assert Judged([0.9, 0.4], [2, 1], False).best(last=False) == 1
    with pytest.raises(ProbeError, match="none of the candidates gave finite scores"):
        Judged([nan, nan], [nan, nan], True).best(last=False)


def test_a_training_that_ends_too_soon_is_said_and_one_that_is_done_is_not() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 40)).astype(np.float32)
    y = (x @ rng.normal(size=(40, 6)) + rng.normal(size=(2000, 6)) > 4).astype(int)
    settings: dict[str, Any]
    for settings in ({"lr": 1e-3}, {"lr": 1e-4}, {"lr": 1e-5}, {"lr": 1e-3, "epochs": 5, "batch_size": 16}):
        with pytest.warns(ProbeWarning, match=r"the loss is still falling after \d+ epochs of batches of \d+ at lr"):
            soon = LinearProbe(**settings).fit(x, y)
        assert any("still falling" in note for note in soon.notes_)
    for settings in ({"lr": 3e-2}, {"lr": 1e-2, "epochs": 200}, {"lr": 1e-2, "batch_size": 32}):
        assert LinearProbe(**settings).fit(x, y).notes_ == ()
    assert LinearProbe(lr=1e-2).fit(rng.normal(size=(5000, 20)), rng.random((5000, 3)) < 0.3).notes_ == ()
    assert still_falling([]) == still_falling([0.7] * 3) == still_falling([0.7] * 40) == 0
    assert still_falling(np.linspace(0.7, 0.9, 40).tolist()) == 0


@quiet
def test_a_rate_that_runs_away_does_not_spoil_the_others(make_problem) -> None:
    problem = make_problem(n=100)
    x = (problem.x * 1e18).astype(np.float32)
    probe = LinearProbe(lr=[1e-20, 1e25], standardize=False, epochs=3).fit(x, problem.y)
    assert probe.lr_ == 1e-20
    assert np.isfinite(probe.weights_).all()


def test_single_labels_are_chosen_by_the_loss_so_that_the_answers_are_right() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(["rare", "usual"], [40, 160])
    x = rng.normal(size=(200, 3)) + 8 * (y == "rare")[:, None]  # every penalty ranks these perfectly
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProbeWarning)
        for probe in (LinearProbe(), RidgeProbe(), LogisticProbe()):
            fitted = probe.fit(x, y)
            assert max(fitted.validation_map_) == 1
            assert fitted.score(x, y) == 1
            assert min(fitted.predict_proba(x)[y == "rare", 0]) > 0.7


@quiet
def test_unknown_labels_take_no_part(make_problem) -> None:
    problem, held = make_problem(n=120, noise=1), make_problem(n=80, noise=1, seed=1)
    rng = np.random.default_rng(0)
    y, truth = problem.y.astype(np.int8), held.y.astype(np.int8)
    unknown, hidden = rng.random(y.shape) < 0.2, rng.random(truth.shape) < 0.2
    unknown[:, 1] = unknown[:, 2]  # two classes that are known for the same rows
    y[unknown], truth[hidden] = -1, -1
    halves = PairedFeatures(problem.x[:, :7], problem.x[:, 7:])
    for probe, x in (
        (RidgeProbe(), problem.x),
        (LogisticProbe(c=1.0), problem.x),
        (LinearProbe(epochs=5), problem.x),
        (FusionProbe(width=4), halves),
    ):
        fitted = probe.fit(
            x, y, classes=tuple("abcd"), validation=(held.x if x is problem.x else PairedFeatures(held.x[:, :7], held.x[:, 7:]), truth)
        )
        assert np.isfinite(fitted.decision_function(x)).all()
    for probe in (RidgeProbe(alphas=[0.01], standardize=False), LogisticProbe(c=1.0, standardize=False)):
        whole = probe.fit(problem.x, y)
        matrix, bias = whole.folded()
        for c in range(4):
            rows = np.flatnonzero(~unknown[:, c])
            alone, shift = probe.fit(problem.x[rows], y[rows, c : c + 1], classes=("a",)).folded()
            np.testing.assert_allclose(problem.x @ matrix[:, c] + bias[c], problem.x @ alone[:, 0] + shift[0], atol=2e-3)


def test_unknown_cells_have_no_slope_and_no_loss() -> None:
    rng = np.random.default_rng(0)
    logits, truth, known = rng.normal(size=(6, 3)), rng.random((6, 3)) < 0.5, rng.random((6, 3)) < 0.6
    value, slope = loss_and_gradient("bce", logits, truth, known)
    other = loss_and_gradient("bce", logits, truth ^ ~known, known)
    assert value == other[0]
    np.testing.assert_array_equal(slope, other[1])
    assert not slope[~known].any()
    assert value == pytest.approx(-np.log(np.where(truth, sigmoid(logits), sigmoid(-logits)))[known].mean())
    with pytest.raises(ProbeError, match="softmax needs to know each sample's class"):
        LinearProbe(loss="softmax").fit(np.eye(4), np.array([[1, 0], [0, 1], [1, -1], [0, 1]]))


def test_a_class_that_nobody_knows_is_neither_likely_nor_unlikely(make_problem) -> None:
    problem = make_problem(n=60)
    y = np.column_stack([problem.y.astype(int), np.full(60, -1)])
    for probe in (RidgeProbe(alphas=[0.1]), LogisticProbe(c=1.0), LinearProbe(epochs=2, lr=0.1)):
        np.testing.assert_allclose(probe.fit(problem.x, y).predict_proba(problem.x)[:, 4], 0.5, atol=1e-6)


@pytest.mark.parametrize("n", [200, 12], ids=["primal", "dual"])
@pytest.mark.parametrize("alpha", [1e-8, 1e-6, 1e-3])
def test_tiny_penalties_are_solved_as_by_singular_values(n: int, alpha: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 20))
    x[:, 5], x[:, 6], x[:, 7] = x[:, 4], 2 * x[:, 4], 1.0  # copies of a dimension, and a constant one
    if n == 12:
        x[3] = x[2]
    y = (rng.random((n, 3)) < 0.4).astype(int)
    y[0] = 1
    path = ridge_path(x, y)
    z = path.standardizer.transform(x).astype(np.float64)
    reference = Ridge(alpha=alpha * n, solver="svd").fit(z, y)
    fresh = rng.normal(size=(50, 20))
    fresh[:, 5], fresh[:, 6], fresh[:, 7] = fresh[:, 4], 2 * fresh[:, 4], 1.0
    np.testing.assert_allclose(path.solve(alpha), reference.coef_.T, atol=2e-3 * np.abs(reference.coef_).max())
    expected = reference.predict(path.standardizer.transform(fresh).astype(np.float64))
    np.testing.assert_allclose(path.scores(fresh, [alpha])[0], expected, atol=2e-3 * np.abs(expected).max())


def test_the_choice_of_alpha_needs_little_memory_and_does_not_depend_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    y = np.zeros((3000, 200), np.uint8)
    y[np.arange(3000), rng.integers(0, 200, 3000)] = 1
    x = rng.normal(size=(3000, 8)).astype(np.float32)
    path, alphas = ridge_path(x, y), [1e-3, 1e-1, 1e1, 1e3]
    whole = path.choose(x, y, alphas)
    monkeypatch.setattr(ridge_module, "SCORE_BYTES", 1)
    monkeypatch.setattr(ridge_module, "PIECE_BYTES", 2**18)
    tracemalloc.start()
    pieces = path.choose(x, y, alphas)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pieces[0] == whole[0]
    assert pieces[1] == pytest.approx(whole[1], abs=1e-6)
    assert peak < 3 * y.size * 4, peak  # the scores of one alpha twice and a little, where those of all four were held thrice
    expected = [mean_average_precision(y, scores).value for scores in path.scores(x, alphas)]
    assert whole[1] == pytest.approx(expected, abs=1e-9)


def test_probabilities_are_exact_at_both_ends() -> None:
    logits = np.array([-80.0, -20.0, 0.0, 20.0, 1e4, -1e4], np.float32)
    np.testing.assert_allclose(sigmoid(logits), [1.8048513e-35, 2.0611537e-09, 0.5, 1, 1, 0], rtol=1e-5)
    nearest = simplex(np.array([[0.2, 0.8, 0.0], [1.4, -0.2, -0.2], [0.6, 0.6, -0.2]]))
    np.testing.assert_allclose(nearest, [[0.2, 0.8, 0], [1, 0, 0], [0.5, 0.5, 0]], atol=1e-12)


def test_a_chosen_penalty_is_the_librarys_best(make_problem) -> None:
    train, held = make_problem(n=200, noise=2), make_problem(n=200, seed=1, noise=2)
    ours = LogisticProbe(c=[1e-3, 1e-1, 10.0]).fit(train.x, train.y, validation=(held.x, held.y))
    z, new = ours.standardizer_.transform(train.x), ours.standardizer_.transform(held.x)
    for c, value in zip([1e-3, 1e-1, 10.0], ours.validation_map_, strict=True):
        scores = np.stack([LogisticRegression(C=c, max_iter=1000).fit(z, train.y[:, k]).decision_function(new) for k in range(4)], axis=1)
        assert value == pytest.approx(mean_average_precision(held.y, scores).value, abs=2e-3)
