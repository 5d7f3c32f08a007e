"""Samples are listed in a stable order with captions and labels, and what cannot be listed is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from difffeat.errors import DuplicateSample, EmptySource, SourceError, SourceFormatError
from difffeat.runtime.blobs import FileBlob
from difffeat.runtime.samples import Source
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from tests.runtime.fake import folder_of_images


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def ids(source: Source) -> list[str]:
    return [sample.id for sample in source.samples]


def test_a_folder_is_listed_in_path_order_and_the_rest_is_counted(tmp_path: Path) -> None:
    source = open_source(touch(tmp_path, "b.png", "a.JPG", "z/c.webp", "notes.pdf", "x", "lonely.txt"))
    assert ids(source) == ["a", "b", "z/c"]
    assert source.samples[2].locator == "z/c.webp"
    assert dict(source.ignored) == {".pdf": 1, "": 1, ".txt": 1}
    assert (source.classes, source.samples[0].labels) == ((), None)


def test_hidden_names_are_no_classes_and_no_samples_but_are_counted(tmp_path: Path) -> None:
    root = touch(tmp_path, "cat/1.png", "dog/2.png", ".ipynb_checkpoints/1.png", "cat/._1.png", "cat/.cache/3.png", ".DS_Store", "dog/.2.txt")
    source = open_source(root)
    assert (ids(source), source.classes) == (["cat/1", "dog/2"], ("cat", "dog"))
    assert dict(source.ignored) == {"hidden": 5}
    assert source.notes == ("3 hidden images and folders are left out, the first is .ipynb_checkpoints/: rename what belongs to the samples",)
    touch(tmp_path / ".here", "1.png", ".DS_Store")
    assert (ids(open_source(tmp_path / ".here")), open_source(tmp_path / ".here").notes) == (["1"], ())
    touch(tmp_path / "only", ".1.png")
    with pytest.raises(EmptySource, match=r"only holds no samples \(passed over: 1 × hidden\)"):
        open_source(tmp_path / "only")


def test_hidden_names_behind_a_url_are_left_out_too() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/hidden/cat/1.png": b"", "/hidden/dog/2.png": b"", "/hidden/.ipynb_checkpoints/1.png": b"", "/hidden/cat/._1.png": b""})
    source = open_source("memory://hidden")
    assert (ids(source), source.classes, dict(source.ignored)) == (["cat/1", "dog/2"], ("cat", "dog"), {"hidden": 2})


def test_captions_lie_beside_their_image_one_a_line(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("\ufeffa cat\n\n  on a mat \n", encoding="utf-8")
    source = open_source(tmp_path)
    assert source.samples[0].captions == ("a cat", "on a mat")
    assert source.samples[1].captions == ()
    assert source.has_captions


def test_a_caption_that_is_not_utf8_is_that_samples_problem(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert open_source(tmp_path).samples[0].problem == "a.txt is not UTF-8 (byte 3). Save it as UTF-8."


@pytest.mark.parametrize(
    ("names", "asked", "classes"),
    [
        (("cat/1.png", "dog/2.png"), None, ("cat", "dog")),
        (("cat/1.png",), None, ()),
        (("cat/1.png",), True, ("cat",)),
        (("cat/1.png", "dog/2.png"), False, ()),
        (("cat/1.png", "dog/2.png", "3.png"), None, ()),
        (("cat/a/1.png", "dog/2.png"), None, ()),
    ],
)
def test_subfolders_are_classes_when_they_look_like_it_or_when_told(
    names: tuple[str, ...], asked: bool | None, classes: tuple[str, ...], tmp_path: Path
) -> None:
    assert open_source(touch(tmp_path, *names), SourceOptions(class_folders=asked)).classes == classes


INSTANCES: dict[str, Any] = {
    "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 4, "file_name": "a.jpg"}, {"id": 5, "file_name": "c.jpg"}],
    "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "zebra"}],
    "annotations": [
        {"image_id": 9, "category_id": 7},
        {"image_id": 9, "category_id": 7},
        {"image_id": 9, "category_id": 2},
        {"image_id": 4, "category_id": 2},
    ],
}
CAPTIONS: dict[str, Any] = {
    "images": INSTANCES["images"],
    "annotations": [{"image_id": 4, "caption": " a zebra "}, {"image_id": 4, "caption": "stripes"}],
}


def coco(folder: Path, name: str, content: Any) -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_coco_joins_labels_and_captions_by_image(tmp_path: Path) -> None:
    options = SourceOptions(images=tmp_path / "val", coco_captions=coco(tmp_path, "c.json", CAPTIONS))
    source = open_source(coco(tmp_path, "i.json", INSTANCES), options)
    assert ids(source) == ["b", "a", "c"]
    assert source.classes == ("zebra", "dog")
    assert [sample.labels for sample in source.samples] == [("zebra", "dog"), ("zebra",), ()]
    assert source.samples[1].captions == ("a zebra", "stripes")
    assert source.samples[0].image == FileBlob(str(tmp_path / "val"), "b.jpg")


def test_coco_captions_alone_have_no_labels(tmp_path: Path) -> None:
    source = open_source(coco(tmp_path, "c.json", CAPTIONS))
    assert source.classes == ()
    assert source.samples[0].labels is None


def errors() -> dict[str, tuple[str, str | bytes, type[SourceError], str]]:
    """Kind of mistake -> file name, content, error, part of its message."""
    foreign = {**INSTANCES, "annotations": [{"image_id": 9, "category_id": 99}]}
    return {
        "COCO of numbers": ("m.json", '{"images": [], "annotations": [5]}', SourceFormatError, "an entry lacks 'image_id' of type int or str: 5"),
        "COCO without categories": (
            "m.json",
            '{"images": [], "annotations": [], "categories": null}',
            SourceFormatError,
            "'categories' must be a list, found NoneType",
        ),
        "no column": (
            "m.csv",
            "path,label\na,b\n",
            SourceFormatError,
            "has no column 'image', 'caption' or 'captions'; its columns are: path, label. Rename",
        ),
        "ragged": ("m.csv", "image,labels\na.png\n", SourceFormatError, "m.csv, line 2: the row has another number of fields than the header"),
        "no UTF-8": ("m.csv", b"image\ncaf\xe9.png\n", SourceFormatError, "m.csv is not UTF-8 (line 2, byte 9). Save it as UTF-8."),
        "no JSON": ("m.jsonl", "{oops\n", SourceFormatError, "m.jsonl, line 1 is not JSON"),
        "no object": ("m.jsonl", "[1]\n", SourceFormatError, "m.jsonl, line 1 is not a JSON object"),
        "number as image": ("m.jsonl", '{"image": 5}\n', SourceFormatError, "row 1: 'image' must be a path, found int"),
        "number as caption": (
            "m.jsonl",
            '{"caption": 1.5}\n',
            SourceFormatError,
            "row 1: 'captions' must be a string or a list of strings, found 1.5",
        ),
        "no Parquet": ("m.parquet", b"PAR1 not really", SourceFormatError, "is no readable Parquet file"),
        "no COCO": ("m.json", '{"images": []}', SourceFormatError, "it needs the lists 'images' and 'annotations', and has: images"),
        "foreign category": ("m.json", json.dumps(foreign), SourceFormatError, "an annotation has category_id 99, which 'categories' does not list"),
        "no field": ("m.json", '{"images": [{"id": 1}], "annotations": []}', SourceFormatError, "an entry lacks 'file_name' of type str"),
        "empty": ("m.csv", "image\n", EmptySource, "m.csv holds no samples: it is CSV without a row"),
        "twice": (
            "m.csv",
            "id,image\nx,1.png\nx,2.png\n",
            DuplicateSample,
            "m.csv, row 2: the id 'x' occurs more than once, in rows of other images (1.png, 2.png). Leave one row for each id, or name a column",
        ),
        "other suffix": ("m.yaml", "a: 1", SourceFormatError, "is no source we read: pass a folder, or a file ending in .csv, .tsv, .jsonl"),
    }


@pytest.mark.parametrize("kind", errors())
def test_mistakes_are_named_where_they_are(kind: str, tmp_path: Path) -> None:
    name, content, error, message = errors()[kind]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error) as caught:
        open_source(path)
    assert message in str(caught.value)


def test_what_does_not_exist_and_what_is_empty_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere does not exist. Pass a folder of images, a CSV, JSONL or Parquet manifest, tar shards"):
        open_source(tmp_path / "nowhere")
    touch(tmp_path, "a.doc", "b.doc")
    with pytest.raises(EmptySource, match=r"holds no samples \(passed over: 2 × \.doc\). Accepted images: \.jpg"):
        open_source(tmp_path)


def test_two_suffixes_of_one_stem_are_two_claims_to_one_id(tmp_path: Path) -> None:
    with pytest.raises(DuplicateSample, match=r"the first is 'a' \(a.jpg, a.png\)"):
        open_source(touch(tmp_path, "a.png", "a.jpg"))


LINES = st.sampled_from(
    ['{"image": "a.png"}', '{"caption": ["x"]}', '{"image": null, "labels": [[]]}', "image,caption", "a,b", '"', "[[[[", '{"images": [1]', ""]
)
TEXT = st.lists(LINES, max_size=5).map(lambda lines: "\n".join(lines).encode())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=100), TEXT), suffix=st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet"]))
def test_any_content_is_a_source_or_a_typed_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(content)
    try:
        source = open_source(path)
    except SourceError:
        return
    assert len(source) > 0


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.png", "b/2.png")
    scan = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith(locked):
            raise error
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    locked, error = "b", PermissionError(13, "Permission denied")
    source = open_source(tmp_path)
    assert ids(source) == ["a/1"]
    assert source.notes == ("1 folders cannot be opened and are left out, the first is b/: change their permissions",)
    locked = tmp_path.name
    with pytest.raises(SourceError, match=r"cannot be listed \(Permission denied\)"):
        open_source(tmp_path)
    locked, error = "b", OSError(5, "Input/output error", str(tmp_path / "b"))
    with pytest.raises(SourceError, match=r"cannot be listed \(Input/output error in .*b\)"):
        open_source(tmp_path)


def test_images_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of_images(tmp_path / "images", 2)
    (tmp_path / "m.csv").write_text("image\nimages/00.png\n")
    monkeypatch.chdir(tmp_path)
    listed = [open_source("images"), open_source("m.csv"), open_source("m.csv", SourceOptions(images="."))]
    monkeypatch.chdir("/")
    for source in listed:
        assert source.samples[0].image is not None
        assert source.samples[0].image.read().startswith(b"\x89PNG")


def test_patterns_are_found_below_a_folder_whose_own_name_looks_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "set[1]{2,3}"
    odd.mkdir()
    for part in "ab":
        (odd / f"{part}.jsonl").write_text(f'{{"id": "{part}", "caption": "the two"}}\n')
    monkeypatch.chdir(odd)
    for pattern in ("*.jsonl", "{a,b}.jsonl"):
        assert [sample.id for sample in open_source(pattern).samples] == ["a", "b"]


def test_a_way_back_behind_a_link_is_followed_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, count in (("images", 3), ("deep/images", 2)):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        folder_of_images(tmp_path / folder, count)
    (tmp_path / "deep/inner").mkdir()
    (tmp_path / "link").symlink_to("deep/inner")
    monkeypatch.chdir(tmp_path)
    assert len(open_source("link/../images")) == 2


def test_a_class_folders_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    root = touch(tmp_path / "d", "cat/a.png", "dog/b.png")
    (root / "owl.v1").symlink_to(tmp_path / "gone")
    source = open_source(root)
    assert source.classes == ("cat", "dog")
    assert "1 links lead nowhere and are left out, the first is owl.v1: mend or remove them" in source.notes
    assert dict(source.ignored) == {}


def test_a_folder_of_tables_names_them_and_the_command_that_reads_one(tmp_path: Path) -> None:
    root = touch(tmp_path / "r", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "README.md")
    with pytest.raises(EmptySource, match=r"it holds data/test-0.*, data/train-0.*: a table or tar, and so each split, is a source of its own"):
        open_source(root)


@pytest.mark.parametrize("name", ["metadata.csv", "train/metadata.csv"])
def test_metadata_of_a_folder_of_images_are_said_with_a_command_that_reads_them(name: str, tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "d", 2)
    table = root / name
    table.parent.mkdir(exist_ok=True)
    up = "../" if "/" in name else ""
    table.write_text(f"file_name,text,label\n{up}00.png,a cat,cat\n{up}01.png,a dog,dog\n")
    note = next(note for note in open_source(root).notes if name in note)
    assert f"difffeat extract ARTIFACT {root / name} --image-column file_name reads the images" in note
    source = open_source(table, SourceOptions(image_column="file_name", caption_column="text"))
    assert (source.classes, source.samples[1].captions) == (("cat", "dog"), ("a dog",))
    assert all(sample.image is not None and sample.image.read(1 << 20) for sample in source.samples)
