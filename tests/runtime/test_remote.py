"""What lies behind a URL is read like a file: what may pass is tried again, what will not is told at once."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from difffeat.errors import ConfigError, DecodeError, MissingExtra
from difffeat.runtime import remote
from difffeat.runtime.patience import Patience, Stop
from difffeat.runtime.places import blob_at
from difffeat.runtime.remote import RemoteError, fetch, fetch_whole, is_url, list_remote, locate, open_remote
from difffeat.runtime.sources import open_source


class Refused(Exception):
    """As an HTTP client raises it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class FlakyFileSystem(MemoryFileSystem):
    """Memory whose reads fail with the given errors before they succeed."""

    protocol = "flaky"
    errors: list[Exception] = []  # noqa: RUF012  what is left to fail with; emptied by each test
    reads = 0
    ranges = True

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        type(self).reads += 1
        if self.errors:
            raise self.errors.pop(0)
        return super().cat_file(path, start if self.ranges else None, end if self.ranges else None, **options)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FlakyFileSystem]]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    waits: list[float] = []
    monkeypatch.setattr(Stop, "pause", lambda _, seconds: waits.append(seconds))
    monkeypatch.setattr(FlakyFileSystem, "waits", waits, raising=False)
    monkeypatch.setattr(FlakyFileSystem, "reads", 0)
    FlakyFileSystem().pipe({"/a.bin": bytes(range(200))})
    yield FlakyFileSystem
    FlakyFileSystem.errors.clear()


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("s3://b/a.jpg", True),
        ("simplecache::s3://b/a.jpg", True),
        ("https://h/a", True),
        ("a/b.jpg", False),
        ("C:/x.jpg", False),
        ("x::train", False),
        ("a::b://c.png", False),
        ("zip::memory://a.zip", True),
        ("HTTPS://h/a", True),
        ("data:image/png;base64,AAAA", True),
        ("data: of mine.png", False),
    ],
)
def test_a_url_is_told_from_a_path(place: str, url: bool) -> None:
    assert is_url(place) is url


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError("slow"), OSError("busy"), Refused(503), Refused(429)])
def test_what_may_pass_is_tried_four_times_in_all(flaky: Any, error: Exception) -> None:
    flaky.errors += [error] * 3
    assert fetch("flaky://a.bin", 3, 6) == bytes([3, 4, 5])
    assert flaky.waits == [0.5, 1.0, 2.0]
    flaky.errors += [error] * 4
    with pytest.raises(RemoteError, match=r"flaky://a.bin could not be read in 4 attempts: "):
        fetch("flaky://a.bin", 3, 6)
    assert flaky.reads == 8


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("no"), Refused(404), Refused(403)])
def test_what_will_not_pass_is_tried_once(flaky: Any, error: Exception) -> None:
    flaky.errors += [error]
    with pytest.raises(RemoteError, match=rf"flaky://a.bin could not be read: {type(error).__name__}"):
        fetch("flaky://a.bin", 0, 1)
    assert (flaky.reads, flaky.waits) == (1, [])


def test_a_server_that_cannot_be_reached_is_not_a_file_that_is_not_there(flaky: Any) -> None:
    error = FileNotFoundError("flaky://a.bin")
    error.__cause__ = ConnectionRefusedError("refused")
    flaky.errors += [error] * 4
    with pytest.raises(RemoteError, match=r"could not be read in 4 attempts: ConnectionRefusedError: refused"):
        fetch("flaky://a.bin", 0, 1)


def test_a_file_behind_a_url_seeks_and_reads_like_one_on_disk(flaky: Any) -> None:
    with open_remote("flaky://a.bin") as file:
        assert file.read(4) == bytes(range(4))
        assert file.seek(-3, io.SEEK_END) == 197
        assert file.read() == bytes(range(197, 200))
        assert file.read() == b""
        file.seek(100)
        assert (file.read(2), file.tell()) == (bytes([100, 101]), 102)


def test_a_file_in_pieces_is_a_handful_of_requests(flaky: Any) -> None:
    with open_remote("flaky://a.bin") as file:
        for at in range(0, 200, 10):
            file.seek(at)
            file.read(2)
    assert flaky.reads <= 2


def test_a_server_that_knows_no_ranges_gives_the_same_bytes(flaky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flaky, "ranges", False)
    assert fetch("flaky://a.bin", 50, 53) == bytes([50, 51, 52])
    assert fetch("flaky://a.bin", 0, 1000) == bytes(range(200))
    flaky.reads = 0
    with open_remote("flaky://a.bin") as file:
        for at in (150, 3, 199):
            file.seek(at)
            assert file.read(1) == bytes([at])
    assert flaky.reads <= 2


def test_a_file_that_shrank_is_told(flaky: Any) -> None:
    file = open_remote("flaky://a.bin")
    FlakyFileSystem().pipe({"/a.bin": b""})
    with pytest.raises(RemoteError, match=r"ends at byte 0, though it claims to have 200"):
        file.read(1)


def test_a_folder_is_listed_with_sizes() -> None:
    fsspec.filesystem("memory").pipe({"/tree/b.png": b"12", "/tree/x/a.png": b"123"})
    assert list_remote("memory://tree") == [("b.png", 2), ("x/a.png", 3)]


def test_a_protocols_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("lacking", "no_such_package.FileSystem", errtxt="install it", clobber=True)
    with pytest.raises(
        MissingExtra, match=r"Reading lacking:// URLs needs no_such_package, which is not installed. Run: pip install no_such_package"
    ):
        locate("lacking://a")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(MissingExtra, match=r"Reading s3:// URLs needs fsspec, which is not installed. Run: pip install 'difffeat\[remote\]'"):
        locate("s3://b/a")


def test_an_unknown_protocol_is_told() -> None:
    with pytest.raises(ConfigError, match=r"nonsense://a cannot be read: Protocol not known: nonsense"):
        locate("nonsense://a")


def test_colons_are_a_chain_only_behind_what_reads_out_of_another() -> None:
    fsspec.filesystem("memory").pipe({"/c/a::b.png": b"12", "/c/zip::x://y.png": b"34"})
    assert fetch_whole("memory://c/a::b.png", 10) == b"12"
    assert fetch_whole("MEMORY://c/zip::x://y.png", 10) == b"34"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("in/a.png", b"56")
        packed.writestr("bomb.png", bytes(1 << 20), zipfile.ZIP_DEFLATED)
    fsspec.filesystem("memory").pipe({"/c/z.zip": buffer.getvalue()})
    assert fetch_whole("zip://in/a.png::memory://c/z.zip", 10) == b"56"
    with pytest.raises(RemoteError, match="has more than 10 bytes, the limit"):
        fetch_whole("zip://bomb.png::memory://c/z.zip", 10)


def test_what_is_larger_than_a_piece_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE", 7)
    for size in (6, 7, 8, 14, 200):
        data = bytes(range(size))
        fsspec.filesystem("memory").pipe({"/pieces.bin": data})
        assert fetch_whole("memory://pieces.bin", 1000) == data
        assert fetch("memory://pieces.bin", 2, size) == data[2:]
        with open_remote("memory://pieces.bin") as file:
            assert file.read() == data


def test_a_file_system_that_never_answers_ends_by_the_deadline(flaky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(flaky, "cat_file", lambda *_, **__: answered.wait() and b"")
    try:
        with pytest.raises(RemoteError, match=r"TimeoutError: no answer within 0\.1 s"):
            fetch("flaky://silent.bin", 0, 1, Patience(timeout=0.1, retries=0, total=1))
    finally:
        answered.set()


@pytest.mark.parametrize("url", ["file:///dev/zero", "file:///dev/../dev/zero", "FILE:///dev/zero", "local:///dev/zero", "file://localhost/dev/zero"])
def test_devices_are_no_images_under_any_address(url: str) -> None:
    with pytest.raises(DecodeError, match="is no regular file"):
        blob_at(".", url).read()


def test_an_address_of_this_disk_is_a_path_with_a_paths_rules(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"12")
    (tmp_path / "c%20d.png").write_bytes(b"34")
    os.mkfifo(tmp_path / "pipe")
    assert blob_at(".", f"file://{tmp_path}/a%20b.png").read() == b"12"
    assert blob_at(".", f"file://{tmp_path}/c%20d.png").read() == b"34"
    for name in ("pipe", "."):
        with pytest.raises(DecodeError, match="is no regular file"):
            blob_at(".", f"file://{tmp_path}/{name}").read()
    with pytest.raises(DecodeError, match="has 2 bytes, more than the limit of 1"):
        blob_at(".", f"file://{tmp_path}/a%20b.png").read(1)
    (tmp_path / "m.csv").write_text("image\na b.png\n")
    assert open_source(f"file://{tmp_path}/m.csv").samples == open_source(tmp_path / "m.csv").samples
    assert open_source(f"file://{tmp_path}").samples == open_source(tmp_path).samples


@pytest.mark.parametrize(
    ("url", "data"),
    [("data:image/png;base64,AQI=", b"\1\2"), ("data:;BASE64,AQI", b"\1\2"), ("data:,a%20b", b"a b"), ("data:x;base64,-_8=", b"\xfb\xff")],
)
def test_a_data_address_holds_its_bytes(url: str, data: bytes) -> None:
    assert blob_at("https://h", url).read() == data


def test_a_data_address_that_is_damaged_is_told() -> None:
    with pytest.raises(DecodeError, match="is not base64"):
        blob_at(".", "data:image/png;base64,A?=").read()
