"""An autoencoder of another kind than the backbone's is refused before its weights are read, and its config is held against its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from difffeat.errors import CheckpointMismatch
from difffeat.export import weights as w

VAE = {
    **w.SD_VAE_CONFIG,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
LEFT_OUT = object()


def folder(place: Path, channels: int = 4, **changes: Any) -> Path:
    w.save_vae(w.random_vae({**VAE, "latent_channels": channels}), place)
    config = json.loads((place / "config.json").read_text()) | changes
    (place / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not LEFT_OUT}))
    return place


def test_other_channels_are_refused_by_the_config_alone(tmp_path: Path) -> None:
    place = folder(tmp_path / "v", 16)
    (place / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointMismatch, match=r"makes latents of 16 channels, as those of SD3 and FLUX, and the backbone takes 4"):
        w.load_vae(place, channels=4)


@pytest.mark.parametrize(("channels", "stated"), [(16, 4), (4, 16)])
def test_a_config_of_other_channels_than_the_tensors_is_refused_and_both_are_named(tmp_path: Path, channels: int, stated: int) -> None:
    words = rf"latent_channels = {stated}, but encoder\.conv_out\.weight has {2 * channels} rows, for {channels}"
    with pytest.raises(CheckpointMismatch, match=words):
        w.load_vae(folder(tmp_path / "v", channels, latent_channels=stated))


def test_a_config_of_another_factor_than_the_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="lists 3 block_out_channels, but the weights have 2 resolutions"):
        w.load_vae(folder(tmp_path / "v", block_out_channels=[8, 16, 16]))


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": 10**9},
        {"layers_per_block": 0},
        {"latent_channels": "4"},
        {"latent_channels": True},
        {"latent_channels": -4},
        {"latent_channels": 10**12},
        {"norm_num_groups": 0},
        {"norm_num_groups": 3},
        {"block_out_channels": [8] * 4000},
        {"block_out_channels": [10**9, 10**9]},
        {"block_out_channels": None},
        {"block_out_channels": "8"},
        {"down_block_types": ["Evil", "Evil"]},
        {"in_channels": 1},
        {"act_fn": "none"},
        {"_class_name": "AutoencoderTiny"},
        {"_class_name": "VQModel"},
        {"latents_mean": [0.0] * 4},
        {"scaling_factor": 0},
        {"scaling_factor": "0.18215"},
        {"scaling_factor": float("nan")},
        {"scaling_factor": True},
        {"shift_factor": "x"},
        {"shift_factor": float("inf")},
    ],
)
def test_numbers_that_no_autoencoder_has_are_typed_errors(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointMismatch):
        w.load_vae(folder(tmp_path / "v", **changes))


def test_a_missing_scaling_factor_is_said(tmp_path: Path) -> None:
    loaded = w.load_vae(folder(tmp_path / "v", scaling_factor=LEFT_OUT))
    assert loaded.scaling_factor == 0.18215
    assert loaded.notes == ("the autoencoder's config.json has no scaling_factor: 0.18215, that of Stable Diffusion 1 and 2, is taken",)


def test_a_shift_is_kept(tmp_path: Path) -> None:
    assert w.load_vae(folder(tmp_path / "v", shift_factor=0.0609)).shift_factor == 0.0609
