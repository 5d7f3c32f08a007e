"""From what a user names on the command line to weights in memory."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difffeat.errors import CheckpointMismatch, ConfigError, require

BUNDLED = Path(__file__).parent / "weights"
PUBLISHED_DIT = {"dit": "facebook/DiT-XL-2-256", "dit-xl-2-256": "facebook/DiT-XL-2-256", "dit-xl-2-512": "facebook/DiT-XL-2-512"}
PUBLISHED_VAE = "stabilityai/sd-vae-ft-ema"
DIGITS = ("dit-digits", "plaid-digits")
EMBEDDINGS = ("original", "diffusers")


@dataclass(frozen=True)
class Backbone:
    """Weights of one backbone with what belongs to it: a VAE for images, a tokenizer (bytes of `tokenizer.json`) for text.

    `notes` are what a user should know of how all of it was read.
    """

    family: str
    weights: Any
    vae: Any | None = None
    tokenizer: bytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """L, the number of blocks of the full model."""
        return self.weights.config.depth

    def default_block(self) -> int:
        """The paper's block, at the same relative depth: 12 of 28 for DiT, 20 of 24 for Plaid."""
        share = 12 / 28 if self.family == "dit" else 20 / 24
        return max(1, round(share * self.depth))


@dataclass(frozen=True, kw_only=True)
class Pins:
    """What fixes the files that are loaded: revisions of hub ids, and digests. Of weights in parts see `check_parts`."""

    revision: str | None = None
    sha256: str | None = None
    vae_revision: str | None = None
    vae_sha256: str | None = None
    tokenizer_sha256: str | None = None

    def require_use(self, weights: str | None, vae: str | None, tokenizer: str | None, *, text: bool, autoencoder: bool) -> None:
        """Raises ConfigError for a pin that would pin nothing."""
        local = weights is not None and (weights == "random" or Path(weights).expanduser().exists())
        local_vae = vae is not None and (vae == "random" or Path(vae).expanduser().exists())
        unread = not autoencoder or vae == "random" or (vae is None and weights == "random")
        given = {
            "--sha256": (self.sha256, weights == "random", "--weights random has no file"),
            "--revision": (self.revision, text or local, "the weights are no hub id; --sha256 pins a file"),
            "--vae-sha256": (self.vae_sha256, unread, "no autoencoder is read from a file"),
            "--vae-revision": (self.vae_revision, unread or local_vae, "the autoencoder is no hub id; --vae-sha256 pins a file"),
            "--tokenizer-sha256": (self.tokenizer_sha256, not text or tokenizer is None, "no --tokenizer is given"),
        }
        for option, (value, idle, reason) in given.items():
            if value is not None and idle:
                raise ConfigError(f"{option} would be passed over: {reason}. Leave it out.")


def load_backbone(
    model: str,
    weights: str | None = None,
    *,
    vae: str | None = None,
    tokenizer: str | None = None,
    need_vae: bool = True,
    revision: str | None = None,
    sha256: str | None = None,
    vae_revision: str | None = None,
    vae_sha256: str | None = None,
    tokenizer_sha256: str | None = None,
    heads: int | None = None,
    timestep_embedding: str = "original",
    seed: int = 0,
    assume: str | None = None,
) -> Backbone:
    """Load a backbone by model name.

    **Arguments:** `model` is `dit`, `plaid`, a published geometry such as `dit-b-4-256`, or `dit-digits`/`plaid-digits` (bundled weights);
    `weights` a file, folder, hub id or `random`; `vae` and `tokenizer` likewise (`tokenizer` is a file); `revision` and `sha256` pin the weights, and
    `vae_...` and `tokenizer_...` the others; `assume` the family (`dit`, `plaid`) that weights are taken for although something contradicts it.

    Raises ConfigError and WeightsError with its subclasses.
    """
    require("export", f"Loading {model}", "torch")  # whose networks the names are held against
    _check_names(model, heads, assume)
    pins = Pins(
        revision=revision, sha256=sha256, vae_revision=vae_revision, vae_sha256=vae_sha256, tokenizer_sha256=tokenizer_sha256
    )  # fmt: skip
    autoencoder = model == "dit-digits" or (model.startswith("dit") and (need_vae or vae is not None))
    require("export", f"Loading {model}", "torch", "onnx", "onnxscript", "huggingface_hub", *(["diffusers"] if autoencoder else []))
    if timestep_embedding not in EMBEDDINGS:
        raise ConfigError(f"--timestep-embedding must be {' or '.join(EMBEDDINGS)}, got {timestep_embedding!r}.")
    if timestep_embedding != "original" and (model in DIGITS or model == "plaid"):
        raise ConfigError(f"--timestep-embedding {timestep_embedding} is for DiT weights of that library, and {model} are others. Leave it out.")
    pins.require_use(weights, vae, tokenizer, text=model.startswith("plaid"), autoencoder=autoencoder)
    if model in DIGITS:
        return _digits(model, weights, pins, vae=vae, tokenizer=tokenizer, heads=heads, seed=seed)
    if model == "plaid":
        return _plaid(weights, tokenizer, pins, seed, assume == "plaid")
    loaded = _dit(model, weights, pins, heads, timestep_embedding, seed, assume == "dit")
    if not autoencoder:
        return Backbone("dit", loaded, notes=loaded.notes)
    own = _vae(vae, pins, random=weights == "random", seed=seed, channels=loaded.config.in_channels)
    loaded, notes = _checked_latents(loaded, own, vae or PUBLISHED_VAE, assume == "dit")
    return Backbone("dit", loaded, own, notes=(*loaded.notes, *own.notes, *notes))


def _check_names(model: str, heads: int | None, assume: str | None) -> None:
    from difffeat.export.weights import DIT_CONFIGS

    if not (model in ("dit", "plaid", *DIGITS) or model in DIT_CONFIGS or re.fullmatch(r"dit-\w[\w-]*", model)):
        raise ConfigError(f"model must be dit, plaid, dit-digits, plaid-digits or a DiT geometry such as dit-b-4-256; got {model!r}")
    if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
        raise ConfigError(f"--heads must be a whole number of 1 or more, got {heads!r}")
    if assume is not None and not model.startswith(assume):
        raise ConfigError(f"--assume-{assume} is for --model {assume}, and the model is {model}. Leave it out.")


def _checked_latents(loaded: Any, vae: Any, name: str, assume: bool) -> tuple[Any, tuple[str, ...]]:
    """The backbone with what its autoencoder contradicts, where the caller knows better.

    A DiT that is not bundled was trained on Stable Diffusion's latents: 8 pixels to a latent, scaled by 0.18215. Nothing in its file says otherwise.
    Raises CheckpointMismatch for an autoencoder of another factor.
    """
    from dataclasses import replace

    from difffeat.export.vae import downsampling
    from difffeat.export.vae_weights import DEFAULT_SCALING_FACTOR

    factor, side = downsampling(vae.config), loaded.config.input_size
    notes = []
    if abs(vae.scaling_factor - DEFAULT_SCALING_FACTOR) > 1e-6:
        notes.append(
            f"the autoencoder scales its latents by {vae.scaling_factor:g}, and DiT was trained on latents scaled by {DEFAULT_SCALING_FACTOR} "
            "(Stable Diffusion 1 and 2): features differ unless these weights were trained so"
        )
    if vae.shift_factor:
        notes.append(f"the autoencoder's shift of {vae.shift_factor:g} is taken off its latents before they are scaled")
    if factor == 8:
        return loaded, tuple(notes)
    words = (
        f"the autoencoder {name} makes a latent of {factor} × {factor} pixels, and DiT was trained on those of 8 × 8: {side} × "
        f"{side} latents would be "
        f"pictures of {side * factor} pixels, not {side * 8}"
    )
    if not assume:
        raise CheckpointMismatch(
            f"{words}. Pass --vae with the one that it was trained on (stabilityai/sd-vae-ft-ema). If you know that these weights "
            "were trained so, pass "
            "--assume-dit, and the recipe says so."
        )
    return replace(loaded, assumed=(*loaded.assumed, words)), (*notes, f"goes on although {words}")


def _dit(model: str, weights: str | None, pins: Pins, heads: int | None, timestep_embedding: str, seed: int, assume: bool) -> Any:
    from dataclasses import replace

    from difffeat.export.weights import DIT_CONFIGS, load_dit, random_dit

    if weights == "random":
        name = "dit-xl-2-256" if model == "dit" else model
        if name not in DIT_CONFIGS:
            raise ConfigError(f"no published DiT is called {name!r}; the names are {', '.join(sorted(DIT_CONFIGS))}")
        if heads is not None and heads != DIT_CONFIGS[name].heads:
            raise ConfigError(f"{name} has {DIT_CONFIGS[name].heads} heads, got --heads {heads}. Leave it out.")
        return random_dit(replace(DIT_CONFIGS[name], timestep_embedding=timestep_embedding), seed=seed)
    if weights is None and model not in PUBLISHED_DIT:
        raise ConfigError(f"{model} has no published hub id; pass --weights PATH")
    return load_dit(
        weights or PUBLISHED_DIT[model], heads=heads, revision=pins.revision, sha256=pins.sha256, timestep_embedding=timestep_embedding,
        model=model, assume=assume,
    )  # fmt: skip


def _vae(vae: str | None, pins: Pins, *, random: bool, seed: int, channels: int) -> Any:
    from difffeat.export.weights import SD_VAE_CONFIG, load_vae, random_vae

    if vae == "random" or (vae is None and random):
        return random_vae(SD_VAE_CONFIG, seed=seed)
    return load_vae(vae or PUBLISHED_VAE, revision=pins.vae_revision, sha256=pins.vae_sha256, channels=channels)


def _plaid(weights: str | None, tokenizer: str | None, pins: Pins, seed: int, assume: bool) -> Backbone:
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
        loaded = load_plaid(weights, sha256=pins.sha256, assume=assume)
    if tokenizer is None and weights != "random":
        raise ConfigError("Plaid needs its tokenizer: pass --tokenizer owt2_tokenizer.json (it comes with the weights).")
    vocab = loaded.config.vocab
    content = load_tokenizer_file(tokenizer, vocab=vocab, sha256=pins.tokenizer_sha256) if tokenizer else counting_tokenizer(vocab)
    return Backbone("plaid", loaded, tokenizer=content, notes=(*loaded.notes, *_vocabulary_notes(content, vocab)))


def _vocabulary_notes(tokenizer: bytes, vocab: int) -> tuple[str, ...]:
    from tokenizers import Tokenizer

    size = Tokenizer.from_str(tokenizer.decode()).get_vocab_size()
    return () if size == vocab else (f"the tokenizer has {size} tokens and the model {vocab}: it may be another model's tokenizer",)


def _digits(model: str, weights: str | None, pins: Pins, *, vae: str | None, tokenizer: str | None, heads: int | None, seed: int) -> Backbone:
    """The small backbones, with the bundled weights where no others are named."""
    from difffeat.export.weights import load_dit, load_plaid, load_tokenizer_file, load_vae, random_dit, random_plaid

    bundled = str(BUNDLED / f"{model}.safetensors")
    path = bundled if weights in (None, "random") else str(weights)
    if model == "dit-digits":
        dit = load_dit(path, heads=heads or 4, name=model, sha256=pins.sha256)
        own = load_vae(
            vae or str(BUNDLED / "vae"), channels=dit.config.in_channels, revision=pins.vae_revision, sha256=pins.vae_sha256
        )  # fmt: skip
        return Backbone("dit", random_dit(dit.config, seed=seed) if weights == "random" else dit, own, notes=(*dit.notes, *own.notes))
    plaid = load_plaid(path, name=model, max_length=64, sha256=pins.sha256)
    content = load_tokenizer_file(tokenizer or str(BUNDLED / "tokenizer.json"), vocab=plaid.config.vocab, sha256=pins.tokenizer_sha256)
    return Backbone("plaid", random_plaid(plaid.config, seed=seed) if weights == "random" else plaid, tokenizer=content, notes=plaid.notes)


def counting_tokenizer(vocab: int) -> bytes:
    """A tokenizer for random weights, where no published one fits: every word is `<n>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(vocab)}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return tokenizer.to_str().encode()


def provenance() -> dict[str, Any]:
    """How the bundled weights came about: attempts, samples, what they were chosen on."""
    return json.loads((BUNDLED / "provenance.json").read_text())
