"""Whatever a plain server answers within the standard is read; what it does outside of it ends in bounded time and memory, and is named."""

from __future__ import annotations

import io
import socket
import tarfile
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from difffeat.errors import DecodeError
from difffeat.runtime import http_client as client
from difffeat.runtime import remote
from difffeat.runtime.blobs import SliceBlob, UrlBlob
from difffeat.runtime.decoding import DecodePool
from difffeat.runtime.patience import Patience, Stop, adopt
from difffeat.runtime.pipeline import Stopped
from difffeat.runtime.places import below, blob_at, parent, suffix_of
from difffeat.runtime.remote import RemoteError, fetch, fetch_whole, list_remote, open_remote
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from tests.runtime.web import PHOTO, Web, web

SOON = Patience(timeout=0.3, retries=0, total=0.5)
ONCE = Patience(timeout=60, retries=0, total=120)
LIMIT = 1 << 20


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(Stop, "pause", lambda _, seconds: None)
    with web() as running:
        yield running


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "gzip",
        "twice",
        "deflate",
        "raw",
        "odd",
        "mislabelled",
        "redirect",
        "norange",
        "range",
        "partial",
        "nolength",
        "chunked",
        "busy",
        "flaky",
    ],
)
def test_a_plain_answer_is_the_file(server: Web, name: str) -> None:
    assert fetch_whole(f"{server.base}/{name}.png", LIMIT) == PHOTO


@pytest.mark.parametrize("name", ["plain", "gzip", "norange", "range", "partial", "nolength", "chunked", "redirect"])
def test_any_part_of_a_file_is_had_from_servers_with_and_without_ranges(server: Web, name: str) -> None:
    url = f"{server.base}/{name}.png"
    assert fetch(url, 50, 2000) == PHOTO[50:2000]
    with open_remote(url) as file:
        assert file.seek(-10, io.SEEK_END) == len(PHOTO) - 10
        assert file.read() == PHOTO[-10:]
        file.seek(0)
        assert file.read() == PHOTO


def test_a_server_without_ranges_sends_a_file_once(server: Web) -> None:
    with open_remote(f"{server.base}/norange.png") as file:
        for at in range(0, 3000, 100):
            file.seek(at)
            assert file.read(1) == PHOTO[at : at + 1]
    assert sum(not asked for asked in server.ranges) == 1


def test_an_empty_file_has_no_bytes(server: Web) -> None:
    server.files["range-0"] = b""
    with open_remote(f"{server.base}/range-0") as file:
        assert file.read() == b""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("silent", r"TimeoutError: no answer, or too little of it, within 0\.3"),
        ("drip", r"TimeoutError: no answer, or too little of it, within 0\.3"),
        ("endless", "it has more than 1048576 bytes, the limit"),
        ("chunkless", "it has more than 1048576 bytes, the limit"),
        ("bomb", "it has more than 1048576 bytes, the limit"),
        ("halfgzip", "its gzip coding ends too soon"),
        ("br", "the server sends it with content coding 'br', unasked; only gzip and deflate are undone"),
        ("away", "it redirects to 'file:///etc/passwd', which is not a web address"),
        ("loop", "it redirects more than 10 times"),
        ("short", "ClientPayloadError"),
        ("nothing", "the server answers 204 No Content: there is nothing at this address"),
        ("forbidden", "the server answers 403 Forbidden"),
        ("later", r"the server answers 429 Too Many Requests \(it asks to come back after 900 s; --total-timeout is 0.5 s\)"),
    ],
)
def test_what_is_no_answer_is_named_and_bounded(server: Web, name: str, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RemoteError, match=message):
            fetch_whole(f"{server.base}/{name}.png", LIMIT, SOON if name in ("silent", "drip", "later") else ONCE)
        assert tracemalloc.get_traced_memory()[1] < 16 * LIMIT
    finally:
        tracemalloc.stop()


def test_a_body_of_unstated_length_is_held_to_a_limit_of_its_own(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "UNSTATED", 1000)
    with pytest.raises(RemoteError, match="it has more than 1000 bytes, the limit"):
        fetch_whole(f"{server.base}/nolength.png", LIMIT)
    assert fetch_whole(f"{server.base}/plain.png", LIMIT) == PHOTO


def test_what_a_backend_says_is_told_in_one_short_line(server: Web) -> None:
    with pytest.raises(RemoteError, match=r"overrun\.png could not be read") as raised:
        fetch_whole(f"{server.base}/overrun.png", LIMIT)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_ranges_that_lie_elsewhere_are_refused(server: Web) -> None:
    with pytest.raises(RemoteError, match="asked for bytes 3 to 9, the server sends those from 10 on"):
        fetch(f"{server.base}/lying.png", 3, 9)


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("a%2Fb%2540%2Cc.png?X-Sig=a%2Fb%2Cc+d", "a%2Fb%2540%2Cc.png?X-Sig=a%2Fb%2Cc+d"),
        ("a::b.png", "a::b.png"),
        ("k;v=1,2.png?sig=a%2Fb%2Bc%3D&e=1", "k;v=1,2.png?sig=a%2Fb%2Bc%3D&e=1"),
        ("zip::a.png", "zip::a.png"),
        ("a b/ü.png", "a%20b/%C3%BC.png"),
        ("100%.png", "100%25.png"),
        ("a.png#part", "a.png"),
        ("a/../b//c.png", "a/../b//c.png"),
        ("a[1]{x}|^.png", "a[1]%7Bx%7D|%5E.png"),
        ("%e4%ba%ba.png", "%e4%ba%ba.png"),
        ("?q=http://h/x?y", "?q=http://h/x?y"),
    ],
)
def test_an_address_is_sent_as_it_is_written(server: Web, written: str, sent: str) -> None:
    assert UrlBlob(f"{server.base}/{written}").read() == PHOTO
    assert server.asked == [f"/{sent}"]


def test_a_redirect_is_followed_byte_for_byte(server: Web) -> None:
    fetch_whole(f"{server.base}/redirect.png", LIMIT)
    assert server.asked[-1] == "/after%2Fwards.png?x=%41"


def test_schemes_are_read_in_any_case_and_hosts_in_any_form(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch_whole(server.base.replace("http", "HTTP") + "/a.png", LIMIT) == PHOTO
    assert fetch_whole(server.base, LIMIT) == PHOTO
    fetch_whole(server.base.replace("://", "://ann:s3%40cret@") + "/a.png", LIMIT)
    assert "Authorization: Basic YW5uOnMzQGNyZXQ=" in server.headers[-1]


def test_an_address_of_ipv6_is_no_chain() -> None:
    if not socket.has_ipv6:
        pytest.skip("needs IPv6")
    try:
        with web(socket.AF_INET6) as running:
            assert fetch_whole(f"{running.base}/a.png", LIMIT) == PHOTO
    except OSError as error:
        if isinstance(error, RemoteError):
            raise
        pytest.skip("needs IPv6 on loopback")


def test_a_password_is_not_told(server: Web) -> None:
    with pytest.raises(RemoteError, match="ann:PASSWORD@") as caught:
        fetch_whole(server.base.replace("://", "://ann:s3cret@") + "/forbidden.png", LIMIT)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://", "http:///a.png", "http://[::1/a.png", "http://h:port/a.png", "https://ex..ample\u00fc/a"])
def test_what_is_no_address_is_named(url: str) -> None:
    with pytest.raises(RemoteError, match=r"could not be read: it is not an address \("):
        fetch_whole(url, LIMIT, SOON)


def test_a_silent_host_is_asked_shortly_after_a_while(server: Web) -> None:
    silent = [f"{server.base}/silent-{number}.png" for number in range(3)]
    for url in silent:
        with pytest.raises(RemoteError, match="TimeoutError"):
            fetch_whole(url, LIMIT, Patience(timeout=0.1, retries=1, total=1.0))
    with pytest.raises(RemoteError, match="its host has not answered before, so it was asked once and shortly"):
        fetch_whole(f"{server.base}/silent-4.png", LIMIT, Patience(timeout=0.1, retries=1, total=1.0))
    assert [server.asked.count(f"/silent-{number}.png") for number in (0, 4)] == [2, 1]
    assert fetch_whole(f"{server.base}/a.png", LIMIT) == PHOTO
    with pytest.raises(RemoteError, match="in 2 attempts: TimeoutError"):
        fetch_whole(silent[0], LIMIT, Patience(timeout=0.1, retries=1, total=1.0))


def test_a_name_that_nobody_resolves_ends_by_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: resolved.wait() and [])
    try:
        with pytest.raises(RemoteError, match="TimeoutError"):
            fetch_whole("http://slow.example/a.png", LIMIT, SOON)
    finally:
        resolved.set()


def test_a_wait_ends_when_it_is_stopped() -> None:
    stop, ended = Stop(), list[BaseException]()

    def wait(url: str) -> None:
        adopt(stop)
        try:
            fetch_whole(url, LIMIT, Patience(timeout=1000, retries=5, total=5000))
        except BaseException as error:
            ended.append(error)

    with web() as running:
        threads = [threading.Thread(target=wait, args=(f"{running.base}/silent-{number}",)) for number in range(3)]
        for thread in threads:
            thread.start()
        while len(running.asked) < 3:
            threading.Event().wait(0.01)
        stop.set()
        threads.append(threading.Thread(target=wait, args=(f"{running.base}/a.png",)))
        threads[-1].start()
        for thread in threads:
            thread.join()
    assert [type(error) for error in ended] == [Stopped] * 4


def test_of_many_that_are_fetched_at_once_one_is_large_at_a_time(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LARGE", 1000)
    held, most = [0], [0]

    def read(url: str) -> bytes:
        data = UrlBlob(url).read()
        held[0] += len(data) > 1000
        most[0] = max(most[0], held[0])
        return data

    def decode(data: bytes) -> int:
        held[0] -= len(data) > 1000
        return len(data)

    server.files |= {f"plain-{number}.png": bytes(900 + 300 * (number % 2)) for number in range(20)}
    with DecodePool(2) as pool:
        found = [pool.fetch(read, f"{server.base}/plain-{number}.png", then=decode) for number in range(20)]
        assert [future.result() for future in found] == [900 + 300 * (number % 2) for number in range(20)]
    assert most == [1]


def test_a_source_says_how_long_its_addresses_are_waited_for(server: Web, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"image\n{server.base}/silent.png\n")
    blob = open_source(manifest, SourceOptions(timeout=0.1, retries=1, total_timeout=2)).samples[0].image
    assert isinstance(blob, UrlBlob)
    with pytest.raises(DecodeError, match="in 2 attempts"):
        blob.read()
    assert UrlBlob("http://h/a").patience == Patience()


def packed(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(PHOTO)
            tar.addfile(member, io.BytesIO(PHOTO))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["range", "plain", "norange", "gzip", "nolength", "partial"])
def test_a_shard_and_a_table_are_read_from_any_server(server: Web, kind: str) -> None:
    server.files[f"{kind}-s.tar"] = packed(["a.png", "b.png"])
    server.files[f"{kind}-m.csv"] = b"id,image\na,x.png\nb,sub/y.png\n"
    shard = open_source(f"{server.base}/{kind}-s.tar?X-Sig=a%2Fb").samples
    assert [sample.id for sample in shard] == ["a", "b"]
    assert isinstance(shard[1].image, SliceBlob)
    assert shard[1].image.read() == PHOTO
    table = open_source(f"{server.base}/{kind}-m.csv?X-Sig=a%2Fb").samples
    assert [sample.image for sample in table] == [UrlBlob(f"{server.base}/x.png"), UrlBlob(f"{server.base}/sub/y.png")]


def test_a_folder_of_the_web_is_listed_by_its_index_pages(server: Web) -> None:
    server.files["photos/"] = (
        b'<html><a href="?C=N;O=D">Name</a><a href="../">up</a><a href="a%20b.png">x</a><a href="sub/">s</a><a href="http://other/x.png">o</a>'
        b'<A HREF="/photos/c&amp;d.png">c</a></html>'
    )
    server.files["photos/sub/"] = b'<a href="./">.</a><a href="/photos/">top</a><a href="e%23%2520%E4.png">e</a>'
    assert list_remote(f"{server.base}/photos") == [("a b.png", -1), ("c&d.png", -1), ("sub/e#%20\udce4.png", -1)]
    assert below(f"{server.base}/photos", "sub/e#%20\udce4.png") == f"{server.base}/photos/sub/e%23%2520%E4.png"
    with pytest.raises(RemoteError, match="is not an index page"):
        list_remote(f"{server.base}/plain")


def test_a_folder_of_the_web_has_the_ids_of_the_folder_on_disk(server: Web, tmp_path: Path) -> None:
    for name in ("a b.png", "ü#1%20.png", "s.png"):
        (tmp_path / name).write_bytes(PHOTO)
    server.files["f/"] = "".join(f'<a href="{quote(path.name)}">x</a>' for path in tmp_path.iterdir()).encode()
    found, local = open_source(f"{server.base}/f/").samples, open_source(tmp_path).samples
    assert [sample.id for sample in found] == [sample.id for sample in local]
    assert all(sample.image is not None and sample.image.read() == PHOTO for sample in found)


def test_a_place_beside_a_signed_table_is_without_its_query() -> None:
    assert parent("https://h/d/m.csv?sig=a/b") == "https://h/d"
    assert suffix_of("HTTPS://h/d/m.CSV?sig=a/b.png") == ".csv"
    assert blob_at("https://h/d", "a#1.png") == UrlBlob("https://h/d/a%231.png")
