"""The linear probes are scikit-learn classifiers: its own checks say so, and its tools work with them."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from difffeat.probe.linear import LinearProbe
from difffeat.probe.logistic import LogisticProbe
from difffeat.probe.ridge import RidgeProbe


@pytest.mark.filterwarnings("ignore::difffeat.errors.ProbeWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([LinearProbe(), RidgeProbe(), LogisticProbe()])
def test_scikit_learns_own_checks_pass(estimator: Any, check: Any) -> None:
    check(estimator)
