"""A few images tell whether a source is the one that something was made from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pytest

from difffeat.errors import DecodeError
from difffeat.runtime.blobs import BytesBlob
from difffeat.runtime.samples import Sample
from difffeat.runtime.witness import LOOKED_AT, PATIENCE, ask, spread


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


@dataclass
class Fetched:
    """An image whose size nobody knows before it is read."""

    data: bytes
    size: int = -1

    def read(self, limit: int = 0) -> bytes:
        return self.data


def test_a_file_of_other_bytes_speaks_against_the_source() -> None:
    samples = [Sample(str(n), BytesBlob(bytes([n]))) for n in range(4)]
    known = [(sample, digest(bytes([n if n < 3 else 99]))) for n, sample in enumerate(samples)]
    assert ask(known[:3]).against is None
    assert ask(known).against is samples[3]
    assert ask([(Sample("none"), digest(b""))]).against is None


def test_what_was_fetched_speaks_against_the_source_only_when_most_of_it_is_other() -> None:
    samples = [Sample(str(n), Fetched(bytes([n]))) for n in range(4)]
    for changed, refused in ((1, False), (2, False), (3, True), (4, True)):
        known = [(sample, digest(bytes([n if n >= changed else 99]))) for n, sample in enumerate(samples)]
        assert (ask(known).against is not None) == refused


def test_what_cannot_be_read_says_nothing_and_is_not_asked_for_ever() -> None:
    gone = Gone()
    found = ask([(Sample(str(n), gone), digest(b"")) for n in range(9)])
    assert (found.against, gone.tries) == (None, PATIENCE)


@pytest.mark.parametrize("count", [0, 1, 2, LOOKED_AT, LOOKED_AT + 1, 1000])
def test_they_are_spread_over_everything(count: int) -> None:
    found = spread(count)
    assert len(found) == min(count, LOOKED_AT) == len(set(found))
    assert count == 0 or (found[0], found[-1]) == (0, count - 1)
