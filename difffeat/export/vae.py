"""The encoder of a Stable-Diffusion-type autoencoder: uint8 pixels to clean, scaled latents.

The network is diffusers' own encoder; ours is what goes around it: normalising pixels, keeping the posterior mean only, and folding the scaling
factor into the last convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from difffeat.export.layers import Affine, FlatGroupNorm


class VaeEncoder(nn.Module):
    """pixels uint8 [B, H, W, 3] -> latents float32 [B, C, H/f, W/f], (posterior mean − shift) × scaling factor.

    **Arguments:** `config` AutoencoderKL's constructor arguments; `flat_norms` writes its group norms as layer norms over whole groups, which ONNX
    Runtime's CPU provider runs three times as fast as the operator GroupNormalization (that it takes apart); GPUs have kernels for the operator.
    """

    def __init__(self, config: Mapping[str, Any], *, flat_norms: bool = False) -> None:
        super().__init__()
        from diffusers.models.autoencoders.vae import Encoder

        self.channels = config.get("latent_channels", 4)
        self.encoder = Encoder(
            in_channels=config.get("in_channels", 3),
            out_channels=self.channels,
            down_block_types=tuple(config.get("down_block_types", ("DownEncoderBlock2D",))),
            block_out_channels=tuple(config.get("block_out_channels", (64,))),
            layers_per_block=config.get("layers_per_block", 1),
            act_fn=config.get("act_fn", "silu"),
            norm_num_groups=config.get("norm_num_groups", 32),
            double_z=True,
            mid_block_add_attention=config.get("mid_block_add_attention", True),
        )
        self.mean = nn.Conv2d(2 * self.channels, self.channels, 1)
        linears_to_affine(self)
        if flat_norms:
            flatten_norms(self)
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixels_BHW3: Tensor) -> Tensor:
        # Cast first, then transpose: TensorRT takes no transposed uint8.
        x_B3HW = pixels_BHW3.to(self.mean.weight.dtype).permute(0, 3, 1, 2) * (2.0 / 255.0) - 1.0
        return self.mean(self.encoder(x_B3HW.to(self.encoder.conv_in.weight.dtype)).to(self.mean.weight.dtype))


def fill_encoder(model: VaeEncoder, tensors: Mapping[str, Tensor], scaling_factor: float, shift_factor: float | None) -> None:
    """Fill the encoder from a state dict in diffusers' layout (`encoder.*`, `quant_conv.*`)."""
    for name, target in model.encoder.state_dict().items():
        source = tensors[f"encoder.{name}"]
        owner = _owner(model.encoder, name)
        if isinstance(owner, Affine) and source.ndim == 2:
            source = source.T
        target.copy_(source.reshape(target.shape) if isinstance(owner, FlatGroupNorm) else source)
    weight, bias = _mean_projection(tensors, model.channels)
    model.mean.weight.copy_(weight * scaling_factor)
    model.mean.bias.copy_((bias - (shift_factor or 0.0)) * scaling_factor)  # type: ignore[union-attr]


def downsampling(config: Mapping[str, Any]) -> int:
    """F of an f-fold autoencoder: 2 to the number of its resolutions less one."""
    return 2 ** (len(config.get("block_out_channels", (64,))) - 1)


def linears_to_affine(module: nn.Module) -> None:
    """Replace every Linear by an `Affine` of the same shape, in place; see `layers`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Affine(child.in_features, child.out_features, bias=child.bias is not None))
        else:
            linears_to_affine(child)


def flatten_norms(module: nn.Module) -> None:
    """Replace every GroupNorm by a `FlatGroupNorm` with the same parameters, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, FlatGroupNorm(child.num_groups, child.num_channels, child.eps))
        else:
            flatten_norms(child)


def _mean_projection(tensors: Mapping[str, Tensor], channels: int) -> tuple[Tensor, Tensor]:
    """The rows of the 1×1 quantisation convolution that give the mean, float64; the identity where there is none."""
    if "quant_conv.weight" in tensors:
        return tensors["quant_conv.weight"][:channels].double(), tensors["quant_conv.bias"][:channels].double()
    identity = torch.eye(channels, 2 * channels, dtype=torch.float64)[:, :, None, None]
    return identity, torch.zeros(channels, dtype=torch.float64)


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])
