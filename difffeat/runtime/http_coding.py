"""Content codings of HTTP, undone piece by piece: what comes out is counted before it is kept, so that no bomb takes memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from difffeat.runtime.remote_errors import CutOff, Unreadable

PIECE = 1 << 18
"""Bytes that are decoded at once."""
_UNKNOWN_HERE = ("br", "zstd", "compress", "x-compress", "dcb", "dcz")


class Plain:
    """No coding at all."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What these bytes decode to, in pieces."""
        yield data

    def close(self) -> None:
        """Raises CutOff where the body ends too soon."""


class Zipped:
    """gzip and deflate. Bodies that are not what the header calls them pass as they are, as other clients let them."""

    def __init__(self, gzip: bool) -> None:
        self._gzip = gzip
        self._inflate: zlib._Decompress | None = None
        self._plain, self._begun = False, b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What these bytes decode to, in pieces of at most `PIECE`. Raises Unreadable."""
        if self._inflate is None and not self._plain:
            data, self._begun = self._begun + data, b""
            if len(data) < 2:
                self._begun = data
                return
            self._begin(data)
        if self._plain:
            yield data
            return
        while data:
            inflate = self._inflate
            assert inflate is not None
            if inflate.eof:
                if not (self._gzip and data.startswith(b"\x1f\x8b")):
                    return  # padding after the end
                self._inflate = inflate = zlib.decompressobj(31)
            try:
                out = inflate.decompress(data, PIECE)
            except zlib.error as error:
                raise Unreadable(f"its {'gzip' if self._gzip else 'deflate'} coding is damaged ({error})") from None
            data = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
            if out:
                yield out

    def _begin(self, data: bytes) -> None:
        """Take the form of the body by its first bytes: deflate is sent with zlib's header and without."""
        if self._gzip:
            self._plain = not data.startswith(b"\x1f\x8b")
        window = 31 if self._gzip else 15 if data[0] & 15 == 8 and (data[0] << 8 | data[1]) % 31 == 0 else -15
        self._inflate = zlib.decompressobj(window)

    def close(self) -> None:
        """Raises CutOff where the body ends too soon."""
        if self._begun or (self._inflate is not None and not self._plain and not self._inflate.eof):
            raise CutOff(f"its {'gzip' if self._gzip else 'deflate'} coding ends too soon")


def decoder(content_encoding: str) -> Plain | Zipped:
    """For a body with this header. Raises Unreadable naming a coding that we do not ask for and cannot undo."""
    named = [name for name in (part.strip().lower() for part in content_encoding.split(",")) if name not in ("", "identity")]
    if len(named) > 1 or (named and named[0] in _UNKNOWN_HERE):
        raise Unreadable(f"the server sends it with content coding {content_encoding!r}, unasked; only gzip and deflate are undone")
    if named and named[0] in ("gzip", "x-gzip", "deflate"):
        return Zipped(named[0] != "deflate")
    return Plain()  # names that mean nothing, such as utf-8, are sent by misconfigured servers
