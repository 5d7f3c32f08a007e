"""Files on the web that are read in parts; those of servers that send no ranges are fetched once, into a temporary file."""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from html.parser import HTMLParser
from typing import BinaryIO
from urllib.parse import unquote, urljoin

from difffeat.runtime.http_client import NoRanges, http_client
from difffeat.runtime.http_url import sendable
from difffeat.runtime.remote_errors import RemoteError

KEPT = 8
"""Temporary files that are held open at once."""
PAGES = 100_000
"""Pages of a listing that are followed."""
PAGE_BYTES = 64 << 20
_PAGE = re.compile(rb"<(?:!doctype|html|body|pre|a)\b", re.IGNORECASE)


class HttpFiles:
    """Ranges of web files, from any thread."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def size(self, url: str, seconds: float) -> int:
        """Bytes of the file. What was kept of it is forgotten: whoever asks begins to read it anew."""
        with self._guard:
            self._kept.pop(url, None)
        try:
            return http_client().size(url, seconds)
        except NoRanges:
            return self._whole(url).size(seconds)

    def part(self, url: str, start: int, end: int, seconds: float) -> bytes:
        """Bytes `start` to `end` (exclusive), fewer where the file ends before."""
        with self._guard:
            kept = self._kept.get(url)
        if kept is not None:
            return kept.part(start, end, seconds)
        found = bytearray()
        try:
            while start + len(found) < end:
                more = http_client().part(url, start + len(found), end, seconds)
                found += more
                if not more:
                    break
        except NoRanges:
            return self._whole(url).part(start, end, seconds)
        return bytes(found)

    def _whole(self, url: str) -> _Kept:
        with self._guard:
            kept = self._kept.setdefault(url, _Kept(url))
            self._kept.move_to_end(url)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return kept


class _Kept:
    """A file that is fetched when its first part is asked for; whoever asks meanwhile waits."""

    def __init__(self, url: str) -> None:
        self._url, self._lock = url, threading.Lock()
        self._file: BinaryIO | None = None

    def size(self, seconds: float) -> int:
        return os.fstat(self._opened(seconds).fileno()).st_size

    def part(self, start: int, end: int, seconds: float) -> bytes:
        file, parts = self._opened(seconds), []
        while start < end and (piece := os.pread(file.fileno(), end - start, start)):
            parts.append(piece)
            start += len(piece)
        return b"".join(parts)

    def _opened(self, seconds: float) -> BinaryIO:
        with self._lock:
            if self._file is None:
                self._file = http_client().spool(self._url, seconds)
                self._file.flush()
                weakref.finalize(self, self._file.close)  # when no thread reads from it any more
            return self._file


_FILES = HttpFiles()


def http_files() -> HttpFiles:
    """Of this process."""
    return _FILES


def list_pages(url: str, page: Callable[[str], bytes]) -> list[str]:
    """Paths below a folder of the web, as its index pages link them (Apache, nginx, Python's http.server ...), without their escapes.

    **Arguments:** `page` fetches one. Raises RemoteError where it is no page of links.
    """
    root = sendable(url).partition("?")[0].rstrip("/") + "/"
    found, seen, todo = dict[str, None](), {root}, [root]
    while todo:
        here = todo.pop()
        for link in _links(here, page(here)):
            target = urljoin(here, link).partition("#")[0]
            if "?" in target or not target.startswith(root) or target == root:
                continue
            if not target.endswith("/"):
                found[unquote(target.removeprefix(root), errors="surrogateescape")] = None
            elif target not in seen:
                seen.add(target)
                todo.append(target)
                if len(seen) > PAGES:
                    raise RemoteError(f"{url} links more than {PAGES} folders")
    return sorted(found)


def _links(url: str, content: bytes) -> list[str]:
    class Links(HTMLParser):
        found: list[str] = []  # noqa: RUF012  of one page

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found.extend(value for name, value in attrs if tag == "a" and name == "href" and value)

    if _PAGE.search(content[: 1 << 16]) is None:
        raise RemoteError(f"{url} is not an index page, so that nothing below it can be listed. Name the images in a manifest")
    parser = Links(convert_charrefs=True)
    parser.found = []
    parser.feed(content.decode("utf-8", "replace"))
    return parser.found
