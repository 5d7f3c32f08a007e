"""Tar shards list the samples that WebDataset would, read their images in place, and refuse what cannot be trusted."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from difffeat.errors import DecodeError, DuplicateSample, SourceError, SourceFormatError
from difffeat.runtime.extract import extract
from difffeat.runtime.matching import Mode
from difffeat.runtime.samples import Sample, Source
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from tests.runtime.fake import FakeEngine, encoded


def shard(path: Path, members: dict[str, bytes], change: Callable[[tarfile.TarInfo], Any] = lambda info: None) -> Path:
    """A tar of these members; `change` edits each header."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            change(info)
            tar.addfile(info, io.BytesIO(content))
    return path


def listed(source: Source) -> dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]]:
    return {sample.id: (sample.captions, sample.labels) for sample in source.samples}


def reason(sample: Sample) -> str:
    """Why a row cannot be read: the same for its image and for its captions."""
    assert sample.image is not None
    with pytest.raises(DecodeError) as caught:
        sample.image.read()
    assert str(caught.value) == sample.problem
    return str(caught.value)


def test_members_of_a_key_are_one_sample_read_in_place(tmp_path: Path) -> None:
    members = {
        "000.jpg": encoded(0), "000.txt": b"a cat\n\non a mat\n", "000.cls": b"7\n",
        "./sub/001.PNG": encoded(1), "sub/001.json": json.dumps({"caption": "a dog", "labels": ["dog", "mat"], "width": 3}).encode(),
        "002.webp": encoded(2), "002.left.jpg": b"x", "README": b"x", "._000.jpg": b"x",
    }  # fmt: skip
    source = open_source(shard(tmp_path / "a.tar", members))
    assert listed(source) == {"000": (("a cat", "on a mat"), ("7",)), "sub/001": (("a dog",), ("dog", "mat")), "002": ((), None)}
    assert [sample.image.read() for sample in source.samples if sample.image] == [encoded(0), encoded(1), encoded(2)]
    assert [sample.size for sample in source.samples] == [len(encoded(index)) for index in range(3)]
    assert source.samples[0].locator == "a.tar/000.jpg"
    assert source.classes == ("7", "dog", "mat")
    assert dict(source.ignored) == {"second images and texts of a key": 1, "": 1, ".jpg": 1}


def test_what_webdataset_writes_is_what_is_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for index in range(3):
            writer.write({"__key__": f"{index:04d}", "png": encoded(index), "txt": b"two", "cls": b"1"})
    (tmp_path / "names").write_text("cat\ndog\n")
    source = open_source(tmp_path / "a.tar", SourceOptions(classes=tmp_path / "names"))
    assert listed(source) == {f"{index:04d}": (("two",), ("dog",)) for index in range(3)}
    assert source.classes == ("cat", "dog")
    assert source.samples[2].image is not None
    assert source.samples[2].image.read() == encoded(2)


def test_shards_of_a_pattern_are_one_source_in_order(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"{number:03d}.tar", {f"{number}.png": encoded(number), f"{number}.txt": b"two"})
    expected = {str(number): (("two",), None) for number in range(3)}
    assert listed(open_source(f"{tmp_path}/{{000..002}}.tar")) == listed(open_source(f"{tmp_path}/*.tar")) == expected
    with pytest.raises(SourceError, match=r"1 of the 4 files .* do not exist: .*003.tar"):
        open_source(f"{tmp_path}/{{000..003}}.tar")


def test_an_id_does_not_depend_on_the_other_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.tar", {"0.png": b"", f"{name}.png": b""})
    assert list(listed(open_source(tmp_path / "a.tar"))) == ["0", "a"]
    with pytest.raises(DuplicateSample) as caught:
        open_source(f"{tmp_path}/{{a,b}}.tar")
    assert str(caught.value) == (
        f"{tmp_path}/{{a,b}}.tar: {tmp_path}/a.tar and {tmp_path}/b.tar both hold the key '0', so that it is no id. With --id-column shard/key they "
        "are called a/0 and b/0; or pass --id-column with the key of the .json members that holds ids."
    )
    told = SourceOptions(id_column="shard/key")
    assert list(listed(open_source(f"{tmp_path}/{{a,b}}.tar", told))) == ["a/0", "a/a", "b/0", "b/b"]
    assert list(listed(open_source(tmp_path / "a.tar", told))) == ["a/0", "a/a"]


def test_shards_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        shard(tmp_path / folder / "s.tar", {"1.png": b""})
    with pytest.raises(DuplicateSample, match=r"so that shard and key are no id. With --id-column folder/shard/key they are called x/s/1 and y/s/1;"):
        open_source(f"{tmp_path}/{{x,y}}/s.tar", SourceOptions(id_column="shard/key"))
    told = SourceOptions(id_column="folder/shard/key")
    source = open_source(f"{tmp_path}/{{x,y}}/s.tar", told)
    assert [(sample.id, sample.locator) for sample in source.samples] == [("x/s/1", "x/s.tar/1.png"), ("y/s/1", "y/s.tar/1.png")]
    monkeypatch.chdir(tmp_path / "x")
    assert list(listed(open_source("s.tar", told))) == ["x/s/1"]
    with pytest.raises(DuplicateSample, match=r"the first is 'x/s/1'"):
        open_source("{s.tar,../x/s.tar}", told)


def test_adding_a_shard_doubles_no_row(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        shard(tmp_path / f"{name}.tar", {"0.png": encoded(number), "1.png": encoded(2 + number)})
    told = SourceOptions(id_column="shard/key")
    extract(FakeEngine(), open_source(tmp_path / "a.tar", told), tmp_path / "out", batch_size=2)
    summary = extract(FakeEngine(), open_source(f"{tmp_path}/{{a,b}}.tar", told), tmp_path / "out", batch_size=2, mode=Mode.APPEND)
    assert (summary.rows, summary.added) == (4, 2)


def test_samples_without_the_id_that_was_asked_for_keep_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.tar", {"0.png": b"", "0.json": b"{}", "1.png": b"", "1.json": json.dumps({"uid": name}).encode(), "2.png": b""})
    source = open_source(f"{tmp_path}/{{a,b}}.tar", SourceOptions(id_column="uid"))
    assert [sample.id for sample in source.samples] == ["a/0", "a", "a/2", "b/0", "b", "b/2"]
    assert [reason(source.samples[row]) for row in (0, 2)] == ["its .json has no 'uid', the id that was asked for."] * 2


def test_the_json_may_give_the_id_and_columns_be_named(tmp_path: Path) -> None:
    members = {
        "0.png": b"", "0.json": b'{"uid": 77, "text": ["a", "b"], "tags": ["x"]}',
        "1.png": b"", "1.json": b'{"text": "c", "tags": []}',
    }  # fmt: skip
    source = open_source(shard(tmp_path / "a.tar", members), SourceOptions(id_column="uid", caption_column="text", label_column="tags"))
    assert (source.samples[0].id, source.samples[0].captions, source.samples[0].labels) == ("77", ("a", "b"), ("x",))
    assert reason(source.samples[1]) == "its .json has no 'uid', the id that was asked for."
    with pytest.raises(DuplicateSample, match=r"the first is '7' \(a.tar/0.png, a.tar/1.png\)"):
        open_source(
            shard(tmp_path / "a.tar", {"0.png": b"", "0.json": b'{"id": 7}', "1.png": b"", "1.json": b'{"id": 7}'}), SourceOptions(id_column="id")
        )


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"", "a.jpg": b""}, "holds two images of this key: 'a.png' and 'a.jpg'. Keep one."),
        ({"a.png": b"", "a.txt": b"x", "./a.txt": b"y"}, "holds './a.txt' twice"),
        ({"a.png": b"", "a.json": b"{oops"}, "its .json is not JSON"),
        ({"a.png": b"", "a.json": b"[1]"}, "its .json is not a JSON object"),
        ({"a.png": b"", "a.txt": b"x" * ((1 << 20) + 1)}, "'a.txt' has 1048577 bytes, more than the limit of 1048576."),
        ({"a.png": b"", "a.json": b'{"labels": [1.5]}'}, "'labels' must be names or class numbers, found 1.5."),
    ],
)
def test_a_bad_sample_keeps_its_place_and_says_why(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    source = open_source(shard(tmp_path / "a.tar", {**members, "z.png": b""}))
    assert [sample.id for sample in source.samples] == ["a", "z"]
    assert message in reason(source.samples[0])
    assert source.notes[0].startswith("1 rows cannot be read and will be in quarantine; the first is a.tar/")


def test_what_holds_something_is_taken_before_what_is_empty(tmp_path: Path) -> None:
    members = {
        "0.png": b"", "0.cls": b"\n", "0.txt": b" \n", "0.json": b'{"label": "cat", "caption": "a cat"}',
        "1.png": b"", "1.json": b'{"labels": [], "label": "dog", "captions": null, "caption": "a dog"}',
        "2.png": b"", "2.cls": b"dog", "2.txt": b"a dog", "2.json": b'{"labels": ["cat"], "captions": 1.5}',
        "3.png": b"", "3.cls": b"", "3.json": b"{}",
    }  # fmt: skip
    source = open_source(shard(tmp_path / "a.tar", members))
    assert listed(source) == {"0": (("a cat",), ("cat",)), "1": (("a dog",), ("dog",)), "2": (("a dog",), ("dog",)), "3": ((), None)}
    assert [sample.problem for sample in source.samples] == [None] * 4


def test_a_class_that_is_no_text_is_never_lost(tmp_path: Path) -> None:
    sample = open_source(shard(tmp_path / "a.tar", {"a.png": b"", "a.cls": b"caf\xe9", "a.json": b'{"label": "cat"}'})).samples[0]
    assert reason(sample) == "its .cls is not UTF-8 (byte 3). Save it as UTF-8."


def test_captions_that_are_no_text_spoil_the_captions_alone(tmp_path: Path) -> None:
    sample = open_source(shard(tmp_path / "a.tar", {"a.png": encoded(0), "a.txt": b"caf\xe9"})).samples[0]
    assert sample.problem == "its .txt is not UTF-8 (byte 3). Save it as UTF-8."
    assert sample.image is not None
    assert sample.image.read() == encoded(0)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_followed_nowhere(kind: bytes, tmp_path: Path) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    sample = open_source(shard(tmp_path / "a.tar", {"a.png": b""}, change)).samples[0]
    assert reason(sample) == "'a.png' is no regular member (a link or device). Pack the file itself."


def test_hostile_names_are_names_and_nothing_is_written(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = shard(inside / "a.tar", {"../../escape.png": encoded(0), "/etc/escape.png": encoded(1), "a\nb.png": encoded(2)})
    before = sorted(tmp_path.rglob("*"))
    source = open_source(path)
    assert [sample.id for sample in source.samples] == ["../../escape", "/etc/escape", "a\nb"]
    assert [sample.image.read() for sample in source.samples if sample.image] == [encoded(0), encoded(1), encoded(2)]
    assert sorted(tmp_path.rglob("*")) == before


def with_size(path: Path, field: bytes) -> Path:
    """The shard with the size field of its first header replaced, and the checksum mended."""
    content = bytearray(path.read_bytes())
    content[124:136] = field
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"\xff" * 12], ids=["8 GiB", "absurd", "negative"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE], ids=["member", "long name", "pax"])
def test_absurd_lengths_are_refused_without_memory_or_end(kind: bytes, size: bytes, tmp_path: Path) -> None:
    path = with_size(shard(tmp_path / "a.tar", {"a.png": b"x"}, lambda info: setattr(info, "type", kind)), size)
    with pytest.raises(SourceFormatError, match=r"a.tar is (cut off or damaged within 'a.png'|no readable tar)"):
        open_source(path)


def damaged(whole: bytes) -> dict[str, tuple[bytes, str]]:
    """Kind of damage -> content, part of the message. `whole` has two members of one block each, and ends with zeros."""
    return {
        "within a member": (whole[:512], "cut off or damaged within 'a.png'"),
        "within its padding": (whole[:700], "no readable tar after 'a.png' (unexpected end of data)"),
        "between two members": (whole[:1024], "lacks its end mark after 'a.png'"),
        "within a header": (whole[:1200], "damaged header after 'a.png'"),
        "a header spoiled": (whole[:1100] + b"spoiled" + whole[1107:], "damaged header after 'a.png'"),
        "two joined": (whole + whole, "goes on after its end mark, which follows 'b.png': two tars were joined"),
        "no tar": (b"no tar at all" * 100, "is no readable tar after its start"),
        "empty": (b"", "is no readable tar after its start"),
    }


@pytest.mark.parametrize("kind", damaged(b""))
def test_a_damaged_shard_is_an_error_and_never_a_shorter_listing(kind: str, tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"a.png": b"x", "b.png": b"y"})
    content, message = damaged(path.read_bytes())[kind]
    path.write_bytes(content)
    with pytest.raises(SourceFormatError) as caught:
        open_source(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_compressed_shards_are_refused_with_the_way_out(tmp_path: Path) -> None:
    content = shard(tmp_path / "a.tar", {"a.png": b""}).read_bytes()
    for name in ("b.tar", "b.tar.gz", "b.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(content))
        with pytest.raises(SourceFormatError, match=r"is compressed: .* Unpack the compression alone, for example: gunzip shard.tar.gz"):
            open_source(tmp_path / name)


def test_shards_behind_urls_are_read_by_ranges(tmp_path: Path) -> None:
    for number in range(2):
        path = shard(tmp_path / "a.tar", {f"{number}.png": encoded(number), f"{number}.txt": b"two"})
        fsspec.filesystem("memory").pipe(f"/shards/{number}.tar", path.read_bytes())
    source = open_source("memory://shards/{0..1}.tar")
    os.remove(tmp_path / "a.tar")
    assert listed(source) == {"0": (("two",), None), "1": (("two",), None)}
    assert [sample.image.read() for sample in source.samples if sample.image] == [encoded(0), encoded(1)]
    with pytest.raises(SourceFormatError, match=r"memory://shards/2.tar cannot be read \(memory://shards/2.tar could not be read: FileNotFoundError"):
        open_source("memory://shards/{0..2}.tar")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 3000), spoiled=st.binary(min_size=1, max_size=20), cut=st.integers(0, 20_000))
def test_any_content_is_a_source_or_a_typed_error(place: int, spoiled: bytes, cut: int, tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"a.png": b"x" * 600, "a.json": b'{"caption": "x"}', "b" * 120 + ".png": b"y"})
    content = path.read_bytes()
    path.write_bytes((content[:place] + spoiled + content[place + len(spoiled) :])[:cut])
    try:
        source = open_source(path)
    except SourceError:
        return
    assert len(source) > 0


def test_keys_may_hold_dots_where_nothing_stands_for_the_key_before_the_first(tmp_path: Path) -> None:
    members = {f"IMG_{number}.2023-05-01.{kind}": b"x" for number in range(300) for kind in ("png", "txt")}
    members |= {"plain.png": b"", "plain.edited.png": b"", "v1.0/IMG.3.cls": b"3.0", "v1.0/IMG.3.JPG": b""}
    source = open_source(shard(tmp_path / "a.tar", members))
    assert len(source) == 302
    found = listed(source)
    assert (found["IMG_7.2023-05-01"], found["plain"], found["v1.0/IMG.3"]) == ((("x",), None), ((), None), ((), ("3",)))
    assert dict(source.ignored) == {"second images and texts of a key": 1}
    assert source.notes[0].startswith(
        "301 keys hold dots, since no member of what stands before the first dot has a single suffix; the first is IMG_0."
    )


def test_columns_of_classes_are_keys_of_the_json_members(tmp_path: Path) -> None:
    members = {"1.png": b"", "1.json": b'{"A": 1, "B": -1}', "2.png": b"", "2.json": b'{"A": 0, "B": true}', "3.png": b""}
    source = open_source(shard(tmp_path / "a.tar", members), SourceOptions(label_column="A,B"))
    assert [(sample.labels, sample.unknown) for sample in source.samples] == [(("A",), ("B",)), (("B",), ()), (None, ())]
