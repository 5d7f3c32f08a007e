"""The small autoencoder: f2, four latent channels, nearly lossless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difffeat.workflows.scenes import CANVAS
from difffeat.workflows.training.common import Average, Log, images, learning_rate, save_checkpoint, scene_batches

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": CANVAS,
}
KL_WEIGHT = 1e-4
INITIAL_LOG_VARIANCE = -6.0


def train(out: Path, steps: int, batch: int = 64, seed: int = 1) -> None:
    """Reconstruction (L1 + MSE) with a small KL term. Writes `vae.pt` with the averaged weights and the latents' scaling factor."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(**CONFIG)
    with torch.no_grad():
        model.quant_conv.bias[CONFIG["latent_channels"] :] = INITIAL_LOG_VARIANCE
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average, log = Average(model, 0.998), Log(out / "vae.jsonl")
    for step, scenes in zip(range(steps), scene_batches("train", 0, batch), strict=False):
        x = images(scenes)
        posterior = model.encode(x).latent_dist
        reconstruction = model.decode(posterior.sample()).sample
        error = reconstruction - x
        loss = error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean() / x[0].numel()
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 2e-3)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step)
        if step % 200 == 0 or step == steps - 1:
            log(model="vae", step=step, loss=loss.item(), rmse=error.square().mean().sqrt().item())
    model.load_state_dict(average.state)
    scaling, report = latent_scale(model)
    log(model="vae", step=steps, **report)
    save_checkpoint(out / "vae.pt", model=model.state_dict(), scaling_factor=scaling)


@torch.no_grad()
def latent_scale(model: Any, count: int = 2000) -> tuple[float, dict[str, Any]]:
    """1 / standard deviation of the posterior means over validation scenes, and what else is worth knowing of them."""
    x = images(next(scene_batches("validation", 0, count)))
    posterior = model.encode(x).latent_dist
    mean: Tensor = posterior.mean
    error = model.decode(mean).sample - x
    report = {
        "scaling_factor": 1.0 / mean.std().item(),
        "channel_means": mean.mean((0, 2, 3)).tolist(),
        "channel_stds": mean.std((0, 2, 3)).tolist(),
        "posterior_std": posterior.std.mean().item(),
        "validation_rmse": error.square().mean().sqrt().item(),
    }
    return report["scaling_factor"], report
