"""Which shared libraries a file is linked against, and which of those cannot be loaded here."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

_LOAD, _DYNAMIC = 1, 2
"""Kinds of segments: what is mapped into memory, and what the loader must know (System V ABI, chapter 5)."""
_END, _NEEDED, _STRINGS, _STRINGS_SIZE = 0, 1, 5, 10
"""Tags of the dynamic section."""


def needed(path: Path) -> tuple[str, ...]:
    """Names of the libraries that a 64-bit ELF file wants loaded with it. Raises ValueError for any other file, OSError where it cannot be read."""
    with path.open("rb") as file:

        def at(offset: int, size: int) -> bytes:
            file.seek(offset)
            if len(content := file.read(size)) != size:
                raise ValueError(f"{path} ends early")
            return content

        header = at(0, 64)
        if header[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is no 64-bit little-endian ELF file")
        (table,), (size, count) = struct.unpack_from("<Q", header, 32), struct.unpack_from("<HH", header, 54)
        segments = [struct.unpack("<IIQQQQQQ", at(table + size * index, 56)) for index in range(count)]
        dynamic = [at(offset, length) for kind, _, offset, _, _, length, _, _ in segments if kind == _DYNAMIC]
        entries = [entry for section in dynamic for entry in _entries(section)]
        tags = dict(entries)
        if _STRINGS not in tags or _STRINGS_SIZE not in tags:
            return ()
        strings = at(_offset(segments, tags[_STRINGS], path), tags[_STRINGS_SIZE])
    return tuple(strings[value : strings.index(b"\0", value)].decode() for tag, value in entries if tag == _NEEDED)


def unloadable(names: Iterable[str]) -> tuple[str, ...]:
    """Those that the system's loader neither has in this process yet nor finds. The others are loaded from now on."""
    return tuple(name for name in names if not _loads(name))


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _entries(section: bytes) -> Iterator[tuple[int, int]]:
    for tag, value in struct.iter_unpack("<qQ", section[: len(section) // 16 * 16]):
        if tag == _END:
            return
        yield tag, value


def _offset(segments: list[tuple[int, ...]], address: int, path: Path) -> int:
    """Where in the file an address of memory comes from."""
    for kind, _, offset, start, _, length, _, _ in segments:
        if kind == _LOAD and start <= address < start + length:
            return offset + address - start
    raise ValueError(f"{path} has no strings where its dynamic section says")
