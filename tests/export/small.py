"""Small backbones with every tensor drawn at random, gates and biases too: a fold that is left out must show."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from difffeat.export.dit import DiT
from difffeat.export.plaid import Plaid

DIT = SimpleNamespace(
    name="dit-small",
    depth=4,
    width=64,
    heads=4,
    patch=2,
    input_size=8,
    in_channels=4,
    out_channels=8,
    num_classes=5,
    mlp_ratio=4,
    timestep_embedding="original",
)
PLAID = SimpleNamespace(name="plaid-small", depth=3, width=128, vocab=40, embed_dim=16, width_base=256, max_length=64)


def draw(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Redraw every parameter: fan-in scaled matrices, unit norms with jitter, biases of 0.3."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1 and name != "pos_embed":
            state[name] = noise / (tensor[0].numel() ** 0.5)
        elif "norm" in name:
            state[name] = 1.0 + 0.2 * noise
        else:
            state[name] = 0.3 * noise
    module.load_state_dict(state)
    module.eval().requires_grad_(False)
    return state


def dit(seed: int = 0, **changes: object) -> tuple[DiT, dict[str, Tensor], SimpleNamespace]:
    config = SimpleNamespace(**{**vars(DIT), **changes})
    model = DiT.from_config(config)
    return model, draw(model, seed), config


def plaid(seed: int = 0) -> tuple[Plaid, dict[str, Tensor], SimpleNamespace]:
    model = Plaid.from_config(PLAID)
    tensors = {f"model.{name}": value for name, value in draw(model, seed).items()}
    generator = torch.Generator().manual_seed(seed + 1)
    tensors |= {
        "noise_schedule.W1": torch.randn(1024, 1, generator=generator),
        "noise_schedule.b1": torch.randn(1024, generator=generator),
        "noise_schedule.W2": torch.randn(1, 1024, generator=generator),
        "gamma_bounds.gamma_0": torch.tensor(-3.1),
        "gamma_bounds.gamma_1": torch.tensor(5.7),
        "embedding_matrix.matrix": torch.randn(PLAID.vocab, PLAID.embed_dim, generator=generator),
    }
    return model, tensors, PLAID
