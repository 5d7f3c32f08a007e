"""Whatever an image lies in, its bytes are read when they are needed, within a limit, and what cannot be read says why."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import fsspec
import pytest

from difffeat.errors import DecodeError
from difffeat.runtime.blobs import Blob, BytesBlob, FileBlob, SliceBlob, UnreadableBlob, UrlBlob
from difffeat.runtime.samples import Sample


@pytest.fixture
def blobs(tmp_path: Path) -> list[Blob]:
    """The bytes `abcdef` of every kind."""
    (tmp_path / "a.png").write_bytes(b"abcdef")
    (tmp_path / "a.tar").write_bytes(b"....abcdef....")
    fsspec.filesystem("memory").pipe({"/blobs/a.png": b"abcdef", "/blobs/a.tar": b"....abcdef...."})
    return [
        FileBlob(str(tmp_path), "a.png"),
        FileBlob("elsewhere", str(tmp_path / "a.png")),
        SliceBlob(str(tmp_path / "a.tar"), 4, 6),
        UrlBlob("memory://blobs/a.png", 6),
        SliceBlob("memory://blobs/a.tar", 4, 6),
        BytesBlob(b"abcdef"),
    ]


def test_every_kind_gives_its_bytes_and_their_number_also_after_pickling(blobs: list[Blob]) -> None:
    for blob in (*blobs, *pickle.loads(pickle.dumps(blobs))):
        assert blob.read() == b"abcdef"
        assert blob.size == 6
        assert isinstance(blob, Blob)


def test_no_kind_reads_beyond_the_limit(blobs: list[Blob]) -> None:
    for blob in blobs:
        assert blob.read(6) == b"abcdef"
        with pytest.raises(DecodeError, match=r"more than (the limit of )?5"):
            blob.read(5)


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"the file cannot be read \(No such file or directory\). Check that it exists and its permissions."):
        FileBlob(str(tmp_path), "gone.png").read()
    with pytest.raises(DecodeError, match=r"gone.tar cannot be read \(No such file or directory\)"):
        SliceBlob(str(tmp_path / "gone.tar"), 0, 1).read()
    with pytest.raises(DecodeError, match=r"memory://blobs/gone.png could not be read: FileNotFoundError.*Check the address"):
        UrlBlob("memory://blobs/gone.png").read()
    with pytest.raises(DecodeError, match=r"^it is a link$"):
        UnreadableBlob("it is a link").read()
    assert FileBlob(str(tmp_path), "gone.png").size == UnreadableBlob("").size == UrlBlob("memory://x").size == -1


def test_names_that_are_no_paths_are_told(tmp_path: Path) -> None:
    blob = FileBlob(str(tmp_path), "a\0b.png")
    assert blob.size == -1
    with pytest.raises(DecodeError, match=r"is no path"):
        blob.read()


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DecodeError, match=r"a.png is no regular file"):
        FileBlob(str(tmp_path), "a.png").read()


def test_a_stretch_that_ends_too_soon_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"abc")
    with pytest.raises(DecodeError, match=r"a.tar ends at byte 3, 4 bytes too soon. Get the file again."):
        SliceBlob(str(tmp_path / "a.tar"), 1, 6).read()


def test_a_sample_on_disk_costs_less_than_half_a_kilobyte() -> None:
    folder, name = "/data/photos", "000000123456.jpg"
    sample = Sample("000000123456", FileBlob(folder, name), name, ("a cat on a mat",))
    own = (sample, sample.id, sample.image, name, sample.captions, sample.captions[0])
    assert sum(map(sys.getsizeof, own)) < 500
    assert not hasattr(sample, "__dict__")
    assert not hasattr(sample.image, "__dict__")
