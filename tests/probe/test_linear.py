"""The linear probe is Adam with cosine annealing on standardised features, whatever holds the features."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe import training
from difffeat.probe.factory import load_probe, make_probe
from difffeat.probe.linear import LinearProbe
from difffeat.probe.logistic import LogisticProbe
from difffeat.probe.metrics import mean_average_precision
from difffeat.probe.optim import batches, cosine, loss_and_gradient
from difffeat.probe.ridge import RidgeProbe

FALLING = "ignore:the loss is still falling:difffeat.errors.ProbeWarning"


@pytest.mark.filterwarnings(FALLING)
def test_a_training_is_torchs_adam_with_a_cosine(make_problem) -> None:
    torch = pytest.importorskip("torch")
    problem = make_problem(n=70, width=6, classes=3)
    ours = LinearProbe(epochs=4, lr=0.05, batch_size=16, weight_decay=0.01, seed=3).fit(problem.x, problem.y)

    x = torch.tensor((problem.x - problem.x.mean(0)) / problem.x.std(0), dtype=torch.float64)
    y = torch.tensor(problem.y, dtype=torch.float64)
    weights, bias = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam, step = torch.optim.Adam([weights, bias], lr=0.05, weight_decay=0.01), 0
    for _, rows in batches(70, epochs=4, batch_size=16, seed=3):
        adam.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 20))
        adam.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(x[rows] @ weights + bias, y[rows]).backward()
        adam.step()
        step += 1
    assert step == 20
    np.testing.assert_allclose(ours.weights_, weights.detach().numpy(), atol=2e-4)
    np.testing.assert_allclose(ours.bias_, bias.detach().numpy(), atol=2e-4)


def test_a_long_training_reaches_the_optimum_that_logistic_regression_finds(make_problem) -> None:
    problem, fresh = make_problem(noise=2.0), make_problem(seed=1, noise=2.0)
    ours = LinearProbe(epochs=600, lr=0.1, batch_size=300).fit(problem.x, problem.y)
    z, new = ours.standardizer_.transform(problem.x), ours.standardizer_.transform(fresh.x)
    expected = np.empty((300, 4))
    for c in range(4):
        reference = LogisticRegression(C=1e6, max_iter=2000).fit(z, problem.y[:, c])
        np.testing.assert_allclose(ours.weights_[:, c], reference.coef_[0], atol=0.05)
        expected[:, c] = reference.decision_function(new)
    got = mean_average_precision(fresh.y, ours.decision_function(fresh.x)).value
    assert got == pytest.approx(mean_average_precision(fresh.y, expected).value, abs=0.005)


def test_the_loss_falls_and_the_rate_ends_at_nothing(make_problem) -> None:
    problem = make_problem()
    history = LinearProbe(epochs=3, lr=1e-3).fit(problem.x, problem.y).history_
    assert len(history) == 3
    assert history[0] == pytest.approx(math.log(2), abs=0.01)
    assert all(later < earlier for earlier, later in itertools.pairwise(history))
    assert (cosine(1.0, 0, 10), cosine(1.0, 5, 10)) == (1.0, pytest.approx(0.5))
    assert cosine(1.0, 9, 10) < 0.03


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_gradients_are_the_slopes_of_the_loss(loss: str) -> None:
    rng = np.random.default_rng(0)
    logits, targets = 3 * rng.normal(size=(5, 4)), np.eye(4)[[0, 1, 1, 3, 2]]
    _, gradient = loss_and_gradient(loss, logits, targets)
    for place in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-6
        slope = (loss_and_gradient(loss, logits + step, targets)[0] - loss_and_gradient(loss, logits - step, targets)[0]) / 2e-6
        assert gradient[place] == pytest.approx(slope, abs=1e-8)


def test_extreme_logits_do_not_overflow() -> None:
    value, gradient = loss_and_gradient("bce", np.array([[1e4, -1e4]], np.float32), np.array([[0, 1]], np.float32))
    assert value == pytest.approx(1e4)
    np.testing.assert_allclose(gradient, [[0.5, -0.5]])


def test_every_epoch_visits_each_row_once_in_another_order() -> None:
    seen: dict[int, list[np.ndarray]] = {}
    for epoch, rows in batches(23, epochs=2, batch_size=5, seed=0):
        seen.setdefault(epoch, []).append(rows)
    assert [sorted(np.concatenate(rows).tolist()) for rows in seen.values()] == [list(range(23))] * 2
    assert any((a != b).any() for a, b in zip(seen[0][:4], seen[1][:4], strict=True))


def test_features_read_in_pieces_give_the_same_probe(make_problem, read_in_pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(n=200)
    x, rows = problem.x.astype(np.float16), np.arange(0, 200, 2)[::-1].copy()
    in_memory = LinearProbe(epochs=3, lr=0.01, batch_size=32).fit(x[rows], problem.y[rows])
    for cache_bytes in (2**30, 0):
        held = read_in_pieces(x)
        monkeypatch.setattr(training.standardised_reader, "__defaults__", (cache_bytes,))
        streamed = LinearProbe(epochs=3, lr=0.01, batch_size=32).fit(held, problem.y[rows], rows=rows)
        np.testing.assert_array_equal(streamed.weights_, in_memory.weights_)
        np.testing.assert_array_equal(streamed.predict_proba(held, rows), in_memory.predict_proba(x[rows]))


def test_the_seed_decides_the_order_and_nothing_else_is_random(make_problem) -> None:
    problem = make_problem()
    first, again, other = (LinearProbe(epochs=2, lr=0.01, seed=seed).fit(problem.x, problem.y).weights_ for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_single_labels_train_a_softmax() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 200)
    x = np.eye(3)[truth] * 4 + rng.normal(size=(200, 3))
    probe = LinearProbe(loss="softmax", epochs=60, lr=0.05).fit(x, truth, classes=("a", "b", "c"))
    assert (probe.predict(x) == truth).mean() > 0.9
    np.testing.assert_allclose(probe.predict_proba(x).sum(axis=1), 1, rtol=1e-5)


def test_it_has_scikit_learns_shape(make_problem) -> None:
    problem = make_problem()
    probe = LinearProbe(epochs=2, lr=0.01)
    assert probe.fit(problem.x, problem.y) is probe
    scores, chances = probe.decision_function(problem.x), probe.predict_proba(problem.x)
    assert scores.shape == chances.shape == (300, 4)
    np.testing.assert_allclose(chances, 1 / (1 + np.exp(-scores)), rtol=1e-5)
    np.testing.assert_array_equal(probe.predict(problem.x), (scores > 0).astype(np.uint8))
    assert probe.classes_ == ("0", "1", "2", "3")


@pytest.mark.parametrize("method", ["adam", "ridge", "logistic"])
def test_a_saved_probe_scores_the_same(method: str, make_problem, tmp_path) -> None:
    problem = make_problem()
    settings = {"lr": 0.03, "epochs": 3} if method == "adam" else {}
    probe = make_probe(method, **settings).fit(problem.x, problem.y, classes=("cat", "dog", "é", "x/y"))
    path = probe.save(tmp_path / "deep" / "probe.safetensors", {"tap": "b12/t30", "fingerprint": "ab"})
    loaded = load_probe(path)
    assert type(loaded) is type(probe)
    np.testing.assert_array_equal(loaded.decision_function(problem.x), probe.decision_function(problem.x))
    np.testing.assert_array_equal(loaded.predict_proba(problem.x), probe.predict_proba(problem.x))
    assert loaded.classes_ == ("cat", "dog", "é", "x/y")
    assert loaded.metadata_ == {"tap": "b12/t30", "fingerprint": "ab"}
    assert loaded.settings() == probe.settings()
    assert [file.name for file in path.parent.iterdir()] == ["probe.safetensors"]


def test_other_files_are_no_probes(make_problem, tmp_path) -> None:
    from safetensors.numpy import save_file

    problem = make_problem()
    path = LinearProbe(epochs=1).fit(problem.x, problem.y).save(tmp_path / "p.safetensors")
    with pytest.raises(ProbeError, match=r"holds a probe of kind 'linear', not 'ridge'\. Use difffeat.probe.load_probe"):
        RidgeProbe.load(path)
    with pytest.raises(ProbeError, match="there is no probe at"):
        load_probe(tmp_path / "absent")
    (tmp_path / "torn").write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ProbeError, match="is no probe file"):
        load_probe(tmp_path / "torn")
    save_file({"weights": np.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(ProbeError, match="is no probe file of format difffeat-probe/1"):
        load_probe(tmp_path / "foreign")


def test_tensors_that_do_not_fit_together_are_refused(make_problem, tmp_path) -> None:
    from safetensors.numpy import load_file, save_file

    from difffeat.probe.base import METADATA_KEY, read_probe_file

    problem = make_problem()
    path = LinearProbe(epochs=1).fit(problem.x, problem.y).save(tmp_path / "p.safetensors")
    import json

    header, tensors = json.dumps(read_probe_file(path)[0]), load_file(path)
    for name in tensors:
        for damaged in ({**tensors, name: tensors[name][:-1].copy()}, {key: value for key, value in tensors.items() if key != name}):
            save_file(damaged, tmp_path / "damaged", {METADATA_KEY: header})
            with pytest.raises(ProbeError, match="lacks tensors, or has others, or they do not fit together"):
                load_probe(tmp_path / "damaged")


def test_errors_say_what_is_wrong(make_problem) -> None:
    problem = make_problem()
    cases = [
        (lambda: LinearProbe().decision_function(problem.x), "this LinearProbe is not fitted yet: call fit(features, labels) first"),
        (lambda: LinearProbe().fit(problem.x, problem.y[:-1]), "there are 300 rows of features but 299 of labels"),
        (lambda: LinearProbe().fit(problem.x, None), "there are no labels"),
        (lambda: LinearProbe().fit(problem.x, problem.y * 0), "no label is positive: nothing can be learned"),
        (lambda: LinearProbe().fit(problem.x, problem.y, classes=("a",)), "there are 1 names for 4 classes"),
    ]
    for call, message in cases:
        with pytest.raises(ProbeError, match=re.escape(message)):
            call()
    with pytest.raises(ConfigError, match="lr must be above 0 and weight_decay at least 0, got 0 and 0"):
        LinearProbe(lr=0, weight_decay=0).fit(problem.x, problem.y)
    with pytest.raises(ConfigError, match="lr must be above 0"):
        make_probe("adam", lr=0)
    with pytest.raises(ConfigError, match="method must be one of adam, ridge, logistic; got 'svm'"):
        make_probe("svm")
    with pytest.raises(ConfigError, match="the ridge probe does not take these settings"):
        make_probe("ridge", epochs=3)


def test_a_loss_that_runs_away_is_said() -> None:
    x = np.full((8, 1), 3e38, np.float32)
    x[::2] *= -1
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(ProbeError, match="Lower lr, or turn standardisation on"):
        LinearProbe(standardize=False, lr=1e3, epochs=5, batch_size=4).fit(x, np.arange(8) % 2)


def test_a_class_that_is_never_or_always_present_gets_its_log_odds(make_problem) -> None:
    problem = make_problem(n=100)
    y = problem.y.copy()
    y[:, 0], y[:, 1] = 0, 1
    probe = LogisticProbe(c=1.0).fit(problem.x, y)
    assert not probe.weights_[:, :2].any()
    np.testing.assert_allclose(probe.predict_proba(problem.x)[0, :2], [0.5 / 101, 100.5 / 101], rtol=1e-4)


def test_probing_needs_no_torch_and_importing_loads_nothing_heavy() -> None:
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("no torch here", name="torch")
sys.meta_path.insert(0, Absent())
import difffeat
import difffeat.probe
heavy = {"sklearn", "matplotlib", "PIL", "pyarrow", "onnxruntime", "scipy"} & set(sys.modules)
assert not heavy, heavy
from difffeat.probe import LinearProbe, RidgeProbe, FusionProbe, Report, probe_store, local_search
import difffeat.probe.clusters
heavy = {"matplotlib", "PIL", "onnxruntime"} & set(sys.modules)
assert not heavy, heavy
import numpy as np
x = np.random.default_rng(0).normal(size=(50, 3))
LinearProbe(epochs=1, lr=0.1).fit(x, x > 0).predict(x)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
