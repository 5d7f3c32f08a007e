"""Where the bytes of an image lie: a file, a stretch of a tar, a URL, memory. Nothing is read before it is needed, and nothing is ever written.

Blobs are small, because a source may list millions of them: they share the strings that they have in common. They can be pickled.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from difffeat.errors import DecodeError
from difffeat.runtime.patience import Patience, patience
from difffeat.runtime.remote import fetch, fetch_whole, is_url

MAX_BYTES = 1 << 30
"""Largest image file, in bytes, that is read."""


@runtime_checkable
class Blob(Protocol):
    """Bytes to be read later."""

    @property
    def size(self) -> int:
        """Bytes, as far as that is known without reading them; −1 where it is not, or where there is nothing."""
        ...

    def read(self, limit: int = MAX_BYTES) -> bytes:
        """All bytes. Raises DecodeError when they cannot be had, or are more than `limit`."""
        ...


@dataclass(frozen=True, slots=True)
class FileBlob:
    """A file on disk: `name` within `folder`; an absolute name stands for itself."""

    folder: str
    name: str

    @property
    def path(self) -> str:
        """The whole path."""
        return os.path.join(self.folder, self.name)

    @property
    def size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except (OSError, ValueError):
            return -1

    def read(self, limit: int = MAX_BYTES) -> bytes:
        try:
            found = os.stat(self.path)
            if not stat.S_ISREG(found.st_mode):
                raise DecodeError(f"{self.name} is no regular file. Replace it by the image itself, or leave it out of the source.")
            if found.st_size > limit:
                raise DecodeError(f"{self.name} has {found.st_size} bytes, more than the limit of {limit}.")
            with open(self.path, "rb") as file:
                return _within(file.read(limit + 1), limit, self.name)
        except ValueError as error:
            raise DecodeError(f"{self.name!r} is no path ({error}). Mend its name in the source.") from None
        except OSError as error:
            raise DecodeError(f"the file cannot be read ({error.strerror or error}). Check that it exists and its permissions.") from None


@dataclass(frozen=True, slots=True)
class UrlBlob:
    """An object behind a URL of any protocol that fsspec knows; `size` where a listing told it. It is waited for as the source that names it was."""

    url: str
    size: int = -1
    patience: Patience = field(default_factory=patience, compare=False, repr=False)

    def read(self, limit: int = MAX_BYTES) -> bytes:
        try:
            return fetch_whole(self.url, limit, self.patience)
        except OSError as error:
            raise DecodeError(f"{error}. Check the address, your access and the connection, then extract it again.") from None


@dataclass(frozen=True, slots=True)
class SliceBlob:
    """`size` bytes from `offset` of a file or URL, such as a member of a tar: read in place, never unpacked."""

    place: str
    offset: int
    size: int
    patience: Patience = field(default_factory=patience, compare=False, repr=False)

    def read(self, limit: int = MAX_BYTES) -> bytes:
        name = self.place.rpartition("/")[2]
        if self.size > limit:
            raise DecodeError(f"this member of {name} has {self.size} bytes, more than the limit of {limit}.")
        try:
            data = fetch(self.place, self.offset, self.offset + self.size, self.patience) if is_url(self.place) else self._pread()
        except OSError as error:
            raise DecodeError(f"{name} cannot be read ({error.strerror or error}). Check that it exists and your access.") from None
        if len(data) != self.size:
            raise DecodeError(f"{name} ends at byte {self.offset + len(data)}, {self.size - len(data)} bytes too soon. Get the file again.")
        return data

    def _pread(self) -> bytes:
        descriptor = os.open(self.place, os.O_RDONLY)
        try:
            parts, offset, left = [], self.offset, self.size
            while left and (part := os.pread(descriptor, left, offset)):
                parts.append(part)
                offset, left = offset + len(part), left - len(part)
            return b"".join(parts)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class BytesBlob:
    """Bytes in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, limit: int = MAX_BYTES) -> bytes:
        return _within(self.data, limit, "the image")


@dataclass(frozen=True, slots=True)
class UnreadableBlob:
    """An image that the source names in a way that cannot be followed; `problem` says how, and becomes the quarantine's reason."""

    problem: str
    size: int = -1

    def read(self, limit: int = MAX_BYTES) -> bytes:
        raise DecodeError(self.problem)


def is_remote(blob: Blob) -> bool:
    """Whether reading it waits for another machine."""
    return isinstance(blob, UrlBlob) or (isinstance(blob, SliceBlob) and is_url(blob.place))


def _within(data: bytes, limit: int, name: str) -> bytes:
    if len(data) > limit:
        raise DecodeError(f"{name} has more than {limit} bytes, the limit.")
    return data
