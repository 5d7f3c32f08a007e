"""Images in cells of Parquet and Arrow files are listed by their schema and read one at a time; saved Hugging Face datasets are such files."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from difffeat.errors import DecodeError, SourceError, SourceFormatError
from difffeat.runtime import cells as cells_module
from difffeat.runtime.samples import Source
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from tests.runtime.fake import encoded

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
HF = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def bytes_of(source: Source) -> list[bytes]:
    return [sample.image.read() for sample in source.samples if sample.image is not None]


def parquet(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, **options: Any) -> Path:
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def arrow(path: Path, columns: dict[str, Any], stream: bool = True) -> Path:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


IMAGES = [encoded(index) for index in range(5)]
CELLS = {
    "binary": pa.array(IMAGES, pa.binary()),
    "large": pa.array(IMAGES, pa.large_binary()),
    "struct": pa.array([{"bytes": image, "path": f"{index}.png"} for index, image in enumerate(IMAGES)], STRUCT),
}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
def test_cells_of_every_kind_and_file_give_their_bytes(form: str, kind: str, tmp_path: Path) -> None:
    columns = {"image": CELLS[kind], "caption": [f"number {index}" for index in range(5)]}
    if form == "parquet":
        path = parquet(tmp_path / "a.parquet", columns, row_group_size=2)
    else:
        path = arrow(tmp_path / "a.arrow", columns, form == "stream")
    source = open_source(path)
    assert bytes_of(source) == IMAGES
    assert bytes_of(pickle.loads(pickle.dumps(source))) == IMAGES
    assert [sample.id for sample in source.samples] == [f"{index:09d}" for index in range(5)]
    assert source.samples[1].captions == ("number 1",)
    assert source.samples[1].locator == ("1.png" if kind == "struct" else f"{path.name}#2")
    assert source.samples[1].size == -1


def test_several_files_are_one_source_with_running_ids(tmp_path: Path) -> None:
    for number in range(3):
        parquet(tmp_path / f"{number}.parquet", {"image": pa.array([IMAGES[number]] * (number + 1), pa.binary())})
    source = open_source(f"{tmp_path}/{{0..2}}.parquet")
    assert [sample.id for sample in source.samples][-1] == "000000005"
    assert bytes_of(source) == [IMAGES[number] for number in range(3) for _ in range(number + 1)]


def test_rows_are_right_in_any_order_and_from_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells_module, "WINDOW_BYTES", 40)
    monkeypatch.setattr(cells_module, "OPEN_FILES", 1)
    values = [b"%05d" % row for row in range(300)]
    for number in range(3):
        parquet(tmp_path / f"{number}.parquet", {"image": pa.array(values[number::3], pa.binary())}, row_group_size=40)
    source = open_source(f"{tmp_path}/{{0..2}}.parquet")
    expected = [value for number in range(3) for value in values[number::3]]
    order = [row * 37 % 300 for row in range(300)] + list(range(300))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: source.samples[row].image.read(), order))  # type: ignore[union-attr]
    assert found == [expected[row] for row in order]


def test_reading_forward_reads_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    begin = cells_module._ParquetReader._begin
    monkeypatch.setattr(cells_module._ParquetReader, "_begin", lambda self, group: (begun.append(group), begin(self, group))[1])
    path = parquet(tmp_path / "a.parquet", {"image": pa.array([b"x"] * 100, pa.binary())}, row_group_size=30)
    bytes_of(open_source(path))
    assert begun == [0, 1, 2, 3]


def test_a_cell_without_bytes_is_the_path_beside_it(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(IMAGES[0])
    rows = [{"bytes": None, "path": "x.png"}, {"bytes": None, "path": "gone.png"}, {"bytes": None, "path": None}, None]
    samples = open_source(parquet(tmp_path / "a.parquet", {"image": pa.array(rows, STRUCT)})).samples
    blobs = [sample.image for sample in samples]
    assert blobs[0] is not None
    assert blobs[0].read() == IMAGES[0]
    for blob, message in zip(blobs[1:], ["No such file", "its cell is empty", "its cell is empty"], strict=True):
        assert blob is not None
        with pytest.raises(DecodeError, match=message):
            blob.read()


def test_a_cell_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    blob = open_source(parquet(tmp_path / "a.parquet", {"image": pa.array([b"12345"], pa.binary())})).samples[0].image
    assert blob is not None
    with pytest.raises(DecodeError, match=r"its cell has 5 bytes, more than the limit of 4"):
        blob.read(4)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_file_that_is_gone_or_changed_is_that_samples_problem(name: str, tmp_path: Path) -> None:
    write = parquet if name == "a.parquet" else arrow
    path = write(tmp_path / name, {"image": pa.array([b"1", b"2"], pa.binary())})
    blob = open_source(path).samples[1].image
    assert blob is not None
    path.unlink()
    with pytest.raises(DecodeError, match=r"row 2 of .* cannot be read \(.*No such file"):
        blob.read()
    write(path, {"image": pa.array([b"1"], pa.binary())})
    with pytest.raises(DecodeError, match=r"row 2 of .* cannot be read"):
        blob.read()


def test_columns_are_chosen_by_name_and_asked_for_ones_must_exist(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"jpg": CELLS["binary"], "text": list("abcde"), "key": list("vwxyz"), "image": list("fghij")})
    source = open_source(path, SourceOptions(image_column="jpg", caption_column="text", id_column="key"))
    assert bytes_of(source) == IMAGES
    assert (source.samples[0].id, source.samples[0].captions) == ("v", ("a",))
    with pytest.raises(SourceFormatError, match=r"has no column 'uid'; its columns that are read here: image"):
        open_source(path, SourceOptions(id_column="uid"))
    with pytest.raises(SourceFormatError, match=r"column 'image' must be a path, image bytes or a struct of 'bytes' and 'path', found double"):
        open_source(parquet(tmp_path / "b.parquet", {"image": [1.5]}))


def test_parquet_behind_a_url_is_read_by_ranges_and_images_may_be_urls(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    path = parquet(tmp_path / "a.parquet", {"image": CELLS["struct"]}, row_group_size=2)
    memory.pipe({"/tables/a.parquet": path.read_bytes(), "/tables/x/1.png": IMAGES[1], "/tables/m.csv": b"image\nx/1.png\nmemory://tables/x/1.png\n"})
    path.unlink()
    assert bytes_of(open_source("memory://tables/a.parquet")) == IMAGES
    source = open_source("memory://tables/m.csv")
    assert [sample.id for sample in source.samples] == ["x/1", "memory://tables/x/1"]
    assert bytes_of(source) == [IMAGES[1]] * 2
    assert bytes_of(open_source("memory://tables/x")) == [IMAGES[1]]


def test_class_names_and_the_image_column_come_from_the_schema(tmp_path: Path) -> None:
    features = {"img": {"_type": "Image"}, "label": HF["label"]}
    source = open_source(parquet(tmp_path / "a.parquet", {"img": CELLS["struct"], "label": [0, 1, 1, 0, -1]}, features))
    assert source.classes == ("cat", "dog")
    assert [sample.labels for sample in source.samples] == [("cat",), ("dog",), ("dog",), ("cat",), None]
    listed = {"image": {"_type": "Image"}, "labels": {"_type": "List", "feature": HF["label"]}}
    several = open_source(parquet(tmp_path / "b.parquet", {"image": CELLS["struct"], "labels": [[0, 1], [0], [], [1], [0, 1]]}, listed))
    assert [sample.labels for sample in several.samples] == [("cat", "dog"), ("cat",), (), ("dog",), ("cat", "dog")]


def labelled(path: Path, names: list[str] | None, values: list[Any]) -> Path:
    """A file whose ids and images are its own, with the class names that it declares for its labels."""
    columns = {"image": [f"{path.stem}{row}.png" for row in range(len(values))], "label": values}
    features = None if names is None else {"label": {"names": names, "_type": "ClassLabel"}}
    return parquet(path, columns, features)


def test_each_files_numbers_mean_its_own_class_names(tmp_path: Path) -> None:
    labelled(tmp_path / "a.parquet", ["cat", "dog"], [0, 1])
    labelled(tmp_path / "b.parquet", ["dog", "cow", "cat"], [0, 1, 2, -1])
    labelled(tmp_path / "c.parquet", None, ["cow", None])
    source = open_source(f"{tmp_path}/{{a,b,c}}.parquet")
    assert source.classes == ("cat", "dog", "cow")
    assert [sample.labels for sample in source.samples] == [("cat",), ("dog",), ("dog",), ("cow",), ("cat",), None, ("cow",), None]


def test_numbers_that_may_mean_two_things_are_refused(tmp_path: Path) -> None:
    labelled(tmp_path / "a.parquet", ["cat", "dog"], [0, 1])
    labelled(tmp_path / "b.parquet", ["dog", "cat"], [0, 1])
    labelled(tmp_path / "c.parquet", None, [0, 1])
    (tmp_path / "names").write_text("one\ntwo\n")
    named = SourceOptions(classes=tmp_path / "names")
    with pytest.raises(SourceFormatError, match=r"a.parquet and .*b.parquet declare different class names, .* Leave out --classes"):
        open_source(f"{tmp_path}/{{a,b}}.parquet", named)
    with pytest.raises(SourceFormatError, match=r"c.parquet declares no names for the numbers of its labels, and .*a.parquet does.* pass --classes"):
        open_source(f"{tmp_path}/{{a,c}}.parquet")
    assert [sample.labels for sample in open_source(f"{tmp_path}/{{a,c}}.parquet", named).samples] == [("one",), ("two",)] * 2


@pytest.mark.parametrize("order", ["{a,b}", "{b,a}"])
def test_files_without_images_and_files_with_them_are_one_source(order: str, tmp_path: Path) -> None:
    for kind in ("binary", "struct"):
        parquet(tmp_path / "a.parquet", {"caption": ["one", "two"]})
        parquet(tmp_path / "b.parquet", {"image": CELLS[kind], "caption": list("abcde")})
        source = open_source(f"{tmp_path}/{order}.parquet")
        assert bytes_of(source) == IMAGES
        assert {sample.captions for sample in source.samples if sample.image is None} == {("one",), ("two",)}


def test_the_name_of_a_field_that_is_no_utf8_is_each_samples_problem(tmp_path: Path) -> None:
    rows = [{"bytes": None, "zzzz": 1, "path": "x.png"}]
    path = arrow(tmp_path / "a.arrow", {"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("zzzz", pa.int8()), ("path", pa.string())]))})
    path.write_bytes(path.read_bytes().replace(b"zzzz", b"zz\xff\xfe"))
    blob = open_source(path).samples[0].image
    assert blob is not None
    with pytest.raises(DecodeError, match=r"row 1 of .* cannot be read \('utf-8' codec"):
        blob.read()


@pytest.mark.parametrize("write", [parquet, arrow])
def test_a_column_that_is_there_twice_is_refused(write: Any, tmp_path: Path) -> None:
    table = pa.table([["a.png"], ["first"], ["second"], [1], [2]], names=["image", "caption", "caption", "other", "other"])
    path = tmp_path / f"a.{write.__name__}"
    if write is parquet:
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(SourceFormatError, match=r"has 2 columns called 'caption', of which one would hide the others. Rename or remove all but one"):
        open_source(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_name_that_is_no_utf8_is_told(kind: str, tmp_path: Path) -> None:
    columns = {"image": ["a.png"], "zzzz": [1]}
    path = arrow(tmp_path / "a.arrow", columns) if kind == "arrow" else parquet(tmp_path / "a.parquet", columns, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"zzzz", b"zz\xff\xfe"))
    with pytest.raises(SourceFormatError, match=rf"a.{kind} is no readable {kind.capitalize()} file: .*utf-8"):
        open_source(path)


@pytest.mark.parametrize("metadata", [b"", b"{", b"[]", b'{"info": 5}', b'{"info": {"features": [1]}}'])
def test_strange_metadata_is_passed_over(metadata: bytes, tmp_path: Path) -> None:
    table = pa.table({"image": CELLS["binary"]}).replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, tmp_path / "a.parquet")
    assert bytes_of(open_source(tmp_path / "a.parquet")) == IMAGES


def test_a_damaged_table_is_named_with_its_row(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"image": [f"{row}.png" for row in range(5000)]}, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(SourceFormatError, match=r"a.parquet, row 1 or soon after cannot be read"):
        open_source(path)


SAVE = """
import sys
import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
root, images = sys.argv[1], [open(path, "rb").read() for path in sys.argv[2:]]
features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"]), "captions": List(Value("string"))})
def rows(count):
    return {"image": [{"bytes": data, "path": None} for data in images[:count]], "label": [i % 2 for i in range(count)],
            "captions": [[f"number {i}", "of five"] for i in range(count)]}
whole = Dataset.from_dict(rows(5), features=features)
DatasetDict(train=whole, test=Dataset.from_dict(rows(2), features=features)).save_to_disk(root + "/dict", num_shards={"train": 2, "test": 1})
whole.select([3, 1]).save_to_disk(root + "/alone")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the datasets library writes, by the library itself in a process of its own."""
    pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("saved")
    for index, image in enumerate(IMAGES):
        (root / f"{index}.png").write_bytes(image)
    command = [sys.executable, "-c", SAVE, str(root), *(str(root / f"{index}.png") for index in range(5))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return root


def test_a_saved_dataset_is_read_as_the_library_wrote_it(saved: Path) -> None:
    source = open_source(saved / "alone")
    assert bytes_of(source) == [IMAGES[3], IMAGES[1]]
    assert [(sample.labels, sample.captions) for sample in source.samples] == [(("dog",), (f"number {n}", "of five")) for n in (3, 1)]
    assert source.classes == ("cat", "dog")


def test_a_split_is_chosen_by_name(saved: Path) -> None:
    train = open_source(f"{saved}/dict::train")
    assert bytes_of(train) == IMAGES
    assert len(list((saved / "dict" / "train").glob("*.arrow"))) == 2
    assert bytes_of(open_source(saved / "dict", SourceOptions(split="test"))) == IMAGES[:2]
    for locator, message in (
        (f"{saved}/dict", r"has several splits: train, test. Choose one with --split, or as SOURCE::train"),
        (f"{saved}/dict::val", r"has no split 'val': train, test"),
        (f"{saved}/alone::train", r"is one saved dataset, without splits. Leave out --split"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source(locator)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "a" * 5000}]}, "lacks .*aaa, of 1 files"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "lacks .*gone.arrow, of 1 files. Copy the dataset again"),
        ({"_data_files": [], "_indices_data_files": [{}]}, "holds rows in another order than its files. Save it anew: dataset.flatten_indices"),
        ({"_data_files": 5}, "names no data files"),
        ([], "is no JSON object"),
        (None, "cannot be read"),
    ],
)
def test_a_saved_dataset_that_is_not_whole_is_told(state: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{oops" if state is None else json.dumps(state))
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path)


def test_offsets_that_point_outside_an_arrow_file_are_not_followed(tmp_path: Path) -> None:
    path = arrow(tmp_path / "a.arrow", {"image": pa.array([b"one", b"two"], pa.binary()), "caption": ["x" * 5, "y" * 7]})
    content = path.read_bytes()
    for offsets, message in ((bytes([0, 0, 0, 0, 3, 0, 0, 0, 6]), None), (bytes([0, 0, 0, 0, 5, 0, 0, 0, 12]), "row 1 or soon after cannot be read")):
        at = content.index(offsets) + 4
        path.write_bytes(content[:at] + b"\xff\xff\xff\x7f" + content[at + 4 :])
        if message is not None:
            with pytest.raises(SourceFormatError, match=message):
                open_source(path)
            continue
        for sample in open_source(path).samples:
            assert sample.image is not None
            with pytest.raises(DecodeError, match=r"cannot be read \(.*[Oo]ffset"):
                sample.image.read()


def test_a_path_that_is_no_text_is_refused_with_the_type_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"image": {"bytes": b"x", "path": ["b.png"]}}]), tmp_path / "a.parquet")
    with pytest.raises(
        SourceFormatError, match=r"column 'image' must be a path, image bytes or a struct of 'bytes' and 'path', found struct<.*list<"
    ):
        open_source(tmp_path / "a.parquet")


FORMS_OF_BYTES = {"view": pa.array(IMAGES, pa.binary_view()), "dictionary": pa.array(IMAGES, pa.binary()).dictionary_encode()}


@pytest.mark.parametrize("kind", FORMS_OF_BYTES)
def test_views_and_dictionaries_of_images_are_images(kind: str, tmp_path: Path) -> None:
    assert bytes_of(open_source(arrow(tmp_path / "m.arrow", {"image": FORMS_OF_BYTES[kind]}))) == IMAGES


def test_a_struct_of_views_is_an_image_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(IMAGES[1])
    fields = [pa.array([IMAGES[0], None], pa.binary_view()), pa.array(["0.png", "1.png"], pa.string_view())]
    source = open_source(arrow(tmp_path / "m.arrow", {"image": pa.StructArray.from_arrays(fields, ["bytes", "path"])}))
    assert bytes_of(source) == IMAGES[:2]


TEXTS = {
    "view": pa.array(["a", None], pa.string_view()),
    "large": pa.array(["a", None], pa.large_string()),
    "dictionary": pa.array(["a", None]).dictionary_encode(),
    "runs": pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int32()), pa.array(["a", None])),
    "list view": pa.array([["a"], None], pa.list_view(pa.string_view())),
    "nan text": pa.array(["a", "nan"]),
    "bytes": pa.array([b"a", None]),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_every_arrow_type_are_texts_and_nothing_is_nothing(kind: str, tmp_path: Path) -> None:
    images = pa.array(["0.png", "1.png"], pa.string_view())
    source = open_source(arrow(tmp_path / "m.arrow", {"image": images, "labels": TEXTS[kind]}))
    assert [(sample.id, sample.labels) for sample in source.samples] == [("0", ("a",)), ("1", None)]


def test_numbers_and_truth_in_columns_are_those_of_tables_of_text(tmp_path: Path) -> None:
    columns = {"image": ["0.png", "1.png"], "A": pa.array([True, None]), "B": pa.array([0.0, float("nan")]), "C": pa.array([-1, 1], pa.int8())}
    (tmp_path / "m.csv").write_text("image,A,B,C\n0.png,True,0.0,-1\n1.png,,nan,1\n")
    options = SourceOptions(label_column="A,B,C")
    for path in (parquet(tmp_path / "m.parquet", columns), tmp_path / "m.csv"):
        found = [(sample.labels, sample.unknown) for sample in open_source(path, options).samples]
        assert found == [(("A",), ("C",)), (("C",), ("A", "B"))]


def test_a_class_label_that_names_one_class_twice_is_refused(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog", "cat"], "_type": "ClassLabel"}}
    table = pa.table({"image": ["0.png", "1.png"], "label": [0, 2]})
    place = tmp_path / "m.parquet"
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), place)
    with pytest.raises(SourceFormatError, match="declares 'cat' twice among the class names of column 'label'"):
        open_source(place)
