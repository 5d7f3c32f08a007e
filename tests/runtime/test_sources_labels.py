"""Labels are names whatever form they are written in, and a number that no class has is never passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from difffeat.errors import SampleError, SourceFormatError
from difffeat.runtime.samples import Source
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_labels import LabelReader
from difffeat.runtime.sources_options import SourceOptions, read_class_names
from tests.runtime.test_sources_tar import listed, shard

CLASSES = ("cat", "dog", "mat")


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (None, None), (-1, None), ("-1", None), (" -1\n", None), ([-1], None), ("dog", ("dog",)), (2, ("mat",)), ("2", ("mat",)), ([], ()),
        ("", None), ("nan", None), (float("nan"), None), ([None], None), (2.0, ("mat",)), ("2.0", ("mat",)), (True, ("dog",)), ("False", ("cat",)),
        (["cat", "mat"], ("cat", "mat")), ([0, 2], ("cat", "mat")), ((1,), ("dog",)),
    ],
)  # fmt: skip
def test_names_and_numbers_become_names(cell: Any, names: tuple[str, ...] | None) -> None:
    assert LabelReader(CLASSES).read(cell, "here") == (names, ())


def test_without_classes_a_number_is_its_own_name() -> None:
    assert LabelReader().read([3, "x"], "here")[0] == ("3", "x")


def test_a_text_holds_several_labels_unless_a_class_is_called_so() -> None:
    assert LabelReader().read("cat; dog|mat", "here")[0] == ("cat", "dog", "mat")
    assert LabelReader(("cat; dog",)).read("cat; dog", "here")[0] == ("cat; dog",)


@pytest.mark.parametrize("cell", [[0, 1, 1], [0.0, 1.0, 1.0], [False, True, True], "0|1|1"])
def test_vectors_of_zeros_and_ones_are_recognised_by_their_length(cell: Any) -> None:
    reader = LabelReader(CLASSES)
    reader.look([cell, [1, 0, 0]])
    assert reader.read(cell, "here")[0] == ("dog", "mat")


def test_one_row_of_another_length_means_numbers() -> None:
    reader = LabelReader(CLASSES)
    reader.look([[0, 1, 2], [1]])
    assert reader.read([0, 2], "here")[0] == ("cat", "mat")


@pytest.mark.parametrize("first", [[], [[0, 1, 2], [1]]])
def test_a_vector_that_comes_after_other_rows_is_not_taken_for_numbers(first: list[Any]) -> None:
    reader = LabelReader(CLASSES)
    reader.look(first)
    with pytest.raises(SourceFormatError, match=r"a.csv, row 2000: its labels look like a 0/1 vector, .* --multi-hot or --no-multi-hot"):
        reader.read([0, 1, 1], "a.csv, row 2000")


VECTORS = [[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
UNNAMED = r"its labels look like 0/1 vectors, and nobody names their 4 classes. Name them with --classes FILE, one a line; or say --multi-hot to call"


def written_as(suffix: str, folder: Path) -> Path:
    """A source of the three vectors above, of this kind."""
    path = folder / f"m{suffix}"
    if suffix == ".csv":
        path.write_text("image,labels\n" + "".join(f"{n}.png,{'|'.join(map(str, row))}\n" for n, row in enumerate(VECTORS)))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"image": f"{n}.png", "labels": row}) + "\n" for n, row in enumerate(VECTORS)))
    elif suffix == ".parquet":
        pq.write_table(pa.table({"image": [f"{n}.png" for n in range(3)], "labels": VECTORS}), path)
    else:
        members = {f"{n}.{kind}": content for n, row in enumerate(VECTORS) for kind, content in (("png", b"x"), ("json", labels_json(row)))}
        shard(path, members)
    return path


def labels_json(row: list[int]) -> bytes:
    return json.dumps({"labels": row}).encode()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".tar"])
def test_vectors_of_unnamed_classes_are_never_read_as_class_numbers(suffix: str, tmp_path: Path) -> None:
    path = written_as(suffix, tmp_path)
    with pytest.raises(SourceFormatError, match=UNNAMED):
        open_source(path)
    source = open_source(path, SourceOptions(multi_hot=True))
    assert source.classes == ("0", "1", "2", "3")
    assert [sample.labels for sample in source.samples] == [("1", "3"), ("0",), ()]
    assert open_source(path, SourceOptions(multi_hot=False)).classes == ("0", "1")


@pytest.mark.parametrize("rows", [[[0, 0, 1], [1]], [[0, 1, 2], [0, 0, 1]], [[1], [0]], [[1, 2], [1, 0]]])
def test_what_may_be_class_numbers_is_read_as_such(rows: list[list[int]]) -> None:
    reader = LabelReader()
    reader.look(rows)
    assert [reader.read(row, "here")[0] for row in rows] == [tuple(dict.fromkeys(map(str, row))) for row in rows]


def test_unnamed_vectors_are_found_after_rows_without_labels() -> None:
    reader = LabelReader()
    reader.look([None, [], -1])
    with pytest.raises(SourceFormatError, match=r"a.csv, row 2000: its labels look like 0/1 vectors"):
        reader.read([0, 1, 1], "a.csv, row 2000")


def test_vectors_of_several_lengths_number_no_classes() -> None:
    with pytest.raises(SourceFormatError, match=r"m.jsonl: with --multi-hot its labels are 0/1 vectors, and their lengths are 2, 3. Give them one"):
        LabelReader(multi_hot=True).look([[0, 1], [0, 1, 1]], "m.jsonl")


@pytest.mark.parametrize("content", ["image,label\n1.png,-1\n2.png,cat\n", "image,labels\n1.png,-1\n2.png,cat\n"])
def test_minus_one_as_text_means_no_label_too(content: str, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(content)
    source = open_source(tmp_path / "m.csv")
    assert (source.classes, [sample.labels for sample in source.samples]) == (("cat",), [None, ("cat",)])
    assert listed(open_source(shard(tmp_path / "a.tar", {"1.png": b"", "1.cls": b"-1\n", "2.png": b"", "2.cls": b"3"})))["1"] == ((), None)


def test_minus_one_beside_other_labels_is_no_label_and_no_class() -> None:
    with pytest.raises(SampleError, match=r"its labels hold -1, which means that there are none, beside others"):
        LabelReader().read([-1, 1], "here")
    assert LabelReader(("-1", "1")).read("-1", "here")[0] == ("-1",)


def test_a_label_of_thousands_of_digits_is_a_name_or_a_typed_error() -> None:
    digits = "9" * 5000
    with pytest.raises(SourceFormatError, match=r"label '9{80}' is none of the 3 classes"):
        LabelReader(CLASSES).read(digits, "here")


def test_what_was_said_is_not_guessed() -> None:
    reader = LabelReader(CLASSES, multi_hot=False)
    reader.look([[0, 1, 1]])
    assert reader.read([0, 1, 1], "here")[0] == ("cat", "dog")


def test_equal_labels_are_one_object() -> None:
    reader = LabelReader()
    assert reader.read(["a", "b"], "here") is reader.read(["a", "b"], "there")


@pytest.mark.parametrize(("cell", "message"), [([0, 1], "a vector of 2 numbers, and there are 3 classes"), ([0, 1, 2], "holds 2, neither 0 nor 1")])
def test_a_bad_vector_is_that_samples_problem(cell: Any, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        LabelReader(CLASSES, multi_hot=True).read(cell, "here")


def test_a_label_that_the_classes_lack_stops_the_listing() -> None:
    with pytest.raises(SourceFormatError, match=r"a.csv, row 3: label 'cow' is none of the 3 classes \(cat, dog, mat ...\)"):
        LabelReader(CLASSES).read("cow", "a.csv, row 3")
    with pytest.raises(SourceFormatError, match=r"label '3' is none of the 3 classes"):
        LabelReader(CLASSES).read(3, "here")


def test_a_class_file_orders_the_classes_also_those_that_never_occur(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("mat\n\ndog\ncat\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"image": f"{n}.png", "labels": row}) + "\n" for n, row in enumerate([[0], [1], []])))
    source = open_source(tmp_path / "a.jsonl", SourceOptions(classes=tmp_path / "names"))
    assert source.classes == ("mat", "dog", "cat")
    assert [sample.labels for sample in source.samples] == [("mat",), ("dog",), ()]


def test_several_columns_of_zeros_and_ones_are_classes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,cat,dog\n1.png,1,0\n2.png,1,1\n3.png,0,0\n4.png,-1,0\n")
    source = open_source(tmp_path / "a.csv", SourceOptions(label_column="cat,dog"))
    assert source.classes == ("cat", "dog")
    assert [sample.labels for sample in source.samples] == [("cat",), ("cat", "dog"), (), ()]
    assert [sample.unknown for sample in source.samples] == [(), (), (), ("cat",)]
    assert source.notes == ("1 of 8 cells of the label vectors are unknown, each for its class alone: no probe trains or scores on them",)


def test_classes_that_are_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,labels\n" + "".join(f"{n}.png,{n}\n" for n in (10, 2, 1)))
    assert open_source(tmp_path / "a.csv").classes == ("1", "2", "10")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "holds no class names"), (b"a\nb\na\n", "holds 'a' twice"), (b"\xff", "is not UTF-8"), (None, "cannot be read")]
)
def test_a_class_file_that_will_not_do_is_told(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "names").write_bytes(content)
    with pytest.raises(SourceFormatError, match=message):
        read_class_names(tmp_path / "names")


def test_labels_of_minus_one_are_counted_as_unknown_and_refused_beside_one_alone(tmp_path: Path) -> None:
    def listed(*labels: str, **options: Any) -> Source:
        (tmp_path / "m.csv").write_text("image,label\n" + "".join(f"{n}.png,{label}\n" for n, label in enumerate(labels)))
        return open_source(tmp_path / "m.csv", SourceOptions(**options))

    source = listed("-1", "3", "1", "-1")
    assert source.classes == ("1", "3")
    assert source.notes == ("2 labels -1 are read as unknown, as published test sets write it; a class of that name is named with --classes FILE",)
    with pytest.raises(SourceFormatError, match=r"its labels are 1 and -1, and -1 alone means that nobody knows a label\."):
        listed("-1", "1")
    (tmp_path / "classes.txt").write_text("-1\n1\n")
    both = listed("-1", "1", classes=tmp_path / "classes.txt")
    assert ([sample.labels for sample in both.samples], both.notes) == ([("-1",), ("1",)], ())


def test_vectors_that_begin_late_are_numbered_too(tmp_path: Path) -> None:
    lines = ['{"image": "a.png", "labels": null}'] * 1200 + ['{"image": "b.png", "labels": [0, 1, 1]}']
    (tmp_path / "m.jsonl").write_text("".join(line[:-1] + f', "id": "{n}"}}\n' for n, line in enumerate(lines)))
    source = open_source(tmp_path / "m.jsonl", SourceOptions(multi_hot=True))
    assert (source.classes, source.samples[-1].labels) == (("0", "1", "2"), ("1", "2"))


@pytest.mark.parametrize("content", ['["mat", "dog"]', '{"0": "mat", "1": "dog"}', '{"mat": 0, "dog": 1}'])
def test_class_names_in_json_are_read_in_the_order_of_their_numbers(content: str, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(content)
    assert read_class_names(tmp_path / "names.json") == ("mat", "dog")


@pytest.mark.parametrize("content", ["{", '{"1": "mat", "2": "dog"}', "[1]", '{"a": {"b": 1}}', '"mat"'])
def test_json_that_holds_no_class_names_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(SourceFormatError, match=r"names.json (is not JSON|holds neither a list of class names nor)"):
        read_class_names(tmp_path / "names.json")


def test_names_are_the_same_in_either_unicode_form() -> None:
    assert LabelReader(("caf\u00e9",)).read("cafe\u0301", "here")[0] == ("caf\u00e9",)


def test_shares_of_classes_are_not_read_as_class_numbers_where_they_are_whole(tmp_path: Path) -> None:
    rows = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.3, 0.7, 0.0]]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"id": n, "caption": "a", "labels": row}) + "\n" for n, row in enumerate(rows)))
    with pytest.raises(SourceFormatError, match=r"row 1: its labels look like 0/1 vectors, and nobody names their 3 classes"):
        open_source(tmp_path / "m.jsonl")
