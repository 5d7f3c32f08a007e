"""What the steps are run on: the published sizes on a card, the bundled small backbones in a rehearsal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from difffeat.export.dit_weights import DIT_CONFIGS, DiTConfig
from difffeat.export.vae_weights import SD_VAE_CONFIG


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """**Fields:** `device`; `dit` geometry and `block` it is cut after; `vae` constructor arguments of the autoencoder; `latents_batch` and
    `pixels_batch` of the tables; `batches` of the table over batch sizes; `side` of the square product; `images` JPEGs of the extraction; `resumed`
    images of the one that is killed; `models` names for `load_backbone` with `weights`; `text_block`; `lengths` of captions and `captions_batch`;
    `copy_bytes`; `warm` and `seconds` of a timing; `repeats` rounds; `compiler` torch.compile's backend.
    """

    device: str
    dit: DiTConfig
    block: int
    vae: Mapping[str, Any]
    latents_batch: int
    pixels_batch: int
    batches: tuple[int, ...]
    side: int
    images: int
    resumed: int
    models: tuple[str, str]
    weights: str | None
    text_block: int
    lengths: tuple[int, ...]
    captions_batch: int
    copy_bytes: int
    warm: float
    seconds: float
    repeats: int
    compiler: str = "inductor"

    @property
    def tokens(self) -> int:
        """Of an image."""
        return (self.dit.input_size // self.dit.patch) ** 2

    @property
    def trunk_gflop(self) -> float:
        """Of one image through the blocks: products and attention."""
        width = self.dit.width
        return self.block * (24 * self.tokens * width**2 + 4 * self.tokens**2 * width) / 1e9

    @property
    def pixels(self) -> int:
        """Side of an image."""
        return self.dit.input_size * 2 ** (len(self.vae["block_out_channels"]) - 1)


CARD = Sizes(
    device="cuda",
    dit=DIT_CONFIGS["dit-xl-2-256"],
    block=12,
    vae=SD_VAE_CONFIG,
    latents_batch=64,
    pixels_batch=32,
    batches=(8, 32, 128),
    side=8192,
    images=1024,
    resumed=1024,
    models=("dit", "plaid"),
    weights="random",
    text_block=20,
    lengths=(16, 32, 64, 128),
    captions_batch=64,
    copy_bytes=1 << 31,
    warm=0.25,
    seconds=0.4,
    repeats=7,
)
REHEARSAL = Sizes(
    device="cpu",
    dit=DiTConfig(name="tiny", depth=3, width=64, heads=4, patch=2, input_size=8, num_classes=5),
    block=2,
    vae={**SD_VAE_CONFIG, "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 4, "layers_per_block": 1},
    latents_batch=4,
    pixels_batch=2,
    batches=(2, 4, 9),
    side=128,
    images=24,
    resumed=64,
    models=("dit-digits", "plaid-digits"),
    weights=None,
    text_block=2,
    lengths=(8, 16),
    captions_batch=4,
    copy_bytes=1 << 18,
    warm=0.0,
    seconds=0.0,
    repeats=1,
)
