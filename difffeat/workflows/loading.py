"""From what a user names on the command line to weights in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difffeat.errors import ConfigError, require

BUNDLED = Path(__file__).parent / "weights"
PUBLISHED_DIT = {"dit": "facebook/DiT-XL-2-256", "dit-xl-2-256": "facebook/DiT-XL-2-256", "dit-xl-2-512": "facebook/DiT-XL-2-512"}
PUBLISHED_VAE = "stabilityai/sd-vae-ft-ema"
DIGITS = ("dit-digits", "plaid-digits")
EMBEDDINGS = ("original", "diffusers")


@dataclass(frozen=True)
class Backbone:
    """Weights of one backbone with what belongs to it: a VAE for images, a tokenizer (bytes of `tokenizer.json`) for text."""

    family: str
    weights: Any
    vae: Any | None = None
    tokenizer: bytes | None = None

    @property
    def depth(self) -> int:
        """L, the number of blocks of the full model."""
        return self.weights.config.depth

    def default_block(self) -> int:
        """The paper's block, at the same relative depth: 12 of 28 for DiT, 20 of 24 for Plaid."""
        share = 12 / 28 if self.family == "dit" else 20 / 24
        return max(1, round(share * self.depth))


def load_backbone(
    model: str,
    weights: str | None = None,
    *,
    vae: str | None = None,
    tokenizer: str | None = None,
    need_vae: bool = True,
    revision: str | None = None,
    sha256: str | None = None,
    heads: int | None = None,
    timestep_embedding: str = "original",
    seed: int = 0,
) -> Backbone:
    """Load a backbone by model name.

    **Arguments:** `model` is `dit`, `plaid`, a published geometry such as `dit-b-4-256`, or `dit-digits`/`plaid-digits` (bundled weights);
    `weights` a file, folder, hub id or `random`; `vae` and `tokenizer` likewise (`tokenizer` is a file).

    Raises ConfigError and WeightsError with its subclasses.
    """
    autoencoder = model == "dit-digits" or (model.startswith("dit") and (need_vae or vae is not None))
    require("export", f"Loading {model}", "torch", "onnx", "onnxscript", "huggingface_hub", *(["diffusers"] if autoencoder else []))
    if timestep_embedding not in EMBEDDINGS:
        raise ConfigError(f"--timestep-embedding must be {' or '.join(EMBEDDINGS)}, got {timestep_embedding!r}.")
    if timestep_embedding != "original" and (model in DIGITS or model == "plaid"):
        raise ConfigError(f"--timestep-embedding {timestep_embedding} is for DiT weights of that library, and {model} are others. Leave it out.")
    if model in DIGITS:
        return _digits(model, weights, vae=vae, tokenizer=tokenizer, heads=heads, sha256=sha256, seed=seed)
    if model == "plaid":
        return _plaid(weights, tokenizer, sha256, seed)
    if model.startswith("dit"):
        loaded = _dit(model, weights, revision, sha256, heads, timestep_embedding, seed)
        return Backbone("dit", loaded, _vae(vae, random=weights == "random", revision=None, seed=seed) if autoencoder else None)
    raise ConfigError(f"model must be dit, plaid, dit-digits, plaid-digits or a DiT geometry such as dit-b-4-256; got {model!r}")


def _dit(model: str, weights: str | None, revision: str | None, sha256: str | None, heads: int | None, timestep_embedding: str, seed: int) -> Any:
    from dataclasses import replace

    from difffeat.export.weights import DIT_CONFIGS, load_dit, random_dit

    if weights == "random":
        name = "dit-xl-2-256" if model == "dit" else model
        if name not in DIT_CONFIGS:
            raise ConfigError(f"no published DiT is called {name!r}; the names are {', '.join(sorted(DIT_CONFIGS))}")
        return random_dit(replace(DIT_CONFIGS[name], timestep_embedding=timestep_embedding), seed=seed)
    if weights is None and model not in PUBLISHED_DIT:
        raise ConfigError(f"{model} has no published hub id; pass --weights PATH")
    return load_dit(weights or PUBLISHED_DIT[model], heads=heads, revision=revision, sha256=sha256, timestep_embedding=timestep_embedding)


def _vae(vae: str | None, *, random: bool, revision: str | None, seed: int) -> Any:
    from difffeat.export.weights import SD_VAE_CONFIG, load_vae, random_vae

    if vae == "random" or (vae is None and random):
        return random_vae(SD_VAE_CONFIG, seed=seed)
    return load_vae(vae or PUBLISHED_VAE, revision=revision)


def _plaid(weights: str | None, tokenizer: str | None, sha256: str | None, seed: int) -> Backbone:
    from difffeat.export.weights import PLAID_1B, load_plaid, load_tokenizer_file, random_plaid

    if weights == "random":
        loaded = random_plaid(PLAID_1B, seed=seed)
    elif weights is None:
        raise ConfigError(
            "Plaid's weights are in no hub: download release v1.0.0 of igul222/plaid, unpack it, and pass "
            "--weights FOLDER --tokenizer owt2_tokenizer.json. "
            "To try the method at once use --model plaid-digits; for timing only, --weights random."
        )
    else:
        loaded = load_plaid(weights, sha256=sha256)
    if tokenizer is None and weights != "random":
        raise ConfigError("Plaid needs its tokenizer: pass --tokenizer owt2_tokenizer.json (it comes with the weights).")
    content = load_tokenizer_file(tokenizer, vocab=loaded.config.vocab) if tokenizer else counting_tokenizer(loaded.config.vocab)
    return Backbone("plaid", loaded, tokenizer=content)


def _digits(model: str, weights: str | None, *, vae: str | None, tokenizer: str | None, heads: int | None, sha256: str | None, seed: int) -> Backbone:
    """The small backbones, with the bundled weights where no others are named."""
    from difffeat.export.weights import load_dit, load_plaid, load_tokenizer_file, load_vae, random_dit, random_plaid

    bundled = str(BUNDLED / f"{model}.safetensors")
    path = bundled if weights in (None, "random") else str(weights)
    if model == "dit-digits":
        dit = load_dit(path, heads=heads or 4, name=model, sha256=sha256)
        return Backbone("dit", random_dit(dit.config, seed=seed) if weights == "random" else dit, load_vae(vae or str(BUNDLED / "vae")))
    plaid = load_plaid(path, name=model, max_length=64, sha256=sha256)
    content = load_tokenizer_file(tokenizer or str(BUNDLED / "tokenizer.json"), vocab=plaid.config.vocab)
    return Backbone("plaid", random_plaid(plaid.config, seed=seed) if weights == "random" else plaid, tokenizer=content)


def counting_tokenizer(vocab: int) -> bytes:
    """A tokenizer for random weights, where no published one fits: every word is `<n>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(vocab)}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return tokenizer.to_str().encode()


def provenance() -> dict[str, Any]:
    """How the bundled weights came about: attempts, samples, what they were chosen on."""
    return json.loads((BUNDLED / "provenance.json").read_text())
