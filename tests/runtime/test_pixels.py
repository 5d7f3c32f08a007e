"""A picture that viewers show is not lost for what is not pixels; what is guessed is counted and named, or refused on request."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from difffeat.errors import DecodeError
from difffeat.runtime.preprocess import decode, quiet_pillow
from tests.runtime.test_preprocess import saved, smooth

SIDE = 32
Transparent = tuple[int, ...]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, colour: int, rows: list[bytes], *extra: bytes, side: int = SIDE, after: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + body + after + chunk(b"IEND", b"")


def grey_row(depth: int, value: int) -> bytes:
    return (
        struct.pack(">H", value) * SIDE
        if depth == 16
        else bytes([sum(value << (8 - depth * (i + 1)) for i in range(8 // depth))]) * (SIDE * depth // 8)
    )


def decoded(data: bytes, pixels: str = "shown") -> tuple[np.ndarray, list[str]]:
    remarks: list[str] = []
    with quiet_pillow():
        return decode(data, SIDE, "center", pixels, remarks), remarks


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white_and_no_other_is(depth: int) -> None:
    top = (1 << depth) - 1
    for clear in {0, 1, top // 3, top}:
        other = top - clear if top - clear != clear else clear ^ 1
        rows = [grey_row(depth, clear)] * 16 + [grey_row(depth, other)] * 16
        found, _ = decoded(png(depth, 0, rows, chunk(b"tRNS", struct.pack(">H", clear))))
        assert (found[:16] == 255).all()
        assert (found[16:] == (other >> 8 if depth == 16 else other * 255 // top)).all()


@pytest.mark.parametrize(("value", "white"), [((0x1234, 0x2345, 0x3456), True), ((0x1235, 0x2345, 0x3456), False), ((0x1234, 0x2345, 0x3400), False)])
def test_a_transparent_colour_of_16_bits_is_compared_in_all_its_bits(value: Transparent, white: bool) -> None:
    rows = [struct.pack(">HHH", *value) * SIDE] * SIDE
    found, _ = decoded(png(16, 2, rows, chunk(b"tRNS", struct.pack(">HHH", 0x1234, 0x2345, 0x3456))))
    assert found[4, 4].tolist() == ([255] * 3 if white else [0x12, 0x23, 0x34])


def test_transparent_colours_of_8_bits_and_of_palettes_are_white() -> None:
    rows = [bytes([9, 8, 7]) * SIDE] * 16 + [bytes([9, 8, 6]) * SIDE] * 16
    found, _ = decoded(png(8, 2, rows, chunk(b"tRNS", struct.pack(">HHH", 9, 8, 7))))
    assert found[[0, 31], 0].tolist() == [[255] * 3, [9, 8, 6]]
    palette, alpha = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60])), chunk(b"tRNS", bytes([0]))
    found, _ = decoded(png(1, 3, [b"\0" * 4] * 16 + [b"\xff" * 4] * 16, palette, alpha))
    assert found[[0, 31], 0].tolist() == [[255] * 3, [40, 50, 60]]


BIG = zlib.compress(b"a" * (2 << 20))
EXTRA = {
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + BIG),
    "iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + BIG),
    "tEXt": chunk(b"tEXt", b"Comment\0" + b"a" * (3 << 20)),
    "iCCP": chunk(b"iCCP", b"icc\0\0" + BIG),
    "eXIf": chunk(b"eXIf", b"MM\0*" + bytes(3 << 20)),
    "unknown": chunk(b"prVt", bytes(3 << 20)),
    "damaged text": chunk(b"zTXt", b"Comment\0\0nonsense"),
    "wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"?",
    "many": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 900_000)) * 90,
    "no null": chunk(b"iTXt", b"Comment"),
    "bomb": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 1)),
}


@pytest.mark.parametrize("kind", EXTRA)
@pytest.mark.parametrize("place", ["before", "after"])
def test_no_metadata_cost_a_png_its_picture(kind: str, place: str) -> None:
    picture = smooth(SIDE, SIDE)
    rows = [row.tobytes() for row in np.asarray(picture)]
    extra = EXTRA[kind]
    data = png(8, 2, rows, extra) if place == "before" else png(8, 2, rows, after=extra)
    np.testing.assert_array_equal(decoded(data)[0], np.asarray(picture))


def test_metadata_beyond_a_mebibyte_cost_no_format_its_picture() -> None:
    picture, profile = smooth(SIDE, SIDE), bytes(2 << 20)
    for kind in ("JPEG", "WEBP", "TIFF"):
        data = saved(picture, kind, icc_profile=profile)
        assert len(data) > 1 << 20
        np.testing.assert_array_equal(decoded(data)[0], decoded(saved(picture, kind))[0])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 5, 6, 8])
def test_every_format_is_turned_as_its_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(smooth(SIDE, SIDE), kind, exif=exif.tobytes())
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found, _ = decoded(data)
    np.testing.assert_array_equal(found, wanted)


def test_an_orientation_behind_the_pixels_and_in_text_counts() -> None:
    picture = smooth(SIDE, SIDE)
    rows = [row.tobytes() for row in np.asarray(picture)]
    exif = Image.Exif()
    exif[0x0112] = 3
    data = png(8, 2, rows, after=chunk(b"eXIf", exif.tobytes()[6:]))
    np.testing.assert_array_equal(decoded(data)[0], np.asarray(picture)[::-1, ::-1])


def bitmap(alpha: int) -> bytes:
    """A 32-bit BMP with an alpha channel."""
    rgb = np.asarray(smooth(SIDE, SIDE))
    data = np.dstack([rgb[:, :, ::-1], np.full((SIDE, SIDE), alpha, np.uint8)])[::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", 108, SIDE, SIDE, 1, 32, 3, len(data), 2835, 2835, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(data), 0, 0, 14 + len(header)) + header + data


def test_a_bitmap_without_any_alpha_shows_its_colours() -> None:
    shown, remarks = decoded(bitmap(0))
    assert shown.std() > 1
    assert remarks == ["an alpha of zero everywhere: its colours are shown"]
    assert decoded(bitmap(255))[1] == []


def test_what_is_transparent_everywhere_is_named() -> None:
    found, remarks = decoded(saved(Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 0))))
    assert (found == 255).all()
    assert remarks == ["transparent everywhere: it is white"]


def wide(dtype: type, values: list[float]) -> np.ndarray:
    return np.array(values, dtype).repeat(SIDE * SIDE // len(values)).reshape(SIDE, SIDE)


HIGH, CUT = "16 bits: their high byte is taken", "32 bits or floating point: cut to 0..255"
CONVERTED: dict[str, tuple[bytes, list[int], str]] = {
    "16-bit PNG": (saved(Image.fromarray(wide(np.uint16, [0, 300, 40000, 65535]))), [0, 1, 156, 255], HIGH),
    "16-bit TIFF": (saved(Image.fromarray(wide(np.uint16, [0, 300, 40000, 65535])), "TIFF"), [0, 1, 156, 255], HIGH),
    "32-bit TIFF": (
        saved(Image.fromarray(wide(np.int32, [-5, 3, 200, 70000])), "TIFF"),
        [0, 3, 200, 255],
        CUT,
    ),
    "float TIFF": (
        saved(Image.fromarray(wide(np.float32, [float("nan"), 3.9, 200, float("inf")])), "TIFF"),
        [0, 3, 200, 255],
        CUT,
    ),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_wide_numbers_are_converted_and_named(kind: str) -> None:
    data, values, remark = CONVERTED[kind]
    found, remarks = decoded(data)
    assert found[::8, 0, 0].tolist() == values
    assert remarks == [remark]
    with pytest.raises(DecodeError, match=r"the image has mode (I|F)"):
        decoded(data, "strict")


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted_as_pillow_does_and_named(kind: str) -> None:
    data = saved(smooth(SIDE, SIDE).convert("CMYK"), kind)
    found, remarks = decoded(data)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))
    assert remarks == ["CMYK colours: converted without a profile"]
    with pytest.raises(DecodeError, match="the image has mode CMYK"):
        decoded(data, "strict")


EXIF = Image.Exif()
EXIF[0x0112] = 6


@pytest.mark.parametrize(
    "data",
    [
        saved(smooth(SIDE, SIDE), "JPEG", exif=EXIF.tobytes()),
        saved(Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 0))),
        saved(Image.fromarray(wide(np.uint16, [0, 300]))),
        saved(smooth(SIDE, SIDE).convert("CMYK"), "JPEG"),
        saved(smooth(SIDE, SIDE).convert("P"), transparency=3),
    ],
    ids=["turned", "transparent", "16 bits", "cmyk", "palette"],
)
def test_pillows_own_conversion_is_to_be_had(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decoded(data, "pillow")[0], np.asarray(image.convert("RGB")))


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue", "lime")]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken_and_that_is_said(kind: str) -> None:
    found, remarks = decoded(animated(kind))
    assert found[3, 3].tolist() == [255, 0, 0]
    assert remarks == ["several frames or pages: the first is taken"]


def test_a_second_view_is_no_second_frame() -> None:
    data = saved(smooth(SIDE, SIDE), "MPO", save_all=True, append_images=[smooth(SIDE, SIDE)])
    assert decoded(data)[1] == []


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_mark_is_whole_and_one_that_lacks_more_is_not(progressive: bool) -> None:
    data = saved(smooth(200, 200), "JPEG", progressive=progressive)
    found, remarks = decoded(data[:-2])
    np.testing.assert_array_equal(found, decoded(data)[0])
    assert remarks == ["a JPEG without its end mark: all of its pixels are there"]
    np.testing.assert_array_equal(decoded(data + b"garbage" * 50)[0], found)
    for lost in (len(data) // 2, len(data) // 5, 100):
        with pytest.raises(DecodeError, match="the image is damaged or truncated"):
            decoded(data[:-lost])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (7, 1), (600, 2)])
def test_any_mode_in_any_size_is_a_picture(mode: str, size: tuple[int, int]) -> None:
    found, _ = decoded(saved(smooth(*size).convert(mode)))
    assert found.shape == (SIDE, SIDE, 3)


FOREIGN: dict[str, tuple[bytes, str]] = {
    "AVIF": (b"\0\0\0\x20ftypavif" + bytes(50), "It is AVIF."),
    "HEIC": (b"\0\0\0\x20ftypheic" + bytes(50), "It is HEIC."),
    "JXL": (b"\xff\x0a" + bytes(50), "It is JPEG XL."),
    "JXL in boxes": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "It is JPEG XL."),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50), "It is JPEG 2000."),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "It is SVG."),
    "page": (b"\n<!DOCTYPE html><html>403</html>", "It is a web page (HTML): the address may be gone, or ask for a login."),
    "error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "It is XML."),
    "json": (b'{"error": 1}', "It is JSON."),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "It is a pointer of git-lfs: run git lfs pull."),
    "pdf": (b"%PDF-1.4", "It is PDF."),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_named_for_what_it_is(kind: str) -> None:
    data, name = FOREIGN[kind]
    with pytest.raises(DecodeError) as caught:
        decoded(data)
    assert name in str(caught.value)


def test_a_hostile_png_of_many_chunks_ends() -> None:
    data = png(8, 2, [bytes(96)] * SIDE, chunk(b"tEXt", b"a\0b") * 20_000)
    assert decoded(data)[0].shape == (SIDE, SIDE, 3)
