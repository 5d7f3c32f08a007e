# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# To a type checker every attribute of an nn.Module is `Tensor | Module`.
"""The truncated, folded backbones: plain pre-norm transformers whose pooled residual streams are the features.

With `swept=True` the timestep stays an input: what folding would have made constant (modulations, γ embedding) is fed from a table that was computed
at export.

Shape legend: B batch, N image tokens, S text tokens, D width, k blocks kept, C latent channels, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difffeat.export.layers import Affine, Scale, attention, pool_masked, pool_tokens, split_heads
from difffeat.export.plaid import HEAD_DIM, NORM_EPS, rotary_tables, rotate


class DiTBlock(nn.Module):
    """x += proj(attention(LN(x))); x += fc2(gelu(fc1(LN(x)))). The norms' affine is the folded modulation, or an input when swept."""

    def __init__(self, width: int, heads: int, hidden: int, mlp_norm_eps: float, swept: bool) -> None:
        super().__init__()
        self.heads, self.width, self.mlp_norm_eps = heads, width, mlp_norm_eps
        if not swept:
            self.norm1, self.norm2 = Scale(width, shift=True), Scale(width, shift=True)
        self.qkv, self.proj = Affine(width, 3 * width), Affine(width, width)
        self.fc1, self.fc2 = Affine(width, hidden), Affine(hidden, width)

    def forward(self, x_BND: Tensor, modulation_6D: Tensor | None = None) -> Tensor:
        if modulation_6D is None:
            x_BND = x_BND + self._attend(x_BND, self.norm1.weight, self.norm1.bias)
            return x_BND + self._mlp(x_BND, self.norm2.weight, self.norm2.bias)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation_6D.unbind(0)
        x_BND = x_BND + gate_msa * self._attend(x_BND, scale_msa, shift_msa)
        return x_BND + gate_mlp * self._mlp(x_BND, scale_mlp, shift_mlp)

    def _attend(self, x: Tensor, scale_D: Tensor, shift_D: Tensor) -> Tensor:
        x = F.layer_norm(x, (self.width,), scale_D, shift_D, eps=1e-6)
        return self.proj(attention(*split_heads(self.qkv(x), self.heads)))

    def _mlp(self, x: Tensor, scale_D: Tensor, shift_D: Tensor) -> Tensor:
        x = F.layer_norm(x, (self.width,), scale_D, shift_D, eps=self.mlp_norm_eps)
        return self.fc2(self.fc1.gelu(x))


class DiTTrunk(nn.Module):
    """Noisy latents to pooled taps: patches, positions, the first k blocks.

    **Arguments:** `taps` blocks asked for, ascending (0 is the patch embedding); the rest as in `DiT`.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        patch: int,
        in_channels: int,
        input_size: int,
        mlp_ratio: int,
        mlp_norm_eps: float,
        taps: Sequence[int],
        pooling: str,
        swept: bool,
    ) -> None:
        super().__init__()
        self.taps, self.pooling = tuple(taps), pooling
        self.patch_embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.empty(1, (input_size // patch) ** 2, width), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio * width, mlp_norm_eps, swept) for _ in range(max(self.taps)))
        self.requires_grad_(False)

    def forward(self, z_BCSS: Tensor, modulation_k6D: Tensor | None = None) -> tuple[Tensor, ...]:
        x = self.patch_embed(z_BCSS).flatten(2).transpose(1, 2) + self.pos_embed
        pooled = [pool_tokens(x, self.pooling)] if 0 in self.taps else []
        for index, block in enumerate(self.blocks):
            x = block(x) if modulation_k6D is None else block(x, modulation_k6D[index])
            if index + 1 in self.taps:
                pooled.append(pool_tokens(x, self.pooling))
        return tuple(pooled)


class PlaidBlock(nn.Module):
    """x += attn_out(attention(RMSNorm(x))); x += fc2(gelu(fc1(RMSNorm(x)))), the residual scale folded into attn_out and fc2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads, self.width = width // HEAD_DIM, width
        self.norm1, self.norm2 = Scale(width, shift=False), Scale(width, shift=False)
        self.qkv, self.attn_out = Affine(width, 3 * width, bias=False), Affine(width, width, bias=False)
        self.fc1, self.fc2 = Affine(width, 4 * width, bias=False), Affine(4 * width, width, bias=False)

    def forward(self, x_BSD: Tensor, cos_SK: Tensor, sin_SK: Tensor, bias_B11S: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(self._norm(x_BSD, self.norm1.weight)), self.heads)
        x_BSD = x_BSD + self.attn_out(attention(rotate(q, cos_SK, sin_SK), rotate(k, cos_SK, sin_SK), v, bias_B11S))
        return x_BSD + self.fc2(self.fc1.gelu(self._norm(x_BSD, self.norm2.weight)))

    def _norm(self, x: Tensor, weight_D: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPS) * weight_D


class PlaidTrunk(nn.Module):
    """Noisy embeddings to pooled taps: input map, γ embedding, the first k blocks.

    The input map holds the input scale 1/√(α²/E + σ²) unless swept; `gamma_embedding` [D] is γ's embedding after its linear map. `vocab` None: there
    is no table of embeddings, for graphs that tokens do not enter.
    """

    def __init__(
        self,
        *,
        width: int,
        vocab: int | None,
        embed_dim: int,
        max_length: int,
        taps: Sequence[int],
        pooling: str,
        swept: bool,
        self_conditioned: bool = False,
    ) -> None:
        super().__init__()
        self.taps, self.pooling, self.max_length = tuple(taps), pooling, max_length
        self.embeddings = None if vocab is None else nn.Parameter(torch.empty(vocab, embed_dim), requires_grad=False)
        self.input = Affine(embed_dim, width, bias=not swept)
        self.selfcond = Affine(embed_dim, width, bias=False) if self_conditioned else None
        cos, sin = rotary_tables(max_length)
        self.register_buffer("cos", torch.tensor(cos), persistent=False)
        self.register_buffer("sin", torch.tensor(sin), persistent=False)
        self.blocks = nn.ModuleList(PlaidBlock(width) for _ in range(max(self.taps)))

    def forward(
        self, z_BSE: Tensor, lengths_B: Tensor, gamma_embedding_D: Tensor | None = None, selfcond_BSE: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        mask_BS = self.mask(z_BSE, lengths_B)
        stream = self.residual_stream(z_BSE, mask_BS, gamma_embedding_D, selfcond_BSE)
        return tuple(pool_masked(x, mask_BS, lengths_B, self.pooling) for index, x in enumerate(stream) if index in self.taps)

    def mask(self, z_BSE: Tensor, lengths_B: Tensor) -> Tensor:
        """True at real tokens, [B, S]."""
        return torch.arange(z_BSE.shape[1], device=z_BSE.device)[None, :] < lengths_B[:, None]

    def residual_stream(self, z_BSE: Tensor, mask_BS: Tensor, gamma_embedding_D: Tensor | None, selfcond_BSE: Tensor | None) -> Iterator[Tensor]:
        """Yields x [B, S, D] after 0, 1, ..., k blocks. The map of the self-conditioning holds its factor 4."""
        length = z_BSE.shape[1]
        bias = torch.where(mask_BS, 0.0, torch.finfo(torch.float32).min)[:, None, None, :]
        x = self.input(z_BSE)
        if selfcond_BSE is not None and self.selfcond is not None:
            x = x + self.selfcond(selfcond_BSE)
        if gamma_embedding_D is not None:
            x = x + gamma_embedding_D
        yield x
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length], bias)
            yield x
