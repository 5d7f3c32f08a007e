"""Bytes to pixels: decoding that trusts nothing, and DiT's preprocessing."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from difffeat.errors import DecodeError, ImageTooLarge
from difffeat.runtime.foreign import kind_of
from difffeat.runtime.pixels import to_rgb
from difffeat.runtime.png import SIGNATURE, PngFacts, without_metadata

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 89_478_485
"""Largest image, in pixels, that is decoded: where Pillow begins to warn of bombs. Decoding takes 8 bytes a pixel, 16 with transparency."""

MAX_SIDE = 1 << 20
"""Longest side, in pixels: a resize holds 32 bytes for each pixel of it."""
MAX_RATIO = 32
"""Of pictures longer than that, only the middle is resized: scaled whole, one pixel's height of them would become gigabytes ahead of the crop."""


def decode(data: bytes, size: int, preprocessing: str, pixels: str = "shown", remarks: list[str] | None = None) -> np.ndarray:
    """An image file's bytes to pixels, uint8 [size, size, 3].

    Palette and grey images become RGB, of animations the first frame is taken; orientation, transparency and wide numbers as `pixels` says. `remarks`
    gets a sentence for each thing that was not plain. Texts, profiles and other metadata are passed over, whatever they are.

    Raises DecodeError (no accepted format, truncated, refused) and ImageTooLarge.
    """
    remarks = [] if remarks is None else remarks
    facts = None
    if data.startswith(SIGNATURE):
        data, facts = without_metadata(data)
    image = _open(data)
    _check_size(image)
    _remark_frames(image, facts, remarks)
    try:
        image = _loaded(image, data, remarks)
        low = _low_bytes(data) if facts is not None and facts.depth == 16 and facts.colour == 2 and facts.transparent else None
        rgb = to_rgb(image, pixels, remarks, facts, low)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DecodeError(f"the image is damaged or truncated ({error}). Get it again, or remove it from the source.") from None
    return preprocess(rgb, size, preprocessing)


def _remark_frames(image: Any, facts: PngFacts | None, remarks: list[str]) -> None:
    """Say that there are more; a second view of the same (MPO of cameras) does not count."""
    try:
        several = facts.frames > 1 if facts is not None else image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # frames that cannot be found are none; Pillow's parsers raise whatever hostile bytes lead them to
        several = False
    if several:
        remarks.append("several frames or pages: the first is taken")


def _loaded(image: Any, data: bytes, remarks: list[str]) -> Any:
    """The image with its pixels decoded. A JPEG that lacks nothing but its end mark is whole."""
    try:
        image.load()
    except OSError:
        whole = _without_end_mark(data) if data.startswith(b"\xff\xd8") else None
        if whole is None:
            raise
        remarks.append("a JPEG without its end mark: all of its pixels are there")
        return whole
    return image


def _without_end_mark(data: bytes) -> Any | None:
    """The picture of a JPEG whose last pixel is there, None where any is missing: then what follows it would show in the picture."""
    from PIL import Image

    pictures = []
    for filler in (b"\x00", b"\x5a"):
        image = Image.open(io.BytesIO(data + filler * 4096 + b"\xff\xd9"), formats=("JPEG",))
        image.load()
        pictures.append(image)
    return pictures[0] if pictures[0].tobytes() == pictures[1].tobytes() else None


def _low_bytes(data: bytes) -> Any:
    """A 16-bit RGB PNG again, the low byte of each sample: Pillow keeps the high ones alone."""
    image = _open(data)
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    image.load()
    return image


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
        kind = kind_of(data)
        found = f" It is {kind}." if kind else ""
        raise DecodeError(
            f"this is no image in a format we accept ({', '.join(FORMATS)}), whatever its name says.{found} Convert or remove it."
        ) from None
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
