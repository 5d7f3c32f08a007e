"""The plain layers that a folded backbone is made of.

Matrix products keep their weight as [in, out], the way ONNX's MatMul wants it: an exported initializer is then bit for bit the module's parameter,
under the module's name, and the torch engine can read its weights back out of the graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cpu_types() -> frozenset[torch.dtype]:
    """See `CPU_TYPES`."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    units = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16",)}
    return frozenset({torch.float32, *(dtype for dtype, names in units.items() if any(known.get(name, False) for name in names))})


CPU_TYPES = cpu_types()
"""Types whose products this CPU has units for, with sums in fp32, as torch tells; fp32 alone where it cannot be told."""


class Affine(nn.Module):
    """y = x · weight + bias, in the weight's type; weight [in, out].

    `form` says how it is computed: `host` as the CPU does it well, `plain` as graphs are exported, `epilogue` with bias and GELU in the kernel of the
    product, for GPUs. It is set by whoever exports or runs the module: torch.compile of torch 2.11 takes every compilation for an export.
    """

    form = "host"

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.form == "epilogue" and self.bias is not None:
            return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        if self.form == "host" and not self.weight.is_cuda and self.weight.dtype not in CPU_TYPES:
            # Sums in fp32, rounded once, as matrix units do; CPUs without such units take many times as long over torch's own half-precision product.
            y = (x.float() @ self.weight.float()).to(self.weight.dtype)
        else:
            y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of y, in its tanh form."""
        if self.form != "epilogue" or self.bias is None or self.weight.dtype == torch.float32:
            return F.gelu(self(x), approximate="tanh")
        x = x.to(self.weight.dtype)
        return torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight, use_gelu=True).unflatten(0, x.shape[:-1])


def set_form(module: nn.Module, form: str) -> None:
    """Have every `Affine` of a module computed in a form."""
    for layer in module.modules():
        if isinstance(layer, Affine):
            layer.form = form


class Scale(nn.Module):
    """A norm's learned scale, and shift if it has one; each [D]."""

    def __init__(self, width: int, shift: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False) if shift else None


class FlatGroupNorm(nn.Module):
    """GroupNorm over [B, C, ...] as a layer norm over each group's values laid flat, then the channels' scale and shift, each [C, 1]."""

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        super().__init__()
        self.groups, self.channels, self.eps = groups, channels, eps
        self.weight = nn.Parameter(torch.empty(channels, 1), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(channels, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        values = x[0].numel()
        flat = x.reshape(-1, values // self.groups)
        y = F.layer_norm(flat, (flat.shape[1],), eps=self.eps).reshape(-1, self.channels, values // self.channels)
        return (y * self.weight + self.bias).reshape(x.shape)


def attention(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias_B11S: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√K + bias)·v in v's type, heads merged: [B, S, H·K]."""
    q_BHSK, k_BHSK = q_BHSK.to(v_BHSK.dtype), k_BHSK.to(v_BHSK.dtype)
    if bias_B11S is not None and bias_B11S.dtype != v_BHSK.dtype:
        bias_B11S = bias_B11S.clamp(min=torch.finfo(v_BHSK.dtype).min).to(v_BHSK.dtype)
    y = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=bias_B11S)
    return y.transpose(1, 2).flatten(2)


def split_heads(qkv_BSD3: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, 3·H·K] in the order (three, head, dim) -> q, k, v, each [B, H, S, K]."""
    qkv = qkv_BSD3.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv[2]


def pool_tokens(x_BND: Tensor, pooling: str) -> Tensor:
    """Pool image tokens: `mean` and `max` give [B, D], `grid` [B, 4·D] (means of the four quadrants, row-major), `tokens` [B, N, D]."""
    if pooling == "mean":
        return x_BND.mean(dim=1)
    if pooling == "max":
        return x_BND.amax(dim=1)
    if pooling == "tokens":
        return x_BND
    side = math.isqrt(x_BND.shape[1])
    half = side // 2
    grid = x_BND.unflatten(1, (side, side))
    cells = [
        grid[:, rows, columns].mean(dim=(1, 2)) for rows in (slice(0, half), slice(half, side)) for columns in (slice(0, half), slice(half, side))
    ]
    return torch.cat(cells, dim=-1)


def pool_masked(x_BSD: Tensor, mask_BS: Tensor, lengths_B: Tensor, pooling: str) -> Tensor:
    """Pool text tokens, padding left out: `mean` or `max`, [B, D]."""
    mask = mask_BS[:, :, None]
    if pooling == "max":
        return x_BSD.masked_fill(~mask, torch.finfo(x_BSD.dtype).min).amax(dim=1)
    return (x_BSD * mask.to(x_BSD.dtype)).sum(dim=1) / lengths_B[:, None].to(x_BSD.dtype)
