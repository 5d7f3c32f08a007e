"""An engine against the fp32 reference, tap by tap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from difffeat.errors import ParityError

TOLERANCE = 1e-5


@dataclass(frozen=True)
class TapParity:
    """How far one tap is from the reference.

    **Fields:** `relative_l2` ‖x − r‖/‖r‖ of the worst sample; `cosine` of the worst sample; `max_abs` largest difference of an element;
    `nonfinite` how many elements are NaN or infinite.
    """

    relative_l2: float
    cosine: float
    max_abs: float
    nonfinite: int

    def within(self, tolerance: float) -> bool:
        """Finite everywhere, and the worst sample's relative L2 at most `tolerance`."""
        return self.nonfinite == 0 and self.relative_l2 <= tolerance


def compare(found: np.ndarray, reference: np.ndarray) -> TapParity:
    """Compare features [B, ...] with their reference, sample by sample, in float64."""
    if found.shape != reference.shape:
        raise ParityError(f"the engine gave shape {list(found.shape)}, the reference {list(reference.shape)}")
    x, r = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (found, reference))
    nonfinite = int(np.count_nonzero(~np.isfinite(x)))
    x = np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    tiny = np.finfo(np.float64).tiny
    size = np.linalg.norm(r, axis=1)
    relative = np.linalg.norm(x - r, axis=1) / np.maximum(size, tiny)
    cosine = (x * r).sum(1) / np.maximum(np.linalg.norm(x, axis=1) * size, tiny)
    return TapParity(float(relative.max()), float(cosine.min()), float(np.abs(x - r).max()), nonfinite)


@dataclass(frozen=True)
class ParityReport:
    """All taps of a graph, in one engine, against the reference."""

    engine: str
    device: str
    precision: str
    tolerance: float
    samples: int
    taps: Mapping[str, TapParity]
    reference: str = "unfolded fp32 torch module"

    @property
    def passed(self) -> bool:
        """Whether every tap is within tolerance."""
        return all(tap.within(self.tolerance) for tap in self.taps.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "passed": self.passed}

    def require(self) -> None:
        """Raises ParityError naming the first tap out of tolerance and how far the others are."""
        bad = {name: tap for name, tap in self.taps.items() if not tap.within(self.tolerance)}
        if not bad:
            return
        name, tap = next(iter(bad.items()))
        raise ParityError(
            f"{len(bad)} of {len(self.taps)} taps are beyond the tolerance {self.tolerance:g} against the {self.reference}; the first is {name}: "
            f"relative L2 {tap.relative_l2:.2e}, cosine {tap.cosine:.6f}, {tap.nonfinite} non-finite values. The artifact is not usable; "
            "please report it with the versions that difffeat inspect prints."
        )


@dataclass(frozen=True)
class TapStatistics:
    """One tap against the reference over many samples [n, ...], in float64.

    **Fields:** `relative_l2` ‖x − r‖/‖r‖ over all samples together; `standardised_l2` the same on features standardised per dimension by the
    reference's mean and deviation, as a probe sees them (dimensions that never vary are left out); `percentiles` of the samples' own standardised
    relative L2 at 50, 90, 99 and 100 %; `cosine` smallest and mean over samples; `max_abs` largest difference of an element; `nonfinite` elements
    that are NaN or infinite.
    """

    relative_l2: float
    standardised_l2: float
    percentiles: Mapping[str, float]
    cosine_min: float
    cosine_mean: float
    max_abs: float
    nonfinite: int
    samples: int

    def within(self, tolerance: float) -> bool:
        """Finite everywhere, and standardised relative L2 at most `tolerance`."""
        return self.nonfinite == 0 and self.standardised_l2 <= tolerance


def statistics(found: np.ndarray, reference: np.ndarray) -> TapStatistics:
    """Compare features [n, ...] with their reference. Standardised figures need n ≥ 2. Raises ParityError on shapes that differ."""
    if found.shape != reference.shape:
        raise ParityError(f"the engine gave shape {list(found.shape)}, the reference {list(reference.shape)}")
    x, r = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (found, reference))
    nonfinite = int(np.count_nonzero(~np.isfinite(x)))
    x = np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    tiny = np.finfo(np.float64).tiny
    size = np.maximum(np.linalg.norm(r, axis=1), tiny)
    cosine = (x * r).sum(1) / np.maximum(np.linalg.norm(x, axis=1) * size, tiny)
    deviation = r.std(axis=0)
    varying = deviation > 1e-7 * np.maximum(np.abs(r).max(axis=0), tiny)
    standard = (r - r.mean(axis=0))[:, varying] / deviation[varying]
    error = (x - r)[:, varying] / deviation[varying]
    per_sample = np.linalg.norm(error, axis=1) / np.maximum(np.linalg.norm(standard, axis=1), tiny)
    return TapStatistics(
        relative_l2=float(np.linalg.norm(x - r) / np.linalg.norm(size)),
        standardised_l2=float(np.linalg.norm(error) / max(float(np.linalg.norm(standard)), tiny)) if varying.any() else 0.0,
        percentiles={str(q): float(np.percentile(per_sample, q)) for q in (50, 90, 99, 100)},
        cosine_min=float(cosine.min()),
        cosine_mean=float(cosine.mean()),
        max_abs=float(np.abs(x - r).max()),
        nonfinite=nonfinite,
        samples=len(x),
    )
