"""From a name to weights: the bundled ones, random ones that say so, and errors that say what to pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from difffeat import errors
from difffeat.errors import CheckpointMismatch, CheckpointNotFound, ConfigError, MissingExtra, UntrustedFile
from difffeat.workflows.loading import BUNDLED, counting_tokenizer, load_backbone


def test_the_bundled_backbones_load_and_are_small() -> None:
    dit, plaid = load_backbone("dit-digits"), load_backbone("plaid-digits")
    assert (dit.family, dit.depth, dit.weights.origin, dit.vae is not None) == ("dit", 8, "file", True)
    assert (plaid.family, plaid.depth, plaid.weights.origin, plaid.tokenizer is not None) == ("plaid", 8, "file", True)
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*")) < 12_000_000


def test_the_default_block_is_the_papers_at_the_same_relative_depth() -> None:
    assert load_backbone("dit-digits").default_block() == 3
    assert load_backbone("plaid-digits").default_block() == 7


def test_random_weights_say_so_and_follow_their_seed() -> None:
    first, again, other = (load_backbone("dit-digits", "random", seed=seed).weights for seed in (1, 1, 2))
    assert first.origin == "random:1"
    assert first.digest == again.digest != other.digest
    assert load_backbone("plaid-digits", "random", seed=4).weights.origin == "random:4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unet",), "model must be dit, plaid, dit-digits, plaid-digits or a DiT geometry such as dit-b-4-256; got 'unet'"),
        (("dit-b-4-256",), "dit-b-4-256 has no published hub id; pass --weights PATH"),
        (("dit-q-9-256", "random"), "no published DiT is called 'dit-q-9-256'; the names are dit-b-2-256"),
        (("plaid",), "Plaid's weights are in no hub: download release v1.0.0"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_pass(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_backbone(*arguments)
    assert message in str(caught.value)


def test_plaid_without_its_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from difffeat.export import weights
    from tests.artifacts import plaid_weights

    monkeypatch.setattr(weights, "load_plaid", lambda *_, **__: plaid_weights())
    with pytest.raises(ConfigError, match=r"Plaid needs its tokenizer: pass --tokenizer owt2_tokenizer.json"):
        load_backbone("plaid", str(tmp_path))


def test_the_hub_that_cannot_be_reached_names_the_way_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CheckpointNotFound, match=r"facebook/DiT-XL-2-256.*With no network, download the files on another machine"):
        load_backbone("dit")


def test_a_pinned_digest_is_checked() -> None:
    with pytest.raises(UntrustedFile, match="0000"):
        load_backbone("dit-digits", sha256="0" * 64)


def test_a_library_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(MissingExtra, match=r"Loading dit needs onnxscript, which is not installed. Run: pip install 'difffeat\[export\]'"):
        load_backbone("dit")


def test_the_counting_tokenizer_knows_every_id_of_the_model() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(counting_tokenizer(50).decode())
    assert tokenizer.encode("<0> <49> other").ids == [0, 49, 0]


def test_the_provenance_of_the_bundled_weights_is_told() -> None:
    made = json.loads((BUNDLED / "provenance.json").read_text())
    assert {"attempts", "chosen_on"} <= made.keys()


@pytest.mark.parametrize("model", ["dit-s-8-256", "dit-digits", "plaid-digits", "plaid"])
def test_an_embedding_of_timesteps_that_a_model_does_not_have_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match=r"--timestep-embedding must be original or diffusers, got 'foo'\."):
        load_backbone(model, "random", need_vae=False, timestep_embedding="foo")
    if not model.startswith("dit-s"):
        with pytest.raises(ConfigError, match=rf"--timestep-embedding diffusers is for DiT weights of that library, and {model} are others"):
            load_backbone(model, "random", timestep_embedding="diffusers")


DIT = {"depth": 1, "width": 32, "heads": 4, "patch": 4, "input_size": 32, "num_classes": 5}


def a_dit(place: Path, **changes: Any) -> str:
    from difffeat.export.weights import DiTConfig, random_dit, save_dit_original

    save_dit_original(random_dit(DiTConfig(name="x", **{**DIT, **changes})), place / "w.pt")
    return str(place / "w.pt")


def a_vae(place: Path, levels: int, channels: int = 4, scaling: float = 0.18215) -> str:
    from dataclasses import replace

    from difffeat.export.weights import SD_VAE_CONFIG, random_vae, save_vae

    config = {**SD_VAE_CONFIG, "block_out_channels": [8] * levels, "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": channels}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    save_vae(replace(random_vae(config), scaling_factor=scaling), place / "v")
    return str(place / "v")


@pytest.mark.parametrize(("levels", "factor", "pixels"), [(3, 4, 128), (5, 16, 512)])
def test_an_autoencoder_of_another_factor_is_refused_unless_the_caller_knows_better(tmp_path: Path, levels: int, factor: int, pixels: int) -> None:
    weights, vae = a_dit(tmp_path), a_vae(tmp_path, levels)
    words = rf"a latent of {factor} × {factor} pixels, and DiT was trained on those of 8 × 8: .* pictures of {pixels} pixels, not 256"
    with pytest.raises(CheckpointMismatch, match=rf"{words}.*pass --assume-dit"):
        load_backbone("dit", weights, vae=vae, heads=4)
    loaded = load_backbone("dit", weights, vae=vae, heads=4, assume="dit")
    assert len(loaded.weights.assumed) == 1
    assert any(note.startswith("goes on although") for note in loaded.notes)


@pytest.mark.parametrize("need_vae", [True, False])
@pytest.mark.parametrize("model", ["dit", "dit-digits"])
def test_an_autoencoder_of_other_channels_is_refused_for_every_graph(tmp_path: Path, need_vae: bool, model: str) -> None:
    weights = a_dit(tmp_path) if model == "dit" else None
    with pytest.raises(CheckpointMismatch, match="latents of 16 channels, as those of SD3 and FLUX, and the backbone takes 4"):
        load_backbone(model, weights, vae=a_vae(tmp_path, 4, 16), heads=4, need_vae=need_vae)


def test_another_scaling_than_dits_is_said(tmp_path: Path) -> None:
    notes = load_backbone("dit", a_dit(tmp_path), vae=a_vae(tmp_path, 4, scaling=0.13025), heads=4).notes
    assert any("scales its latents by 0.13025, and DiT was trained on latents scaled by 0.18215" in note for note in notes)


@pytest.mark.parametrize("model", ["dit-xl-2-256", "dit-s-4-256", "dit-1x32-2-256", "dit-1x32-4-512"])
def test_a_geometry_that_the_weights_do_not_have_is_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(CheckpointMismatch, match=rf"--model {model} means .* but the weights are dit-1x32-4-256: 1 blocks of 32, patches of 4"):
        load_backbone(model, a_dit(tmp_path), heads=4, need_vae=False)
    assert load_backbone("dit-1x32-4-256", a_dit(tmp_path), heads=4, need_vae=False).depth == 1


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"revision": "main"}, "--revision would be passed over: the weights are no hub id"),
        ({"vae_revision": "main"}, "--vae-revision would be passed over: the autoencoder is no hub id"),
        ({"tokenizer_sha256": "00"}, "--tokenizer-sha256 would be passed over: no --tokenizer is given"),
    ],
)
def test_a_pin_that_pins_nothing_is_refused(tmp_path: Path, pins: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_backbone("dit", a_dit(tmp_path), vae=a_vae(tmp_path, 4), heads=4, **pins)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--sha256 would be passed over: --weights random has no file"):
        load_backbone("dit-s-8-256", "random", need_vae=False, sha256="00")


def test_digests_of_the_autoencoder_and_the_tokenizer_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UntrustedFile, match="but 00 was pinned"):
        load_backbone("dit", a_dit(tmp_path), vae=a_vae(tmp_path, 4), heads=4, vae_sha256="00")
    with pytest.raises(UntrustedFile, match=r"tokenizer\.json has SHA-256"):
        load_backbone("plaid-digits", tokenizer=str(BUNDLED / "tokenizer.json"), tokenizer_sha256="00")


@pytest.mark.parametrize("heads", [0, -4, True, 10**9])
def test_heads_that_cannot_be_are_refused(tmp_path: Path, heads: int) -> None:
    with pytest.raises(ConfigError, match="--heads must be a whole number"):
        load_backbone("dit", a_dit(tmp_path), heads=heads, need_vae=False)
