"""What stands around the weights is held against them: contradictions stop an export and name both, and a person who knows better goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from difffeat.errors import CheckpointMismatch
from difffeat.export import weights as w
from difffeat.export.claims import families_in
from tests.export.checkpoints import CONFIG, load, saved, state

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "SiT's path": ({"path_type": "Linear"}, r"args\.path_type = 'Linear' is a setting of SiT and REPA"),
    "velocity": ({"prediction": "velocity"}, r"args\.prediction = 'velocity', where DiT has 'epsilon'"),
    "v-prediction": ({"prediction_type": "v_prediction"}, "prediction_type = 'v_prediction'"),
    "cosine schedule": ({"noise_schedule": "squaredcos_cap_v2"}, "noise_schedule = 'squaredcos_cap_v2', where DiT has 'linear'"),
    "another length": ({"diffusion_steps": 4000}, "diffusion_steps = 4000, where DiT has 1000"),
    "clean prediction": ({"predict_xstart": True}, "predict_xstart = True"),
    "SiT's model": ({"model": "SiT-XL/2"}, r"args\.model = 'SiT-XL/2' speaks of SiT"),
    "pixels": ({"image_size": 512}, r"args\.image_size = 512 says 512 pixels, but the positions are of 32 × 32 latents, 256 pixels"),
    "classes": ({"num_classes": 1000}, r"args\.num_classes = 1000, but the tensors have 5 \(and a null label\)"),
    "no null label": ({"num_classes": 6}, "the table of labels has 6 rows: trained without label dropout, there is no null label"),
    "patch": ({"patch_size": 2}, r"patch_size = 2, but the tensors have 4"),
    "heads": ({"num_heads": 8}, r"num_heads = 8, but the tensors have 4"),
    "channels": ({"in_channels": 16}, "in_channels = 16, but the tensors have 4"),
    "variance": ({"learn_sigma": False}, "learn_sigma = False, but the last layer gives 8 channels for 4"),
    "REPA": ({"enc_type": "dinov2-vit-b"}, "enc_type = 'dinov2-vit-b' is a setting of SiT and REPA"),
    "autoencoder": ({"vae": "vavae_f16d32"}, "args\\.vae = 'vavae_f16d32' speaks of a network on VA-VAE's latents"),
    "spelt out": ({"text": "Namespace(path_type='Linear', prediction='velocity')"}, "says .*path_type='Linear"),
    "command": ({"command": "train.py --path-type Linear --model SiT"}, "says 'path-type Linear'"),
    "deep": ({"cfg": {"transport": {"path_type": "GVP"}}}, r"args\.cfg\.transport\.path_type = 'GVP'"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_saved_with_the_weights_that_contradict_them_are_errors(tmp_path: Path, name: str) -> None:
    settings, words = SETTINGS[name]
    path = saved(tmp_path, {"ema": state(), "args": argparse.Namespace(**settings)})
    with pytest.raises(CheckpointMismatch, match=rf"{words}.*If you know that it is such a DiT, pass --assume-dit"):
        load(path)
    loaded = load(path, assume=True)
    assert len(loaded.assumed) == 1
    assert any(note.startswith("goes on although") for note in loaded.notes)


def test_settings_that_agree_are_no_contradiction(tmp_path: Path) -> None:
    agreeing = argparse.Namespace(model="DiT-S/4", image_size=256, num_classes=5, vae="ema", epochs=1400, results_dir="results", learn_sigma=True)
    notes = load(saved(tmp_path, {"ema": state(), "args": agreeing}, "0050000.pt")).notes
    assert notes == (
        "weights are those under 'ema'",
        "args.model = 'DiT-S/4' is published as 12 blocks of 384; the tensors are 2 of 32, and are believed",
    )


@pytest.mark.parametrize(
    "name",
    [
        "SiT-XL-2-256x256.pt",
        "sit_xl.pt",
        "SiTXL2.pt",
        "REPA-XL-2.pt",
        "repa-e_sdvae/0400000.pt",
        "lightningdit-xl-imagenet256-64ep.pt",
        "mdlm.pt",
        "PixArt-XL-2-256.pth",
        "selfflow_imagenet256.pt",
        "meanflow-B4.pt",
        "flow_matching_dit.pt",
        "000-SiT-XL-2-Linear-velocity-None/checkpoints/0050000.pt",
        "sit/ckpt.pt",
    ],
)
def test_names_of_other_families_are_errors(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, state(), name)
    with pytest.raises(CheckpointMismatch, match=r"the name '.*' speaks of (?!DiT)"):
        load(path)
    assert load(path, assume=True).assumed


@pytest.mark.parametrize("name", ["DiT-XL-2-512x512.pt", "dit_imagenet512.pt", "dit-512/model.pt"])
def test_a_name_of_another_size_in_pixels_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointMismatch, match="says 512 pixels, but the positions are of 32 × 32 latents, 256 pixels"):
        load(saved(tmp_path, state(), name))


@pytest.mark.parametrize(
    "name", ["DiT-XL-2-256x256.pt", "position.pt", "website/model.pt", "visit-dit.pt", "best_512.pt", "dit-bs512.pt", "0000512.pt", "DiT-S-4-ema.pt"]
)
def test_names_that_agree_or_say_nothing_are_read(tmp_path: Path, name: str) -> None:
    assert load(saved(tmp_path, state(), name)).assumed == ()


def test_the_name_behind_a_link_and_the_links_own_are_both_heard(tmp_path: Path) -> None:
    real = saved(tmp_path, state(), "SiT-XL-2.pt")
    link = tmp_path / "run" / "w.pt"
    link.symlink_to(real)
    with pytest.raises(CheckpointMismatch, match="'SiT-XL-2' speaks of SiT"):
        load(link)
    blob = saved(tmp_path, state(), "blobs/" + "a" * 64)
    cached = tmp_path / "models--owner--SiT-XL-2" / "snapshots" / ("b" * 40) / "model.pt"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(blob)
    with pytest.raises(CheckpointMismatch, match="'models--owner--SiT-XL-2' speaks of SiT"):
        load(cached)


def test_a_published_size_in_the_name_is_held_against_a_published_geometry() -> None:
    from difffeat.export.claims import size_contradictions

    xl = w.DIT_CONFIGS["dit-xl-2-256"]
    assert list(size_contradictions("the name", "DiT-B-4", xl)) == [
        "the name speaks of DiT-B-4 (12 blocks of 768), but the tensors are 28 blocks of 1152"
    ]
    assert list(size_contradictions("the name", "DiT-XL/8", xl)) == ["the name speaks of patches of 8, but the tensors have patches of 2"]
    assert list(size_contradictions("the name", "DiT-XL-2-256x256", xl)) == []


def test_ema_in_the_name_and_none_in_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="speaks of EMA weights, but the file has only those under 'model'"):
        load(saved(tmp_path, {"model": state()}, "dit-ema.pt"))
    with pytest.raises(CheckpointMismatch, match="speaks of weights without EMA, but those taken are under 'ema'"):
        load(saved(tmp_path, {"model": state(1), "ema": state()}, "dit_no_ema.pt"))


def test_tensors_that_speak_of_another_family_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"projectors\.0\.0\.weight, a projector of REPA"):
        load(saved(tmp_path, {"ema": state(), "model": {**state(), "projectors.0.0.weight": torch.zeros(2, 2)}}))
    from dataclasses import replace

    half = dict(w.random_dit(replace(CONFIG, out_channels=4)).tensors)
    path = saved(tmp_path, half)
    with pytest.raises(CheckpointMismatch, match=r"final_layer\.linear has 64 rows where DiT has 128: it predicts no variance \(learn_sigma\)"):
        load(path)
    assert load(path, assume=True).config.out_channels == 4


def test_positions_of_another_kind_and_a_missing_null_label_are_said(tmp_path: Path) -> None:
    from dataclasses import replace

    learned = load(saved(tmp_path, {**state(), "pos_embed": torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))}))
    assert any("positions are not DiT's sines and cosines" in note for note in learned.notes)
    rows = load(saved(tmp_path, dict(w.random_dit(replace(CONFIG, num_classes=999)).tensors)))
    assert any("the table of labels has 1000 rows" in note for note in rows.notes)
    assert load(saved(tmp_path, state())).notes == ()


def test_heads_that_the_settings_state_are_used_and_bounded(tmp_path: Path) -> None:
    assert w.load_dit(saved(tmp_path, {"state_dict": state(), "hyper_parameters": {"num_heads": 4}})).config.heads == 4
    for number in (0, 5, 10**12):
        with pytest.raises(CheckpointMismatch, match="heads"):
            w.load_dit(saved(tmp_path, {"state_dict": state(), "hyper_parameters": {"num_heads": number}}))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", '{"_class_name": "SiTTransformer"}', "_class_name = 'SiTTransformer' is not DiT's class"),
        ("args.json", '{"path_type": "linear"}', r"args\.json\.path_type"),
        ("config.yaml", "model:\n  path_type: linear\n", r"config\.yaml\.model\.path_type"),
        ("../args.json", '{"prediction": "v"}', r"args\.json\.prediction"),
    ],
)
def test_settings_beside_a_file_are_read(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = saved(tmp_path, state())
    (path.parent / name).write_text(content)
    with pytest.raises(CheckpointMismatch, match=words):
        load(path)


def test_settings_beside_a_file_that_cannot_be_read_are_said_to_be(tmp_path: Path) -> None:
    path = saved(tmp_path, state())
    (path.parent / "config.json").write_text("{")
    assert any("config.json beside the weights cannot be read" in note for note in load(path).notes)


def test_the_metadata_of_a_safetensors_file_is_read(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors", metadata={"format": "pt"})
    assert load(tmp_path / "w.safetensors").assumed == ()
    save_file(state(), tmp_path / "w.safetensors", metadata={"modelspec.architecture": "SiT-XL/2"})
    with pytest.raises(CheckpointMismatch, match=r"metadata\.modelspec\.architecture = 'SiT-XL/2' speaks of SiT"):
        load(tmp_path / "w.safetensors")


PUBLISHED_SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "clip_sample": False, "trained_betas": None,
}  # fmt: skip


def pipeline(place: Path, *, config: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None, index: str = "DiTPipeline") -> Path:
    w.save_dit_diffusers(w.random_dit(CONFIG), place / "transformer")
    file = place / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    (place / "scheduler").mkdir()
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(PUBLISHED_SCHEDULER | (scheduler or {})))
    (place / "model_index.json").write_text(json.dumps({"_class_name": index, "id2label": {"0": "sit, repa"}, "vae": ["diffusers", "AutoencoderKL"]}))
    return place


@pytest.mark.parametrize("part", ["", "transformer", "transformer/diffusion_pytorch_model.safetensors"])
def test_the_published_pipeline_contradicts_nothing(tmp_path: Path, part: str) -> None:
    place = pipeline(tmp_path / "w", config={"_class_name": "Transformer2DModel", "cross_attention_dim": None, "dropout": 0})
    assert w.load_dit(place / part).assumed == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheduler": {"beta_schedule": "scaled_linear"}}, r"scheduler/scheduler_config\.json\.beta_schedule = 'scaled_linear'"),
        ({"scheduler": {"prediction_type": "v_prediction"}}, "prediction_type = 'v_prediction'"),
        ({"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}}, "is not a scheduler of DiT's noise"),
        ({"scheduler": {"rescale_betas_zero_snr": True}}, "rescale_betas_zero_snr = True"),
        ({"index": "StableDiffusion3Pipeline"}, "speaks of Stable Diffusion 3"),
        ({"config": {"_class_name": "SiTTransformer2DModel"}}, "is not DiT's class"),
        ({"config": {"_class_name": "PixArtTransformer2DModel"}}, "speaks of PixArt"),
        ({"config": {"_class_name": "UNet2DConditionModel"}}, "speaks of a UNet"),
        ({"config": {"norm_type": "ada_norm_single"}}, "norm_type = 'ada_norm_single'"),
        ({"config": {"num_embeds_ada_norm": 1000}}, "num_embeds_ada_norm = 1000, but the tensors have 5"),
        ({"config": {"num_attention_heads": 8}}, r"num_attention_heads × attention_head_dim = 64, but the weights have 32"),
        ({"config": {"num_layers": 3}}, "num_layers = 3, but the weights have 2 blocks"),
        ({"config": {"patch_size": 2}}, "patch_size = 2, but the weights have 4"),
    ],
)
def test_configs_of_a_pipeline_that_contradict_are_errors(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    place = pipeline(tmp_path / "w", **change)
    for part in ("", "transformer"):
        with pytest.raises(CheckpointMismatch, match=words):
            w.load_dit(place / part)


@pytest.mark.parametrize(
    ("text", "families"),
    [
        ("DiT-XL-2", ["DiT"]),
        ("lightning-dit", ["LightningDiT (flow matching, another autoencoder)"]),
        ("position", []),
        ("edit", []),
        ("transit", []),
    ],
)
def test_families_are_heard_in_names_only_as_words(text: str, families: list[str]) -> None:
    assert [family for _, family in families_in(text)] == families


def test_a_plaid_under_another_familys_name_is_an_error(tmp_path: Path) -> None:
    drawn = w.random_plaid(w.PlaidConfig(name="p", depth=1, width=64, vocab=9))
    w.save_plaid(drawn, tmp_path / "mdlm-owt")
    with pytest.raises(CheckpointMismatch, match=r"'mdlm-owt' speaks of a masked text diffusion.*pass --assume-plaid"):
        w.load_plaid(tmp_path / "mdlm-owt")
    assert w.load_plaid(tmp_path / "mdlm-owt", assume=True).assumed
