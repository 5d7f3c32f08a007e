"""Rows of CSV, TSV, JSONL and Parquet: each keeps its place and its id, whatever is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from difffeat.errors import ConfigError, DecodeError, SourceFormatError
from difffeat.runtime.blobs import FileBlob
from difffeat.runtime.extract import extract
from difffeat.runtime.matching import Mode
from difffeat.runtime.samples import Sample
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_manifest import without_suffix
from difffeat.runtime.sources_options import SourceOptions
from tests.runtime.fake import FakeEngine, encoded
from tests.runtime.test_sources import ids

ROWS = [
    {"id": "one", "image": "pictures/1.png", "captions": ["a cat", "a mat"], "labels": ["cat", "mat"]},
    {"id": "two", "image": "pictures/2.png", "captions": ["a dog"], "labels": []},
]


def csv_manifest(path: Path) -> Path:
    path.with_suffix(".csv").write_text("id,image,captions,labels\none,pictures/1.png,a cat|a mat,cat;mat\ntwo,pictures/2.png,a dog,[]\n")
    return path.with_suffix(".csv")


def tsv_manifest(path: Path) -> Path:
    path.with_suffix(".tsv").write_text("id\timage\tcaptions\tlabels\none\tpictures/1.png\ta cat|a mat\tcat|mat\ntwo\tpictures/2.png\ta dog\t[]\n")
    return path.with_suffix(".tsv")


def jsonl_manifest(path: Path) -> Path:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    return path.with_suffix(".jsonl")


def parquet_manifest(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist([{**row, "other": 1.5} for row in ROWS]), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


@pytest.mark.parametrize("write", [csv_manifest, tsv_manifest, jsonl_manifest, parquet_manifest])
def test_every_kind_of_manifest_says_the_same(write: Callable[[Path], Path], tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "all"))
    assert ids(source) == ["one", "two"]
    assert [sample.captions for sample in source.samples] == [("a cat", "a mat"), ("a dog",)]
    assert [sample.labels for sample in source.samples] == [("cat", "mat"), ()]
    assert source.classes == ("cat", "mat")
    assert source.samples[0].image == FileBlob(str(tmp_path), "pictures/1.png")
    moved = open_source(write(tmp_path / "all"), SourceOptions(images=tmp_path / "elsewhere"))
    assert moved.samples[0].image == FileBlob(str(tmp_path / "elsewhere"), "pictures/1.png")


def test_without_ids_the_path_or_the_row_names_the_sample(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image\nx/1.png\nx/2.jpg\n")
    assert ids(open_source(tmp_path / "a.csv")) == ["x/1", "x/2"]
    (tmp_path / "b.csv").write_text("caption\na cat\na dog\n")
    assert ids(open_source(tmp_path / "b.csv")) == ["000000000", "000000001"]


def reason(sample: Sample) -> str:
    assert sample.image is not None
    with pytest.raises(DecodeError) as caught:
        sample.image.read()
    return str(caught.value)


BROKEN_ROWS = {
    "JSONL": ("m.jsonl", b'{"image": "a.png"}\n{oops\n{"id": "mine", "image": 5}\n', [r"line 2 is not JSON", r"'image' must be a path, found int"]),
    "CSV": ("m.csv", b"id,image\nx,a.png\ny\nz,b.png,7\n", [r"line 3: the row has another number of fields", r"line 4: the row has another number"]),
}


@pytest.mark.parametrize("kind", BROKEN_ROWS)
def test_a_row_that_cannot_be_read_keeps_its_place_and_says_why(kind: str, tmp_path: Path) -> None:
    name, content, messages = BROKEN_ROWS[kind]
    (tmp_path / name).write_bytes(content)
    source = open_source(tmp_path / name)
    assert ids(source) == (["a", "000000001", "mine"] if kind == "JSONL" else ["x", "000000001", "000000002"])
    for sample, message in zip(source.samples[1:], messages, strict=True):
        assert message in reason(sample)
        assert sample.problem == reason(sample)
    assert source.notes == (f"2 rows cannot be read and will be in quarantine; the first is {name}#2: {source.samples[1].problem}",)


FULLER = (
    '{"image": "a.png", "captions": null, "caption": "a cat", "labels": null, "label": "cat"}',
    '{"image": "a.png", "captions": [], "caption": "a cat", "labels": [], "label": "cat"}',
    '{"image": "a.png", "captions": [" ", null], "caption": ["a cat"], "labels": "", "label": ["cat"]}',
    '{"image": "a.png", "captions": "a cat", "caption": "hidden", "labels": ["cat"], "label": "hidden"}',
)


@pytest.mark.parametrize("row", FULLER)
def test_of_two_columns_of_a_role_the_first_that_holds_something_is_taken(row: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(row)
    sample = open_source(tmp_path / "m.jsonl").samples[0]
    assert (sample.captions, sample.labels, sample.problem) == (("a cat",), ("cat",), None)


def test_an_empty_list_of_labels_says_that_there_are_none_and_null_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(
        '{"image": "a.png", "labels": [], "label": null}\n{"image": "b.png", "labels": null}\n{"image": "c.png", "label": 0}\n'
    )
    assert [sample.labels for sample in open_source(tmp_path / "m.jsonl").samples] == [(), None, ("0",)]


def test_two_columns_of_one_name_are_refused_where_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("image,caption,caption\na.png,first,second\n")
    with pytest.raises(
        SourceFormatError, match=r"m.csv has 2 columns called 'caption', of which one would hide the others. Rename or remove all but"
    ):
        open_source(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("image,caption,,\na.png,first,,\n")
    assert open_source(tmp_path / "m.csv").samples[0].captions == ("first",)


@pytest.mark.parametrize(
    ("row", "identity"),
    [
        ('{"image": "x/1.png", "label": 3.5}', "x/1"),
        ('{"id": 7, "image": "1.png", "label": 3.5}', "7"),
        ('{"id": 7, "image": 5}', "7"),
        ('{"caption": 1.5}', "000000001"),
        ('{"image": 5}', "000000001"),
    ],
)
def test_a_broken_row_has_the_id_that_it_has_when_it_is_mended(row: str, identity: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(f'{{"image": "a.png"}}\n{row}\n')
    source = open_source(tmp_path / "m.jsonl")
    assert ids(source) == ["a", identity]
    assert reason(source.samples[1])


def test_a_row_with_a_bad_label_is_healed_in_its_place(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    (tmp_path / "m.jsonl").write_text('{"image": "0.png", "label": 3}\n{"image": "1.png", "label": 3.5}\n')
    extract(FakeEngine(), open_source(tmp_path / "m.jsonl"), tmp_path / "out", batch_size=2, max_bad_fraction=0.9)
    (tmp_path / "m.jsonl").write_text('{"image": "0.png", "label": 3}\n{"image": "1.png", "label": 4}\n')
    summary = extract(FakeEngine(), open_source(tmp_path / "m.jsonl"), tmp_path / "out", batch_size=2, mode=Mode.RETRY)
    assert (summary.rows, summary.healed, summary.quarantined) == (2, 1, 0)


def test_a_caption_that_is_no_text_spoils_the_captions_alone(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"image": "a.png", "caption": 1.5}\n{"image": "b.png", "caption": "x"}\n')
    sample = open_source(tmp_path / "m.jsonl").samples[0]
    assert sample.problem == "'captions' must be a string or a list of strings, found 1.5."
    assert sample.image == FileBlob(str(tmp_path), "a.png")


def test_broken_rows_end_in_quarantine_with_their_reason(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(0))
    (tmp_path / "m.jsonl").write_text('{"image": "a.png"}\n{oops\n{"image": "gone.png"}\n')
    summary = extract(FakeEngine(), open_source(tmp_path / "m.jsonl"), tmp_path / "out", batch_size=2, max_bad_fraction=0.9)
    entries = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert (summary.rows, summary.quarantined) == (3, 2)
    assert [entry["row"] for entry in entries] == [1, 2]
    assert "line 2 is not JSON" in entries[0]["message"]
    assert "No such file or directory" in entries[1]["message"]


def test_broken_rows_alone_make_no_modality(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"caption": "x"}\n{oops\n')
    source = open_source(tmp_path / "m.jsonl")
    assert (source.has_images, source.has_captions) == (False, True)
    (tmp_path / "m.jsonl").write_text('{"image": "x.png"}\n{oops\n')
    source = open_source(tmp_path / "m.jsonl")
    assert (source.has_images, source.has_captions) == (True, False)


@pytest.mark.parametrize(
    ("path", "identity"),
    [("x/1.png", "x/1"), ("./x//1.png", "x/1"), ("a.b.jpg", "a.b"), ("x/1.notes", "x/1"), (".png", ".png"), ("s3://b/x/1.jpg", "s3://b/x/1")],
)
def test_an_id_is_the_path_without_its_suffix(path: str, identity: str) -> None:
    assert without_suffix(path) == identity


def test_manifests_of_a_pattern_are_one_source(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / f"{part}.csv").write_text(f"image\n{part}/1.png\n{part}/2.png\n")
    assert ids(open_source(f"{tmp_path}/{{val,train}}.csv")) == ["val/1", "val/2", "train/1", "train/2"]
    (tmp_path / "x.jsonl").write_text("{}")
    with pytest.raises(SourceFormatError, match=r"names files of several kinds \(.csv, .jsonl\)"):
        open_source(f"{tmp_path}/{{val.csv,x.jsonl}}")


def test_columns_that_were_asked_for_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("file,text,tags\na.png,a cat,cat\n")
    source = open_source(tmp_path / "m.csv", SourceOptions(image_column="file", caption_column="text", label_column="tags"))
    assert (ids(source), source.samples[0].captions, source.classes) == (["a"], ("a cat",), ("cat",))
    with pytest.raises(
        SourceFormatError, match=r"has no column 'image', 'caption' or 'captions'; .* name it with --image-column or --caption-column"
    ):
        open_source(tmp_path / "m.csv")
    with pytest.raises(SourceFormatError, match=r"has no column 'uid'; its columns that are read here: file, tags, text"):
        open_source(tmp_path / "m.csv", SourceOptions(image_column="file", id_column="uid"))


def test_an_archive_or_server_that_is_not_there_is_its_rows_problem_and_a_protocol_that_cannot_be_used_an_error(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"image": f"zip://a.png::{tmp_path}/gone.zip"}))
    assert "No such file or directory" in reason(open_source(tmp_path / "m.jsonl").samples[0])
    (tmp_path / "m.jsonl").write_text('{"image": "dir://a.png"}')
    with pytest.raises(ConfigError, match=r"dir://a.png cannot be read: "):
        open_source(tmp_path / "m.jsonl")
