import math

import numpy as np
import pytest

from difffeat.errors import ConfigError
from difffeat.export.schedule import NoiseLevel, PlaidSchedule, dit_noise_level


@pytest.mark.parametrize(
    ("t", "sigma", "snr"),
    [(0, 0.010, 9999), (30, 0.111, 80), (50, 0.173, 32), (81, 0.268, 13), (121, 0.384, 5.8), (261, 0.712, 0.97), (500, 0.960, 0.08)],
)
def test_dit_levels_are_the_published_ones(t: int, sigma: float, snr: float) -> None:
    level = dit_noise_level(t)
    assert level.sigma == pytest.approx(sigma, abs=6e-4)
    assert math.exp(level.log_snr) == pytest.approx(snr, rel=0.07)
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("t", [-1, 1000, 0.5])
def test_dit_timesteps_outside_the_range_are_refused(t: float) -> None:
    with pytest.raises(ConfigError, match=r"whole number in 0\.\.999"):
        dit_noise_level(t)


@pytest.fixture
def schedule() -> PlaidSchedule:
    rng = np.random.default_rng(0)
    return PlaidSchedule(rng.normal(size=(1024, 1)), rng.normal(size=1024), rng.normal(size=(1, 1024)), -3.1, 5.7)


def test_plaid_gamma_runs_from_its_bounds_upward(schedule: PlaidSchedule) -> None:
    gammas = [schedule.gamma(t) for t in np.linspace(0, 1, 21)]
    assert gammas[0] == pytest.approx(-3.1, abs=1e-12)
    assert gammas[-1] == pytest.approx(5.7, abs=1e-12)
    assert all(np.diff(gammas) > 0)


def test_plaid_gamma_is_the_formula_of_the_paper(schedule: PlaidSchedule) -> None:
    def g(t: float) -> float:
        total = 0.0
        for w1, b1, w2 in zip(schedule.w1[:, 0], schedule.b1, schedule.w2[0], strict=True):
            total += math.tanh((t - 0.5) * math.log1p(math.exp(w1)) + b1) * 0.01 * math.log1p(math.exp(w2))
        return total

    expected = -3.1 + 8.8 * (g(0.3) - g(0)) / (g(1) - g(0))
    assert schedule.gamma(0.3) == pytest.approx(expected, abs=1e-10)


def test_plaid_noise_levels(schedule: PlaidSchedule) -> None:
    level = schedule.noise_level(0.0)
    assert level.alpha**2 == pytest.approx(1 / (1 + math.exp(-3.1)))
    assert level.sigma**2 == pytest.approx(1 / (1 + math.exp(3.1)))
    assert level.log_snr == pytest.approx(3.1)
    with pytest.raises(ConfigError, match=r"lies in 0\.\.1"):
        schedule.noise_level(1.5)


def test_a_level_is_recovered_from_its_log_snr() -> None:
    level = dit_noise_level(30)
    again = NoiseLevel.from_log_snr(30, level.log_snr)
    assert (again.alpha, again.sigma) == pytest.approx((level.alpha, level.sigma), abs=1e-14)
