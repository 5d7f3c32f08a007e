# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# To a type checker every attribute of an nn.Module is `Tensor | Module`.
"""The quickstart's input: scenes as PNG files with a JSONL manifest a split, and the controls that need no backbone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.workflows.scenes import DIGIT_WORDS, Scene, scene, vocabulary


def write_split(folder: Path, split: str, count: int) -> tuple[Path, list[Scene]]:
    """Write the first `count` scenes of a split; the manifest's path and the scenes. Files that are there already are left alone."""
    from PIL import Image

    images = folder / split
    images.mkdir(parents=True, exist_ok=True)
    scenes = [scene(split, index) for index in range(count)]
    lines = []
    for item in scenes:
        path = images / f"{item.id}.png"
        if not path.exists():
            Image.fromarray(item.pixels).save(path)
        labels = [str(label) for label in item.labels]
        lines.append(json.dumps({"id": item.id, "image": f"{split}/{path.name}", "captions": [item.caption], "labels": labels}))
    manifest = folder / f"{split}.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest, scenes


def raw_pixels(scenes: list[Scene]) -> np.ndarray:
    """float32 [n, 576]; the three channels are equal, so one is kept."""
    return np.stack([item.pixels[:, :, 0].ravel() for item in scenes]).astype(np.float32) / 255


def bag_of_words(scenes: list[Scene]) -> np.ndarray:
    """Word counts, float32 [n, V]."""
    column = {word: index for index, word in enumerate(vocabulary())}
    counts = np.zeros((len(scenes), len(column)), np.float32)
    for row, item in enumerate(scenes):
        for word in item.caption.split():
            counts[row, column[word]] += 1
    return counts


def named_share(scenes: list[Scene]) -> float:
    """Share of the positive labels that the scene's own caption names, in words or numerals."""
    named = total = 0
    for item in scenes:
        words = set(item.caption.split())
        total += len(item.labels)
        named += sum(str(label) in words or DIGIT_WORDS[label] in words for label in item.labels)
    return named / total


def random_backbone(weights: Any, seed: int = 0) -> Any:
    """The same geometry, freshly initialised as published but with its gates open: closed gates would make every block the identity."""
    import torch

    from difffeat.export.dit import DiT, initialise_adaln_zero
    from difffeat.export.safe_files import tensors_digest

    generator = torch.Generator().manual_seed(seed)
    model = DiT.from_config(weights.config)
    initialise_adaln_zero(model, generator)
    for block in model.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02, generator=generator)
        block.adaLN_modulation[1].bias.data.view(6, -1)[[2, 5]] = 1.0
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config = replace(weights.config, name="dit-digits-random")
    return type(weights)(config, tensors, tensors_digest(tensors), f"random:{seed}")
