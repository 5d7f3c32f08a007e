# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false
# To a type checker every attribute of an nn.Module is `Tensor | Module`.
"""The small autoencoder: f2, four latent channels, nearly lossless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
    """Reconstruction (L1 + MSE) with a small KL term. Writes `vae.pt` with the averaged weights, latents standardised per channel."""
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
    standardise_latents(model, step=steps, log=log)
    save_checkpoint(out / "vae.pt", model=model.state_dict(), scaling_factor=1.0)


@torch.no_grad()
def standardise_latents(model: Any, step: int, log: Log, count: int = 2000) -> None:
    """Fold each latent channel's mean and standard deviation (posterior means of validation scenes) into the 1×1 convolutions around it.

    The scaling factor is then 1, and every channel has mean 0 and variance 1; reconstructions stay what they were.
    """
    channels = CONFIG["latent_channels"]
    x = images(next(scene_batches("validation", 0, count)))
    latents = model.encode(x).latent_dist.mean
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    encode, decode = model.quant_conv, model.post_quant_conv
    encode.weight[:channels] /= deviation[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / deviation
    encode.bias[channels:] -= 2.0 * deviation.log()
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= deviation[None, :, None, None]
    posterior = model.encode(x).latent_dist
    error = model.decode(posterior.mean).sample - x
    log(
        model="vae",
        step=step,
        channel_stds_before=deviation.tolist(),
        channel_stds=posterior.mean.std((0, 2, 3)).tolist(),
        posterior_std=posterior.std.mean((0, 2, 3)).tolist(),
        validation_rmse=error.square().mean().sqrt().item(),
    )
