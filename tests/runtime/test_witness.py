"""A few images tell whether a source is the one that something was made from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pytest

from difffeat.errors import DecodeError
from difffeat.runtime.blobs import BytesBlob
from difffeat.runtime.samples import Sample
from difffeat.runtime.witness import LOOKED_AT, PATIENCE, first_changed, spread


def digest(data: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint8)


@dataclass
class Gone:
    """An image that cannot be read any more; counts the tries."""

    tries: int = 0
    size: int = -1

    def read(self, limit: int = 0) -> bytes:
        self.tries += 1
        raise DecodeError("gone")


def test_the_first_image_of_other_bytes_is_named() -> None:
    samples = [Sample(str(n), BytesBlob(bytes([n]))) for n in range(4)]
    known = [(sample, digest(bytes([n if n < 2 else 99]))) for n, sample in enumerate(samples)]
    assert first_changed(known[:2]) is None
    assert first_changed(known) is samples[2]
    assert first_changed([(Sample("none"), digest(b""))]) is None


def test_what_cannot_be_read_says_nothing_and_is_not_asked_for_ever() -> None:
    gone = Gone()
    known = [(Sample(str(n), gone), digest(b"")) for n in range(9)]
    assert first_changed(known) is None
    assert gone.tries == PATIENCE


@pytest.mark.parametrize("count", [0, 1, 2, LOOKED_AT, LOOKED_AT + 1, 1000])
def test_they_are_spread_over_everything(count: int) -> None:
    found = spread(count)
    assert len(found) == min(count, LOOKED_AT) == len(set(found))
    assert count == 0 or (found[0], found[-1]) == (0, count - 1)
