"""Pixels as DiT was trained on, from bytes that are trusted in nothing."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from difffeat.errors import DecodeError, ImageTooLarge, SampleError
from difffeat.runtime import preprocess as module
from difffeat.runtime.preprocess import decode, preprocess, quiet_pillow

RNG = np.random.default_rng(0)


def smooth(width: int, height: int) -> Image.Image:
    coarse = Image.fromarray(RNG.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reference_center(image: Image.Image, size: int) -> np.ndarray:
    """As the facts state it: halve by box while the short side is at least twice the size, bicubic to the size, crop the middle."""
    while min(*image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(("width", "height"), [(32, 32), (64, 32), (33, 100), (127, 129), (31, 17), (300, 40), (640, 480)])
def test_center_is_dits_preprocessing(width: int, height: int) -> None:
    image = smooth(width, height)
    np.testing.assert_array_equal(decode(saved(image), 32, "center"), reference_center(image, 32))


def test_squash_keeps_the_edges() -> None:
    image = smooth(90, 30)
    np.testing.assert_array_equal(decode(saved(image), 32, "squash"), np.array(image.resize((32, 32), Image.Resampling.BICUBIC)))


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = smooth(32, 32)
    np.testing.assert_array_equal(preprocess(image, 32, "center"), np.array(image))


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_grey_and_palette_images_become_rgb(mode: str) -> None:
    image = smooth(32, 32).convert(mode)
    np.testing.assert_array_equal(decode(saved(image), 32, "center"), np.array(image.convert("RGB")))


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    image.paste((200, 0, 0, 255), (0, 0, 32, 16))
    pixels = decode(saved(image), 32, "center")
    assert (pixels[:16] == (200, 0, 0)).all()
    assert (pixels[16:] == 255).all()


def test_a_transparent_palette_colour_is_laid_on_white() -> None:
    image = Image.new("P", (32, 32), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert (decode(saved(image, transparency=0), 32, "center") == 255).all()


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied_as_pillow_does(orientation: int) -> None:
    image = smooth(32, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, "PNG", exif=exif.tobytes())
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(decode(data, 32, "center"), np.array(ImageOps.exif_transpose(opened)))


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*garbage", b"Dxif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_metadata_that_cannot_be_read_say_nothing(exif: bytes) -> None:
    image = smooth(32, 32)
    with quiet_pillow():
        np.testing.assert_array_equal(decode(saved(image, "PNG", exif=exif), 32, "center"), np.array(image))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data, 32, "center")[0, 0] == (255, 0, 0)).all()


def sixteen() -> bytes:
    return saved(Image.fromarray(np.full((9, 9), 40000, np.uint16)))


REFUSED = {
    "truncated": (saved(smooth(200, 200), "JPEG")[:2000], "the image is damaged or truncated"),
    "cmyk": (saved(smooth(32, 32).convert("CMYK"), "JPEG"), "the image has mode CMYK: CMYK colours cannot be converted without their profile"),
    "16-bit": (sixteen(), "16 or 32 bits per channel have no agreed range; convert it to 8 bits, for example: magick in.png -depth 8 out.png"),
    "float": (saved(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "the image has mode F: floating-point pixels have no agreed range"),
    "text": (
        b"dear diary",
        "this is no image in a format we accept (JPEG, PNG, WEBP, BMP, GIF, TIFF), whatever its name says. Convert or remove it.",
    ),
    "empty": (b"", "the file is empty. Get it again, or remove it from the source."),
    "foreign format": (saved(smooth(8, 8), "PPM"), "this is no image in a format we accept"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_decoded_faithfully_is_refused_with_the_way_out_where_it_is_asked_for(kind: str) -> None:
    data, message = REFUSED[kind]
    with pytest.raises(DecodeError) as caught:
        decode(data, 32, "center", "strict")
    assert message in str(caught.value)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header states a huge image."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(ImageTooLarge, match="Resize it first, or remove it from the source"):
        decode(bomb(*size), 32, "center")


@pytest.mark.parametrize("size", [(module.MAX_SIDE, 1), (1, module.MAX_SIDE), (20_000, 3)])
@pytest.mark.parametrize("preprocessing", ["center", "squash"])
def test_a_long_thin_image_takes_no_more_memory_than_others(size: tuple[int, int], preprocessing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = Image.Image.resize

    def resize(image: Image.Image, to: tuple[int, int], *rest: Any, **named: Any) -> Image.Image:
        made.append(to[0] * to[1])
        return real(image, to, *rest, **named)

    monkeypatch.setattr(Image.Image, "resize", resize)
    assert decode(saved(Image.new("RGB", size, (9, 8, 7))), 32, preprocessing).tolist() == np.full((32, 32, 3), (9, 8, 7)).tolist()
    assert max(made) <= 32 * 32 * module.MAX_RATIO


def test_of_a_very_long_image_the_middle_is_what_it_always_was() -> None:
    image = smooth(4400, 40)
    np.testing.assert_allclose(decode(saved(image), 32, "center").astype(int), reference_center(image, 32), atol=3)


def test_odd_metadata_and_large_images_do_not_warn() -> None:
    with quiet_pillow():
        for size in ((15_000, 12_000), (9_460, 9_460)):  # Pillow refuses the first, and would only warn of the second
            with pytest.raises(ImageTooLarge):
                decode(bomb(*size), 32, "center")
        with pytest.raises(DecodeError):
            decode(bomb(9_400, 9_400), 32, "center")


def test_the_limit_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    monkeypatch.setattr(module, "MAX_SIDE", 60)
    with pytest.raises(ImageTooLarge, match=r"61×1 pixels: a side is longer than the limit of 60\. Resize it first"):
        decode(saved(smooth(61, 1)), 8, "center")
    with pytest.raises(ImageTooLarge, match="11×10 pixels are more than the limit of 100"):
        decode(saved(smooth(11, 10)), 32, "center")


WHOLE = [saved(smooth(40, 30), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]


@settings(max_examples=150, deadline=None)
@given(data=st.one_of(st.binary(max_size=200), st.tuples(st.sampled_from(WHOLE), st.integers(0, 2000), st.binary(min_size=1, max_size=6))))
def test_any_bytes_give_pixels_or_a_typed_error(data: bytes | tuple[bytes, int, bytes]) -> None:
    if isinstance(data, tuple):
        whole, place, spoiled = data
        place %= len(whole)
        data = whole[:place] + spoiled + whole[place + len(spoiled) :]
    try:
        with quiet_pillow():
            pixels = decode(data, 16, "center")
    except SampleError:
        return
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
