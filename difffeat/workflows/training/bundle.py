"""From checkpoints to the bundled weights: averaged weights as fp16 safetensors, the autoencoder's folder, the tokenizer, the logs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from difffeat.workflows.loading import BUNDLED
from difffeat.workflows.scenes import tokenizer_json
from difffeat.workflows.training.vae import CONFIG as VAE_CONFIG


def bundle(training: Path, out: Path = BUNDLED) -> None:
    """Write everything the package carries. Decoders are left out: features never need them."""
    (out / "vae").mkdir(parents=True, exist_ok=True)
    vae = torch.load(training / "vae.pt", weights_only=True)
    encoder = {name: tensor.half().contiguous() for name, tensor in vae["model"].items() if name.startswith(("encoder.", "quant_conv."))}
    save_file(encoder, out / "vae" / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKL", **VAE_CONFIG, "scaling_factor": vae["scaling_factor"]}
    (out / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("dit", "plaid"):
        state = torch.load(training / f"{name}.pt", weights_only=True)["average"]
        save_file({key: tensor.half().contiguous() for key, tensor in state.items()}, out / f"{name}-digits.safetensors")
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)
    (out / "tokenizer.json").write_text(tokenizer_json() + "\n")
    for name in ("vae", "dit", "plaid"):
        shutil.copy(training / f"{name}.jsonl", out / f"{name}-training.jsonl")
