"""URLs, read through fsspec: one primitive with retries, and a file on top of it for what seeks.

Whatever a backend raises leaves here as a RemoteError, an OSError like that of a disk; so readers need not know where their file lies.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

from difffeat.errors import ConfigError, MissingExtra, require

WAITS = (0.5, 1.0, 2.0)
"""Seconds before the second, third and fourth attempt: a read is tried four times in all."""
BUFFER = 1 << 18
"""Bytes that are asked for at once when a file is read bit by bit."""

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+(://|::)")
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError, TypeError)
_RETRIED_STATUS = (408, 425, 429)

T = TypeVar("T")


class RemoteError(OSError):
    """Something behind a URL that could not be had, after all attempts."""


def is_url(place: str) -> bool:
    """Whether fsspec reads this place: `s3://...`, `https://...`, `memory://...`, `simplecache::s3://...`."""
    return _URL.match(place) is not None and "://" in place


def fetch(url: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` (exclusive) by one ranged request. Either `start` is 0, or the object is known to reach to `end`.

    Raises RemoteError, MissingExtra.
    """
    data = _request(url, start, end)
    return data if len(data) <= end - start else data[start:end]


def _request(url: str, start: int, end: int) -> bytes:
    """The bytes of a range; all bytes from a web server that knows no ranges, which are then more than were asked for."""
    filesystem, path = locate(url)
    return attempt(url, lambda: filesystem.cat_file(path, start=start, end=end))


def open_remote(url: str) -> BinaryIO:
    """A seekable file to read from. Raises RemoteError, MissingExtra."""
    filesystem, path = locate(url)
    size = attempt(url, lambda: filesystem.info(path)).get("size")
    if size is None:  # some web servers do not tell
        return io.BytesIO(attempt(url, lambda: filesystem.cat_file(path)))
    return io.BufferedReader(_RemoteFile(url, int(size)), BUFFER)


def list_remote(url: str) -> list[tuple[str, int]]:
    """(path below `url`, bytes) of every file there, sorted. Raises RemoteError, MissingExtra."""
    filesystem, path = locate(url)
    found = attempt(url, lambda: filesystem.find(path, detail=True))
    root = path.rstrip("/") + "/"
    names = ((name if name.startswith(root) else "/" + name, entry.get("size")) for name, entry in found.items())
    return sorted((name.removeprefix(root), -1 if size is None else int(size)) for name, size in names)


def locate(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises MissingExtra naming what to install, ConfigError for an unknown protocol."""
    require("remote", f"Reading {url.partition('://')[0]}:// URLs", "fsspec")
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        raise _missing(url, error) from None
    except (ValueError, TypeError, AttributeError) as error:  # TypeError, AttributeError: a protocol that needs more than a URL
        raise ConfigError(f"{url} cannot be read: {error}") from None


def _missing(url: str, error: ImportError) -> MissingExtra:
    """The package that a protocol needs: s3fs, gcsfs, aiohttp ..."""
    cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
    library = (cause.name or "").partition(".")[0]
    purpose = f"Reading {url.partition('://')[0]}:// URLs"
    if not library:
        return MissingExtra("a package of its own", None, f"{purpose} ({error})")
    return MissingExtra(library, "remote" if library == "aiohttp" else None, purpose)


def attempt(url: str, action: Callable[[], T]) -> T:
    """The action's result; what may pass by itself is tried again after each of WAITS.

    Raises RemoteError with the last reason.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except Exception as raised:  # backends raise what they like: aiohttp's, botocore's, bare OSError
            error = _cause(raised)
            if wait is None or _is_permanent(error):
                tried = "" if _is_permanent(error) else f" in {len(WAITS) + 1} attempts"
                raise RemoteError(f"{url} could not be read{tried}: {type(error).__name__}: {error}") from raised
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _cause(error: Exception) -> Exception:
    """What really happened: fsspec's web backend calls a server that cannot be reached a file that is not found."""
    behind = error.__cause__
    return behind if isinstance(error, FileNotFoundError) and isinstance(behind, OSError) else error


def _is_permanent(error: Exception) -> bool:
    """Whether another attempt would only fail the same way: not there, not allowed, or a request that the server refuses (4xx)."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _RETRIED_STATUS
    return isinstance(error, _PERMANENT)


class _RemoteFile(io.RawIOBase):
    """Random access to an object of known size."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._at = url, size, 0
        self._whole: bytes | None = None  # once a server that knows no ranges has sent it

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
        data = self._between(self._at, end)
        if not data:
            raise RemoteError(f"{self._url} ends at byte {self._at}, though it claims to have {self._size}")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _between(self, start: int, end: int) -> bytes:
        if self._whole is None:
            data = _request(self._url, start, end)
            if len(data) <= end - start:
                return data
            self._whole = data
        return self._whole[start:end]
