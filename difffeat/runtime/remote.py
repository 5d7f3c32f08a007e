"""URLs: one primitive with deadlines and retries, and a file on top of it for what seeks. The web is read by our own client, all else by fsspec.

Whatever a backend raises leaves here as a RemoteError, an OSError like that of a disk; so readers need not know where their file lies.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, unquote_to_bytes

from difffeat.errors import ConfigError, MissingExtra, require
from difffeat.runtime.http_url import host_of, is_http
from difffeat.runtime.patience import Hosts, Patience, current_stop, current_turn, patience, within
from difffeat.runtime.pipeline import Stopped
from difffeat.runtime.remote_errors import Refused, RemoteError, TooLong, Unreadable, without_password

__all__ = ["RemoteError", "attempt", "fetch", "fetch_whole", "is_url", "list_remote", "local_path", "locate", "open_remote"]

SAID = 300
"""Characters of a backend's own message that are told."""
WAITS = (0.5, 1.0, 2.0)
"""Seconds before the second, third and each later attempt."""
BUFFER = 1 << 18
"""Bytes that are asked for at once when a file is read bit by bit."""
LARGE = PIECE = 8 << 20
"""Bytes beyond which one object is held at a time; and bytes that one call to a file system of fsspec is asked for, which has its own deadline."""

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)(://|::)")
_DATA = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError, TypeError)
_RETRIED_STATUS = (408, 425, 429)
_NEAR = ("memory", "data")
"""Protocols that need no deadline, because they read this process's memory."""
_WRAPPERS = ("blockcache", "cached", "dir", "filecache", "libarchive", "reference", "simplecache", "tar", "zip")
"""Protocols that read out of what follows their `::`."""

T = TypeVar("T")


def is_url(place: str) -> bool:
    """Whether this is read as a URL: `s3://...`, `https://...`, `memory://...`, `data:...,`, and `simplecache::s3://...`, whose first part must be a
    protocol that fsspec knows: elsewhere `::` is part of a name.
    """
    if ":" not in place:  # asked of every image of a list
        return False
    match = _SCHEME.match(place)
    if match is None:
        return _DATA.match(place) is not None
    return match[2] == "://" or ("://" in place and _wraps(match[1].lower()))


def local_path(url: str) -> str | None:
    """The path of a `file://` or `local://` URL, None for any other place. Escapes count where no file has them in its name."""
    match = re.match(r"(?:file|local)://(?:localhost(?=/))?", url, re.IGNORECASE)
    if match is None:
        return None
    path = os.path.expanduser(url[match.end() :])
    return path if "%" not in path or os.path.lexists(path) else unquote(path)


def fetch_whole(url: str, limit: int, asked: Patience | None = None) -> bytes:
    """All bytes, at most `limit`. Raises RemoteError, MissingExtra."""
    if is_http(url):
        return _whole(url, limit, asked)
    if _DATA.match(url):
        return _inline(url, limit)
    data = _cat(url, 0, limit + 1, asked)
    if len(data) > limit:
        raise RemoteError(f"{without_password(url)} has more than {limit} bytes, the limit")
    return data


def _whole(url: str, limit: int, asked: Patience | None) -> bytes:
    """All bytes of a web file. Where many threads fetch, one that turns out to be large is begun again when it is its turn."""
    turn = current_turn()
    if turn is not None and limit > LARGE:
        try:
            return attempt(url, lambda seconds: _client().whole(url, LARGE, seconds), asked)
        except RemoteError as error:
            if not isinstance(error.__cause__, TooLong):
                raise
        turn.enter()
    return attempt(url, lambda seconds: _client().whole(url, limit, seconds), asked)


def fetch(url: str, start: int, end: int, asked: Patience | None = None) -> bytes:
    """Bytes `start` to `end` (exclusive); fewer where the object ends before. Raises RemoteError, MissingExtra."""
    if end <= start:
        return b""
    if end - start > LARGE and (turn := current_turn()) is not None:
        turn.enter()
    if is_http(url):
        return attempt(url, lambda seconds: _files().part(url, start, end, seconds), asked)
    return _cat(url, start, end, asked)


def open_remote(url: str, asked: Patience | None = None) -> BinaryIO:
    """A seekable file to read from. Raises RemoteError, MissingExtra."""
    asked = asked or patience()
    if is_http(url):
        size = attempt(url, lambda seconds: _files().size(url, seconds), asked)
        return io.BufferedReader(_RemoteFile(url, size, asked), BUFFER)
    filesystem, path = locate(url)
    size = attempt(url, _timed(url, lambda: filesystem.info(path)), asked).get("size")
    if size is None:  # some servers do not tell
        return io.BytesIO(attempt(url, _timed(url, lambda: filesystem.cat_file(path)), asked))
    return io.BufferedReader(_RemoteFile(url, int(size), asked), BUFFER)


def list_remote(url: str, asked: Patience | None = None) -> list[tuple[str, int]]:
    """(path below `url`, bytes; −1 where nobody tells) of every file there, sorted. Raises RemoteError, MissingExtra."""
    if is_http(url):
        from difffeat.runtime.http_files import PAGE_BYTES, list_pages

        return [(path, -1) for path in list_pages(url, lambda page: fetch_whole(page, PAGE_BYTES, asked))]
    filesystem, path = locate(url)
    found = attempt(url, _timed(url, lambda: filesystem.find(path, detail=True)), asked)
    root = path.rstrip("/") + "/"
    names = ((name if name.startswith(root) else "/" + name, entry.get("size")) for name, entry in found.items())
    return sorted((name.removeprefix(root), -1 if size is None else int(size)) for name, size in names)


def locate(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises MissingExtra naming what to install, ConfigError for an unknown protocol."""
    protocol, separator, rest = url.partition("://")
    require("remote", f"Reading {protocol}:// URLs", "fsspec")
    from fsspec import filesystem, get_filesystem_class
    from fsspec.core import url_to_fs

    url = f"{protocol.lower()}{separator}{rest}"
    try:
        if _is_chain(url):
            return url_to_fs(url)
        kind = get_filesystem_class(protocol.lower())
        opened = filesystem(protocol.lower(), **kind._get_kwargs_from_urls(url))
        # memory's own parser leaves a name with colons as it is, without the slash that all of its names begin with
        return opened, f"/{rest.strip('/')}" if protocol.lower() == "memory" else kind._strip_protocol(url)
    except ImportError as error:
        raise _missing(url, error) from None
    except (ValueError, TypeError, AttributeError) as error:  # TypeError, AttributeError: a protocol that needs more than a URL
        raise ConfigError(f"{without_password(url)} cannot be read: {error}") from None


def _is_chain(url: str) -> bool:
    return "::" in url and _wraps(url.partition("::")[0].partition("://")[0])


def _wraps(protocol: str) -> bool:
    """Whether it reads out of what follows its `::`."""
    return protocol in _WRAPPERS


def _missing(url: str, error: ImportError) -> MissingExtra:
    """The package that a protocol needs: s3fs, gcsfs, aiohttp ..."""
    cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
    library = (cause.name or "").partition(".")[0]
    purpose = f"Reading {url.partition('://')[0]}:// URLs"
    if not library:
        return MissingExtra("a package of its own", None, f"{purpose} ({error})")
    return MissingExtra(library, "remote" if library == "aiohttp" else None, purpose)


def attempt(url: str, action: Callable[[float], T], asked: Patience | None = None) -> T:
    """The result of the action, which is given the seconds that it may take; what may pass by itself is tried again, as `Patience` says.

    Raises RemoteError with the last reason.
    """
    asked, host, since = asked or patience(), host_of(url), time.monotonic()
    allowed = _HOSTS.allow(host, asked)
    for number in range(allowed.retries + 1):
        left = allowed.total - (time.monotonic() - since)
        try:
            result = action(max(0.001, min(allowed.timeout, left)))
            _HOSTS.answered(host)
            return result
        except (Stopped, MissingExtra, ConfigError):
            raise
        except Exception as raised:  # backends raise what they like: aiohttp's, botocore's, bare OSError
            error, spent = _cause(raised), time.monotonic() - since
            wait = _wait(error, number)
            if _is_permanent(error) or number == allowed.retries or spent + wait >= allowed.total:
                _remember(host, error, spent)
                raise _told(url, error, number + 1, wait, allowed, asked) from raised
        current_stop().pause(wait)
    raise AssertionError("the last attempt returns or raises")


def _remember(host: str, error: Exception, spent: float) -> None:
    """Whatever is not silence is an answer."""
    if isinstance(error, Refused | TooLong | Unreadable) or _is_permanent(error):
        _HOSTS.answered(host)
    else:
        _HOSTS.expired(host, spent)


def _wait(error: Exception, number: int) -> float:
    return max(WAITS[min(number, len(WAITS) - 1)], getattr(error, "retry_after", None) or 0.0)


def _told(url: str, error: Exception, tries: int, wait: float, allowed: Patience, asked: Patience) -> RemoteError:
    """What went wrong, in how many attempts, and what would have been waited for."""
    tried = f" in {tries} attempts" if tries > 1 else ""
    name = "" if isinstance(error, Refused | TooLong | Unreadable) else f"{type(error).__name__}: "
    later = getattr(error, "retry_after", None)
    more = f" (it asks to come back after {later:g} s; --total-timeout is {asked.total:g} s)" if later and wait > WAITS[-1] else ""
    short = " (its host has not answered before, so it was asked once and shortly)" if allowed != asked else ""
    return RemoteError(f"{without_password(url)[:500]} could not be read{tried}: {name}{_line(without_password(str(error)))}{more}{short}")


def _line(text: str) -> str:
    """What a backend says, in one line of bounded length: some quote the body, which may be an image."""
    text = " ".join(text[: 4 * SAID].split())
    return text if len(text) <= SAID else f"{text[:SAID]} ..."


def _cause(error: Exception) -> Exception:
    """What really happened: fsspec's web backend calls a server that cannot be reached a file that is not found."""
    behind = error.__cause__
    return behind if isinstance(error, FileNotFoundError) and isinstance(behind, OSError) else error


def _is_permanent(error: Exception) -> bool:
    """Whether another attempt would only fail the same way: not there, not allowed, or a request that the server refuses (4xx)."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status < 500 and status not in _RETRIED_STATUS
    return isinstance(error, _PERMANENT)


def _cat(url: str, start: int, end: int, asked: Patience | None) -> bytes:
    """Bytes of a range, piece by piece, from a file system of fsspec; whatever sends more than it is asked for is cut."""
    filesystem, path = locate(url)

    def piece(first: int, last: int) -> bytes:
        return attempt(url, _timed(url, lambda: filesystem.cat_file(path, start=first, end=last)), asked)

    data = piece(start, min(end, start + PIECE))
    if len(data) != PIECE or start + PIECE >= end:
        return data if len(data) <= end - start else data[start:end]
    if (turn := current_turn()) is not None:
        turn.enter()
    size = attempt(url, _timed(url, lambda: filesystem.info(path)), asked).get("size")
    end, found = end if size is None else min(end, int(size)), bytearray(data)
    while start + len(found) < end and data:
        data = piece(start + len(found), min(end, start + len(found) + PIECE))
        found += data
    return bytes(found[: end - start])


def _timed(url: str, action: Callable[[], T]) -> Callable[[float], T]:
    """The action with a deadline: fsspec's file systems have none, or minutes."""
    near = url.partition("://")[0].lower() in _NEAR
    return (lambda seconds: action()) if near else (lambda seconds: within(seconds, action))


def _inline(url: str, limit: int) -> bytes:
    """The bytes that a `data:` URL holds itself. Raises RemoteError."""
    import base64
    import binascii

    head, _, body = url.partition(",")
    if len(body) > 2 * limit:
        raise RemoteError(f"a data: URL has more than {limit} bytes, the limit")
    plain = unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return plain
    try:
        plain = plain.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n")
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except binascii.Error as error:
        raise RemoteError(f"{url[:60]}... is not base64 ({error})") from None


_HOSTS = Hosts()


def _client() -> Any:
    """The client of the web. Raises MissingExtra."""
    require("remote", "Reading https:// URLs", "fsspec", "aiohttp")
    from difffeat.runtime.http_client import http_client

    return http_client()


def _files() -> Any:
    _client()
    from difffeat.runtime.http_files import http_files

    return http_files()


class _RemoteFile(io.RawIOBase):
    """Random access to an object of known size."""

    def __init__(self, url: str, size: int, asked: Patience) -> None:
        self._url, self._size, self._at, self._asked = url, size, 0, asked

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = fetch(self._url, self._at, end, self._asked)
        if not data:
            raise RemoteError(f"{without_password(self._url)} ends at byte {self._at}, though it claims to have {self._size}")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
