"""A decoded picture as RGB: as viewers show it, as Pillow's `convert("RGB")` gives it, or strictly.

`shown` (default): turned as its EXIF says, transparency on white; CMYK, YCbCr, Lab and HSV by Pillow's formulas, without a profile; of 16 bits the
high byte; of 32 bits and floating point what lies in 0..255. `pillow`: `Image.open(...).convert("RGB")`, as most code of the literature has it: not
turned, alpha dropped, 16 bits cut at 255. `strict`: `shown`, but what has no agreed conversion is refused. Profiles and gamma are never applied.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from difffeat.errors import DecodeError
from difffeat.runtime.png import PngFacts

_ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is turned."""

_REFUSED = {
    "CMYK": "CMYK colours cannot be converted without their profile; convert it with: magick in.jpg -colorspace sRGB out.jpg",
    "I": "16 or 32 bits per channel have no agreed range; convert it to 8 bits, for example: magick in.png -depth 8 out.png",
    "F": "floating-point pixels have no agreed range; convert it to 8 bits, for example: magick in.tif -depth 8 out.png",
    "LAB": "Lab colours are not supported; convert it to sRGB",
    "HSV": "HSV colours are not supported; convert it to sRGB",
    "YCbCr": "raw YCbCr is not supported; convert it to sRGB",
}
_CONVERTED = ("CMYK", "LAB", "HSV", "YCbCr")
_CLEAR = "transparent everywhere: it is white"
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def to_rgb(image: Any, pixels: str = "shown", remarks: list[str] | None = None, facts: PngFacts | None = None, low: Any = None) -> Any:
    """A loaded PIL image as RGB.

    **Arguments:** `pixels` as in `RunRecipe`; `remarks` gets a sentence for each thing that was not plain; `facts` where it comes from a PNG; `low`
    the low bytes of a PNG's 16-bit RGB that has a transparent colour.

    Raises DecodeError for colours that `strict` refuses.
    """
    remarks = [] if remarks is None else remarks
    refused = _REFUSED.get("I" if image.mode.startswith("I") else image.mode)
    if pixels == "strict" and refused is not None:
        raise DecodeError(f"the image has mode {image.mode}: {refused}.")
    if pixels == "pillow":
        return _plain(image)
    clear = None if facts is None or not facts.transparent else _transparent(image, facts, low)
    eight = _eight_bits(image, facts is not None, remarks)
    rgb = _on_white(eight, remarks, image.format == "BMP") if clear is None else _cleared(eight, clear, remarks)
    return _turned(rgb, _orientation(image))


def _plain(image: Any) -> Any:
    """`convert("RGB")`; by way of grey where Pillow has no direct one."""
    try:
        return image.convert("RGB")
    except ValueError:
        return image.convert("L").convert("RGB")


def _eight_bits(image: Any, is_png: bool, remarks: list[str]) -> Any:
    """The image itself, or of wider numbers a grey one of 8 bits: PNG has none of more than 16 bits, whatever mode they are read as."""
    from PIL import Image

    if image.mode in _CONVERTED:
        remarks.append(f"{image.mode} colours: converted without a profile")
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and is_png):
        remarks.append("16 bits: their high byte is taken")
        return Image.fromarray((values >> 8).astype(np.uint8))
    remarks.append("32 bits or floating point: cut to 0..255")
    known = np.nan_to_num(values, nan=0.0, posinf=255.0, neginf=0.0) if values.dtype.kind == "f" else values
    return Image.fromarray(np.clip(known, 0, 255).astype(np.uint8))


def _transparent(image: Any, facts: PngFacts, low: Any) -> np.ndarray | None:
    """Which pixels a PNG's `tRNS` makes transparent, bool [H, W], where Pillow compares other numbers than the file has; None where it does not.

    Pillow spreads grey of 2 and 4 bits over 0..255, and takes the high bytes of 16 bits, but leaves the transparent colour as it was.
    """
    wanted = facts.transparent
    if facts.colour == 0 and facts.depth in (1, 2, 4):
        top = (1 << facts.depth) - 1
        return np.asarray(image.convert("L")) == (wanted[0] & top) * 255 // top
    if facts.colour == 0 and facts.depth == 16 and image.mode.startswith("I"):
        return np.asarray(image) == wanted[0]
    if low is None or len(wanted) < 3:
        return None
    clear = np.ones((image.height, image.width), bool)
    for band in range(3):
        clear &= np.asarray(image.getchannel(band)) == wanted[band] >> 8
        clear &= np.asarray(low.getchannel(band)) == wanted[band] & 255
    return clear


def _cleared(image: Any, clear: np.ndarray, remarks: list[str]) -> Any:
    """RGB, white where it is transparent."""
    from PIL import Image

    rgb = image.convert("RGB")
    rgb.paste((255, 255, 255), mask=Image.fromarray(clear.astype(np.uint8) * 255))
    if clear.all():
        remarks.append(_CLEAR)
    return rgb


def _on_white(image: Any, remarks: list[str], is_bmp: bool) -> Any:
    """RGB, transparency laid on white. A bitmap (BMP) whose alpha is zero everywhere was never given one: viewers show its colours."""
    from PIL import Image

    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return _plain(image)
    rgba = image.convert("RGBA")
    if rgba.getextrema()[3][1] == 0:
        if is_bmp:
            remarks.append("an alpha of zero everywhere: its colours are shown")
            return rgba.convert("RGB")
        remarks.append(_CLEAR)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")


def _orientation(image: Any) -> Any:
    """What cannot be read there says nothing, as in every viewer: only pixels count."""
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow's EXIF parser lets through whatever hostile bytes lead it to: SyntaxError, struct.error, TypeError, KeyError ...
        return None


def _turned(image: Any, orientation: Any) -> Any:
    from PIL.Image import Transpose

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
