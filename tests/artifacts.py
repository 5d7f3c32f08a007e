"""Small artifacts of every kind, exported once in a session and never written to; a test that spoils one takes a copy."""

from __future__ import annotations

import fcntl
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines import Artifact
from difffeat.export.weights import SD_VAE_CONFIG, DiTConfig, PlaidConfig, random_dit, random_plaid, random_vae
from difffeat.workflows.exporting import ExportOptions, ExportReport, export_dit, export_plaid
from difffeat.workflows.scenes import tokenizer_json, vocabulary
from tests.shared import shared_folder

DIT = DiTConfig(name="dit-small", depth=3, width=64, heads=4, patch=2, input_size=8, num_classes=5)
PLAID = PlaidConfig(name="plaid-small", depth=2, width=128, vocab=len(vocabulary()), max_length=32)
VAE = {
    **SD_VAE_CONFIG,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "image": {"kind": "image", "blocks": (0, 2, 3), "timesteps": (30.0,), "noising": "random"},
    "image-constant": {"kind": "image", "blocks": (2,), "timesteps": (30.0,), "noising": "constant", "noise_seed": 7, "pooling": "grid"},
    "latents": {"kind": "latents", "blocks": (0,), "timesteps": (30.0,), "noising": "random"},
    "from-latents": {"kind": "from-latents", "blocks": (0, 2, 3), "timesteps": (30.0,), "noising": "random"},
    "from-latents-mean": {"kind": "from-latents", "blocks": (1, 3), "timesteps": (30.0,), "noising": "mean", "pooling": "tokens", "label": 1},
    "sweep": {"kind": "sweep", "blocks": (0, 2, 3), "timesteps": (0.0, 30.0, 500.0), "noising": "random"},
    "sweep-mean": {"kind": "sweep", "blocks": (2,), "timesteps": (0.0, 30.0), "noising": "mean", "pooling": "max"},
    "from-latents-ddim": {"kind": "from-latents", "blocks": (0, 2), "timesteps": (60.0,), "noising": "ddim", "ddim_steps": 3},
    "sweep-ddim": {"kind": "sweep", "blocks": (2, 3), "timesteps": (0.0, 30.0), "noising": "ddim", "ddim_steps": 2, "label": 1},
    "text": {"kind": "text", "blocks": (0, 2), "timesteps": (0.05,), "noising": "mean"},
    "text-random": {"kind": "text", "blocks": (1,), "timesteps": (0.5,), "noising": "random", "pooling": "max"},
    "text-sweep": {"kind": "text-sweep", "blocks": (0, 2), "timesteps": (0.0, 0.05, 0.5), "noising": "random"},
    "text-sweep-mean": {"kind": "text-sweep", "blocks": (2,), "timesteps": (0.0, 0.05), "noising": "mean"},
    "text-ddim": {"kind": "text", "blocks": (0, 2), "timesteps": (0.3,), "noising": "ddim", "ddim_steps": 3},
    "text-sweep-ddim": {
        "kind": "text-sweep",
        "blocks": (1, 2),
        "timesteps": (0.0, 0.2),
        "noising": "ddim",
        "ddim_steps": 2,
        "self_conditioning": True,
    },
    "text-conditioned": {"kind": "text", "blocks": (2,), "timesteps": (0.05,), "noising": "mean", "self_conditioning": True},
}
WITH_LATENTS = ("from-latents", "sweep", "from-latents-ddim", "sweep-ddim")
"""Which of the graphs that take latents have the autoencoder's graph beside them."""


@cache
def exported(name: str, precision: str = "fp32") -> Artifact:
    """The artifact `name` of `OPTIONS`, exported by whichever process of the session asks for it first, and shared by all: only to be read."""
    out = shared_folder() / (name if precision == "fp32" else f"{name}-{precision}")
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Artifact.open(out) if out.is_dir() else export_named(name, out, precision=precision).artifact


def lend(*names: str) -> dict[str, str]:
    """The environment of a sub-process that is to use these artifacts of ours."""
    for name in names:
        exported(name)
    return dict(os.environ)


@cache
def dit_weights() -> Any:
    return random_dit(DIT, seed=1)


@cache
def vae_weights() -> Any:
    return random_vae(VAE, seed=2)


@cache
def plaid_weights() -> Any:
    return random_plaid(PLAID, seed=3)


def export_named(name: str, out: Path, *, overwrite: bool = False, **changes: Any) -> ExportReport:
    """Export the artifact `name` of `OPTIONS`, with some of its options changed."""
    options = ExportOptions(**{**OPTIONS[name], **changes})
    if options.kind.startswith("text"):
        return export_plaid(plaid_weights(), tokenizer_json().encode(), options, out, overwrite=overwrite, say=lambda _: None)
    vae = vae_weights() if options.kind in ("image", "latents") or name in WITH_LATENTS else None
    return export_dit(dit_weights(), vae, options, out, overwrite=overwrite, say=lambda _: None)


def copy_of(name: str, tmp_path: Path, precision: str = "fp32") -> Path:
    """A copy of an artifact's folder, for a test that spoils it."""
    original = exported(name, precision).path
    return Path(shutil.copytree(original, tmp_path / original.name))


def feeds(artifact: Artifact, batch: int = 3, length: int = 6, seed: int = 0, index: int = 0, graph: str = "model") -> dict[str, np.ndarray]:
    """Seeded inputs for a graph; per-timestep ones are those of timestep `index`."""
    from difffeat.engines.artifact import load_proto, read_specs, resolve

    rng = np.random.default_rng(seed)
    table = artifact.sweep_table() or {}
    specs, _ = read_specs(load_proto(resolve(artifact, graph)[1]))
    sizes = {"batch": batch, "length": length}
    found: dict[str, np.ndarray] = {}
    for name, spec in specs.items():
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        if name in table:
            found[name] = table[name][index]
        elif name == "pixels":
            found[name] = rng.integers(0, 256, shape, dtype=np.uint8)
        elif name == "tokens":
            found[name] = rng.integers(0, PLAID.vocab, shape)
        elif name == "lengths":
            found[name] = rng.integers(1, length + 1, shape)
        else:
            found[name] = rng.standard_normal(shape, dtype=np.float32)
    return found
