"""Texts that cannot be written as UTF-8 set their own sample aside, and nothing else; classes are in a stable order."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from difffeat.errors import DecodeError, SourceFormatError
from difffeat.runtime.blobs import BytesBlob
from difffeat.runtime.extract import extract
from difffeat.runtime.samples import Sample, Source, escaped, multi_hot_classes, storable
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store, verify
from difffeat.runtime.table import encode_part, sample_columns
from tests.runtime.fake import FakeEngine, encoded
from tests.runtime.test_sources_tar import shard

IMAGE = BytesBlob(b"x")
SPOILED = {
    "id": Sample("\ud800x", IMAGE, "a.png"),
    "image's name": Sample("a", IMAGE, "\udcff.png"),
    "label": Sample("a", IMAGE, "a.png", labels=("cat", "\udfff")),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_text_that_is_no_utf8_makes_a_broken_sample_that_can_be_stored(what: str) -> None:
    sample = storable(SPOILED[what])
    assert (
        sample.problem == f"its {what} cannot be written as UTF-8 (lone surrogates, or bytes of another encoding). Rename the file, or mend the row."
    )
    assert sample.image is not None
    with pytest.raises(DecodeError, match=f"its {what} cannot be written"):
        sample.image.read()
    assert encode_part(sample_columns([sample])).nbytes > 0
    assert storable(sample) is sample


def test_a_caption_that_is_no_utf8_spoils_the_captions_alone() -> None:
    sample = storable(Sample("a", IMAGE, "a.png", ("fine", "\ud800"), ("cat",)))
    assert (sample.image, sample.captions, sample.labels) == (IMAGE, (), ("cat",))
    assert str(sample.problem).startswith("its captions cannot be written as UTF-8")


def test_escaped_ids_stay_apart() -> None:
    written = "\\udcff"
    source = Source("here", tuple(Sample(name, IMAGE) for name in ("\udcff", written, "\udcfe")))
    assert escaped("\udcff") == written
    assert [sample.id for sample in source.samples] == ["\\udcff~8f1d0f9c", written, "\\udcfe~51ad4f14"]
    assert source.notes[0].startswith("the texts of 2 samples cannot be written as UTF-8; the first is \\udcff~8f1d0f9c: its id cannot be")


def test_a_class_name_that_is_no_utf8_is_told() -> None:
    with pytest.raises(SourceFormatError, match=r"the class name '\\ud800' cannot be written as UTF-8"):
        Source("here", (Sample("a", IMAGE),), ("\ud800",))


def listings(root: Path) -> dict[str, Path]:
    """Sources of two samples each, one of them with a name that is no UTF-8."""
    for folder in ("flat", "cat", "dog"):
        (root / folder).mkdir()
    (root / "flat" / "good.png").write_bytes(encoded(0))
    Path(os.fsdecode(os.fsencode(root / "flat") + b"/\xff\xfe.png")).write_bytes(encoded(1))
    (root / "a.jsonl").write_text('{"id": "\\ud800x", "image": "flat/good.png"}\n{"id": "good", "image": "flat/good.png"}\n')
    (root / "b.jsonl").write_text('{"id": "x", "image": "\\ud800.png"}\n{"id": "good", "image": "flat/good.png"}\n')
    (root / "c.jsonl").write_text('{"id": "x", "image": "flat/good.png", "label": "\\ud800"}\n{"id": "good", "image": "flat/good.png"}\n')
    shard(root / "a.tar", {os.fsdecode(b"\xff\xfe.png"): encoded(0), "good.png": encoded(0)})
    return {"folder": root / "flat", "id": root / "a.jsonl", "image": root / "b.jsonl", "label": root / "c.jsonl", "tar": root / "a.tar"}


@pytest.mark.parametrize("kind", ["folder", "id", "image", "label", "tar"])
def test_a_run_sets_such_samples_aside_and_keeps_their_rows(kind: str, tmp_path: Path) -> None:
    summary = extract(FakeEngine(), open_source(listings(tmp_path)[kind]), tmp_path / "out", batch_size=2, max_bad_fraction=0.9)
    entries = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert (summary.rows, summary.quarantined) == (2, 1)
    assert "cannot be written as UTF-8" in entries[0]["message"]
    assert Store.open(tmp_path / "out").ids[1 - entries[0]["row"]].endswith("good")
    assert verify(tmp_path / "out") == []


def test_a_folder_of_a_class_that_is_no_utf8_makes_no_class(tmp_path: Path) -> None:
    for folder in (b"cat", b"\xff"):
        path = os.fsencode(tmp_path) + b"/" + folder
        os.mkdir(path)
        Path(os.fsdecode(path), "1.png").write_bytes(b"")
    source = open_source(tmp_path)
    assert source.classes == ("cat",)
    assert [sample.labels for sample in source.samples] == [("cat",), None]


def test_classes_that_are_numbers_are_ordered_as_numbers_unless_they_are_absurd() -> None:
    digits = "9" * 5000
    assert multi_hot_classes([Sample("a", labels=("10", "2"))]) == ("2", "10")
    assert multi_hot_classes([Sample("a", labels=(digits, "10", "2"))]) == ("10", "2", digits)
