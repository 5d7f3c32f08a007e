"""Names for bytes that are no picture we accept, by how they begin: a refusal says what the file is."""

from __future__ import annotations

import re

_BOXES = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"heim": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}
_BEGINNINGS = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"II\xbc", "JPEG XR"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"DDS ", "DirectDraw (DDS)"),
    (b"qoif", "QOI"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM video"),
    (b"version https://git-lfs", "a pointer of git-lfs: run git lfs pull"),
)
_NETPBM = re.compile(rb"P[1-7]\s")
_SVG = re.compile(rb"<svg[\s>]", re.IGNORECASE)
_HTML = re.compile(rb"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)


def kind_of(data: bytes) -> str:
    """What a file is, as far as its beginning tells; empty where it does not."""
    if data[4:8] == b"ftyp":
        return _BOXES.get(data[8:12], "an ISO media file (HEIF or video)")
    for beginning, name in _BEGINNINGS:
        if data.startswith(beginning):
            return name
    text = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    if _SVG.search(text) and text.startswith(b"<"):
        return "SVG"
    if _HTML.search(text) and text.startswith(b"<"):
        return "a web page (HTML): the address may be gone, or ask for a login"
    if text.startswith(b"<"):
        return "XML"
    if text[:1] in (b"{", b"["):
        return "JSON"
    return "Netpbm" if _NETPBM.match(data) else ""
