# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# To a type checker every attribute of an nn.Module is `Tensor | Module`.
"""The diffusion transformer DiT, as published, with its blocks in the open.

Peebles & Xie, *Scalable Diffusion Models with Transformers* (2023). Parameter names are those of the original state dict, so a checkpoint loads
without renaming. This is the *unfolded* network: the reference for parity, the eager baseline, and what the small backbone is trained with.

Shape legend: B batch, N tokens = (input_size / patch)², D width, H heads, K = D / H, C latent channels, S latent side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCY_DIM = 256


def timestep_frequencies(convention: str = "original") -> np.ndarray:
    """Frequencies of the sinusoidal time embedding, float64 [128].

    `original`: exp(−ln(10⁴)·i/128), as in the published code. `diffusers`: i/127 instead, as that library computes it.
    """
    half = FREQUENCY_DIM // 2
    denominator = half if convention == "original" else half - 1
    return np.exp(-math.log(10000.0) * np.arange(half) / denominator)


def sincos_position_embedding(width: int, side: int) -> np.ndarray:
    """2-D sine-cosine positions, float64 [side², D]: the first half of the channels from w, the second from h, each [sin, cos]."""
    rows, columns = np.divmod(np.arange(side * side), side)
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    parts = []
    for coordinate in (columns, rows):
        angles = coordinate[:, None] * omega[None, :]
        parts += [np.sin(angles), np.cos(angles)]
    return np.concatenate(parts, axis=1)


class Attention(nn.Module):
    """Multi-head self-attention with a joint qkv projection and bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        batch, tokens, width = x_BND.shape
        qkv = self.qkv(x_BND).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q_BHNK, k_BHNK, v_BHNK = qkv.unbind(0)
        y_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)
        return self.proj(y_BHNK.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND), approximate="tanh"))


class Block(nn.Module):
    """One adaLN-Zero block: six modulations from the conditioning c, in the order shift, scale, gate (attention), shift, scale, gate (MLP).

    `embedders` of time and label are the block's own, as training with diffusers leaves them; elsewhere all blocks share the network's.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int, mlp_norm_eps: float, embedders: tuple[nn.Module, nn.Module] | None = None) -> None:
        super().__init__()
        self.embedders = embedders is not None
        if embedders is not None:
            self.t_embedder, self.y_embedder = embedders
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=mlp_norm_eps, elementwise_affine=False)
        self.mlp = Mlp(width, mlp_ratio * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c_BD)[:, None, :].chunk(6, dim=-1)
        x_BND = x_BND + gate_msa * self.attn(self.norm1(x_BND) * (1 + scale_msa) + shift_msa)
        return x_BND + gate_mlp * self.mlp(self.norm2(x_BND) * (1 + scale_mlp) + shift_mlp)


class PatchEmbed(nn.Module):
    """Non-overlapping patches by a strided convolution; tokens in row-major order."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, z_BCSS: Tensor) -> Tensor:
        return self.proj(z_BCSS).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoid [cos, sin], then linear, SiLU, linear."""

    def __init__(self, width: int, convention: str) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_DIM, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("frequencies", torch.tensor(timestep_frequencies(convention)), persistent=False)

    def forward(self, t_B: Tensor) -> Tensor:
        angles = t_B.double()[:, None] * self.frequencies.double()[None, :]
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of class embeddings; the last row is the null label."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, label_B: Tensor) -> Tensor:
        return self.embedding_table(label_B)


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear map to patches."""

    def __init__(self, width: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD)[:, None, :].chunk(2, dim=-1)
        return self.linear(self.norm_final(x_BND) * (1 + scale) + shift)


class DiT(nn.Module):
    """The whole network.

    **Arguments:** depth L, width D, heads H, patch, input_size S (latent side), in_channels C, out_channels (noise and variance: 2C), num_classes
    (the null label is `num_classes`), mlp_ratio, `timestep_embedding` (`original` or `diffusers`, which also changes the eps of the MLP's norm to
    1e-5), `block_embedders` (every block but the first has embedders of its own; the last layer uses those of the first).
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        heads: int,
        patch: int,
        input_size: int,
        in_channels: int = 4,
        out_channels: int = 8,
        num_classes: int = 1000,
        mlp_ratio: int = 4,
        timestep_embedding: str = "original",
        block_embedders: bool = False,
    ) -> None:
        super().__init__()
        self.patch, self.out_channels, self.side = patch, out_channels, input_size // patch
        self.x_embedder = PatchEmbed(in_channels, width, patch)
        self.t_embedder = TimestepEmbedder(width, timestep_embedding)
        self.y_embedder = LabelEmbedder(num_classes, width)
        positions = torch.tensor(sincos_position_embedding(width, self.side), dtype=torch.float32)
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        mlp_norm_eps = 1e-6 if timestep_embedding == "original" else 1e-5

        def own(index: int) -> tuple[nn.Module, nn.Module] | None:
            return (TimestepEmbedder(width, timestep_embedding), LabelEmbedder(num_classes, width)) if block_embedders and index else None

        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, mlp_norm_eps, own(index)) for index in range(depth))
        self.final_layer = FinalLayer(width, patch, out_channels)

    @classmethod
    def from_config(cls, config: Any) -> DiT:
        """From anything with the attributes of `DiTConfig`."""
        names = ("depth", "width", "heads", "patch", "input_size", "in_channels", "out_channels", "num_classes", "mlp_ratio", "timestep_embedding")
        return cls(**{name: getattr(config, name) for name in names}, block_embedders=getattr(config, "block_embedders", False))

    def conditioning(self, t_B: Tensor, label_B: Tensor) -> Tensor:
        """C = time embedding + label embedding; [B, D]."""
        return self.t_embedder(t_B) + self.y_embedder(label_B)

    def _block(self, block: Any, x_BND: Tensor, c_BD: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        return block(x_BND, block.t_embedder(t_B) + block.y_embedder(label_B) if block.embedders else c_BD)

    def residual_stream(self, z_BCSS: Tensor, t_B: Tensor, label_B: Tensor) -> Iterator[Tensor]:
        """Yields x [B, N, D] after 0, 1, ..., L blocks. Stop early and the rest is not computed."""
        x_BND = self.x_embedder(z_BCSS) + self.pos_embed
        yield x_BND
        c_BD = self.conditioning(t_B, label_B)
        for block in self.blocks:
            x_BND = self._block(block, x_BND, c_BD, t_B, label_B)
            yield x_BND

    def forward(self, z_BCSS: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        """Predicted noise and variance, [B, out_channels, S, S]."""
        c_BD = self.conditioning(t_B, label_B)
        x_BND = self.x_embedder(z_BCSS) + self.pos_embed
        for block in self.blocks:
            x_BND = self._block(block, x_BND, c_BD, t_B, label_B)
        return self._unpatchify(self.final_layer(x_BND, c_BD))

    def _unpatchify(self, x_BNP: Tensor) -> Tensor:
        batch, side, p = x_BNP.shape[0], self.side, self.patch
        x = x_BNP.reshape(batch, side, side, p, p, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(batch, self.out_channels, side * p, side * p)


def initialise_adaln_zero(model: DiT, generator: torch.Generator) -> None:
    """The published initialisation: Xavier linears, N(0, 0.02) embeddings, zero modulations and output."""
    xavier: Callable[..., Tensor] = nn.init.xavier_uniform_
    for module in model.modules():
        if isinstance(module, nn.Linear):
            xavier(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    xavier(model.x_embedder.proj.weight.view(model.x_embedder.proj.weight.shape[0], -1), generator=generator)
    nn.init.zeros_(model.x_embedder.proj.bias)  # type: ignore[arg-type]
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02, generator=generator)
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
    for module in (*model.blocks, model.final_layer):
        nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(module.adaLN_modulation[1].bias)
    nn.init.zeros_(model.final_layer.linear.weight)
