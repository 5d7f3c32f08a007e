"""Stores become numbers that say where they come from, and never write over older ones."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.data import rarest_class
from difffeat.probe.evaluate import evaluate_taps, make_parts, probe_store, split_rows, usable_rows, write_metrics
from difffeat.probe.metrics import mean_average_precision
from difffeat.probe.ridge import RidgeProbe

pytestmark = pytest.mark.filterwarnings("ignore::difffeat.errors.ProbeWarning")


@pytest.fixture
def grid_stores(make_problem, make_store):
    """Train and validation with four taps, of which b2/t30 is told apart best; some rows are invalid and hold NaN."""
    stores = []
    for seed, n in ((0, 200), (1, 150)):
        problem, rng = make_problem(n=n, seed=seed), np.random.default_rng(100 + seed)
        tensors = {}
        for tap, noise in (("b1/t0", 2.0), ("b2/t0", 1.0), ("b1/t30", 1.0), ("b2/t30", 0.0)):
            tensors[tap] = (problem.x / problem.x.std(axis=0) + noise * rng.normal(size=problem.x.shape)).astype(np.float32)
            tensors[tap][[3, 7]] = np.nan
        stores.append(make_store(tensors, problem.y, invalid=(3, 7)))
    return stores


def test_a_split_is_every_row_once_the_same_twice_and_near_the_shares_of_each_class() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random((1000, 5)) < [0.5, 0.3, 0.1, 0.05, 0.02]
    parts, again, other = (split_rows(labels, seed=seed) for seed in (0, 0, 1))
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1000))
    assert [len(rows) for rows in parts.values()] == pytest.approx([700, 150, 150], abs=40)
    for name, rows in parts.items():
        np.testing.assert_array_equal(rows, again[name])
    assert not np.array_equal(parts["train"], other["train"])
    rarest = labels[:, 4].sum()
    assert labels[parts["test"], 4].sum() == pytest.approx(0.15 * rarest, abs=6)


def test_splits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fractions must be three numbers that sum to 1, got \[0.5, 0.2, 0.2\]"):
        split_rows(np.ones((10, 1)), fractions=(0.5, 0.2, 0.2))
    with pytest.raises(ProbeError, match=r"2 rows are too few for a test split of 0\.15"):
        split_rows(np.ones((2, 1)))


def test_a_probe_on_one_store_splits_it_and_says_so(grid_stores) -> None:
    done = probe_store(grid_stores[0], "b2/t30", method="ridge", n_resamples=20)
    assert done.result["schema"] == "difffeat-metrics/1"
    assert (done.result["selected_on"], done.result["reported_on"]) == ("validation", "test")
    assert [split["rows"] for split in done.result["splits"].values()] == pytest.approx([139, 30, 30], abs=20)
    assert done.result["splits"]["test"]["from"] == "a share of the training store, seed 0"
    assert done.result["metrics"]["mAP"]["value"] == mean_average_precision(done.labels, done.scores).value
    assert done.result["interval"]["low"] <= done.result["metrics"]["mAP"]["value"] <= done.result["interval"]["high"]
    json.dumps(done.result, allow_nan=False)


@pytest.mark.parametrize("method", ["adam", "logistic", "ridge"])
def test_stores_of_their_own_are_used_whole(method: str, grid_stores, make_store) -> None:
    train, other = grid_stores
    last = make_store(
        other.tensors | {"b2/t30": other.tensors["b2/t30"] + np.float32(1e-3)}, other.labels, invalid=(3, 7), ids=[f"t{n}" for n in range(150)]
    )
    last.inputs = last.inputs ^ np.uint8(1)  # other images
    done = probe_store(train, "b2/t30", validation=other, test=last, method=method, n_resamples=20)
    assert done.result["splits"] == {
        "train": {"rows": 198, "from": "a store of its own"},
        "validation": {"rows": 148, "from": "a store of its own"},
        "test": {"rows": 148, "from": "a store of its own"},
    }
    assert done.scores.shape == (148, 4)
    assert done.probe.classes_ == train.classes
    chosen = done.result["chosen"]
    assert (done.result["selected_on"], chosen["on"], chosen["name"]) == (
        "validation",
        "validation",
        {"adam": "lr", "ridge": "alpha"}.get(method, "c"),
    )
    assert chosen["mAP"][chosen["candidates"].index(chosen["value"])] == max(chosen["mAP"])
    assert done.result["metrics"]["mAP"]["value"] > 0.8


def test_no_row_serves_two_splits(grid_stores) -> None:
    parts = make_parts(grid_stores[0], seed=4)
    rows = np.concatenate([part.rows for part in parts.values()])
    assert sorted(rows.tolist()) == usable_rows(grid_stores[0]).tolist()


def test_samples_whose_labels_are_unknown_are_left_out_and_counted(grid_stores) -> None:
    train, other = grid_stores
    train.labelled[[3, 10, 11, 12]] = False
    assert not set(usable_rows(train)) & {3, 7, 10, 11, 12}
    done = probe_store(train, "b2/t30", validation=other, method="ridge", n_resamples=5)
    assert sum(done.result["splits"][name]["rows"] for name in ("train", "test")) == 195
    assert done.result["left_out"] == {
        "train": {"in quarantine": 2, "whose labels are unknown": 3},
        "validation": {"in quarantine": 2, "whose labels are unknown": 0},
    }
    train.labelled[:] = False
    with pytest.raises(
        ProbeError, match=r"no valid sample with known labels: of 200, 2 in quarantine, 198 whose labels are unknown\. Look at difffeat"
    ):
        probe_store(train, "b2/t30")


def test_a_sample_serves_one_split_alone(grid_stores, make_store) -> None:
    train, other = grid_stores
    other.inputs[[3, 20, 21]] = train.inputs[[3, 20, 21]]  # row 3 is in quarantine
    message = r"2 samples of the test split are in the train split as well, for example 's0020' \(same id, same content\)"
    with pytest.raises(ProbeError, match=message):
        make_parts(train, test=other)
    with pytest.raises(ProbeError, match="2 samples of the validation split are in the train split as well"):
        evaluate_taps(train, other)
    other.ids[20:22] = ["other", "another"]
    with pytest.raises(ProbeError, match="for example 'other', which is 's0020' in train"):
        make_parts(train, test=other)
    notes = make_parts(train, test=other, allow_shared=True).notes
    assert any("2 samples of the test split are in the train split as well" in note and "were allowed" in note for note in notes)
    for store in (train, other):  # the same words may be said of two images
        store.manifest = {"recipe": {"graph": {"kind": "text"}}}
    make_parts(train, test=other)
    with pytest.raises(ProbeError, match="148 samples of the test split are in the validation split as well"):
        make_parts(train, validation=other, test=other)


def test_stores_of_other_recipes_or_classes_do_not_meet(grid_stores) -> None:
    train, other = grid_stores
    other.fingerprint, other.manifest = "ab" * 32, {"recipe": {"run": {"seed": 7}}}
    train.manifest = {"recipe": {"run": {"seed": 0}}}
    message = r"the test store was made by another recipe \(abababababab\) than the training store \(000000000000\)\. .*:\n  run.seed: 0 -> 7$"
    with pytest.raises(ProbeError, match=message):
        probe_store(train, "b2/t30", test=other)
    probe_store(train, "b2/t30", test=other, allow_mixed=True, n_resamples=5, settings={"epochs": 1})
    other.classes = ("class-0", "class-1", "b", "class-2")
    message = (
        r"the validation store has other classes than the training store \(4 against 4\): it lacks 'class-3'; it alone has 'b'\. .* --classes FILE"
    )
    with pytest.raises(ProbeError, match=message):
        evaluate_taps(train, other)
    other.classes = train.classes[::-1]
    with pytest.raises(ProbeError, match="the same ones in another order, from class 0 on: 'class-0' there, 'class-3' here"):
        evaluate_taps(train, other)


def test_a_grid_of_taps_is_ridge_at_each(grid_stores) -> None:
    train, validation = grid_stores
    scores = evaluate_taps(train, validation)
    assert (scores.grid.blocks, scores.grid.timesteps) == ((1, 2), (0, 30))
    assert scores.best == "b2/t30"
    rows, held = usable_rows(train), usable_rows(validation)
    for i, block in enumerate((1, 2)):
        for j, t in enumerate((0, 30)):
            x, other = train.tensors[f"b{block}/t{t}"], validation.tensors[f"b{block}/t{t}"]
            alone = RidgeProbe().fit(x[rows], train.labels[rows], validation=(other[held], validation.labels[held]))
            assert scores.values[i, j] == pytest.approx(max(alone.validation_map_), abs=1e-9)
            assert scores.alphas[i, j] == alone.alpha_
    assert scores.rows == {"train": 198, "validation": 148}


def test_what_was_given_was_not_chosen(grid_stores) -> None:
    done = probe_store(grid_stores[0], "b2/t30", method="ridge", settings={"alphas": (0.1,)}, n_resamples=5)
    assert done.result["chosen"] == {"name": "alpha", "value": 0.1, "on": "nothing: alpha was given", "candidates": [], "mAP": []}
    assert done.result["selected_on"] == "nothing: alpha was given"


def test_the_interval_holds_its_score_and_says_of_what_it_is(grid_stores) -> None:
    result = probe_store(grid_stores[0], "b2/t30", method="ridge", n_resamples=50).result
    interval = result["interval"]
    assert interval["low"] <= interval["value"] <= interval["high"]
    assert interval["of"] == "the mean over test sets of this size"
    assert set(interval["rare"]) <= set(grid_stores[0].classes)
    assert all(count < 10 for count in interval["rare"].values())
    assert f"{result['splits']['test']['rows']} samples are few: the interval is narrower than it should be" in result["notes"]


def test_numbers_on_validation_say_that_they_flatter(grid_stores) -> None:
    options: dict[str, Any] = {"method": "ridge", "n_resamples": 5}
    flattering = [note for note in probe_store(grid_stores[0], "b2/t30", report_on="validation", **options).result["notes"] if "flatters" in note]
    assert len(flattering) == 1
    assert not [note for note in probe_store(grid_stores[0], "b2/t30", **options).result["notes"] if "flatters" in note]


def test_a_grid_of_alphas_that_ends_too_soon_is_told_with_the_taps(grid_stores) -> None:
    cut = evaluate_taps(*grid_stores, alphas=(1.0, 1000.0))
    assert cut.at_edge
    assert f"alpha was chosen at an edge of its grid at {len(cut.at_edge)} taps ({cut.at_edge[0]}" in cut.notes[1]
    whole = evaluate_taps(*grid_stores)
    assert whole.at_edge == ()
    assert whole.to_dict()["ties"] == "of equal ones the smaller block, then the smaller timestep"


def test_taps_that_are_not_there_stay_open(grid_stores) -> None:
    scores = evaluate_taps(*grid_stores, taps=["b1/t0", "b2/t30"], max_rows=50)
    assert np.isnan(scores.values[0, 1])
    assert scores.rows["train"] == 50
    data = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert data["mAP"][0][1] is None
    assert (data["selected_on"], data["reported_on"], data["best"]) == ("validation", "validation", "b2/t30")


def test_metrics_never_write_over_older_ones(tmp_path) -> None:
    paths = [write_metrics(tmp_path / "out", {"run": run}) for run in range(3)]
    assert [path.name for path in paths] == ["metrics.json", "metrics-2.json", "metrics-3.json"]
    assert [json.loads(path.read_text())["run"] for path in paths] == [0, 1, 2]
    with pytest.raises(ConfigError, match="these metrics are not plain JSON"):
        write_metrics(tmp_path, {"value": float("nan")})
    assert not (tmp_path / "metrics.json").exists()


def test_what_cannot_be_probed_is_said(grid_stores) -> None:
    train, other = grid_stores
    with pytest.raises(ConfigError, match="report_on must be one of train, validation, test; got 'dev'"):
        probe_store(train, "b1/t0", report_on="dev")
    with pytest.raises(ProbeError, match="there are no rows to report on: give a test store, or a share above 0 in fractions"):
        probe_store(train, "b1/t0", fractions=(0.8, 0.2, 0), settings={"epochs": 1})
    other.valid[:] = False
    with pytest.raises(ProbeError, match="this store has no valid sample with known labels: of 150, 150 in quarantine"):
        evaluate_taps(train, other)
    train.labels = None
    with pytest.raises(ProbeError, match=re.escape("this store has no labels, so nothing can be probed")):
        probe_store(train, "b1/t0")


def test_the_rarest_class_of_each_row_is_found_piece_by_piece() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random((20_000, 7)) < [0.5, 0.3, 0.1, 0.1, 0.02, 0, 0.3]
    frequency = labels.sum(axis=0)
    expected = np.where(labels, frequency, len(labels) + 1).argmin(axis=1)
    np.testing.assert_array_equal(rarest_class(labels), np.where(labels.any(axis=1), expected, 7))
    np.testing.assert_array_equal(rarest_class(np.ones((3, 2), bool)), [0, 0, 0])
