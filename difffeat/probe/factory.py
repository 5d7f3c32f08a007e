"""Probes by name: for the command line, and for files whose kind is not known beforehand."""

from __future__ import annotations

import os
from typing import Any

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.base import Probe, read_probe_file
from difffeat.probe.fusion import FusionProbe
from difffeat.probe.linear import LinearProbe
from difffeat.probe.logistic import LogisticProbe
from difffeat.probe.ridge import RidgeProbe

METHODS = ("adam", "ridge", "logistic")


def make_probe(method: str = "adam", **settings: Any) -> LinearProbe | RidgeProbe | LogisticProbe:
    """`adam` (the paper's), `ridge` (closed form) or `logistic` (scikit-learn); `settings` go to the probe's constructor."""
    kinds = {"adam": LinearProbe, "ridge": RidgeProbe, "logistic": LogisticProbe}
    if method not in kinds:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    try:
        probe = kinds[method](**settings)
    except TypeError as error:
        raise ConfigError(f"the {method} probe does not take these settings: {error}") from None
    probe.check_settings()
    return probe


def load_probe(path: str | os.PathLike[str]) -> Probe:
    """A fitted probe of whatever kind from its file. Raises ProbeError when the file holds none."""
    header, tensors = read_probe_file(path)
    for kind in (LinearProbe, RidgeProbe, LogisticProbe, FusionProbe):
        if header["kind"] == kind.kind:
            return kind.restore(path, header, tensors)
    raise ProbeError(f"{path} holds a probe of kind {header['kind']!r}, which this version does not know")
