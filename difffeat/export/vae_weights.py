"""Autoencoder checkpoints through our own importer: safetensors, or pickles without code. Only the encoder is kept."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difffeat.errors import CheckpointMismatch
from difffeat.export.hub import locate
from difffeat.export.model_folders import read_folder, read_json
from difffeat.export.safe_files import block_count, check_keys, draw, tensors_digest, upcast

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

MAX_RESOLUTIONS, MAX_SCALING = 8, 1e4
_MOST = {"latent_channels": 1 << 10, "layers_per_block": 16, "norm_num_groups": 1 << 10, "in_channels": 1 << 10, "out_channels": 1 << 10}
_BLOCK_TYPES = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D")

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
    notes: tuple[str, ...] = ()


def load_vae(path_or_id: str | Path, *, revision: str | None = None, sha256: str | None = None, channels: int | None = None) -> VAEWeights:
    """Load an autoencoder from a diffusers folder (the pipeline's or its `vae/`) or a hub id.

    **Arguments:** `channels` of the latents that the backbone takes: an autoencoder of others is refused by its config, before its weights are read.

    Raises CheckpointNotFound, CheckpointMismatch, UntrustedFile.
    """
    path = locate(path_or_id, option="--vae", subfolder="vae", revision=revision)
    folder = path / "vae" if (path / "vae").is_dir() else path
    if not folder.is_dir():
        raise CheckpointMismatch(f"{path} is a file; pass the autoencoder's folder with its config.json.")
    raw = read_json(folder / "config.json")
    what = str(folder)
    config = constructor_arguments(raw, what)
    check_numbers(config, f"{what}: config.json")
    scaling, shift, notes = scaling_of(raw, f"{what}: config.json")
    check_channels(config, channels, what)
    tensors = read_folder(folder, sha256=sha256, markers=("encoder.conv_in.weight",))
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(("encoder.", "quant_conv."))}
    if not kept:
        raise CheckpointMismatch(
            f"{what} holds no encoder.* tensors, so it is no AutoencoderKL of diffusers; it has {', '.join(sorted(tensors)[:3])}."
        )
    _check_against_tensors(config, kept, what)
    modern = modern_names(kept)
    check_keys(modern, expected_shapes(config), f"{what} (encoder)")
    final = upcast(modern, what)
    return VAEWeights(config, scaling, shift, final, tensors_digest(final), notes=notes)


def check_channels(config: Mapping[str, Any], channels: int | None, what: str) -> None:
    """Raises CheckpointMismatch unless the latents have the backbone's channels (None: any)."""
    found = config.get("latent_channels", 4)
    if channels is not None and found != channels:
        known = {16: ", as those of SD3 and FLUX", 32: ", as those of VA-VAE and Sana"}.get(found, "")
        raise CheckpointMismatch(
            f"the autoencoder {what} makes latents of {found} channels{known}, and the backbone takes {channels}. Pass --vae with the "
            "one that it was "
            "trained on (DiT: stabilityai/sd-vae-ft-ema)."
        )


def check_numbers(config: Mapping[str, Any], what: str) -> None:
    """Raises CheckpointMismatch for a number that no autoencoder has, before a network is built of it."""

    def whole(key: str, value: Any, most: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise CheckpointMismatch(f"{what} says {key} = {repr(value)[:60]}, and a whole number in 1..{most} is expected there.")

    for key, most in _MOST.items():
        if config.get(key) is not None:
            whole(key, config[key], most)
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        values = config.get(key, ["DownEncoderBlock2D"])
        if not isinstance(values, list | tuple) or not 1 <= len(values) <= MAX_RESOLUTIONS:
            raise CheckpointMismatch(f"{what} must list 1 to {MAX_RESOLUTIONS} items as {key}, it has {repr(values)[:60]}.")
        for value in values:
            if key == "block_out_channels":
                whole(key, value, 1 << 14)
            elif value not in _BLOCK_TYPES:
                raise CheckpointMismatch(f"{what} names the block {repr(value)[:60]} in {key}; known are {', '.join(_BLOCK_TYPES)}.")
    if config.get("in_channels", 3) != 3:
        raise CheckpointMismatch(f"{what} says in_channels = {config['in_channels']}; pictures have 3.")


def scaling_of(raw: Mapping[str, Any], what: str) -> tuple[float, float | None, tuple[str, ...]]:
    """Scaling factor and shift of config.json, with what a user should know of them."""
    scaling, shift = raw.get("scaling_factor"), raw.get("shift_factor")
    notes = []
    if scaling is None:
        scaling = DEFAULT_SCALING_FACTOR
        notes.append(f"the autoencoder's config.json has no scaling_factor: {DEFAULT_SCALING_FACTOR}, that of Stable Diffusion 1 and 2, is taken")
    if not _is_number(scaling) or not (shift is None or _is_number(shift)):
        raise CheckpointMismatch(f"{what}: scaling_factor and shift_factor must be numbers, found {scaling!r} and {shift!r}.")
    if scaling <= 0:
        raise CheckpointMismatch(f"{what}: scaling_factor must be above 0, found {scaling!r}.")
    return float(scaling), None if shift is None else float(shift), tuple(notes)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < MAX_SCALING


def _check_against_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str) -> None:
    """The latents' channels and the number of resolutions in config.json against the tensors, both named."""
    last = tensors.get("encoder.conv_out.weight")
    channels = config.get("latent_channels", 4)
    if last is not None and last.ndim == 4 and last.shape[0] != 2 * channels:
        raise CheckpointMismatch(
            f"{what}: config.json says latent_channels = {channels}, but encoder.conv_out.weight has {last.shape[0]} rows, for "
            f"{last.shape[0] / 2:g}. "
            "Config and weights are of two autoencoders."
        )
    levels = block_count(tensors, "encoder.down_blocks.", what)
    if levels and levels != len(config.get("block_out_channels", (64,))):
        raise CheckpointMismatch(
            f"{what}: config.json lists {len(config.get('block_out_channels', (64,)))} block_out_channels, but the weights have "
            f"{levels} resolutions. "
            "Config and weights are of two autoencoders."
        )


def constructor_arguments(raw: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What of config.json AutoencoderKL's constructor takes and the encoder's shape depends on."""
    from diffusers import AutoencoderKL

    if raw.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise CheckpointMismatch(f"{what} is a {str(raw['_class_name'])[:60]}; difffeat reads AutoencoderKL.")
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
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, ZeroDivisionError, AssertionError) as error:
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
