"""The side of a sample depends on the sample and the seed: not on its neighbours, their order, or their number."""

from __future__ import annotations

import numpy as np
import pytest

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.split_files import read_splits, write_splits
from difffeat.probe.splits import SPLITS, drawn_rows, ids_digest, make_parts, split_rows, split_sides


def sides(ids: list[str], labels: np.ndarray, **options: object) -> dict[str, int]:
    part = split_sides(ids, labels, **options).part  # type: ignore[arg-type]
    return dict(zip(ids, part.tolist(), strict=True))


@pytest.fixture
def many() -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(0)
    return [f"s{row}" for row in range(2000)], (rng.random((2000, 6)) < [0.5, 0.3, 0.2, 0.1, 0.1, 0.1]).astype(np.uint8)


def test_a_sample_keeps_its_side_when_rows_are_dropped_added_or_reordered(many: tuple[list[str], np.ndarray]) -> None:
    ids, labels = many
    whole = sides(ids, labels)
    rng = np.random.default_rng(1)
    for rows in (np.arange(1000), rng.permutation(2000), np.sort(rng.permutation(2000)[:700]), np.arange(1999, 900, -1)):
        part = sides([ids[row] for row in rows], labels[rows])
        assert part == {id_: whole[id_] for id_ in part}
    assert sides(ids, labels, seed=1) != whole


def test_validation_is_the_same_with_a_test_store_and_without(many: tuple[list[str], np.ndarray]) -> None:
    ids, labels = many
    parts, without = (split_rows(labels, ids=ids, fractions=fractions) for fractions in ((0.7, 0.15, 0.15), (0.85, 0.15, 0)))
    np.testing.assert_array_equal(parts["validation"], without["validation"])
    assert set(parts["test"]) < set(without["train"])


@pytest.mark.parametrize("seed", range(20))
def test_rare_classes_stand_in_each_part(seed: int) -> None:
    labels = np.zeros((400, 30), np.uint8)
    rng = np.random.default_rng(seed)
    for column in range(30):
        labels[rng.choice(400, 3 + column // 10, replace=False), column] = 1
    done = split_sides([f"{seed}-{row}" for row in range(400)], labels, seed=seed)
    served = [np.bincount(done.part[labels[:, column] == 1], minlength=3).min() for column in range(30)]
    assert min(served) >= 1
    assert 0 < done.moved < 70


def test_small_stores_have_all_parts() -> None:
    for count in range(3, 30):
        parts = split_rows(np.ones((count, 1)), seed=count)
        assert min(len(rows) for rows in parts.values()) >= 1


def test_rows_of_one_image_stand_together(make_problem, make_store) -> None:
    problem = make_problem(n=120)
    store = make_store({"b1/t0": problem.x}, problem.y)
    store.inputs[60:] = store.inputs[:60]  # every image twice
    parts = make_parts(store)
    for part in parts.values():
        assert set(part.rows % 60) == set(part.rows[part.rows < 60] % 60) == set(part.rows[part.rows >= 60] % 60)
    assert parts.record["rows_that_repeat_an_image"] == 60
    assert "60 rows repeat the image of another row" in parts.notes[0]
    store.inputs[:] = store.inputs[0]
    with pytest.raises(ProbeError, match="1 rows are too few for a validation split"):
        make_parts(store)


def test_images_that_nobody_read_are_not_one_image(make_problem, make_store) -> None:
    problem = make_problem(n=60)
    store = make_store({"b1/t0": problem.x}, problem.y)
    store.inputs[:] = 0
    assert make_parts(store).record["rows_that_repeat_an_image"] == 0


def test_captions_of_one_image_stand_together(make_problem, make_store) -> None:
    problem = make_problem(n=90)
    store = make_store({"b1/t0": problem.x}, problem.y)
    store.manifest = {"recipe": {"graph": {"kind": "text"}}}
    store.images = [f"{row // 3}.jpg" for row in range(90)]
    for part in make_parts(store).values():
        assert all(np.bincount(part.rows // 3)[part.rows // 3] == 3)


def test_splits_that_were_given_are_kept_and_held_to_be_apart(make_problem, make_store) -> None:
    problem = make_problem(n=60)
    store = make_store({"b1/t0": problem.x}, problem.y, invalid=(5,))
    given = {id_: SPLITS[min(row // 20, 2)] for row, id_ in enumerate(store.ids[:50])}
    parts = make_parts(store, splits=given)
    assert [len(part.rows) for part in parts.values()] == [19, 20, 10]
    assert any("10 rows stand in no split" in note for note in parts.notes)
    with pytest.raises(ConfigError, match="the splits call 10 rows of the training store test, and a test store was given as well"):
        make_parts(store, test=make_store({"b1/t0": problem.x + 1}, problem.y), splits=given)
    with pytest.raises(ProbeError, match=r"the splits name none of the usable samples of this store: they name 'a\.jpg'"):
        make_parts(store, splits={"a.jpg": "train"})
    with pytest.raises(ProbeError, match=r"no usable row of this store for train \(0 train, 0 validation, 1 test\)"):
        make_parts(store, splits={"s0000": "test"})
    store.inputs[45] = store.inputs[1]
    with pytest.raises(
        ProbeError, match="1 samples of the test split are in the train split as well, for example 's0045', which is 's0001' in train"
    ):
        make_parts(store, splits=given)
    assert make_parts(store, splits=given, allow_shared=True).record["allow_shared"]


FILES = {
    "lists.json": '{"train": ["a", 2], "val": ["c"], "test": ["d e"]}',
    "map.json": '{"a": "train", "2": "training", "c": "dev", "d e": "TEST"}',
    "records.json": '[{"id": "a", "split": "train"}, {"id": 2, "split": "train"}, {"id": "c", "split": "val"}, {"id": "d e", "split": "test"}]',
    "lines.jsonl": '{"id": "a", "split": "train"}\n{"id": 2, "split": "train"}\n\n{"id": "c", "split": "val"}\n{"id": "d e", "split": "test"}\n',
    "manifest.csv": "\ufeffid,caption,Split\na,x,train\n2,y,train\nc,z,valid\nd e,w,test\nf,w,\n",
    "bare.csv": "a,train\n2,train\nc,validation\nd e,test\n",
    "table.tsv": "image_id\tsplit\na\ttrain\n2\ttrain\nc\tval\nd e\ttest\n",
    "words.txt": "# ours\na train\n2, train\nc\tval\nd e test\n",
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_splits_are_read_as_people_write_them(name: str, tmp_path) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    assert read_splits(tmp_path / name) == {"a": "train", "2": "train", "c": "validation", "d e": "test"}


def test_a_parquet_table_is_read_and_what_is_written_is_read_again(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": ["a", "b"], "split": ["train", None], "x": [1, 2]}), tmp_path / "t.parquet")
    assert read_splits(tmp_path / "t.parquet") == {"a": "train"}
    path = write_splits(tmp_path / "splits.json", {"train": ["a"], "test": ["b"]}, {"seed": 3})
    assert read_splits(path) == {"a": "train", "b": "test"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "id,split\nx,holdout\n", "row 2: 'holdout' is not a split. Write train, validation or test"),
        ("a.csv", "id,split\nx,train\nx,test\n", "row 3: 'x' is test here and train before"),
        ("a.csv", "key,fold\nx,1\n", "row 2: it has key, fold; two of its columns must be the id"),
        ("a.json", "[1]", "entry 0: expected an object with id and split, found int"),
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"train": [["a"]]}', r"train: \['a'\] is not an id"),
        ("a.json", '{"a": 1}', "1 is not a split"),
        ("a.txt", "train\n", "line 1: expected an id and its split"),
        ("a.txt", "", "names no sample"),
    ],
)
def test_files_that_say_something_else_are_refused(name: str, text: str, message: str, tmp_path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_splits(tmp_path / name)
    with pytest.raises(ConfigError, match="is not a file"):
        read_splits(tmp_path)


def test_a_draw_of_rows_sees_every_class_and_nests(make_store) -> None:
    labels = np.repeat(np.eye(5, dtype=np.uint8), 40, axis=0)  # sorted by class
    store = make_store({"b1/t0": np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)}, labels)
    rows = np.arange(200)
    for count in (5, 20, 100):
        drawn = drawn_rows(store, rows, count, 0)
        assert len(drawn) == count
        assert labels[drawn].any(axis=0).all()
        assert set(drawn) <= set(drawn_rows(store, rows, 2 * count, 0))
    assert not np.array_equal(drawn_rows(store, rows, 20, 0), drawn_rows(store, rows, 20, 1))
    np.testing.assert_array_equal(drawn_rows(store, rows, None, 0), rows)
    with pytest.raises(ConfigError, match="max_rows must be at least 1, got 0"):
        drawn_rows(store, rows, 0, 0)


def test_equal_samples_have_equal_digests() -> None:
    assert ids_digest(["a", "b"]) == ids_digest(["b", "a"]) != ids_digest(["ab"])
