"""The linear probes are scikit-learn classifiers: its own checks say so, and its tools work with them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import joblib
import numpy as np
import pytest
from sklearn.base import clone as sklearn_clone
from sklearn.base import is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_iris
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import difffeat
from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.factory import load_probe
from difffeat.probe.fusion import FusionProbe, PairedFeatures
from difffeat.probe.linear import LinearProbe
from difffeat.probe.logistic import LogisticProbe
from difffeat.probe.ridge import RidgeProbe

clone: Any = sklearn_clone
PROBES = [LinearProbe(lr=0.1), RidgeProbe(), LogisticProbe(c=1.0)]
quiet = pytest.mark.filterwarnings("ignore::difffeat.errors.ProbeWarning")


@quiet
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([LinearProbe(), RidgeProbe(), LogisticProbe()])
def test_scikit_learns_own_checks_pass(estimator: Any, check: Any) -> None:
    check(estimator)


def test_the_check_that_needs_scipys_array_interface_passes_too() -> None:
    program = """
import warnings
warnings.simplefilter("ignore")
from sklearn.utils.estimator_checks import check_array_api_input
from difffeat import LinearProbe, LogisticProbe, RidgeProbe
for probe in (LinearProbe(), RidgeProbe(), LogisticProbe()):
    check_array_api_input(type(probe).__name__, probe, array_namespace="numpy", expect_only_array_outputs=False)
"""
    env = {**os.environ, "SCIPY_ARRAY_API": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def iris() -> tuple[np.ndarray, np.ndarray]:
    data: Any = load_iris()
    return data.data, data.target_names[data.target]


@quiet
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: type(probe).__name__)
def test_its_tools_work(probe: Any, iris: tuple[np.ndarray, np.ndarray]) -> None:
    x, names = iris
    assert is_classifier(probe)
    assert cross_val_score(probe, x, names, cv=3).mean() > 0.75
    assert cross_val_score(probe, x, names, cv=3, scoring="neg_log_loss").mean() > -0.8
    assert cross_val_score(probe, x, names, cv=3, scoring="roc_auc_ovr").mean() > 0.9
    assert cross_val_predict(probe, x, names, cv=3, method="predict_proba").shape == (150, 3)
    assert make_pipeline(StandardScaler(), clone(probe)).fit(x, names).score(x, names) > 0.75
    assert OneVsRestClassifier(probe).fit(x, names).predict(x).shape == (150,)
    calibrated = CalibratedClassifierCV(probe, cv=3).fit(x, names).predict_proba(x)
    np.testing.assert_allclose(calibrated.sum(axis=1), 1)
    y = np.stack([names == "setosa", names != "virginica"], axis=1).astype(int)
    assert MultiOutputClassifier(probe).fit(x, y).predict(x).shape == (150, 2)
    assert cross_val_score(probe, x, y, cv=KFold(3, shuffle=True, random_state=0)).mean() > 0.5


@quiet
def test_settings_are_searched_over(iris: tuple[np.ndarray, np.ndarray]) -> None:
    x, names = iris
    searches = [
        (LinearProbe(), {"lr": [0.01, 0.1], "weight_decay": [0.0, 0.01]}),
        (RidgeProbe(), {"alphas": [(0.1,), (1.0,), (0.1, 1.0)]}),
        (LogisticProbe(), {"c": [0.1, 1.0], "standardize": [True, False]}),
    ]
    for probe, grid in searches:
        found = GridSearchCV(probe, grid, cv=3).fit(x, names)
        assert set(found.best_params_) == set(grid)
        assert found.best_score_ > 0.75


@quiet
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: type(probe).__name__)
def test_a_fitted_probe_outlives_pickle_joblib_and_its_own_file(probe: Any, iris: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    x, names = iris
    values = {"names": names, "numbers with gaps": np.array([-5, 3, 10**9])[np.unique(names, return_inverse=True)[1]], "two": names == "setosa"}
    for kind, y in values.items():
        fitted = clone(probe).fit(x, y)
        joblib.dump(fitted, tmp_path / "probe.joblib")
        path = fitted.save(tmp_path / "probe.safetensors", {"tap": "b1/t0"})
        for again in (pickle.loads(pickle.dumps(fitted)), joblib.load(tmp_path / "probe.joblib"), load_probe(path)):
            np.testing.assert_array_equal(again.classes_, np.unique(y), err_msg=kind)
            assert np.asarray(again.classes_).dtype == np.asarray(fitted.classes_).dtype
            np.testing.assert_array_equal(again.predict(x), fitted.predict(x))
            np.testing.assert_array_equal(again.predict_proba(x), fitted.predict_proba(x))
            assert again.settings() == fitted.settings()
            assert again.notes_ == fitted.notes_


def test_the_shapes_are_scikit_learns(iris: tuple[np.ndarray, np.ndarray]) -> None:
    x, names = iris
    for probe in (LinearProbe(lr=1e-2, epochs=2), RidgeProbe(alphas=[0.1]), LogisticProbe(c=1.0)):
        several = probe.fit(x, names)
        assert several.decision_function(x).shape == several.predict_proba(x).shape == (150, 3)
        np.testing.assert_allclose(several.predict_proba(x).sum(axis=1), 1, rtol=1e-12)
        np.testing.assert_array_equal(several.predict(x), several.classes_[several.predict_proba(x).argmax(axis=1)])
        two = probe.fit(x, names == "setosa")
        assert two.decision_function(x).shape == (150,)
        assert two.predict_proba(x).shape == (150, 2)
        np.testing.assert_allclose(two.predict_proba(x).sum(axis=1), 1, rtol=1e-12)
        np.testing.assert_array_equal(two.predict(x), two.decision_function(x) > 0)
        assert two.predict(x).dtype == bool
        assert two.n_features_in_ == 4


def test_probabilities_of_single_labels_are_the_librarys(iris: tuple[np.ndarray, np.ndarray]) -> None:
    x, names = iris
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    for y in (names, names == "setosa", np.array([7, -2, 10**6])[np.unique(names, return_inverse=True)[1]]):
        ours = LogisticProbe(c=0.5).fit(x, y)
        reference = LogisticRegression(C=0.5, max_iter=1000).fit(z, y)
        np.testing.assert_allclose(ours.predict_proba(x), reference.predict_proba(z), atol=2e-3)
        np.testing.assert_array_equal(ours.classes_, reference.classes_)
        np.testing.assert_array_equal(ours.predict(x), reference.predict(z))
        ridge = RidgeProbe(alphas=[0.1 / 150]).fit(x, y)
        np.testing.assert_array_equal(ridge.predict(x), RidgeClassifier(alpha=0.1).fit(z, y).predict(z))


@quiet
def test_a_long_training_of_single_labels_has_the_librarys_probabilities() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    y = np.array(["a", "b", "c"])[(x + rng.gumbel(size=(400, 3))).argmax(axis=1)]
    ours = LinearProbe(epochs=300, lr=0.05, batch_size=400).fit(x, y)
    assert ours.loss_ == "softmax"
    np.testing.assert_allclose(ours.predict_proba(x), LogisticRegression(C=1e6, max_iter=1000).fit(x, y).predict_proba(x), atol=0.01)


def test_settings_stay_as_they_were_given_until_fit() -> None:
    alphas: Any = np.array([0.1, 1.0])
    x, y = np.arange(20.0).reshape(10, 2), np.arange(10) % 2
    assert RidgeProbe(alphas=alphas).alphas is alphas
    adam, ridge, logistic = (cast(Any, kind) for kind in (LinearProbe, RidgeProbe, LogisticProbe))
    nonsense: list[tuple[Any, str]] = [
        (adam(lr=-1), "lr must be above 0"), (adam(lr=[]), "lr must be above 0"), (adam(lr="fast"), "lr must be above 0"),
        (adam(lr=float("nan")), "lr must be above 0"), (adam(epochs=None), "epochs and batch_size must be whole"),
        (adam(loss="hinge"), "loss must be one of auto, bce, softmax"), (adam(weight_decay=None), "weight_decay at least 0"),
        (ridge(alphas=None), "alphas must be numbers above 0"), (ridge(alphas="0.1"), "alphas must be numbers above 0"),
        (ridge(alphas=[0.1, -1]), "alphas must be numbers above 0"), (ridge(alphas=[True]), "alphas must be numbers above 0"),
        (logistic(c=0), "c must be above 0"), (logistic(c="1"), "c must be above 0"), (logistic(max_iter=1.5), "max_iter at least 1"),
        (logistic(seed=-1), "seed must lie in"),
    ]  # fmt: skip
    for probe, message in nonsense:
        clone(probe)
        with pytest.raises(ConfigError, match=message) as caught:
            probe.fit(x, y)
        assert isinstance(caught.value, ValueError)


def test_errors_are_the_ones_that_callers_of_scikit_learn_catch(iris: tuple[np.ndarray, np.ndarray]) -> None:
    x, names = iris
    for probe in (LinearProbe(), RidgeProbe(), LogisticProbe(), FusionProbe()):
        for ask in (probe.predict, probe.predict_proba, probe.decision_function, probe.folded):
            with pytest.raises(NotFittedError, match="is not fitted yet"):
                ask(*([] if ask == probe.folded else [x]))
    with pytest.raises(ValueError, match="X has 3 features, but RidgeProbe is expecting 4"):
        RidgeProbe(alphas=[1.0]).fit(x, names).predict(x[:, :3])
    with pytest.warns(DataConversionWarning, match="column-vector y was passed"):
        fitted = RidgeProbe(alphas=[1.0]).fit(x, names[:, None])
    assert fitted.score(x, names) > 0.7


def test_names_of_columns_are_kept_and_held_to(iris: tuple[np.ndarray, np.ndarray]) -> None:
    pandas = pytest.importorskip("pandas")
    x, names = iris
    frame = pandas.DataFrame(x, columns=list("abcd"))
    probe: Any = RidgeProbe(alphas=[0.1]).fit(frame, pandas.Series(names, dtype="category"))
    assert probe.feature_names_in_.tolist() == list("abcd")
    with pytest.raises(ProbeError, match="feature names should match"):
        probe.predict(frame[["b", "a", "c", "d"]])


def test_a_probe_says_what_it_is() -> None:
    assert repr(LinearProbe(lr=0.01, epochs=5)) == "LinearProbe(epochs=5, lr=0.01)"
    assert repr(RidgeProbe()) == "RidgeProbe()"
    assert repr(LogisticProbe(c=2.0)) == "LogisticProbe(c=2.0)"
    assert repr(FusionProbe(kind="concat")) == "FusionProbe(kind='concat')"
    for name in ("LinearProbe", "RidgeProbe", "LogisticProbe", "FusionProbe", "PairedFeatures", "load_probe"):
        assert name in difffeat.__all__
        assert getattr(difffeat, name).__name__ == name


@quiet
def test_fusion_is_cloned_searched_over_and_fitted_on_plain_columns(make_problem) -> None:
    problem = make_problem(n=120)
    probe = FusionProbe(width=8, kind="concat", lr=0.05, image_width=7, epochs=3)
    assert clone(probe).get_params() == probe.get_params()
    assert probe.set_params(kind="add").fusion == "add"
    pairs = PairedFeatures(problem.x[:, :7], problem.x[:, 7:])
    plain, paired = clone(probe).fit(problem.x, problem.y), clone(probe).fit(pairs, problem.y)
    np.testing.assert_array_equal(plain.decision_function(problem.x), paired.decision_function(pairs))
    assert GridSearchCV(probe, {"lr": [0.01, 0.1]}, cv=2).fit(problem.x, problem.y).best_params_["lr"] in (0.01, 0.1)
    assert cross_val_score(probe, pairs, problem.y, cv=2).shape == (2,)
    with pytest.raises(ProbeError, match="image_width is 12 of 12 features: nothing is left for the text"):
        FusionProbe(image_width=12).fit(problem.x, problem.y)
    with pytest.raises(ConfigError, match="image_width must be a whole number of at least 1"):
        FusionProbe(image_width=0)
