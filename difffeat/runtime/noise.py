"""The noise ledger: the same noise for a sample whatever the batch, order, shard, worker, device or restart.

A stream is keyed by (seed, sample id, timestep, draw). Its Philox-4x64-10 key is the first 16 bytes, as two little-endian 64-bit words, of the
SHA-256 of `difffeat-noise/1`, a newline, and the canonical JSON `[seed, id, t, draw]` (t as a float). The counter starts at zero.

Words w_0, w_1, w_2, ... become normals in pairs (Box–Muller):

    u = ((w_2i >> 11) + 1) · 2⁻⁵³ in (0, 1],   v = (w_2i+1 >> 11) · 2⁻⁵³ in [0, 1)
    r = √(−2 ln u),   n_2i = r · cos(2πv),   n_2i+1 = r · sin(2πv)       (float64, rounded to float32)

so the first n values never depend on how many are asked for. NumPy's own `normal()` is not used: its algorithm may change between versions.
Philox words are exact on every machine. ln, cos and sin come from the platform's maths library, whose last float64 bit may differ between platforms;
after rounding to float32 that shows in about one value of 10⁸. On one platform the values are bit-equal.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from difffeat.recipe import canonical_json

DOMAIN = b"difffeat-noise/1\n"


def noise(seed: int, sample_id: str, t: float, draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normals, float32 of `shape`, filled in row-major order."""
    count = math.prod(shape)
    words = np.random.Philox(key=stream_key(seed, sample_id, t, draw)).random_raw(2 * math.ceil(count / 2))
    return normals(words)[:count].reshape(shape)


def stream_key(seed: int, sample_id: str, t: float, draw: int) -> np.ndarray:
    """The 128-bit Philox key of a stream, uint64 [2]."""
    name = canonical_json([int(seed), sample_id, float(t), int(draw)]).encode()
    return np.frombuffer(hashlib.sha256(DOMAIN + name).digest()[:16], dtype="<u8").astype(np.uint64)


def normals(words: np.ndarray) -> np.ndarray:
    """uint64 words [2n] -> standard normals, float32 [2n]."""
    u = ((words[0::2] >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
    v = (words[1::2] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(u)), 2.0 * np.pi * v
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1).astype(np.float32)
