"""The noise ledger: one stream for each (seed, sample, timestep, draw), whatever asks for it, on every machine."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest

from difffeat.runtime.noise import noise, stream_key

MASK = 2**64 - 1


def philox_4x64_10(counter: int, key: tuple[int, int]) -> list[int]:
    """One block of Philox-4x64-10 (Salmon et al. 2011), written from the paper."""
    x = [(counter >> (64 * i)) & MASK for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(second >> 64) ^ x[1] ^ k0, second & MASK, (first >> 64) ^ x[3] ^ k1, first & MASK]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return x


def reference(seed: int, name: str, t: float, draw: int, count: int) -> list[float]:
    """The ledger's formula in plain Python."""
    text = json.dumps([seed, name, float(t), draw], separators=(",", ":"))
    digest = hashlib.sha256(b"difffeat-noise/1\n" + text.encode()).digest()
    key = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little"))
    words = [word for block in range(count // 4 + 1) for word in philox_4x64_10(block + 1, key)]
    values = []
    for first, second in zip(words[0::2], words[1::2], strict=True):
        u, v = ((first >> 11) + 1) * 2.0**-53, (second >> 11) * 2.0**-53
        radius = math.sqrt(-2 * math.log(u))
        values += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    return values[:count]


@pytest.mark.parametrize("key", [(0, "a", 30.0, 0), (2**62, "ü/ö", 0.05, 3), (5, "", 999, 1)])
def test_it_is_the_stated_formula(key: tuple[int, str, float, int]) -> None:
    expected = np.array(reference(*key, 101), np.float32)
    np.testing.assert_allclose(noise(*key, (101,)), expected, rtol=0, atol=3e-7)


def test_its_bytes_do_not_change_between_versions() -> None:
    """On a platform whose maths library rounds otherwise one value of 10⁸ may differ: then this test, not the ledger, is to be looked at."""
    total = hashlib.sha256()
    for seed, name, t, draw in [(0, "cat", 30.0, 0), (7, "dog", 0.0, 0), (7, "dog", 0.05, 2)]:
        total.update(noise(seed, name, t, draw, (4, 8, 8)).tobytes())
    assert total.hexdigest() == "625f6b90c4cab0f9bb4f21b4b32d18081efc4a4b25e193bcedab973601d12579"


@pytest.mark.parametrize("other", [(1, "a", 30.0, 0), (0, "b", 30.0, 0), (0, "a", 31.0, 0), (0, "a", 30.0, 1)])
def test_every_part_of_the_key_matters(other: tuple[int, str, float, int]) -> None:
    assert abs(np.corrcoef(noise(0, "a", 30.0, 0, (4000,)), noise(*other, (4000,)))[0, 1]) < 0.08


def test_an_integer_timestep_is_its_float() -> None:
    np.testing.assert_array_equal(stream_key(0, "a", 30, 0), stream_key(0, "a", 30.0, 0))


@pytest.mark.parametrize("count", [1, 2, 3, 100, 255])
def test_the_first_values_do_not_depend_on_how_many_are_asked_for(count: int) -> None:
    np.testing.assert_array_equal(noise(3, "x", 10, 0, (count,)), noise(3, "x", 10, 0, (256,))[:count])


def test_shapes_are_filled_row_by_row() -> None:
    np.testing.assert_array_equal(noise(3, "x", 10, 0, (4, 5, 6)).ravel(), noise(3, "x", 10, 0, (120,)))
    assert noise(3, "x", 10, 0, (2,)).dtype == np.float32
    assert noise(3, "x", 10, 0, (0, 4)).shape == (0, 4)


def test_it_neither_reads_nor_moves_the_global_state() -> None:
    np.random.seed(1)
    first = noise(0, "a", 30, 0, (10,))
    following = np.random.rand()
    np.random.seed(1)
    assert np.random.rand() == following
    np.testing.assert_array_equal(noise(0, "a", 30, 0, (10,)), first)


def test_it_is_normal() -> None:
    values = np.concatenate([noise(0, str(i), 30, 0, (4096,)) for i in range(50)]).astype(np.float64)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**4).mean() - 3) < 0.1
    assert abs(np.mean(values[0::2] * values[1::2])) < 0.01
    assert np.mean(np.abs(values) > 1.959964) == pytest.approx(0.05, abs=0.003)
