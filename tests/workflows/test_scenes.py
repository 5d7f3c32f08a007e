"""The digit scenes are fixed, honest about their split, and told by captions that leave something to the image."""

from __future__ import annotations

import hashlib
import itertools
import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from difffeat.workflows.expectations import EXPECTATIONS, judge
from difffeat.workflows.loading import BUNDLED
from difffeat.workflows.scenes import CLASSES, DIGIT_WORDS, Scene, glyph_split, multi_hot, scene, tokenizer_json, vocabulary

SPLITS = ("train", "validation", "test")
GOLDEN = "3db7056550bc9a9ba39d556e2c6ab5764b6231487e6638b52a3d71f7bab599b8"


def digest(count: int) -> str:
    total = hashlib.sha256()
    for split in SPLITS:
        for index in range(count):
            item = scene(split, index)
            total.update(item.pixels.tobytes() + item.caption.encode() + repr(item.labels).encode())
    return total.hexdigest()


def test_scenes_are_the_ones_the_bundled_weights_were_trained_on() -> None:
    assert digest(40) == GOLDEN


def test_a_scene_depends_on_its_number_alone() -> None:
    first = scene("train", 123_456)
    scene("train", 5)
    again = scene("train", 123_456)
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert first.caption == again.caption


def test_no_glyph_is_in_two_splits_and_every_digit_is_in_each() -> None:
    parts = {split: glyph_split(split) for split in SPLITS}
    seen = [{image.tobytes() for image in images} for images, _ in parts.values()]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & seen[2]
    assert sum(len(images) for images, _ in parts.values()) == 1797
    for _, digits in parts.values():
        counts = np.bincount(digits, minlength=10)
        assert counts.min() > 0.85 * counts.mean()


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [scene("validation", index) for index in range(3000)]


def named(item: Scene) -> list[int]:
    """The digits that the caption names; `three digits` is a count, `a three` a name."""
    words = item.caption.split()
    told = [w for before, w in itertools.pairwise(words) if before in ("a", "an")]
    return [DIGIT_WORDS.index(w) if w in DIGIT_WORDS else int(w) for w in told if w in DIGIT_WORDS or w in CLASSES]


def test_captions_name_about_a_third_of_the_digits_and_are_rarely_wrong(many: list[Scene]) -> None:
    digits = sum(len(item.digits) for item in many)
    mentions = [(number, item.labels) for item in many for number in named(item)]
    wrong = sum(number not in labels for number, labels in mentions)
    assert len(mentions) / digits == pytest.approx(0.35, abs=0.02)
    assert wrong / len(mentions) == pytest.approx(0.05 * 0.9, abs=0.02)


def test_labels_are_the_digits_present(many: list[Scene]) -> None:
    labels = multi_hot(many)
    for row, item in zip(labels, many, strict=True):
        assert set(np.flatnonzero(row)) == {digit for digit, _, _ in item.digits}
        assert 1 <= len(item.digits) <= 3
        assert item.pixels.shape == (24, 24, 3)


def test_every_caption_has_its_tokens(many: list[Scene]) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json())
    unknown = vocabulary().index("<unknown>")
    lengths = set()
    for item in many:
        ids = tokenizer.encode(" " + item.caption, add_special_tokens=False).ids
        assert unknown not in ids
        lengths.add(len(ids))
    assert max(lengths) <= 64
    assert len(lengths) > 5


def test_the_bundled_tokenizer_is_this_vocabularys() -> None:
    assert json.loads((BUNDLED / "tokenizer.json").read_text()) == json.loads(tokenizer_json())


def test_every_expectation_must_be_judged() -> None:
    with pytest.raises(KeyError, match="not judged: "):
        judge({"image-block-inside": (True, "b3 of 8")})
    outcomes = judge(dict.fromkeys(EXPECTATIONS, (False, "no")))
    assert [outcome.expected for outcome in outcomes] == list(EXPECTATIONS.values())
    assert not any(outcome.kept for outcome in outcomes)
