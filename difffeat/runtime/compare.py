"""Two stores against each other, joined by sample id: norms, cosines, distances and linear CKA, in one streaming pass over each tap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import ConfigError
from difffeat.runtime.manifest import differences
from difffeat.runtime.store import Features, Store

BLOCK_BYTES = 32 << 20
"""How much of both stores' features (as float64) is in memory at once, roughly."""
CKA_WIDTH = 4096
"""Widest tap of which CKA is computed: its three moment matrices take 8 D² bytes each."""
NAMED = 10
"""How many ids are named where many differ."""
PERCENTILES = (1, 5, 50)
NEGLIGIBLE = 1e-24
"""Share of the features' energy below which their variance is rounding: such features are constant, and CKA says nothing of them."""


@dataclass(frozen=True)
class Joined:
    """Rows of the same samples in both stores; ids that only one has; ids that are in quarantine in either."""

    rows_a: np.ndarray
    rows_b: np.ndarray
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    set_aside: tuple[str, ...]


@dataclass(frozen=True)
class TapDifference:
    """How far one tap of A is from one of B.

    **Fields:** `shape_a`, `shape_b` of one row; `rows` compared; `norm_a`, `norm_b` mean L2 norm of a row, `norm_ratio` B over A; `cosine` of the two
    rows of a sample: mean, min, percentiles, and `worst`, the id of the least; `relative_l2` ‖A − B‖_F / ‖A‖_F; `max_difference` of any number;
    `cka` linear CKA (where it is None, `note` says why). The others are None where the shapes differ, or nothing can be divided by.
    """

    tap_a: str
    tap_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    rows: int
    norm_a: float
    norm_b: float
    norm_ratio: float | None
    cosine: dict[str, Any] | None
    relative_l2: float | None
    max_difference: float | None
    cka: float | None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Everything `difffeat store diff` says."""

    joined: Joined
    taps: tuple[TapDifference, ...]
    taps_only_a: tuple[str, ...]
    taps_only_b: tuple[str, ...]
    recipe: tuple[str, ...]


class Moments:
    """Centred second moments of two sets of features of the same rows, block by block in float64 (Chan, Golub and LeVeque 1983)."""

    def __init__(self, width_x: int, width_y: int) -> None:
        self.count, self.energy_x, self.energy_y = 0, 0.0, 0.0
        self._mean_x, self._mean_y = np.zeros(width_x), np.zeros(width_y)
        self.xx, self.yy, self.xy = np.zeros((width_x, width_x)), np.zeros((width_y, width_y)), np.zeros((width_x, width_y))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """A block of rows: float64 [m, Dx] and [m, Dy]."""
        total = self.count + len(x)
        mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
        step_x, step_y = mean_x - self._mean_x, mean_y - self._mean_y
        centred_x, centred_y = x - mean_x, y - mean_y
        weight = self.count * len(x) / total
        self.xx += centred_x.T @ centred_x + weight * np.outer(step_x, step_x)
        self.yy += centred_y.T @ centred_y + weight * np.outer(step_y, step_y)
        self.xy += centred_x.T @ centred_y + weight * np.outer(step_x, step_y)
        self._mean_x += step_x * (len(x) / total)
        self._mean_y += step_y * (len(x) / total)
        self.energy_x += float((x * x).sum())
        self.energy_y += float((y * y).sum())
        self.count = total

    def cka(self) -> float | None:
        """Linear CKA, ‖YcᵀXc‖²_F / (‖XcᵀXc‖_F ‖YcᵀYc‖_F) (Kornblith et al. 2019, section 3); None where either side does not vary."""
        own_x, own_y = float(np.linalg.norm(self.xx)), float(np.linalg.norm(self.yy))
        if own_x <= NEGLIGIBLE * self.energy_x or own_y <= NEGLIGIBLE * self.energy_y:
            return None
        return float((np.linalg.norm(self.xy) / own_x) * (np.linalg.norm(self.xy) / own_y))


def compare_stores(a: str | Path, b: str | Path, *, taps: Sequence[str] | None = None) -> Comparison:
    """Compare two stores.

    **Arguments:** `taps` names of both, or `b12/t30=b8/t30` for different ones of A and B; by default all that both have.

    Raises StoreError with its subclasses, ConfigError (no sample or no tap in common, an unknown tap).
    """
    left, right = Store.open(a), Store.open(b)
    joined = join(left, right)
    pairs = _pairs(left, right, taps)
    return Comparison(
        joined,
        tuple(_compare_tap(left, right, one, other, joined) for one, other in pairs),
        tuple(tap for tap in left.taps if tap not in right.taps),
        tuple(tap for tap in right.taps if tap not in left.taps),
        tuple(differences(_identity(left), _identity(right))),
    )


def join(a: Store, b: Store) -> Joined:
    """Rows of the same sample ids, in A's order. Raises ConfigError when there are none."""
    places = {name: row for row, name in enumerate(b.ids)}
    shared = [(row, places[name]) for row, name in enumerate(a.ids) if name in places]
    if not shared:
        raise ConfigError(f"{a.path} and {b.path} share no sample id: one begins with {a.ids[0]!r}, the other with {b.ids[0]!r}.")
    rows_a, rows_b = (np.array(rows) for rows in zip(*shared, strict=True))
    good = a.valid[rows_a] & b.valid[rows_b]
    if not good.any():
        raise ConfigError(
            f"of the {len(good)} samples that {a.path} and {b.path} share, each is in quarantine in one of them: nothing can be compared."
        )
    own = set(a.ids)
    return Joined(
        rows_a[good],
        rows_b[good],
        tuple(name for name in a.ids if name not in places),
        tuple(name for name in b.ids if name not in own),
        tuple(a.ids[row] for row in rows_a[~good]),
    )


def _identity(store: Store) -> dict[str, Any]:
    """The manifest without what follows from the samples, or is compared row by row."""
    derived = ("rows", "shards", "shard_rows", "samples", "samples_digest", "fingerprint", "taps")
    return {key: value for key, value in store.manifest.items() if key not in derived}


def _pairs(a: Store, b: Store, taps: Sequence[str] | None) -> list[tuple[str, str]]:
    asked = taps or [tap for tap in a.taps if tap in b.taps]
    if not asked:
        raise ConfigError(
            f"{a.path} ({', '.join(a.taps)}) and {b.path} ({', '.join(b.taps)}) have no tap in common. Name a pair: --taps {a.taps[0]}={b.taps[0]}"
        )
    pairs = [(one, other or one) for one, _, other in (tap.partition("=") for tap in asked)]
    for store, names in zip((a, b), zip(*pairs, strict=True), strict=True):
        for name in names:
            if name not in store.taps:
                raise ConfigError(f"{store.path} has no tap {name!r}; it has {', '.join(store.taps)}")
    return pairs


def _compare_tap(a: Store, b: Store, tap_a: str, tap_b: str, joined: Joined) -> TapDifference:
    left, right = a[tap_a], b[tap_b]
    widths = _width(left), _width(right)
    moments = Moments(*widths) if max(widths) <= CKA_WIDTH else None
    gap = _Gap() if left.shape[1:] == right.shape[1:] else None
    norms: list[tuple[np.ndarray, np.ndarray]] = []
    block = max(1, BLOCK_BYTES // (8 * sum(widths)))
    for start in range(0, len(joined.rows_a), block):
        x = left[joined.rows_a[start : start + block]].reshape(-1, widths[0]).astype(np.float64)
        y = right[joined.rows_b[start : start + block]].reshape(-1, widths[1]).astype(np.float64)
        norms.append((np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)))
        if moments is not None:
            moments.add(x, y)
        if gap is not None:
            gap.add(x, y, *norms[-1])
    norm_a, norm_b = (float(np.concatenate(own).mean()) if own else 0.0 for own in ([one for one, _ in norms], [other for _, other in norms]))
    cka = moments.cka() if moments is not None and moments.count > 1 else None
    return TapDifference(
        tap_a,
        tap_b,
        left.shape[1:],
        right.shape[1:],
        len(joined.rows_a),
        norm_a,
        norm_b,
        norm_b / norm_a if norm_a else None,
        gap.cosine([a.ids[row] for row in joined.rows_a]) if gap is not None else None,
        gap.relative_l2 if gap is not None else None,
        gap.max_difference if gap is not None else None,
        cka,
        _note(max(widths), moments, cka),
    )


def _width(features: Features) -> int:
    return int(np.prod(features.shape[1:]))


def _note(width: int, moments: Moments | None, cka: float | None) -> str:
    if moments is None:
        return f"no CKA: a row has {width} numbers, more than {CKA_WIDTH}; export with --pooling mean or max"
    if cka is None:
        return "no CKA: one side does not vary" if moments.count > 1 else "no CKA: it takes two rows"
    return ""


class _Gap:
    """Distances between rows of equal shape."""

    def __init__(self) -> None:
        self._cosines: list[np.ndarray] = []
        self._squares, self._own = 0.0, 0.0
        self.max_difference = 0.0

    def add(self, x: np.ndarray, y: np.ndarray, norm_x: np.ndarray, norm_y: np.ndarray) -> None:
        scale = norm_x * norm_y
        with np.errstate(invalid="ignore", divide="ignore"):
            self._cosines.append(np.where(scale > 0, np.einsum("nd,nd->n", x, y) / scale, np.nan))
        self._squares += float(((x - y) ** 2).sum())
        self._own += float((norm_x**2).sum())
        self.max_difference = max(self.max_difference, float(np.abs(x - y).max()))

    @property
    def relative_l2(self) -> float | None:
        return float(np.sqrt(self._squares / self._own)) if self._own else None

    def cosine(self, ids: list[str]) -> dict[str, Any] | None:
        """Mean, least and percentiles over rows that are not zero, and how many are."""
        cosines = np.concatenate(self._cosines) if self._cosines else np.empty(0)
        good = np.flatnonzero(~np.isnan(cosines))
        if not len(good):
            return None
        worst = good[np.argmin(cosines[good])]
        spread = {f"p{percent}": float(value) for percent, value in zip(PERCENTILES, np.percentile(cosines[good], PERCENTILES), strict=True)}
        least = {"min": float(cosines[worst]), "worst": ids[worst]}
        return {"mean": float(cosines[good].mean()), **least, **spread, "zero_rows": len(cosines) - len(good)}
