"""From a name to weights: the bundled ones, random ones that say so, and errors that say what to pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from difffeat import errors
from difffeat.errors import CheckpointNotFound, ConfigError, MissingExtra, UntrustedFile
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
