"""What a source is taken for is said before anything is done: where ids, labels, classes and captions come from, and what was left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from difffeat.errors import DuplicateSample, SourceFormatError
from difffeat.runtime.convert import convert
from difffeat.runtime.extract import extract
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.sources_voc import CLASSES
from difffeat.runtime.store import Store
from difffeat.runtime.understood import passed_over, say_understood
from tests.runtime.fake import FakeEngine, encoded
from tests.runtime.test_sources import touch


def lines(place: Path | str, **options: Any) -> str:
    said: list[str] = []
    say_understood(open_source(place, SourceOptions(**options)), said.append)
    return "\n".join(said)


def csv(folder: Path, content: str, name: str = "m.csv") -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def test_a_table_says_which_columns_it_was_read_from(tmp_path: Path) -> None:
    path = csv(tmp_path, "image,label,Split\n0.png,cat,train\n1.png,nan,test\n2.png,,test\n")
    said = lines(path)
    assert said.startswith(f"{path}: 3 rows, read as CSV\n  ids: no column 'id': image paths without their suffix (first 0, 1, 2)\n")
    assert "classes: 1 (cat), named by the labels as they are written, sorted\n" in said
    assert "labels: column 'label'; 1 of 3 rows are labelled\n" in said
    assert "captions: none (no column 'captions' or 'caption')\n" in said
    assert "columns that are not read: Split\n" in said
    assert "note: 1 labels are written as nothing ('nan') and read as unknown; a class of that name is named with --classes FILE\n" in said
    assert "note: 1 empty labels are read as unknown; write [] where a row has none of the classes" in said


def test_rows_without_an_id_are_said_to_be_numbered(tmp_path: Path) -> None:
    assert "ids: no column 'id': row numbers (first 000000000, 000000001)" in lines(csv(tmp_path, "caption\na\nb\n"))


def test_a_class_that_no_row_has_is_named(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("cat\ndog\nowl\n")
    said = lines(csv(tmp_path, "image,label\n0.png,cat\n"), classes=tmp_path / "names")
    assert f"classes: 3 (cat, dog, owl), named by --classes {tmp_path / 'names'}; 2 of them have no row: dog, owl" in said


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("cat/a.png", "dog/b.png", "preview.png"), "since 1 images lie in the folder itself (preview.png); --class-folders takes them as such"),
        (("cat/a.png", "dog/b/c.png"), "since 1 images lie deeper (dog/b/c.png); --class-folders takes them as such"),
        (("cat/a.png",), "the one subfolder cat is not taken as a class"),
        (("train/a.png", "test/b.png"), "its subfolders test, train are called as parts of a data set"),
        (("a.png",), "all images lie in the folder itself"),
    ],
)
def test_a_folder_says_why_its_subfolders_are_no_classes(names: tuple[str, ...], why: str, tmp_path: Path) -> None:
    assert why in lines(touch(tmp_path, *names))


def test_a_folder_says_that_its_subfolders_are_classes(tmp_path: Path) -> None:
    said = lines(touch(tmp_path, "cat/a.png", "dog/b.png", "notes.md"))
    assert "classes: 2 (cat, dog), named by the folders, sorted" in said
    assert "labels: names of the first folder; 2 of 2 rows are labelled" in said
    assert "passed over: 1 × .md" in said


def test_rare_kinds_of_files_are_counted_together() -> None:
    many = {f".{number}": 1 for number in range(400)} | {".mov": 7}
    assert passed_over(many).startswith("7 × .mov, 1 × .0, ")
    assert passed_over(many).endswith("393 of 393 other kinds")
    assert len(passed_over(many)) < 200


def test_linked_folders_are_followed_but_never_in_a_circle(tmp_path: Path) -> None:
    touch(tmp_path / "real", "cat/a.png", "dog/b.png")
    (tmp_path / "sub").mkdir()
    for name in ("cat", "dog"):
        os.symlink(tmp_path / "real" / name, tmp_path / "sub" / name)
    os.symlink(tmp_path / "sub", tmp_path / "real/cat/circle")
    source = open_source(tmp_path / "sub")
    assert ([sample.id for sample in source.samples], source.classes) == (["cat/a", "dog/b"], ("cat", "dog"))
    assert source.notes == (
        "2 linked folders are followed, the first is cat/",
        "1 links lead to a folder that they lie in, and are not followed; the first is cat/circle/",
    )
    for pattern in ("*", "**", "{cat,dog}", "*/*.png", "**/*.png"):
        assert [sample.id for sample in open_source(f"{tmp_path}/sub/{pattern}").samples] == ["cat/a", "dog/b"], pattern


def test_one_image_is_a_source(tmp_path: Path) -> None:
    (touch(tmp_path, "a.png", "b.png") / "a.txt").write_text("a cat")
    source = open_source(tmp_path / "a.png")
    assert [(sample.id, sample.captions) for sample in source.samples] == [("a", ("a cat",))]


def test_captions_lie_beside_images_whatever_their_case_and_form(tmp_path: Path) -> None:
    touch(tmp_path, "A.JPG", "cafe\u0301.png")
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "caf\u00e9.txt").write_text("two")
    assert [(sample.id, sample.captions) for sample in open_source(tmp_path).samples] == [("A", ("one",)), ("caf\u00e9", ("two",))]


@pytest.mark.parametrize(
    ("written", "identity"),
    [
        ("Bilder\\a.jpg", "Bilder/a"),
        ("bilder/A.jpg", "bilder/A"),
        (" Bilder/A.JPG ", "Bilder/A"),
        ("Bilder/A", "Bilder/A"),
        ("./Bilder/A.JPG", "Bilder/A"),
    ],
)
def test_images_are_found_by_names_as_people_write_them(written: str, identity: str, tmp_path: Path) -> None:
    (tmp_path / "Bilder").mkdir()
    (tmp_path / "Bilder/A.JPG").write_bytes(b"here")
    sample = open_source(csv(tmp_path, f"image\n{written}\n")).samples[0]
    assert sample.id == identity
    assert sample.image is not None
    assert sample.image.read() == b"here"


def test_a_name_that_several_files_share_is_not_guessed(tmp_path: Path) -> None:
    touch(tmp_path, "A.png", "a.PNG")
    source = open_source(csv(tmp_path, "image\na.png\n"))
    assert source.samples[0].size == -1


def test_rows_of_one_image_are_one_sample_with_the_captions_of_all(tmp_path: Path) -> None:
    source = open_source(csv(tmp_path, "image,caption\n0.png,A cat .\n1.png,A dog .\n0.png,A small | cat .\n"))
    assert [(sample.id, sample.captions) for sample in source.samples] == [("0", ("A cat .", "A small | cat .")), ("1", ("A dog .",))]
    assert "3 rows are 2 samples: rows of one id and image are joined, with a caption from each" in source.notes


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("image,caption,label\n0.png,a,cat\n0.png,b,dog\n", "with other labels. Give each image one row, with its labels separated by |"),
        ("image\n0.png\n0.png\n", "without captions to join"),
        ("id,image,caption\nx,0.png,a\nx,1.png,b\n", r"of other images \(0.png, 1.png\)"),
    ],
)
def test_rows_that_cannot_be_joined_are_named(content: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DuplicateSample, match=rf"m.csv, row 2: the id '.' occurs more than once, in rows {reason}"):
        open_source(csv(tmp_path, content))


def test_quotes_are_text_in_tsv_unless_a_writer_of_csv_made_them(tmp_path: Path) -> None:
    plain = open_source(csv(tmp_path, 'caption\timage\n"I love you\t0.png\nb\t1.png\n"say ""hi"""\t2.png\n"all"\t3.png\n', "m.tsv"))
    assert [sample.captions[0] for sample in plain.samples] == ['"I love you', "b", 'say "hi"', '"all"']
    quoted = open_source(csv(tmp_path, '"image"\t"caption"\n"0.png"\t"two\nlines"\n', "q.tsv"))
    assert quoted.samples[0].captions == ("two\nlines",)
    assert quoted.notes[0].startswith("1 rows go over several lines, since a quoted field holds line breaks; the first is line 2 to 3 of")


@pytest.mark.parametrize(
    "content", ["image;caption\n0.png;a, b\n", "sep=;\nimage;caption\n0.png;a, b\n", "image|caption\n0.png| a, b\n", "image\tcaption\n0.png\ta, b\n"]
)
def test_a_table_of_another_separator_is_read_and_told(content: str, tmp_path: Path) -> None:
    source = open_source(csv(tmp_path, content))
    assert source.samples[0].captions == ("a, b",)
    assert "is separated by" in source.notes[0]


def test_long_fields_are_read_and_utf_16_is_named(tmp_path: Path) -> None:
    assert len(open_source(csv(tmp_path, f"caption\n{'x' * 200_000}\n")).samples[0].captions[0]) == 200_000
    (tmp_path / "u.csv").write_bytes("image\n0.png\n".encode("utf-16"))
    with pytest.raises(SourceFormatError, match=r"u.csv is not UTF-8 \(it is UTF-16, as spreadsheets' 'Unicode text' is\)"):
        open_source(tmp_path / "u.csv")


def test_a_pipe_separates_captions_in_one_column_of_every_format(tmp_path: Path) -> None:
    rows = [("caption", ("a|b",)), ("captions", ("a", "b"))]
    for column, captions in rows:
        assert open_source(csv(tmp_path, f"{column}\na|b\n")).samples[0].captions == captions
        assert open_source(csv(tmp_path, json.dumps({column: "a|b"}), "m.jsonl")).samples[0].captions == captions


def test_unknown_cells_of_label_columns_reach_the_store(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    path = csv(tmp_path, "image,Edema,Pneumonia\n0.png,1.0,-1.0\n1.png,,1\n2.png,nan,\n")
    source = open_source(path, SourceOptions(label_column="Edema,Pneumonia"))
    assert [(sample.labels, sample.unknown) for sample in source.samples] == [(("Edema",), ("Pneumonia",)), (("Pneumonia",), ("Edema",)), (None, ())]
    extract(FakeEngine(), source, tmp_path / "out", batch_size=2)
    store = Store.open(tmp_path / "out")
    assert store.label_known is not None
    assert store.label_known.tolist() == [[True, False], [False, True], [False, False]]
    assert store.targets is not None
    assert store.targets.tolist() == [[1, -1], [-1, 1], [-1, -1]]
    assert store.labels is not None
    assert store.labels.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert json.loads((tmp_path / "out/summary.json").read_text())["understood"]["rows"]["with_unknown_classes"] == 2
    convert(tmp_path / "out", tmp_path / "table", "parquet")
    assert pq.read_table(next((tmp_path / "table").rglob("*.parquet")))["unknown"].to_pylist() == [["Pneumonia"], ["Edema"], []]


def voc_row(**values: int) -> str:
    return ",".join(str(values.get(name, -1)) for name in CLASSES)


def test_tables_of_voc_say_minus_one_where_a_class_is_absent(tmp_path: Path) -> None:
    touch(tmp_path, "000005.jpg", "000007.jpg")
    path = csv(tmp_path, f"name,{','.join(CLASSES)}\n000005,{voc_row(chair=1, person=0)}\n000007,{voc_row(car=1)}\n")
    source = open_source(path, SourceOptions(image_column="name", label_column=",".join(CLASSES)))
    assert [(sample.id, sample.labels, sample.unknown) for sample in source.samples] == [
        ("000005", ("chair",), ("person",)),
        ("000007", ("car",), ()),
    ]
    assert source.samples[0].image is not None
    assert source.samples[0].image.read() == b""


def test_columns_of_one_and_minus_one_alone_have_no_unknown(tmp_path: Path) -> None:
    path = csv(tmp_path, "image,Smiling,Young\n0.png,1,-1\n1.png,-1,-1\n")
    source = open_source(path, SourceOptions(label_column="Smiling,Young"))
    assert [(sample.labels, sample.unknown) for sample in source.samples] == [(("Smiling",), ()), ((), ())]
    assert source.notes == ("-1 says that a class is absent, as in tables of 1 and -1: there is no 0",)


COCO = {
    "images": [{"id": 0, "file_name": "0.png"}, {"id": 1, "file_name": "1.png"}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [{"image_id": 0, "category_id": 1}],
}


@pytest.mark.parametrize(
    ("change", "labels", "note"),
    [
        (
            {"categories": [{"id": 0, "name": "cat"}, *COCO["categories"]]},
            [("cat",), ()],
            "2 categories are called 'cat' (ids 0, 1), and are one class",
        ),
        (
            {"annotations": [{"image_id": 9, "category_id": 1}]},
            [(), ()],
            "1 of 1 annotations are of images that are not listed, the first of image 9",
        ),
        ({"annotations": [{"image_id": "01", "category_id": 2.0}]}, [(), ("dog",)], ""),
        ({"annotations": [{"image_id": 1, "segments_info": [{"category_id": 1}, {"category_id": 2}]}]}, [(), ("cat", "dog")], ""),
        ({"images": [*COCO["images"], COCO["images"][0]]}, [("cat",), ()], "1 entries of images stand twice in the file, and count once"),
    ],
    ids=["one name", "no image", "ids as text", "panoptic", "twice"],
)
def test_coco_is_checked_and_read_in_its_variants(change: dict[str, Any], labels: list[tuple[str, ...]], note: str, tmp_path: Path) -> None:
    source = open_source(csv(tmp_path, json.dumps(COCO | change), "m.json"))
    assert [sample.labels for sample in source.samples] == labels
    assert source.classes == ("cat", "dog")
    assert note in "\n".join(source.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [{"id": 1, "file_name": "0.png"}, {"id": 1, "file_name": "1.png"}]}, "two images have the id 1: 0.png and 1.png"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]}, "two categories have the id 1: 'cat' and 'dog'"),
        ({"categories": [{"id": 1, "name": " "}]}, "the category 1 has no name"),
    ],
)
def test_coco_that_contradicts_itself_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceFormatError, match=message):
        open_source(csv(tmp_path, json.dumps(COCO | change), "m.json"))


def test_coco_regions_to_be_ignored_leave_a_class_open_and_test_lists_have_no_labels(tmp_path: Path) -> None:
    regions = [{"image_id": 0, "category_id": 1, "ignore": 1}, {"image_id": 0, "category_id": 2, "iscrowd": 1}]
    source = open_source(csv(tmp_path, json.dumps(COCO | {"annotations": regions}), "m.json"))
    assert [(sample.labels, sample.unknown) for sample in source.samples] == [(("dog",), ("cat",)), ((), ())]
    test = {name: value for name, value in COCO.items() if name != "annotations"}
    assert [sample.labels for sample in open_source(csv(tmp_path, json.dumps(test), "t.json")).samples] == [None, None]


def test_a_column_without_a_name_is_called_so(tmp_path: Path) -> None:
    assert "columns that are not read: one without a name" in lines(csv(tmp_path, ",image\n0,0.png\n"))
