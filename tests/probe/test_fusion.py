"""Fusion pairs samples by id, trains what it says, and is one matrix in the end."""

from __future__ import annotations

import re

import numpy as np
import pytest

from difffeat.errors import ConfigError, NotYetAvailable, ProbeError
from difffeat.probe.factory import load_probe
from difffeat.probe.fusion import FusionProbe, PairedFeatures, join, ridge_fusion
from difffeat.probe.linear import LinearProbe
from difffeat.probe.metrics import mean_average_precision
from difffeat.probe.ridge import RidgeProbe


@pytest.fixture
def pair(make_problem) -> tuple[PairedFeatures, np.ndarray]:
    problem = make_problem(n=200)
    return PairedFeatures(problem.x[:, :7], problem.x[:, 7:]), problem.y


@pytest.fixture
def stores(make_problem, make_store):
    """An image and a text store whose rows stand in different orders; row r of `x` belongs to id s000r."""
    problem = make_problem(n=30)
    order = np.random.default_rng(0).permutation(30)
    ids = [f"s{row:04d}" for row in range(30)]
    image = make_store({"b6/t30": problem.x[:, :7]}, problem.y, ids=ids)
    text = make_store({"b4/t0": problem.x[order, 7:]}, problem.y[order], ids=[ids[row] for row in order])
    return image, text, problem


def test_rows_are_paired_by_id_whatever_their_order(stores) -> None:
    image, text, problem = stores
    joined = join(image, text)
    assert joined.ids == tuple(image.ids)
    np.testing.assert_array_equal(joined.features("b6/t30", "b4/t0")[:], problem.x)
    np.testing.assert_array_equal(joined.labels, problem.y)
    assert joined.summary() == "30 samples joined by id; left out: none"


def test_what_is_left_out_is_counted_with_its_reason(stores, make_store) -> None:
    image, text, problem = stores
    image.valid[[0, 1]] = False
    text.valid[[text.ids.index(f"s000{digit}") for digit in (1, 2, 3)]] = False
    text.ids[text.ids.index("s0009")] = "only-here"
    joined = join(image, text)
    assert dict(joined.dropped) == {
        "only in the image store": 1,
        "only in the text store": 1,
        "invalid in the image store": 2,
        "invalid in the text store": 2,
        "whose labels are unknown": 0,
    }
    assert not set(joined.ids) & {"s0000", "s0001", "s0002", "s0003", "s0009"}
    assert len(joined) == 25
    np.testing.assert_array_equal(joined.features("b6/t30", "b4/t0")[:], problem.x[joined.image_rows])
    assert "2 invalid in the text store" in joined.summary()


def test_labels_may_come_from_either_store(stores) -> None:
    image, text, problem = stores
    image.labels = None
    joined = join(image, text)
    np.testing.assert_array_equal(joined.labels, problem.y)
    assert joined.classes == text.classes


def test_each_samples_labels_come_from_the_store_that_knows_them(stores) -> None:
    image, text, problem = stores
    image.labels = problem.y.copy()
    places = {name: text.ids.index(name) for name in ("s0001", "s0002", "s0003")}
    image.labelled[[1, 3]] = False
    image.labels[[1, 3]] = 0
    for name in ("s0002", "s0003"):
        text.labelled[places[name]] = False
        text.labels[places[name]] = 0
    joined = join(image, text)
    kept = [row for row in range(30) if row != 3]
    assert joined.ids == tuple(f"s{row:04d}" for row in kept)
    np.testing.assert_array_equal(joined.labels, problem.y[kept])
    assert joined.dropped["whose labels are unknown"] == 1
    assert "1 whose labels are unknown" in joined.summary()


def test_unknown_labels_of_all_are_an_error_and_no_labels_at_all_are_a_join_without(stores) -> None:
    image, text, _ = stores
    image.labelled[:] = text.labelled[:] = False
    with pytest.raises(ProbeError, match="neither store knows the labels of any of the 30 samples that they share"):
        join(image, text)
    image.labels = text.labels = None
    assert join(image, text).labels is None
    assert len(join(image, text)) == 30


def test_labels_that_disagree_are_named(stores) -> None:
    image, text, _ = stores
    image.labels[4] = [1, 0, 0, 1]
    text.labels[text.ids.index("s0004")] = 0
    message = "labels disagree for 1 of 30 samples; 's0004' has class-0, class-3 in the image store and none in the text store"
    with pytest.raises(ProbeError, match=re.escape(message)):
        join(image, text)


def test_stores_that_cannot_be_joined_say_why(stores, make_store) -> None:
    image, text, problem = stores
    other = make_store({"b4/t0": problem.x}, problem.y, ids=[f"s{row:04d}.txt" for row in range(30)])
    with pytest.raises(ProbeError, match=re.escape("the image store has 's0000', ..., the text store 's0000.txt', ...")):
        join(image, other)
    with pytest.raises(ProbeError, match=r"the text store has other classes than the image store \(4 against 4\): it lacks 'class-0'"):
        join(image, make_store({"b4/t0": problem.x}, problem.y, classes=("a", "b", "c", "d")))
    twice = make_store({"b4/t0": problem.x}, problem.y, ids=["s0000"] * 2 + image.ids[2:])
    with pytest.raises(ProbeError, match="sample id 's0000' stands more than once in the text store"):
        join(image, twice)
    text.valid[:] = False
    with pytest.raises(ProbeError, match="none of the 30 shared samples is valid in both stores"):
        join(image, text)


def test_gradients_are_the_slopes_of_the_loss(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair
    for kind in ("add", "concat"):
        probe = FusionProbe(width=3, kind=kind, epochs=1, lr=0.01).fit(x, y)
        rng = np.random.default_rng(0)
        probe.parameters_ = {name: rng.normal(size=value.shape) for name, value in probe.parameters_.items()}
        batch, truth = rng.normal(size=(9, 12)), rng.random((9, 4)) < 0.5
        _, gradients = probe.loss_gradients(batch, truth)
        assert set(gradients) == set(probe.parameters_)
        for name, value in probe.parameters_.items():
            for place in np.ndindex(value.shape):
                kept, losses = value[place], []
                for step in (1e-6, -1e-6):
                    value[place] = kept + step
                    losses.append(probe.loss_gradients(batch, truth)[0])
                value[place] = kept
                assert gradients[name][place] == pytest.approx((losses[0] - losses[1]) / 2e-6, abs=1e-7)


def test_merging_gives_one_matrix_of_low_rank_with_the_same_scores(make_problem) -> None:
    problem = make_problem(classes=6)
    x = PairedFeatures(problem.x[:, :7], problem.x[:, 7:])
    probe = FusionProbe(width=2, epochs=3, lr=0.01).fit(x, problem.y)
    matrix, bias = probe.merged()
    assert matrix.shape == (12, 6)
    assert np.linalg.matrix_rank(matrix, tol=1e-6 * np.linalg.norm(matrix)) <= 2
    np.testing.assert_allclose(problem.x.astype(np.float64) @ matrix + bias, probe.decision_function(x), atol=2e-4)


@pytest.mark.filterwarnings("ignore:the loss is still falling:difffeat.errors.ProbeWarning")
def test_adding_learns_what_neither_half_knows(make_problem) -> None:
    problem, fresh = make_problem(n=600), make_problem(n=400, seed=1)
    x, new = (PairedFeatures(p.x[:, :6], p.x[:, 6:]) for p in (problem, fresh))
    settings = {"epochs": 60, "lr": 0.01}
    fused = mean_average_precision(fresh.y, FusionProbe(width=16, **settings).fit(x, problem.y).decision_function(new)).value
    for half in (slice(0, 6), slice(6, 12)):
        alone = LinearProbe(**settings).fit(problem.x[:, half], problem.y)
        assert fused > mean_average_precision(fresh.y, alone.decision_function(fresh.x[:, half])).value + 0.1
    ridge = ridge_fusion(x, problem.y, validation=(new, fresh.y))
    assert fused > mean_average_precision(fresh.y, ridge.decision_function(new)).value - 0.03


def test_concatenation_is_the_linear_probe_on_both(pair, make_problem) -> None:
    x, y = pair
    fused, plain = FusionProbe(kind="concat", epochs=3, lr=0.1).fit(x, y), LinearProbe(epochs=3, lr=0.1).fit(make_problem(n=200).x, y)
    np.testing.assert_allclose(fused.merged()[0], plain.folded()[0], atol=1e-6)


def test_the_ridge_beside_it_is_ridge_on_the_concatenation(pair, make_problem) -> None:
    x, y = pair
    assert isinstance(ridge_fusion(x, y, alphas=[0.1]), RidgeProbe)
    plain = RidgeProbe(alphas=[0.1]).fit(make_problem(n=200).x, y)
    np.testing.assert_allclose(ridge_fusion(x, y, alphas=[0.1]).weights_, plain.weights_, atol=1e-6)


@pytest.mark.parametrize("kind", ["add", "concat"])
def test_a_saved_fusion_scores_the_same(kind: str, pair, tmp_path) -> None:
    x, y = pair
    probe = FusionProbe(width=5, kind=kind, epochs=2, lr=0.01).fit(x, y)
    loaded = load_probe(probe.save(tmp_path / "fused.safetensors"))
    assert isinstance(loaded, FusionProbe)
    np.testing.assert_array_equal(loaded.decision_function(x), probe.decision_function(x))
    assert loaded.settings() == probe.settings()


def test_the_seed_draws_the_first_projections(pair) -> None:
    x, y = pair
    first, again, other = (FusionProbe(width=4, epochs=1, lr=0.01, seed=seed).fit(x, y).merged()[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("kind", ["gated", "attention"])
def test_later_kinds_say_what_there_is(kind: str) -> None:
    with pytest.raises(NotYetAvailable, match=f"fusion by {kind} comes with a later release; available now: add, concat"):
        FusionProbe(kind=kind)


def test_other_settings_are_refused(pair) -> None:
    with pytest.raises(ConfigError, match="fusion must be one of add, concat with a width of at least 1; got 'sum' and 512"):
        FusionProbe(kind="sum")
    with pytest.raises(ProbeError, match=r"fusion needs PairedFeatures, got ndarray. Use join\(image_store, text_store\)"):
        FusionProbe().fit(np.zeros((3, 3)), np.ones((3, 1)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ProbeError, match="3 rows of images cannot be paired with 4 of texts"):
        PairedFeatures(np.zeros((3, 2)), np.zeros((4, 2)))


def test_cells_that_one_store_does_not_know_come_from_the_other(make_problem, make_store) -> None:
    problem = make_problem(n=20)
    image, text = (make_store({tap: problem.x + shift}, problem.y) for tap, shift in (("b1/t0", 0), ("b2/t0", 1)))
    image.targets, text.targets = problem.y.astype(np.int8), problem.y.astype(np.int8)
    image.targets[3, 1] = text.targets[4, 2] = -1
    np.testing.assert_array_equal(join(image, text).labels, problem.y)
    text.targets[3, 1] = -1
    joined = join(image, text).labels
    assert joined is not None
    assert joined.dtype == np.int8
    assert np.argwhere(join(image, text).labels == -1).tolist() == [[3, 1]]
    image.targets[5], text.targets[5] = -1, -1
    assert join(image, text).dropped["whose labels are unknown"] == 1


@pytest.mark.parametrize("kinds", [("text", "sweep"), ("image", "latents"), ("text-sweep", "text")])
def test_stores_of_the_wrong_modality_are_refused(kinds: tuple[str, str], make_problem, make_store) -> None:
    problem = make_problem(n=20)
    stores = [make_store({"b1/t0": problem.x}, problem.y) for _ in kinds]
    for store, kind in zip(stores, kinds, strict=True):
        store.manifest = {"recipe": {"graph": {"kind": kind}}}
    with pytest.raises(ProbeError, match=r"the stores are the wrong way round|was given as the (image|text) store, but it holds features of"):
        join(*stores)
    with pytest.raises(ProbeError, match="the text store has several classes of one name: 'a'"):
        join(make_store({"b1/t0": problem.x}, problem.y), make_store({"b1/t0": problem.x}, problem.y, classes=("a", "b", "a", "c")))
