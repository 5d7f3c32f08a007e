"""Folding changes nothing, and each fold is needed: leaving any one out makes the parity fail."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from difffeat.export import fold
from difffeat.export.dit import DiT
from difffeat.export.folded import DiTTrunk, PlaidTrunk
from difffeat.export.layers import pool_masked, pool_tokens
from difffeat.export.plaid import normalise_rows
from difffeat.export.schedule import dit_noise_level
from tests.export import small

TAPS, T, LABEL = (0, 1, 3), 30, 5


def dit_trunk(config: SimpleNamespace, swept: bool = False, pooling: str = "mean") -> DiTTrunk:
    eps = 1e-6 if config.timestep_embedding == "original" else 1e-5
    names = ("width", "heads", "patch", "in_channels", "input_size", "mlp_ratio")
    return DiTTrunk(**{name: getattr(config, name) for name in names}, mlp_norm_eps=eps, taps=TAPS, pooling=pooling, swept=swept)


def folded_dit(tensors: dict[str, torch.Tensor], config: SimpleNamespace, pooling: str = "mean") -> DiTTrunk:
    trunk = dit_trunk(config, pooling=pooling)
    fold.fill_dit(trunk, tensors, fold.dit_modulation(tensors, config, T, LABEL, 3))
    return trunk


def dit_error(model: DiT, trunk: Callable[..., Any], pooling: str = "mean") -> float:
    """Largest relative L2 over taps of a trunk against the unfolded network."""
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    stream = list(model.residual_stream(z, torch.full((3,), T), torch.full((3,), LABEL)))
    expected = [pool_tokens(stream[block], pooling) for block in TAPS]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(trunk(z), expected, strict=True))


@pytest.mark.parametrize("pooling", ["mean", "max", "grid", "tokens"])
@pytest.mark.parametrize("convention", ["original", "diffusers"])
def test_the_folded_dit_equals_the_unfolded_one(pooling: str, convention: str) -> None:
    model, tensors, config = small.dit(timestep_embedding=convention)
    assert dit_error(model, folded_dit(tensors, config, pooling), pooling) < 1e-6


def test_the_swept_dit_equals_the_unfolded_one() -> None:
    model, tensors, config = small.dit()
    trunk = dit_trunk(config, swept=True)
    fold.fill_dit(trunk, tensors, None)
    modulation = fold.dit_modulation(tensors, config, T, LABEL, 3).float()
    assert dit_error(model, lambda z: trunk(z, modulation)) < 1e-6


@pytest.mark.parametrize("part", range(6), ids=["shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"])
@pytest.mark.parametrize("block", [0, 2])
def test_leaving_out_one_modulation_breaks_parity(part: int, block: int) -> None:
    model, tensors, config = small.dit()
    modulation = fold.dit_modulation(tensors, config, T, LABEL, 3)
    modulation[block, part] = 0.0 if part in (fold.SHIFT_MSA, fold.SHIFT_MLP) else 1.0
    trunk = dit_trunk(config)
    fold.fill_dit(trunk, tensors, modulation)
    assert dit_error(model, trunk) > 1e-3


@pytest.mark.parametrize("name", ["blocks.0.proj.bias", "blocks.1.fc2.bias", "blocks.2.qkv.bias", "patch_embed.bias", "pos_embed"])
def test_leaving_out_one_tensor_breaks_parity(name: str) -> None:
    model, tensors, config = small.dit()
    trunk = folded_dit(tensors, config)
    trunk.state_dict()[name].zero_()
    assert dit_error(model, trunk) > 1e-3


def test_a_gate_missing_from_the_bias_alone_breaks_parity() -> None:
    model, tensors, config = small.dit()
    trunk = folded_dit(tensors, config)
    trunk.blocks[0].proj.bias.copy_(tensors["blocks.0.attn.proj.bias"])  # type: ignore[union-attr]
    assert dit_error(model, trunk) > 1e-3


@pytest.mark.parametrize("change", [{"t": 31}, {"label": 4}])
def test_another_timestep_or_label_gives_other_features(change: dict[str, int]) -> None:
    model, tensors, config = small.dit()
    trunk = dit_trunk(config)
    fold.fill_dit(trunk, tensors, fold.dit_modulation(tensors, config, **{"t": T, "label": LABEL, **change}, blocks=3))
    assert dit_error(model, trunk) > 1e-4


def plaid_case(swept: bool) -> tuple[Any, dict[str, torch.Tensor], SimpleNamespace, PlaidTrunk, Any]:
    model, tensors, config = small.plaid()
    trunk = PlaidTrunk(width=128, vocab=40, embed_dim=16, max_length=64, taps=TAPS, pooling="mean", swept=swept)
    level = fold.plaid_schedule(tensors).noise_level(0.2)
    fold.fill_plaid(trunk, tensors, config.depth, None if swept else level)
    return model, tensors, config, trunk, level


def plaid_error(model: Any, tensors: dict[str, torch.Tensor], level: Any, trunk: Callable[..., Any], pooling: str = "mean") -> float:
    generator = torch.Generator().manual_seed(9)
    tokens, lengths = torch.randint(40, (3, 9), generator=generator), torch.tensor([9, 4, 1])
    z = level.alpha * normalise_rows(tensors["embedding_matrix.matrix"])[tokens] + level.sigma * torch.randn(3, 9, 16, generator=generator)
    mask = torch.arange(9)[None] < lengths[:, None]
    stream = list(model.residual_stream(z, torch.full((3,), -level.log_snr, dtype=torch.float64), mask))
    expected = [pool_masked(stream[block], mask, lengths, pooling) for block in TAPS]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(trunk(z, lengths), expected, strict=True))


def test_the_folded_plaid_equals_the_unfolded_one() -> None:
    model, tensors, _, trunk, level = plaid_case(swept=False)
    assert plaid_error(model, tensors, level, trunk) < 1e-6


def test_the_folded_plaid_equals_the_unfolded_one_with_max_pooling() -> None:
    model, tensors, _, trunk, level = plaid_case(swept=False)
    trunk.pooling = "max"
    assert plaid_error(model, tensors, level, trunk, "max") < 1e-6


def test_the_swept_plaid_equals_the_unfolded_one() -> None:
    model, tensors, config, trunk, level = plaid_case(swept=True)
    scale = fold.plaid_input_scale(level, config.embed_dim)
    embedding = fold.plaid_gamma_embedding(tensors, level).float()
    assert plaid_error(model, tensors, level, lambda z, lengths: trunk(z * scale, lengths, embedding)) < 1e-6


@pytest.mark.parametrize("name", ["blocks.0.attn_out.weight", "blocks.2.fc2.weight"])
def test_leaving_out_one_residual_scale_breaks_parity(name: str) -> None:
    model, tensors, config, trunk, level = plaid_case(swept=False)
    trunk.state_dict()[name].mul_(config.depth**0.5)
    assert plaid_error(model, tensors, level, trunk) > 1e-3


def test_leaving_out_the_input_scale_or_the_gamma_embedding_breaks_parity() -> None:
    model, tensors, config, trunk, level = plaid_case(swept=False)
    trunk.input.weight.div_(fold.plaid_input_scale(level, config.embed_dim))
    assert plaid_error(model, tensors, level, trunk) > 1e-3
    model, tensors, config, trunk, level = plaid_case(swept=False)
    trunk.input.bias.zero_()  # type: ignore[union-attr]
    assert plaid_error(model, tensors, level, trunk) > 1e-3


def test_truncation_keeps_the_residual_scale_of_the_full_depth() -> None:
    model, tensors, _, trunk, level = plaid_case(swept=False)
    fold.fill_plaid(trunk, tensors, 2, level)
    assert plaid_error(model, tensors, level, trunk) > 1e-3


def test_modulations_hold_one_plus_scale() -> None:
    _, tensors, config = small.dit()
    modulation = fold.dit_modulation(tensors, config, 30, 5, 2)
    level = dit_noise_level(30)
    assert modulation.shape == (2, 6, 64)
    assert modulation.dtype == torch.float64
    assert level.t == 30
    zeroed = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    constant = fold.dit_modulation(zeroed, config, 30, 5, 1)[0, :, 0].tolist()
    assert constant == [0, 1, 0, 0, 1, 0]
