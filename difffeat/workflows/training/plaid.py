# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false
# To a type checker every attribute of an nn.Module is `Tensor | Module`.
"""The small Plaid: eight blocks on captions, with the likelihood losses and a learned noise schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difffeat.export.plaid import Plaid, normalise_rows
from difffeat.workflows.scenes import multi_hot, scene, tokenizer_json, vocabulary
from difffeat.workflows.training.common import Average, Log, learning_rate, load_checkpoint, save_checkpoint

CONFIG: dict[str, Any] = {"depth": 8, "width": 128, "vocab": len(vocabulary()), "embed_dim": 16}
PEAK_LEARNING_RATE = 1e-3
SELF_CONDITIONING_RATE = 0.25
RECONSTRUCTION_SHARE = 8  # one row in eight is at t = 0, for the reconstruction term
HIDDEN = 1024


class Diffusion(nn.Module):
    """The four published state dicts as one module."""

    def __init__(self) -> None:
        super().__init__()
        self.noise_schedule = nn.ParameterDict(
            {"W1": torch.randn(HIDDEN, 1), "b1": torch.randn(HIDDEN), "W2": torch.randn(1, HIDDEN)},
        )
        self.gamma_bounds = nn.ParameterDict({"gamma_0": torch.tensor(-3.0), "gamma_1": torch.tensor(6.0)})
        self.embedding_matrix = nn.ParameterDict({"matrix": torch.randn(CONFIG["vocab"], CONFIG["embed_dim"])})
        self.model = Plaid(**CONFIG)
        nn.init.zeros_(self.model.output_linear.weight)
        nn.init.zeros_(self.model.output_linear.bias)
        nn.init.zeros_(self.model.selfcond_linear.weight)

    def embeddings(self) -> Tensor:
        """[V, E], rows of unit length."""
        return normalise_rows(self.embedding_matrix["matrix"])

    def shape(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """s(t) in 0..1 and its derivative, each [B]."""
        slope, bias = F.softplus(self.noise_schedule["W1"][:, 0]), self.noise_schedule["b1"]
        weight = 0.01 * F.softplus(self.noise_schedule["W2"][0])
        hidden = torch.tanh((torch.cat([t, t.new_tensor([0.0, 1.0])])[:, None] - 0.5) * slope + bias)
        values = hidden @ weight
        low, high = values[-2], values[-1]
        derivative = (1 - hidden[:-2].square()) @ (weight * slope)
        return (values[:-2] - low) / (high - low), derivative / (high - low)


def caption_batches(tokenizer: Any, start: int, batch: int, pool: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens [B, S], mask [B, S]) of captions never seen before, in batches of like length; S a multiple of four."""
    index = start
    while True:
        captions = [scene("train", index + i).caption for i in range(pool * batch)]
        index += pool * batch
        encoded = sorted((encoding.ids for encoding in tokenizer.encode_batch([" " + c for c in captions])), key=len)
        order = np.random.Generator(np.random.PCG64(index)).permutation(pool)
        for part in order:
            yield pad(encoded[part * batch : (part + 1) * batch])


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of token ids, padded with 0 to a multiple of four, and the mask of real tokens."""
    length = 4 * math.ceil(max(map(len, rows)) / 4)
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.arange(length)[None, :] < torch.tensor([len(row) for row in rows])[:, None]
    return tokens, mask


def step_losses(diffusion: Diffusion, network: Any, tokens: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One step's negative log-likelihood bound.

    **Returns:** the bound in nats per token (scalar), the diffusion term per row [B'], and [s, s', leaf of s, leaf of s'] for `schedule_backward`.

    The bound is E[−log p(x|z_0)] + KL(q(z_1|x) ‖ N(0, 1)) + ½∫γ'(t) e^{−γ(t)} ‖e − x̂(z_t)‖² dt (Kingma et al. 2021, eq. 11 and 17).
    """
    rows, first = len(tokens), len(tokens) // RECONSTRUCTION_SHARE
    t = (torch.rand(1, generator=generator) + torch.arange(rows - first) / (rows - first)) % 1.0
    s, derivative = diffusion.shape(t)
    s_leaf, derivative_leaf = s.detach().requires_grad_(), derivative.detach().requires_grad_()
    gamma_0, gamma_1 = diffusion.gamma_bounds["gamma_0"], diffusion.gamma_bounds["gamma_1"]
    gamma_t = gamma_0 + (gamma_1 - gamma_0) * s_leaf
    gamma = torch.cat([gamma_0.expand(first), gamma_t])
    table = diffusion.embeddings()
    clean = table[tokens]
    noise = torch.randn(clean.shape, generator=generator)
    z = torch.sigmoid(-gamma).sqrt()[:, None, None] * clean + torch.sigmoid(gamma).sqrt()[:, None, None] * noise
    logits = network(z, gamma, table, mask, _self_conditioning(network, z, gamma, table, mask, generator))
    share = mask.float() / mask.sum()
    reconstruction = (F.cross_entropy(logits[:first].transpose(1, 2), tokens[:first], reduction="none") * mask[:first]).sum() / mask[:first].sum()
    estimate = logits[first:].softmax(-1) @ table
    distance = ((clean[first:] - estimate).square().sum(-1) * mask[first:]).sum(-1) / mask[first:].sum(-1)
    diffusion_B = 0.5 * (gamma_1 - gamma_0) * derivative_leaf * torch.exp(-gamma_t) * distance
    variance = torch.sigmoid(gamma_1)
    prior = 0.5 * (variance + torch.sigmoid(-gamma_1) * clean.square() - 1 - variance.log()).sum(-1)
    weight = mask[first:].sum(-1) / mask[first:].sum() * len(diffusion_B)
    return reconstruction + (diffusion_B * weight).mean() + (prior * share).sum(), diffusion_B.detach(), [s, derivative, s_leaf, derivative_leaf]


@torch.no_grad()
def _self_conditioning(network: Any, z: Tensor, gamma: Tensor, table: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """x̂ of a first pass for a quarter of the rows, zero for the rest."""
    count = int(SELF_CONDITIONING_RATE * len(z))
    chosen = torch.randperm(len(z), generator=generator)[:count]
    result = torch.zeros_like(z)
    first = network(z[chosen], gamma[chosen], table, mask[chosen], torch.zeros_like(z[chosen]))
    result[chosen] = first.softmax(-1) @ table
    return result


def schedule_backward(diffusion_B: Tensor, parts: list[Tensor]) -> None:
    """Give the schedule's interior the gradient of the estimator's variance (Kingma et al. 2021, section 4.1).

    The mean does not depend on the interior, so ∇Var = ∇E[L²]; dL_i/ds_i is what the main backward pass left at the leaves.
    """
    s, derivative, s_leaf, derivative_leaf = parts
    scale = 2.0 * diffusion_B / diffusion_B.square().mean()
    torch.autograd.backward([s, derivative], [scale * s_leaf.grad, scale * derivative_leaf.grad])


def train(out: Path, samples: int, batch: int = 256, seed: int = 3, compiled: bool = True) -> None:
    """Train up to `samples` captions in all, going on from `plaid.pt` where it exists."""
    from tokenizers import Tokenizer

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer, diffusion = Tokenizer.from_str(tokenizer_json()), Diffusion()
    optimizer = torch.optim.AdamW(diffusion.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average, step, log = Average(diffusion, 0.998), 0, Log(out / "plaid.jsonl")
    if (checkpoint := load_checkpoint(out / "plaid.pt")) is not None:
        diffusion.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        average.state, step = checkpoint["average"], checkpoint["step"]
        generator.manual_seed(step)
    network = torch.compile(diffusion.model, dynamic=False) if compiled else diffusion.model
    steps, running = samples // batch, 0.0
    for tokens, mask in caption_batches(tokenizer, 10_000_000 + step * batch, batch):
        if step >= steps:
            break
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, PEAK_LEARNING_RATE)
        optimizer.zero_grad(set_to_none=True)
        loss, diffusion_B, parts = step_losses(diffusion, network, tokens, mask, generator)
        loss.backward()
        schedule_backward(diffusion_B, parts)
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        average.update(diffusion, step)
        step, running = step + 1, running + loss.item()
        if step % 50 == 0:
            bounds = [diffusion.gamma_bounds[key].item() for key in ("gamma_0", "gamma_1")]
            log(model="plaid", samples=step * batch, nats_per_token=running / 50, gamma=bounds)
            running = 0.0
        if step % 500 == 0 or step == steps:
            save_checkpoint(out / "plaid.pt", model=diffusion.state_dict(), average=average.state, optimizer=optimizer.state_dict(), step=step)
            log(model="plaid", samples=step * batch, validation=validation_map(average.state, tokenizer))


@torch.no_grad()
def validation_map(state: dict[str, Tensor], tokenizer: Any) -> list[float]:
    """MAP (%) on validation of a ridge probe on mean-pooled features at t = 0 without noise, at each block; a look while training."""
    from sklearn.linear_model import Ridge
    from sklearn.metrics import average_precision_score

    diffusion = Diffusion()
    diffusion.load_state_dict(state)
    gamma = diffusion.gamma_bounds["gamma_0"]

    def features(captions: list[str]) -> np.ndarray:
        tokens, mask = pad([encoding.ids for encoding in tokenizer.encode_batch([" " + c for c in captions])])
        z = torch.sigmoid(-gamma).sqrt() * diffusion.embeddings()[tokens]
        share = (mask.float() / mask.sum(-1, keepdim=True))[:, :, None]
        return torch.stack([(x * share).sum(1) for x in diffusion.model.residual_stream(z, gamma.expand(len(z)), mask)]).numpy()

    train_scenes, test_scenes = [scene("train", i) for i in range(1500)], [scene("validation", i) for i in range(1000)]
    targets, truth, scores = multi_hot(train_scenes), multi_hot(test_scenes), []
    for x, y in zip(features([s.caption for s in train_scenes]), features([s.caption for s in test_scenes]), strict=True):
        mean, deviation = x.mean(0), x.std(0) + 1e-6
        predicted = Ridge(alpha=30.0).fit((x - mean) / deviation, targets).predict((y - mean) / deviation)
        scores.append(round(100 * float(average_precision_score(truth, predicted)), 2))
    return scores
