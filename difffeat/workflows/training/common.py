"""What the three training scripts share: learning rate, averaged weights, checkpoints, the log."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from difffeat.workflows.scenes import Scene, scene


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200, decay_from: float = 0.7) -> float:
    """Warm up, hold, then fall linearly to zero from `decay_from` of the way on."""
    if step < warmup:
        return peak * (step + 1) / warmup
    left = (steps - step) / max(1.0, (1.0 - decay_from) * steps)
    return peak * min(1.0, max(0.0, left))


class Average:
    """Exponential moving average of a module's state."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {key: value.detach().clone() for key, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After each step. The decay starts low, so that the first steps are forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        targets = list(self.state.values())
        values = list(module.state_dict().values())
        torch._foreach_lerp_(targets, values, 1.0 - decay)


class Log:
    """JSON lines, printed and appended to a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()

    def __call__(self, **entry: Any) -> None:
        """Write one entry, with the minutes since the start."""
        line = json.dumps({**entry, "minutes": round((time.monotonic() - self.start) / 60, 2)})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def scene_batches(split: str, start: int, batch: int) -> Iterator[list[Scene]]:
    """An endless stream of scenes, each drawn once."""
    index = start
    while True:
        yield [scene(split, index + i) for i in range(batch)]
        index += batch


def images(scenes: list[Scene]) -> Tensor:
    """float32 [B, 3, 24, 24] in −1..1."""
    pixels = torch.from_numpy(np.stack([item.pixels for item in scenes]))
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write a checkpoint in one step."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The last checkpoint, or None."""
    return torch.load(path, weights_only=True) if path.exists() else None
