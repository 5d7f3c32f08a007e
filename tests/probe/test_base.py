"""A probe fits on what means something, and a file of one is what was saved or an error that says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.base import METADATA_KEY
from difffeat.probe.factory import load_probe
from difffeat.probe.fusion import FusionProbe, PairedFeatures
from difffeat.probe.linear import LinearProbe
from difffeat.probe.logistic import LogisticProbe
from difffeat.probe.ridge import RidgeProbe
from difffeat.runtime.features import Features

HEADER: dict[str, Any] = {
    "format": "difffeat-probe/1", "kind": "linear", "link": "sigmoid", "classes": ["a", "b", "c"], "settings": {}, "metadata": {},
}  # fmt: skip
TENSORS = {
    "weights": np.ones((6, 3), np.float32), "bias": np.zeros(3, np.float32), "mean": np.zeros(6, np.float32), "scale": np.ones(6, np.float32),
}  # fmt: skip


def written(folder: Path, header: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    path = folder / "probe.safetensors"
    save_file({**TENSORS, **tensors}, path, {METADATA_KEY: json.dumps({**HEADER, **header})})
    return path


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    assert load_probe(written(tmp_path, {}, {})).predict(np.ones((1, 6), np.float32)).tolist() == [[1, 1, 1]]
    ridge = load_probe(written(tmp_path, {"kind": "ridge", "link": "clip"}, {}))
    assert isinstance(ridge, RidgeProbe)
    assert np.isnan(ridge.alpha_)
    assert (ridge.validation_map_, ridge.selected_on_) == ([], "not known: the file is of an earlier version")
    again = load_probe(ridge.save(tmp_path / "again.safetensors"))
    assert isinstance(again, RidgeProbe)
    assert np.isnan(again.alpha_)
    single = load_probe(written(tmp_path, {"kind": "ridge", "link": "clip", "settings": {"alphas": [0.5]}}, {}))
    assert isinstance(single, RidgeProbe)
    assert single.alpha_ == 0.5


HUGE = 10**400
SETTINGS = "holds settings that this version does not know"
SHAPES = "lacks tensors, or has others, or they do not fit together"


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        ({"kind": "ridge", "link": "clip", "settings": {"alphas": ["x"]}}, {}, SETTINGS),
        ({"kind": "ridge", "link": "clip", "settings": {"alphas": [HUGE]}}, {}, SETTINGS),
        ({"kind": "ridge", "link": "clip", "settings": {"alphas": 3}}, {}, SETTINGS),
        ({"settings": {"lr": HUGE}}, {}, SETTINGS),
        ({"settings": {"seed": -1}}, {}, SETTINGS),
        ({"settings": {"epochs": "9"}}, {}, SETTINGS),
        ({"kind": "logistic", "settings": {"c": HUGE}}, {}, SETTINGS),
        ({"kind": "fusion", "settings": {"kind": "gated"}}, {}, SETTINGS),
        ({"link": "softmax"}, {}, "gives probabilities by 'softmax', its settings by 'sigmoid'"),
        ({"fitted": []}, {}, "has an incomplete header"),
        ({"fitted": {"history": ["x"]}}, {}, SHAPES),
        ({"kind": "ridge", "link": "clip", "fitted": {"alpha": HUGE}}, {}, SHAPES),
        ({"kind": "ridge", "link": "clip", "fitted": {"validation_map": 3}}, {}, SHAPES),
        ({"classes": []}, {"weights": np.ones((6, 0), np.float32), "bias": np.zeros(0, np.float32)}, "has classes without a name"),
        ({"classes": [{}, [], None]}, {}, "has classes without a name"),
        ({}, {"mean": np.zeros((), np.float32), "scale": np.ones((), np.float32), "weights": np.ones(3, np.float32)}, SHAPES),
        ({}, {"mean": np.zeros((6, 2), np.float32), "scale": np.ones((6, 2), np.float32), "weights": np.ones((6, 2, 3), np.float32)}, SHAPES),
        ({}, {"surplus": np.ones(3, np.float32)}, SHAPES),
        ({}, {"scale": np.array([1, 1, 1, 1, 1, 0], np.float32)}, "holds a scale that is not above 0"),
        ({}, {"weights": np.full((6, 3), np.nan, np.float32)}, "weights must be finite numbers of fp32 or fp64"),
        ({}, {"weights": np.ones((6, 3), np.int8)}, "weights must be finite numbers of fp32 or fp64"),
    ],
)
def test_a_file_that_was_not_saved_by_a_probe_is_refused(header: dict[str, Any], tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=message):
        load_probe(written(tmp_path, header, tensors))


def test_what_a_fit_found_is_saved_with_it(make_problem, tmp_path: Path) -> None:
    problem = make_problem()
    ridge = RidgeProbe().fit(problem.x, problem.y)
    loaded = load_probe(ridge.save(tmp_path / "ridge.safetensors"))
    assert isinstance(loaded, RidgeProbe)
    assert (loaded.alpha_, loaded.validation_map_, loaded.selected_on_) == (ridge.alpha_, ridge.validation_map_, ridge.selected_on_)
    linear = LinearProbe(epochs=3, lr=0.01).fit(problem.x, problem.y)
    assert LinearProbe.load(linear.save(tmp_path / "linear.safetensors")).history_ == linear.history_


@pytest.mark.parametrize("kind", ["add", "concat"])
def test_a_fusion_knows_which_half_is_which(kind: str, make_problem, tmp_path: Path) -> None:
    x = make_problem().x
    fitted = FusionProbe(width=4, kind=kind, epochs=1, lr=0.01).fit(PairedFeatures(x[:, :7], x[:, 7:]), make_problem().y)
    for probe in (fitted, load_probe(fitted.save(tmp_path / "fusion.safetensors"))):
        probe.decision_function(PairedFeatures(x[:, :7], x[:, 7:]))
        with pytest.raises(ProbeError, match="fitted on images of width 7 and texts of 5, these pairs have 5 and 7"):
            probe.decision_function(PairedFeatures(x[:, 7:], x[:, :7]))


def test_softmax_takes_exactly_one_class_a_sample(make_problem) -> None:
    problem = make_problem()
    several = int((problem.y.sum(axis=1) != 1).sum())
    assert several
    halves = PairedFeatures(problem.x[:, :7], problem.x[:, 7:])
    for fit in (lambda: LinearProbe(loss="softmax").fit(problem.x, problem.y), lambda: FusionProbe(loss="softmax").fit(halves, problem.y)):
        with pytest.raises(
            ProbeError, match=rf"softmax needs exactly one class a sample, and {several} of 300 have several or none\. Use loss='bce'"
        ):
            fit()


@pytest.mark.parametrize("probe", [LinearProbe(epochs=1, lr=0.01), RidgeProbe(alphas=[1.0]), LogisticProbe(c=1.0)])
def test_zeros_in_place_of_quarantined_samples_are_never_fitted(probe: LinearProbe | RidgeProbe | LogisticProbe, make_problem) -> None:
    problem, valid = make_problem(n=60), np.ones(60, bool)
    problem.x[[3, 50]], valid[[3, 50]] = 0, False
    features, rows = Features([problem.x[:40], problem.x[40:]], lambda: valid), np.flatnonzero(valid)
    with pytest.raises(
        ProbeError, match=r"2 of these rows are in quarantine: zeros stand there, not features\. Fit on the others: rows = store\.usable"
    ):
        probe.fit(features, problem.y)
    mean = probe.fit(features, problem.y[rows], rows=rows).standardizer_.mean
    np.testing.assert_array_equal(mean, type(probe)(**probe.settings()).fit(problem.x[rows], problem.y[rows]).standardizer_.mean)


def test_settings_and_features_that_are_none_are_told() -> None:
    x, y = np.ones((4, 2), np.float32), np.eye(2)[[0, 1, 0, 1]]
    for seed in (-1, None, 1.5):
        with pytest.raises(ConfigError, match=rf"seed must lie in 0\.\.2\^63-1, got {seed}"):
            LinearProbe(seed=seed).fit(x, y)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ConfigError, match=r"seed must lie in 0\.\.2\^63-1"):
            RidgeProbe(seed=seed).fit(x, y)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"epochs and batch_size must be whole numbers of at least 1, got 1\.5 and 256"):
        LinearProbe(epochs=1.5).fit(x, y)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ProbeError, match="rows must be an integer array, got list"):
        LinearProbe(epochs=1).fit(x, y[:2], rows=[0, 1])  # pyright: ignore[reportArgumentType]
    assert LinearProbe(epochs=1, lr=0.01, seed=np.int64(3)).fit(x, y).settings()["seed"] == 3  # pyright: ignore[reportArgumentType]


def test_labels_of_many_classes_are_never_copied_whole_in_float64() -> None:
    import tracemalloc

    from difffeat.probe.evaluate import split_rows
    from difffeat.probe.ridge_solutions import ridge_path

    rng = np.random.default_rng(0)
    labels = np.zeros((20_000, 1000), np.uint8)
    labels[np.arange(20_000), rng.integers(0, 1000, 20_000)] = 1
    x = rng.normal(size=(20_000, 4)).astype(np.float32)
    for work in (lambda: split_rows(labels), lambda: ridge_path(x, labels)):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * labels.nbytes, peak
