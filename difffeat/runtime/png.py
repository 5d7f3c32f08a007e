"""PNG files as bytes: what is not pixels is left out before they are decoded, so that no text or profile costs a picture."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEPT = 1 << 20
"""Bytes, decoded, of all texts that are kept: they may say how the picture is turned."""
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf")
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_CHUNKS = 1 << 20
"""Chunks that are looked at."""


@dataclass(frozen=True)
class PngFacts:
    """What the header says: bits of a sample, PNG's colour type (0 grey, 2 RGB, 3 palette, 4 and 6 with alpha), the colour that is transparent as
    `tRNS` gives it, and how many frames an animation has (1: it is none).
    """

    depth: int = 8
    colour: int = 2
    transparent: tuple[int, ...] = ()
    frames: int = 1


def without_metadata(data: bytes) -> tuple[bytes, PngFacts]:
    """The file with its pixels and short texts alone, and its facts. What is not in order is left as it is, for the decoder to tell."""
    facts: dict[str, int | tuple[int, ...]] = {}
    parts, left_out, seen, texts = [data[:8]], False, set[bytes](), 0
    for kind, start, end in _chunks(data):
        body = memoryview(data)[start + 8 : end - 4]
        if kind == b"IHDR" and len(body) >= 13:
            facts |= {"depth": body[8], "colour": body[9]}
        elif kind == b"tRNS" and kind not in seen and facts.get("colour") in (0, 2):
            facts["transparent"] = struct.unpack(f">{len(body) // 2}H", body[: len(body) // 2 * 2])
        elif kind == b"acTL" and len(body) >= 4:
            facts["frames"] = int.from_bytes(body[:4], "big")
        seen.add(kind)
        length = _length(kind, body) if kind in _TEXTS and _is_whole(data, start, end) else KEPT + 1
        if kind in _PIXELS or kind == b"" or texts + length <= KEPT:
            texts += length if kind in _TEXTS else 0
            parts.append(data[start:end])
        else:
            left_out = True
    return (b"".join(parts) if left_out else data), PngFacts(**facts)  # type: ignore[arg-type]


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk; the rest, from where a length leads out of the file or the chunks are too many, is of kind b""."""
    at = 8
    for _ in range(_CHUNKS):
        if at + 12 > len(data):
            break
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            break
        yield data[at + 4 : at + 8], at, end
        if data[at + 4 : at + 8] == b"IEND":
            return
        at = end
    if at < len(data):
        yield b"", at, len(data)


def _is_whole(data: bytes, start: int, end: int) -> bool:
    return zlib.crc32(memoryview(data)[start + 4 : end - 4]).to_bytes(4, "big") == data[end - 4 : end]


def _length(kind: bytes, body: memoryview) -> int:
    """Bytes of a text once it is decoded; more than `KEPT` where that cannot be told."""
    if len(body) > KEPT:
        return len(body)
    _, zero, rest = bytes(body).partition(b"\0")
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and zero and rest[:1] == b"\1":
        packed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    else:
        return len(body)
    inflate = zlib.decompressobj()
    try:
        length = len(inflate.decompress(packed, KEPT + 1))
    except zlib.error:
        return KEPT + 1
    return length if inflate.eof else KEPT + 1
