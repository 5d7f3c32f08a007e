"""The training scripts start, stop, go on where they stopped, and end in files that the loaders take. What they learn is shown by the quickstart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from difffeat.export.weights import load_dit, load_plaid, load_vae
from difffeat.workflows.training import dit as dit_module
from difffeat.workflows.training import plaid as plaid_module
from difffeat.workflows.training import vae as vae_module
from difffeat.workflows.training.bundle import bundle


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of each, the DiT in two sittings."""
    out = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dit_module, "validation_map", lambda *_: [0.0])
        patch.setattr(plaid_module, "validation_map", lambda *_: [0.0])
        vae_module.train(out, steps=3, batch=4)
        dit_module.train(out, samples=8, batch=4, compiled=False)
        dit_module.train(out, samples=16, batch=4, compiled=False)
        plaid_module.train(out, samples=16, batch=8, compiled=False)
    return out


def test_a_second_sitting_goes_on_where_the_first_stopped(trained: Path) -> None:
    checkpoint = torch.load(trained / "dit.pt", weights_only=True)
    assert checkpoint["step"] == 4
    seen = [json.loads(line)["samples"] for line in (trained / "dit.jsonl").read_text().splitlines()]
    assert seen == [8, 16]


def test_the_bundle_is_what_the_loaders_take(trained: Path, tmp_path: Path) -> None:
    bundle(trained, tmp_path)
    dit = load_dit(str(tmp_path / "dit-digits.safetensors"), heads=4, name="dit-digits")
    plaid = load_plaid(str(tmp_path / "plaid-digits.safetensors"), name="plaid-digits", max_length=64)
    vae = load_vae(str(tmp_path / "vae"))
    assert (dit.config.depth, plaid.config.depth, vae.config["latent_channels"]) == (8, 8, 4)
    assert (tmp_path / "tokenizer.json").is_file()
    average = torch.load(trained / "dit.pt", weights_only=True)["average"]
    torch.testing.assert_close(dit.tensors["blocks.0.attn.qkv.weight"], average["blocks.0.attn.qkv.weight"], rtol=2e-3, atol=1e-4)
