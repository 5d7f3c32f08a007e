"""The diffusion language model Plaid, with its blocks in the open.

Gulrajani & Hashimoto, *Likelihood-Based Diffusion Language Models* (2023), from the published description and tensor shapes. Parameter names are
those of the published state dicts. This is the *unfolded* network: the reference for parity, the eager baseline, and what the small backbone is
trained with.

Shape legend: B batch, S tokens, D width, H heads, K = 64, E embedding width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_DIM = 64
NORM_EPS = 1e-5
ROTARY_BASE = 10000.0


def gamma_frequencies() -> np.ndarray:
    """Frequencies of the γ embedding, float64 [32]: exp(linspace(−5, 5, 32))."""
    return np.exp(np.linspace(-5.0, 5.0, 32))


def rotary_inverse_frequencies() -> np.ndarray:
    """float64 [32]: 10000^(−2i/64)."""
    return ROTARY_BASE ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def rotary_tables(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cos and sin, float32 [S, 64], for positions 0..S−1 and the rotate-half layout."""
    angles = np.arange(length)[:, None] * rotary_inverse_frequencies()[None, :]
    angles = np.concatenate([angles, angles], axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x_BHSK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    """Rotary position embedding, rotate-half layout."""
    first, second = x_BHSK.chunk(2, dim=-1)
    return x_BHSK * cos_SK + torch.cat([-second, first], dim=-1) * sin_SK


def normalise_rows(matrix_VE: Tensor) -> Tensor:
    """Rows divided by (their Euclidean norm + 1e-8)."""
    return matrix_VE / (matrix_VE.norm(dim=-1, keepdim=True) + 1e-8)


class RMSNorm(nn.Module):
    """x / rms(x) · weight; eps 1e-5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPS) * self.weight


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, linear; no biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm block; both branches scaled by `residual_scale` = 1/√L of the full model."""

    def __init__(self, width: int, residual_scale: float) -> None:
        super().__init__()
        self.heads, self.residual_scale = width // HEAD_DIM, residual_scale
        self.rmsnorm1 = RMSNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.rmsnorm2 = RMSNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x_BSD: Tensor, cos_SK: Tensor, sin_SK: Tensor, mask_B11S: Tensor | None) -> Tensor:
        batch, length, width = x_BSD.shape
        qkv = self.attn_qkv(self.rmsnorm1(x_BSD)).reshape(batch, length, 3, self.heads, HEAD_DIM).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(rotate(q, cos_SK, sin_SK), rotate(k, cos_SK, sin_SK), v, attn_mask=mask_B11S)
        x_BSD = x_BSD + self.residual_scale * self.attn_out(y.transpose(1, 2).reshape(batch, length, width))
        return x_BSD + self.residual_scale * self.mlp(self.rmsnorm2(x_BSD))


class Plaid(nn.Module):
    """The network of `model.pt`.

    **Arguments:** depth L, width D (a multiple of 64), vocab V, embed_dim E, width_base (the width at which the head's multiplier is 1: 256).
    """

    def __init__(self, *, depth: int, width: int, vocab: int, embed_dim: int = 16, width_base: int = 256) -> None:
        super().__init__()
        self.width_multiplier = width / width_base
        self.input_linear = nn.Linear(embed_dim, width, bias=False)
        self.selfcond_linear = nn.Linear(embed_dim, width, bias=False)
        self.gamma_linear = nn.Linear(64, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, 1.0 / math.sqrt(depth)) for _ in range(depth))
        self.output_norm = nn.LayerNorm(width, eps=NORM_EPS, bias=False)
        self.output_linear = nn.Linear(width, vocab)

    @classmethod
    def from_config(cls, config: Any) -> Plaid:
        """From anything with the attributes of `PlaidConfig`."""
        return cls(**{name: getattr(config, name) for name in ("depth", "width", "vocab", "embed_dim", "width_base")})

    def residual_stream(self, z_BSE: Tensor, gamma_B: Tensor, mask_BS: Tensor | None, selfcond_BSE: Tensor | None = None) -> Iterator[Tensor]:
        """Yields x [B, S, D] after 0, 1, ..., L blocks. `mask_BS` is true at real tokens; `gamma_B` is γ(t) = −log-SNR.

        x = input_linear(z / √(α²/E + σ²)) + selfcond_linear(4·x̂) + gamma_linear([sin, cos](f·γ)).
        """
        gamma_B = gamma_B.double()
        variance = torch.sigmoid(-gamma_B) / z_BSE.shape[-1] + torch.sigmoid(gamma_B)
        x = self.input_linear(z_BSE * torch.rsqrt(variance).to(z_BSE.dtype)[:, None, None])
        if selfcond_BSE is not None:
            x = x + self.selfcond_linear(4.0 * selfcond_BSE)
        angles = gamma_B[:, None] * torch.as_tensor(gamma_frequencies(), device=z_BSE.device)[None, :]
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).to(z_BSE.dtype)
        x = x + self.gamma_linear(embedding)[:, None, :]
        yield x
        cos, sin = (torch.as_tensor(table, device=x.device, dtype=x.dtype) for table in rotary_tables(x.shape[1]))
        mask = None if mask_BS is None else mask_BS[:, None, None, :]
        for block in self.blocks:
            x = block(x, cos, sin, mask)
            yield x

    def head(self, x_BSD: Tensor, z_BSE: Tensor, gamma_B: Tensor, embeddings_VE: Tensor) -> Tensor:
        """Logits [B, S, V]: LayerNorm, divide by the width multiplier, linear, plus (α/σ²)·z·Eᵀ."""
        logits = self.output_linear(self.output_norm(x_BSD) / self.width_multiplier)
        gamma_B = gamma_B.double()
        prior = (torch.sigmoid(-gamma_B).sqrt() / torch.sigmoid(gamma_B)).to(z_BSE.dtype)
        return logits + prior[:, None, None] * (z_BSE @ embeddings_VE.T)

    def forward(
        self, z_BSE: Tensor, gamma_B: Tensor, embeddings_VE: Tensor, mask_BS: Tensor | None = None, selfcond_BSE: Tensor | None = None
    ) -> Tensor:
        """Logits [B, S, V] of the clean tokens."""
        *_, x_BSD = self.residual_stream(z_BSE, gamma_B, mask_BS, selfcond_BSE)
        return self.head(x_BSD, z_BSE, gamma_B, embeddings_VE)
