"""Checkpoints of all three kinds: load, draw at random, save in the published layouts."""

from difffeat.export.dit_weights import DIT_CONFIGS, DiTConfig, DiTWeights, load_dit, random_dit, save_dit_diffusers, save_dit_original
from difffeat.export.plaid_weights import PLAID_1B, PlaidConfig, PlaidWeights, load_plaid, load_tokenizer_file, random_plaid, save_plaid
from difffeat.export.vae_weights import SD_VAE_CONFIG, VAEWeights, load_vae, random_vae, save_vae

__all__ = [
    "DIT_CONFIGS",
    "PLAID_1B",
    "SD_VAE_CONFIG",
    "DiTConfig",
    "DiTWeights",
    "PlaidConfig",
    "PlaidWeights",
    "VAEWeights",
    "load_dit",
    "load_plaid",
    "load_tokenizer_file",
    "load_vae",
    "random_dit",
    "random_plaid",
    "random_vae",
    "save_dit_diffusers",
    "save_dit_original",
    "save_plaid",
    "save_vae",
]
