"""Bytes to pixels: decoding that trusts nothing, and DiT's preprocessing."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from difffeat.errors import DecodeError, ImageTooLarge

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 89_478_485
"""Largest image, in pixels, that is decoded: where Pillow begins to warn of bombs. Decoding takes 8 bytes a pixel, 16 with transparency."""

MAX_SIDE = 1 << 20
"""Longest side, in pixels: a resize holds 32 bytes for each pixel of it."""
MAX_RATIO = 32
"""Of pictures longer than that, only the middle is resized: scaled whole, one pixel's height of them would become gigabytes ahead of the crop."""

_ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is turned."""

_REFUSED_MODES = {
    "CMYK": "CMYK colours cannot be converted without their profile; convert it with: magick in.jpg -colorspace sRGB out.jpg",
    "I": "16 or 32 bits per channel have no agreed range; convert it to 8 bits, for example: magick in.png -depth 8 out.png",
    "F": "floating-point pixels have no agreed range; convert it to 8 bits, for example: magick in.tif -depth 8 out.png",
    "LAB": "Lab colours are not supported; convert it to sRGB",
    "HSV": "HSV colours are not supported; convert it to sRGB",
    "YCbCr": "raw YCbCr is not supported; convert it to sRGB",
}


def decode(data: bytes, size: int, preprocessing: str) -> np.ndarray:
    """An image file's bytes to pixels, uint8 [size, size, 3].

    Palette and grey images become RGB, transparency is laid on white, EXIF orientation is applied, of animations the first frame is taken.

    Raises DecodeError (no accepted format, truncated, CMYK, 16 bits) and ImageTooLarge.
    """
    image = _open(data)
    _check_size(image)
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DecodeError(f"the image is damaged or truncated ({error}). Get it again, or remove it from the source.") from None
    return preprocess(to_rgb(image), size, preprocessing)


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings: of large images (our own limit is checked before any pixel is decoded) and of odd metadata (only pixels count).

    To be entered once, by the thread that starts the decoding ones: filters belong to the process, and entering it in each would race.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\..*")
        yield


def _open(data: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise DecodeError("the file is empty. Get it again, or remove it from the source.")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{error}. Resize it first, or remove it from the source.") from None
    except UnidentifiedImageError:
        raise DecodeError(f"this is no image in a format we accept ({', '.join(FORMATS)}), whatever its name says. Convert or remove it.") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DecodeError(f"the image's header cannot be read ({error}). Get it again, or remove it.") from None


def _check_size(image: Any) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageTooLarge(f"{width}×{height} pixels are more than the limit of {MAX_PIXELS}. Resize it first, or remove it from the source.")
    if max(width, height) > MAX_SIDE:
        raise ImageTooLarge(f"{width}×{height} pixels: a side is longer than the limit of {MAX_SIDE}. Resize it first, or remove it from the source.")
    if min(width, height) < 1:
        raise DecodeError("the image has no pixels. Remove it from the source.")


def to_rgb(image: Any) -> Any:
    """A decoded PIL image as RGB, upright. Raises DecodeError for colour spaces that have no faithful conversion."""
    from PIL import Image

    mode = image.mode
    refused = _REFUSED_MODES.get("I" if mode.startswith("I") else mode)
    if refused is not None:
        raise DecodeError(f"the image has mode {mode}: {refused}.")
    image = _upright(image)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _upright(image: Any) -> Any:
    """Turned as its EXIF says. What cannot be read there says nothing, as in every viewer: only pixels count."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow's EXIF parser lets through whatever hostile bytes lead it to: SyntaxError, struct.error, TypeError, KeyError ...
        orientation = None
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if isinstance(orientation, int) and orientation in turns else image


def preprocess(image: Any, size: int, preprocessing: str) -> np.ndarray:
    """An RGB PIL image to uint8 [size, size, 3].

    `center`: halve with a box filter while the short side is at least 2·size, bicubic to size, centre crop (as DiT was trained).
    `squash`: both sides to size, so that nothing at the edges is cut away.
    """
    from PIL import Image

    if preprocessing == "squash":
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.uint8)
    image = _middle(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)), np.uint8)


def _middle(image: Any) -> Any:
    """A picture no longer than `MAX_RATIO` times its short side."""
    longest = MAX_RATIO * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = max(0, (image.width - longest) // 2), max(0, (image.height - longest) // 2)
    return image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))
