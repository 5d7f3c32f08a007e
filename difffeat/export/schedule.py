"""Noise schedules: DiT's variance-preserving β schedule and Plaid's learned γ(t). Everything in float64.

Conventions: z_t = α_t z + σ_t ε with α² + σ² = 1; log-SNR = ln(α²/σ²). DiT's t runs over 0..999, Plaid's over 0.0..1.0; in both, more t is more
noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from difffeat.errors import ConfigError

DIT_STEPS = 1000


@dataclass(frozen=True)
class NoiseLevel:
    """α, σ and log-SNR of one timestep (float64)."""

    t: float
    alpha: float
    sigma: float
    log_snr: float

    @classmethod
    def from_log_snr(cls, t: float, log_snr: float) -> NoiseLevel:
        """α² = sigmoid(log-SNR), σ² = sigmoid(−log-SNR)."""
        return cls(float(t), float(np.sqrt(1.0 / (1.0 + np.exp(-log_snr)))), float(np.sqrt(1.0 / (1.0 + np.exp(log_snr)))), float(log_snr))


def dit_noise_level(t: float) -> NoiseLevel:
    """DiT: β = linspace(1e-4, 0.02, 1000), ᾱ_t = Π(1−β), α² = ᾱ_t (Ho et al. 2020; Peebles & Xie 2023).

    Raises ConfigError unless t is a whole number in 0..999.
    """
    if not (float(t).is_integer() and 0 <= t < DIT_STEPS):
        raise ConfigError(f"a DiT timestep is a whole number in 0..{DIT_STEPS - 1}, got {t}")
    alpha_bar = dit_alpha_bar()[int(t)]
    return NoiseLevel(float(t), float(np.sqrt(alpha_bar)), float(np.sqrt(1.0 - alpha_bar)), float(np.log(alpha_bar / (1.0 - alpha_bar))))


def dit_alpha_bar() -> np.ndarray:
    """ᾱ_t for t = 0..999, float64 [1000]."""
    return np.cumprod(1.0 - np.linspace(1e-4, 0.02, DIT_STEPS))


@dataclass(frozen=True)
class PlaidSchedule:
    """Plaid's learned schedule (Gulrajani & Hashimoto 2023, section on learned schedules).

    g̃(t) = tanh((t−½)·softplus(W1)ᵀ + b1) · (0.01·softplus(W2))ᵀ, made to run from γ₀ to γ₁.

    **Fields:** `w1` float64 [H, 1], `b1` [H], `w2` [1, H]; `gamma_0`, `gamma_1` scalars.
    """

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    gamma_0: float
    gamma_1: float

    def gamma(self, t: float) -> float:
        """γ(t) = −log-SNR. Raises ConfigError unless 0 ≤ t ≤ 1."""
        if not 0.0 <= t <= 1.0:
            raise ConfigError(f"a Plaid timestep lies in 0..1, got {t}")
        low, high = self._shape(0.0), self._shape(1.0)
        return float(self.gamma_0 + (self.gamma_1 - self.gamma_0) * (self._shape(t) - low) / (high - low))

    def noise_level(self, t: float) -> NoiseLevel:
        """α² = sigmoid(−γ), σ² = sigmoid(γ)."""
        return NoiseLevel.from_log_snr(t, -self.gamma(t))

    def _shape(self, t: float) -> float:
        hidden = np.tanh((t - 0.5) * _softplus(self.w1[:, 0]) + self.b1)
        return float(hidden @ (0.01 * _softplus(self.w2[0])))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, np.asarray(x, np.float64))
