"""Digit scenes: the small data set that comes with the package.

Real handwritten digits (scikit-learn's `load_digits`: 1 797 glyphs of 8×8 pixels from the UCI repository), in a synthetic layout with
synthetic captions. The *glyphs* are split first, so no handwriting of the test split is ever seen in training; then scenes are composed.

A scene is 24×24 pixels with one to three digits of 9 to 11 pixels at any even position, jittered in contrast, on a shaded background with fragments
of other glyphs as clutter. Its labels are the digits present. Its caption names each present digit with probability 0.35 and is wrong in one mention
of twenty, so that text lacks what the image has, and the image is what settles the rest.

Every scene is a function of (split, index) alone. Training scenes are an endless stream; validation and test are the first indices of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

CANVAS = 24
CLASSES = tuple(str(digit) for digit in range(10))
SPLITS = {"train": 1100, "validation": 250, "test": 447}
MENTION_PROBABILITY = 0.35
WRONG_MENTION_PROBABILITY = 0.05

_SPLIT_SEED = 20240917
_STEP = 2  # digits stand on even pixels: one step of the f2 latents, so that a small model sees few sub-pixel phases
_GLYPH_SIZES = (9, 10, 11)
_STREAMS = {"train": 1, "validation": 2, "test": 3}
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_COUNTS = ("", "one digit", "two digits", "three digits")
_OPENINGS = ("a picture of", "an image with", "a scene with", "there is", "we see", "this shows")
_VAGUE = ("some digits", "handwritten digits", "something written", "a few marks")


@dataclass(frozen=True)
class Scene:
    """One scene.

    **Fields:** `pixels` uint8 [24, 24, 3]; `digits` as (digit, centre x, centre y) in pixels; `labels` distinct digits, ascending;
    `caption`; `id`, for example `test-00042`.
    """

    id: str
    pixels: np.ndarray
    digits: tuple[tuple[int, float, float], ...]
    caption: str

    @property
    def labels(self) -> tuple[int, ...]:
        """The digits present, each once, ascending."""
        return tuple(sorted({digit for digit, _, _ in self.digits}))


@cache
def glyph_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Glyphs of one split: (images float32 [n, 8, 8] in 0..1, digits int64 [n]). Stratified by digit, fixed seed."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images, digits = np.asarray(data.images, np.float32) / 16.0, np.asarray(data.target)
    rng = np.random.Generator(np.random.PCG64(_SPLIT_SEED))
    # Spreading each digit's glyphs evenly over (0, 1) and sorting by that key makes every prefix stratified.
    keys = np.empty(len(digits))
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(digits == digit))
        keys[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    order = np.argsort(keys, kind="stable")
    start = 0
    for name, count in SPLITS.items():
        if name == split:
            rows = order[start : start + count]
            return images[rows], digits[rows]
        start += count
    raise KeyError(split)


@cache
def _scaled_glyphs(split: str) -> dict[int, np.ndarray]:
    """Size -> float32 [n, size, size]; bicubic."""
    from PIL import Image

    images, _ = glyph_split(split)
    scaled = {}
    for size in _GLYPH_SIZES:
        resized = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in images]
        scaled[size] = np.clip(np.stack(resized), 0.0, 1.0)
    return scaled


def scene(split: str, index: int) -> Scene:
    """The scene number `index` of a split."""
    rng = np.random.Generator(np.random.PCG64([_SPLIT_SEED, _STREAMS[split], index]))
    _, targets = glyph_split(split)
    canvas = _background(rng)
    digits: list[tuple[int, float, float]] = []
    boxes: list[tuple[int, int, int]] = []
    for _ in range(int(rng.integers(1, 4))):
        size = int(rng.choice(_GLYPH_SIZES))
        x, y = _place(rng, size, boxes)
        row = int(rng.integers(len(targets)))
        _ink(canvas, _scaled_glyphs(split)[size][row], x, y, contrast=rng.uniform(0.55, 1.0))
        boxes.append((x, y, size))
        digits.append((int(targets[row]), x + size / 2, y + size / 2))
    _clutter(rng, canvas, split)
    canvas += rng.normal(0.0, 0.02, canvas.shape)
    gray = np.clip(np.rint(255.0 * canvas), 0, 255).astype(np.uint8)
    pixels = np.repeat(gray[:, :, None], 3, axis=2)
    return Scene(f"{split}-{index:05d}", pixels, tuple(digits), caption(rng, digits))


def _background(rng: np.random.Generator) -> np.ndarray:
    """A dark plane with a linear shade; float64 [24, 24]."""
    ramp = np.linspace(-0.5, 0.5, CANVAS)
    slope_x, slope_y = rng.uniform(-0.12, 0.12, 2)
    return rng.uniform(0.08, 0.2) + slope_x * ramp[None, :] + slope_y * ramp[:, None]


def _place(rng: np.random.Generator, size: int, boxes: list[tuple[int, int, int]]) -> tuple[int, int]:
    """A top-left corner whose box hardly overlaps the others: the best of twenty tries."""
    tries = _STEP * rng.integers(0, (CANVAS - size) // _STEP + 1, (20, 2))
    overlaps = [sum(_overlap(x, y, size, box) for box in boxes) for x, y in tries]
    x, y = tries[int(np.argmin(overlaps))]
    return int(x), int(y)


def _overlap(x: int, y: int, size: int, box: tuple[int, int, int]) -> int:
    left, top, other = box
    width = min(x + size, left + other) - max(x, left)
    height = min(y + size, top + other) - max(y, top)
    return max(width, 0) * max(height, 0)


def _ink(canvas: np.ndarray, glyph: np.ndarray, x: int, y: int, contrast: float) -> None:
    """Blend a glyph [s, s] into the canvas, in place."""
    height, width = glyph.shape
    region = canvas[y : y + height, x : x + width]
    region += contrast * glyph * (1.0 - region)


def _clutter(rng: np.random.Generator, canvas: np.ndarray, split: str) -> None:
    """Up to three faint 3×3 fragments of glyphs, in place."""
    glyphs = _scaled_glyphs(split)[9]
    for _ in range(int(rng.integers(0, 4))):
        top, left = rng.integers(1, 5, 2)
        fragment = glyphs[int(rng.integers(len(glyphs))), top : top + 3, left : left + 3]
        x, y = rng.integers(0, CANVAS - 3, 2)
        _ink(canvas, fragment, int(x), int(y), contrast=rng.uniform(0.2, 0.5))


def caption(rng: np.random.Generator, digits: list[tuple[int, float, float]]) -> str:
    """A caption for digits with their centres (x, y in pixels)."""
    mentions = [entry for entry in digits if rng.random() < MENTION_PROBABILITY]
    parts = []
    for digit, x, y in mentions:
        told = int(rng.integers(10)) if rng.random() < WRONG_MENTION_PROBABILITY else digit
        name = DIGIT_WORDS[told] if rng.random() < 0.5 else str(told)
        article = "an" if told == 8 else "a"
        parts.append(f"{article} {name}{_position(rng, x, y)}")
    opening = str(rng.choice(_OPENINGS))
    count = _COUNTS[len(digits)] if rng.random() < 0.4 else ""
    if not parts:
        return f"{opening} {count or rng.choice(_VAGUE)}"
    listed = " and ".join(parts)
    return f"{opening} {count} , {listed}" if count else f"{opening} {listed}"


def _position(rng: np.random.Generator, x: float, y: float) -> str:
    """Where a digit stands, told half of the time."""
    if rng.random() < 0.5:
        return ""
    dx, dy = x - CANVAS / 2, y - CANVAS / 2
    if max(abs(dx), abs(dy)) < 3:
        return " in the middle"
    if abs(dx) > abs(dy):
        return " on the left" if dx < 0 else " on the right"
    return " at the top" if dy < 0 else " at the bottom"


def multi_hot(scenes: list[Scene]) -> np.ndarray:
    """Labels as uint8 [n, 10]."""
    labels = np.zeros((len(scenes), len(CLASSES)), np.uint8)
    for row, item in enumerate(scenes):
        labels[row, list(item.labels)] = 1
    return labels


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, after `<end>` (id 0) and `<unknown>` (id 1)."""
    words = {*DIGIT_WORDS, *CLASSES, "a", "an", "and", ","}
    for phrase in (*_OPENINGS, *_VAGUE, *_COUNTS, "in the middle", "on the left", "on the right", "at the top", "at the bottom"):
        words.update(phrase.split())
    return ("<end>", "<unknown>", *sorted(words))


def tokenizer_json() -> str:
    """A word-level tokenizer over `vocabulary()`, as `tokenizer.json` text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer.to_str(pretty=True)
