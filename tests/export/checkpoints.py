"""Small checkpoints that tests save in the ways that people do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difffeat.export import weights as w

CONFIG = w.DiTConfig(name="dit-2x32-4-256", depth=2, width=32, heads=4, patch=4, input_size=32, num_classes=5)
Save = Callable[..., Path]


def state(seed: int = 0) -> dict[str, Tensor]:
    """An original state dict of 32 × 32 latents."""
    return dict(w.random_dit(CONFIG, seed).tensors)


def load(path: Path, **options: Any) -> w.DiTWeights:
    """Load as a user does who passes --heads 4."""
    return w.load_dit(path, heads=4, **options)


def saved(place: Path, content: Any, name: str = "w.pt", **options: Any) -> Path:
    """Save with torch.save under `place`, in folders that are made."""
    path = place / "run" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path
