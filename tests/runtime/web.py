"""A web server on loopback that behaves as its paths say."""

from __future__ import annotations

import gzip
import io
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

LIMIT = 64
"""MiB that an endless body sends at most, so that a broken client ends too."""


def photo() -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((96, 64)).save(buffer, "PNG")
    return buffer.getvalue()


PHOTO = photo()


def head(status: str, *headers: str) -> bytes:
    return (f"HTTP/1.1 {status}\r\n" + "".join(f"{line}\r\n" for line in headers) + "Connection: close\r\n\r\n").encode("latin-1")


class Web:
    """**Fields:** `base` URL without a slash; `asked` request targets in order; `ranges` their Range headers; `files` bodies by path."""

    def __init__(self, family: socket.AddressFamily = socket.AF_INET) -> None:
        self._socket = socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family, backlog=256)
        host, port = self._socket.getsockname()[:2]
        self.base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.headers: list[str] = []
        self.files: dict[str, bytes] = {}
        self.tries = Counter[str]()
        self.closed = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self.closed.set()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := connection.recv(65536)):
                    return
                data += more
            text = data.decode("latin-1")
            method, target, _ = text.split("\r\n")[0].split(" ", 2)
            asked = next((line.partition(":")[2].strip() for line in text.split("\r\n") if line.lower().startswith("range:")), "")
            self.asked.append(target)
            self.ranges.append(asked)
            self.headers.append(text)
            if method == "HEAD":
                connection.sendall(head("405 Method Not Allowed", "Content-Length: 0"))
                return
            name = target.lstrip("/").partition("?")[0]
            self.tries[name] += 1
            for part in self._reply(name, target, asked):
                connection.sendall(part)
        except OSError:
            pass  # the client has left
        finally:
            connection.close()

    def _reply(self, name: str, target: str, asked: str) -> Iterator[bytes]:
        kind = name.partition("-")[0].partition(".")[0]
        body = self.files.get(name, PHOTO)
        whole = head("200 OK", f"Content-Length: {len(body)}") + body
        if kind == "silent":
            self.closed.wait()
        elif kind == "drip":
            yield head("200 OK", "Content-Length: 1000000")
            while not self.closed.wait(0.05):
                yield b"x"
        elif kind == "endless":
            yield head("200 OK")
            for _ in range(LIMIT):
                yield b"x" * (1 << 20)
        elif kind == "chunkless":
            yield head("200 OK", "Transfer-Encoding: chunked")
            for _ in range(LIMIT):
                yield b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        elif kind == "bomb":
            packed = zlib.compressobj(9, zlib.DEFLATED, 31)
            content = b"".join(packed.compress(bytes(1 << 20)) for _ in range(LIMIT)) + packed.flush()
            yield head("200 OK", "Content-Encoding: gzip", f"Content-Length: {len(content)}") + content
        elif kind in ("gzip", "twice", "deflate", "raw", "br", "odd", "mislabelled", "halfgzip"):
            yield self._coded(kind, body)
        elif kind == "redirect":
            yield head("302 Found", "Location: /after%2Fwards.png?x=%41", "Content-Length: 0")
        elif kind == "away":
            yield head("302 Found", "Location: file:///etc/passwd", "Content-Length: 0")
        elif kind == "loop":
            yield head("302 Found", f"Location: {target}", "Content-Length: 0")
        elif kind == "norange":
            yield head("416 Range Not Satisfiable", "Content-Length: 0") if asked else whole
        elif kind in ("range", "partial", "lying"):
            yield self._part(kind, body, asked)
        elif kind == "overrun":
            yield head("200 OK", f"Content-Length: {len(body) // 2}") + body
        elif kind == "short":
            yield whole[: -len(body) // 2]
        elif kind == "nolength":
            yield head("200 OK") + body
        elif kind == "chunked":
            yield head("200 OK", "Transfer-Encoding: chunked")
            yield b"".join(f"{len(body[i : i + 100]):x}\r\n".encode() + body[i : i + 100] + b"\r\n" for i in range(0, len(body), 100)) + b"0\r\n\r\n"
        elif kind == "nothing":
            yield head("204 No Content")
        elif kind in ("busy", "later"):
            again = "Retry-After: 0" if kind == "busy" else "Retry-After: 900"
            yield whole if kind == "busy" and self.tries[name] > 2 else head("429 Too Many Requests", again, "Content-Length: 0")
        elif kind == "flaky":
            yield whole if self.tries[name] > 1 else b""
        elif kind == "forbidden":
            yield head("403 Forbidden", "Content-Length: 0")
        elif kind == "page":
            yield head("200 OK", "Content-Type: text/html") + b"<!DOCTYPE html><html>not found</html>"
        else:
            yield whole

    def _coded(self, kind: str, body: bytes) -> bytes:
        raw = zlib.compressobj(9, zlib.DEFLATED, -15)
        content, coding = {
            "gzip": (gzip.compress(body), "gzip"),
            "twice": (gzip.compress(body[:50]) + gzip.compress(body[50:]), "x-gzip"),
            "halfgzip": (gzip.compress(body)[:-20], "gzip"),
            "deflate": (zlib.compress(body), "deflate"),
            "raw": (raw.compress(body) + raw.flush(), "deflate"),
            "br": (body, "br"),
            "odd": (body, "utf-8"),
            "mislabelled": (body, "gzip"),
        }[kind]
        return head("200 OK", f"Content-Encoding: {coding}", f"Content-Length: {len(content)}") + content

    def _part(self, kind: str, body: bytes, asked: str) -> bytes:
        """A range: honest; at most 1 000 bytes of it; or one that lies further on."""
        first, _, last = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), min(len(body), int(last) + 1 if last else len(body))
        if start >= len(body):
            return head("416 Range Not Satisfiable", f"Content-Range: bytes */{len(body)}", "Content-Length: 0")
        start, end = (start, min(end, start + 1000)) if kind == "partial" else (start + 7, end + 7) if kind == "lying" else (start, end)
        part = body[start:end]
        return head("206 Partial Content", f"Content-Range: bytes {start}-{end - 1}/{len(body)}", f"Content-Length: {len(part)}") + part


@contextmanager
def web(family: socket.AddressFamily = socket.AF_INET) -> Iterator[Web]:
    """Running."""
    server = Web(family)
    try:
        yield server
    finally:
        server.close()
        time.sleep(0)
