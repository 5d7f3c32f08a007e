"""What some graphs need that a bare machine with a card may lack."""

from __future__ import annotations

import importlib.util

import pytest

from tests.artifacts import OPTIONS, WITH_LATENTS

WITH_AUTOENCODER = {name for name, options in OPTIONS.items() if options["kind"] in ("image", "latents")} | set(WITH_LATENTS)


def require_autoencoder(name: str) -> None:
    """Skips where the artifact `name` has an autoencoder and diffusers is not installed."""
    if name in WITH_AUTOENCODER and importlib.util.find_spec("diffusers") is None:
        pytest.skip("needs diffusers, whose autoencoder this graph holds")
