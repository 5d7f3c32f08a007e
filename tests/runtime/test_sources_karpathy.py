"""Karpathy's splits are read in exactly their published form, and joined to COCO's own ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from difffeat.errors import ConfigError, SourceError, SourceFormatError
from difffeat.runtime.samples import Source
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from tests.runtime.fake import encoded


def image(number: int, split: str, folder: str = "val2014") -> dict[str, Any]:
    """An entry with the keys of the published file."""
    sentences = [
        {"tokens": ["a", "cat"], "raw": f"A cat. {number} ", "imgid": number, "sentid": 2 * number},
        {"tokens": [], "raw": "On a mat.", "imgid": number, "sentid": 2 * number + 1},
    ]
    return {
        "filepath": folder, "sentids": [2 * number, 2 * number + 1], "filename": f"COCO_{folder}_{number:012d}.jpg", "imgid": number, "split": split,
        "sentences": sentences, "cocoid": number,
    }  # fmt: skip


IMAGES = [image(1, "val"), image(2, "restval"), image(3, "train", "train2014"), image(4, "test"), image(5, "val")]


def written(folder: Path, images: Any) -> Path:
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def ids(source: Source) -> list[str]:
    return [sample.id for sample in source.samples]


def test_a_split_holds_its_images_with_their_captions(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / f"COCO_val2014_{1:012d}.jpg").write_bytes(encoded(0))
    source = open_source(f"{written(tmp_path, IMAGES)}::val")
    assert ids(source) == ["COCO_val2014_000000000001", "COCO_val2014_000000000005"]
    first = source.samples[0]
    assert (first.captions, first.labels, source.classes) == (("A cat. 1", "On a mat."), None, ())
    assert first.image is not None
    assert first.image.read() == encoded(0)


def test_splits_are_joined_in_the_files_order_and_images_may_lie_elsewhere(tmp_path: Path) -> None:
    source = open_source(written(tmp_path, IMAGES), SourceOptions(split="train+restval", images=tmp_path / "coco"))
    assert ids(source) == ["COCO_val2014_000000000002", "COCO_train2014_000000000003"]
    assert str(tmp_path / "coco") in repr(source.samples[0].image)


def test_files_without_folders_of_images_are_read_too(tmp_path: Path) -> None:
    flickr = [{key: value for key, value in image(1, "test").items() if key not in ("filepath", "cocoid")}]
    assert open_source(f"{written(tmp_path, flickr)}::test").samples[0].locator == "COCO_val2014_000000000001.jpg"


def test_the_splits_are_told(tmp_path: Path) -> None:
    path = written(tmp_path, IMAGES)
    with pytest.raises(
        SourceError, match=r"has several splits: val, restval, train, test. Choose one with --split, or as SOURCE::val; join them with"
    ):
        open_source(path)
    with pytest.raises(SourceError, match=r"has no split 'dev': val, restval, train, test"):
        open_source(f"{path}::train+dev")
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(ConfigError, match=r"--split val is for saved and standard data sets"):
        open_source(f"{tmp_path}/coco.json::val")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": 5}, r"in image 2 of its list there is no 'split' of type str"),
        ({"filename": None}, r"in image 2 of its list there is no 'filename' of type str"),
        ({"sentences": ["A cat."]}, r"in image 2 of its list there is no 'raw' of type str: A cat\."),
    ],
)
def test_an_entry_of_another_form_is_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceFormatError, match=message):
        open_source(f"{written(tmp_path, [IMAGES[0], {**IMAGES[4], **changed}])}::val")
