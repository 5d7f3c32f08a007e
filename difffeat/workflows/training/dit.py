# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false
# To a type checker every attribute of an nn.Module is `Tensor | Module`.
"""The small DiT: 36 tokens, eight blocks, conditioned on the number of digits (never on which)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from difffeat.export.dit import DiT, initialise_adaln_zero
from difffeat.export.schedule import dit_alpha_bar
from difffeat.workflows.scenes import CANVAS, Scene, multi_hot, scene
from difffeat.workflows.training.common import Average, Log, images, learning_rate, load_checkpoint, save_checkpoint, scene_batches
from difffeat.workflows.training.vae import CONFIG as VAE_CONFIG

CONFIG: dict[str, Any] = {
    "depth": 8,
    "width": 128,
    "heads": 4,
    "patch": 2,
    "input_size": CANVAS // 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_classes": 3,
}
LABEL_DROPOUT = 0.1
PEAK_LEARNING_RATE = 1e-3


class Latents(nn.Module):
    """Pixels to standardised posterior means, with the trained autoencoder."""

    def __init__(self, checkpoint: dict[str, Any]) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL(**VAE_CONFIG)
        self.vae.load_state_dict(checkpoint["model"])
        self.scale = checkpoint["scaling_factor"]
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.vae.encode(x).latent_dist.mean * self.scale


def noise_loss(model: nn.Module, z: Tensor, label: Tensor, alpha_bar: Tensor, generator: torch.Generator) -> Tensor:
    """E‖ε − ε̂‖², t uniform over 0..999 (Ho et al. 2020, eq. 14). The variance channels stay untrained: features never see them."""
    t = torch.randint(len(alpha_bar), (len(z),), generator=generator)
    noise = torch.randn(z.shape, generator=generator)
    level = alpha_bar[t][:, None, None, None]
    predicted = model(level.sqrt() * z + (1 - level).sqrt() * noise, t, label)[:, : z.shape[1]]
    return (predicted - noise).square().mean()


def train(out: Path, samples: int, batch: int = 64, seed: int = 2, compiled: bool = True) -> None:
    """Train up to `samples` scenes in all, going on from `dit.pt` where it exists."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    latents = Latents(torch.load(out / "vae.pt", weights_only=True))
    model, optimizer, average, step = _start(out, generator)
    forward = torch.compile(model) if compiled else model
    encode = torch.compile(latents) if compiled else latents
    alpha_bar, log = torch.tensor(dit_alpha_bar(), dtype=torch.float32), Log(out / "dit.jsonl")
    steps, running = samples // batch, 0.0
    for scenes in scene_batches("train", step * batch, batch):
        if step >= steps:
            break
        label = torch.tensor([len(item.digits) - 1 for item in scenes])
        label[torch.rand(batch, generator=generator) < LABEL_DROPOUT] = CONFIG["num_classes"]
        with torch.no_grad():
            z = encode(images(scenes))
        loss = noise_loss(forward, z, label, alpha_bar, generator)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, PEAK_LEARNING_RATE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step)
        step, running = step + 1, running + loss.item()
        if step % 100 == 0:
            log(model="dit", samples=step * batch, loss=running / 100)
            running = 0.0
        if step % 800 == 0 or step == steps:
            save_checkpoint(out / "dit.pt", model=model.state_dict(), average=average.state, optimizer=optimizer.state_dict(), step=step)
            log(model="dit", samples=step * batch, validation=validation_map(average.state, latents))


def _start(out: Path, generator: torch.Generator) -> tuple[DiT, torch.optim.Optimizer, Average, int]:
    model = DiT(**CONFIG)
    initialise_adaln_zero(model, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average, checkpoint = Average(model, 0.999), load_checkpoint(out / "dit.pt")
    if checkpoint is None:
        return model, optimizer, average, 0
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    average.state = checkpoint["average"]
    generator.manual_seed(checkpoint["step"])
    return model, optimizer, average, checkpoint["step"]


@torch.no_grad()
def validation_map(state: dict[str, Tensor], latents: nn.Module, t: int = 30) -> list[float]:
    """MAP (%) on validation of a ridge probe on mean-pooled features, at each block; a look while training."""
    from sklearn.linear_model import Ridge
    from sklearn.metrics import average_precision_score

    model = DiT(**CONFIG)
    model.load_state_dict(state)
    level = dit_alpha_bar()[t]
    generator = torch.Generator().manual_seed(0)

    def features(scenes: list[Scene]) -> np.ndarray:
        z = latents(images(scenes))
        z = np.sqrt(level) * z + np.sqrt(1 - level) * torch.randn(z.shape, generator=generator)
        label = torch.full((len(z),), CONFIG["num_classes"])
        return torch.stack([x.mean(1) for x in model.residual_stream(z, torch.full((len(z),), t), label)]).numpy()

    train_scenes, test_scenes = [scene("train", i) for i in range(1500)], [scene("validation", i) for i in range(1000)]
    targets, truth, scores = multi_hot(train_scenes), multi_hot(test_scenes), []
    for x, y in zip(features(train_scenes), features(test_scenes), strict=True):
        mean, deviation = x.mean(0), x.std(0) + 1e-6
        predicted = Ridge(alpha=30.0).fit((x - mean) / deviation, targets).predict((y - mean) / deviation)
        scores.append(round(100 * float(average_precision_score(truth, predicted)), 2))
    return scores
