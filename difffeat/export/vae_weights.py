"""Autoencoder checkpoints through our own importer: safetensors, or pickles without code. Only the encoder is kept."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difffeat.errors import CheckpointMismatch
from difffeat.export.dit_weights import read_folder, read_json
from difffeat.export.hub import locate
from difffeat.export.safe_files import check_keys, draw, tensors_digest, upcast

DEFAULT_SCALING_FACTOR = 0.18215

SD_VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
}

# Names of the mid-block attention in autoencoders saved before diffusers renamed them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class VAEWeights:
    """`config` AutoencoderKL's constructor arguments; tensors `encoder.*` and `quant_conv.*` in diffusers' layout, float32."""

    config: Mapping[str, Any]
    scaling_factor: float
    shift_factor: float | None
    tensors: Mapping[str, Tensor]
    digest: str
    origin: str = "file"


def load_vae(path_or_id: str | Path, *, revision: str | None = None, sha256: str | None = None) -> VAEWeights:
    """Load the encoder of an AutoencoderKL from its folder, a pipeline's folder, or a hub id.

    Raises CheckpointNotFound, CheckpointMismatch, UntrustedFile.
    """
    path = locate(path_or_id, option="--vae", subfolder="vae", revision=revision)
    folder = path / "vae" if (path / "vae").is_dir() else path
    if not folder.is_dir():
        raise CheckpointMismatch(f"{path} is a file; pass the autoencoder's folder with its config.json.")
    raw = read_json(folder / "config.json")
    config = constructor_arguments(raw, str(folder))
    kept = {name: tensor for name, tensor in read_folder(folder, sha256=sha256).items() if name.startswith(("encoder.", "quant_conv."))}
    tensors = upcast(modern_names(kept))
    check_keys(tensors, expected_shapes(config), f"{folder} (encoder)")
    scaling, shift = raw.get("scaling_factor", DEFAULT_SCALING_FACTOR), raw.get("shift_factor")
    if not isinstance(scaling, int | float) or not isinstance(shift, int | float | None):
        raise CheckpointMismatch(f"{folder / 'config.json'}: scaling_factor and shift_factor must be numbers, found {scaling!r} and {shift!r}.")
    return VAEWeights(config, float(scaling), shift, tensors, tensors_digest(tensors))


def constructor_arguments(raw: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What of config.json AutoencoderKL's constructor takes and the encoder's shape depends on."""
    from diffusers import AutoencoderKL

    if raw.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise CheckpointMismatch(f"{what} is a {raw['_class_name']}; difffeat reads AutoencoderKL.")
    known = set(inspect.signature(AutoencoderKL.__init__).parameters) - {"self", "scaling_factor", "shift_factor", "latents_mean", "latents_std"}
    if raw.get("latents_mean") is not None or raw.get("latents_std") is not None:
        raise CheckpointMismatch(f"{what} standardises its latents per channel (latents_mean, latents_std), which is not supported.")
    return {key: value for key, value in raw.items() if key in known}


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mid-block attention's old names to today's; 1×1 convolutions there to matrices."""
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "attentions" in parts:
            parts = [_OLD_ATTENTION.get(part, part) for part in parts]
            if tensor.ndim == 4:
                tensor = tensor[:, :, 0, 0]
        found[".".join(parts)] = tensor
    return found


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of encoder and quantisation convolution, from AutoencoderKL itself on the meta device."""
    from diffusers import AutoencoderKL

    try:
        with torch.device("meta"):
            state = AutoencoderKL(**config).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointMismatch(f"the autoencoder's config.json does not build an AutoencoderKL: {error}") from None
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(("encoder.", "quant_conv."))}


def random_vae(config: Mapping[str, Any], seed: int = 0) -> VAEWeights:
    """Every tensor of the encoder drawn at random."""
    tensors = {}
    for name, shape in expected_shapes(config).items():
        if "norm" in name and name.endswith("weight"):
            tensors[name] = draw(name, shape, seed, mean=1.0, std=0.1)
        else:
            tensors[name] = draw(name, shape, seed, std=0.1 if name.endswith("bias") else None)
    return VAEWeights(dict(config), DEFAULT_SCALING_FACTOR, None, tensors, tensors_digest(tensors), f"random:{seed}")


def save_vae(weights: VAEWeights, folder: Path, *, half: bool = False) -> None:
    """Write an autoencoder folder in diffusers' layout (encoder only)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half() if half else tensor.contiguous() for name, tensor in weights.tensors.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKL", **weights.config, "scaling_factor": weights.scaling_factor}
    if weights.shift_factor is not None:
        config["shift_factor"] = weights.shift_factor
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
