import numpy as np
import pytest
import torch

from difffeat.export.dit import DiT, initialise_adaln_zero, sincos_position_embedding, timestep_frequencies
from tests.export import small


def numpy_dit_block(state: dict[str, np.ndarray], prefix: str, x: np.ndarray, c: np.ndarray, heads: int) -> np.ndarray:
    """One adaLN-Zero block in float64, from the published description."""

    def linear(name: str, v: np.ndarray) -> np.ndarray:
        return v @ state[f"{prefix}.{name}.weight"].T + state[f"{prefix}.{name}.bias"]

    def norm(v: np.ndarray) -> np.ndarray:
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)

    def gelu(v: np.ndarray) -> np.ndarray:
        return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))

    chunks = np.split(linear("adaLN_modulation.1", c / (1 + np.exp(-c))), 6, axis=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = (chunk[:, None] for chunk in chunks)
    batch, tokens, width = x.shape
    qkv = linear("attn.qkv", norm(x) * (1 + scale1) + shift1).reshape(batch, tokens, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
    scores = qkv[0] @ qkv[1].swapaxes(-1, -2) / np.sqrt(width // heads)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = (weights / weights.sum(-1, keepdims=True) @ qkv[2]).transpose(0, 2, 1, 3).reshape(batch, tokens, width)
    x = x + gate1 * linear("attn.proj", y)
    return x + gate2 * linear("mlp.fc2", gelu(linear("mlp.fc1", norm(x) * (1 + scale2) + shift2)))


def test_the_forward_pass_is_the_published_one() -> None:
    model, tensors, config = small.dit()
    state = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    z, t, label = torch.randn(2, 4, 8, 8), torch.tensor([30, 500]), torch.tensor([5, 1])
    angles = t.numpy()[:, None] * np.exp(-np.log(1e4) * np.arange(128) / 128)[None]
    hidden = np.concatenate([np.cos(angles), np.sin(angles)], 1) @ state["t_embedder.mlp.0.weight"].T + state["t_embedder.mlp.0.bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    c = hidden @ state["t_embedder.mlp.2.weight"].T + state["t_embedder.mlp.2.bias"] + state["y_embedder.embedding_table.weight"][label.numpy()]
    patches = z.double().numpy().reshape(2, 4, 4, 2, 4, 2).transpose(0, 2, 4, 1, 3, 5).reshape(2, 16, 16)
    x = patches @ state["x_embedder.proj.weight"].reshape(64, -1).T + state["x_embedder.proj.bias"] + state["pos_embed"]
    for found, index in zip(model.residual_stream(z, t, label), range(config.depth + 1), strict=True):
        if index:
            x = numpy_dit_block(state, f"blocks.{index - 1}", x, c, config.heads)
        np.testing.assert_allclose(found.numpy(), x, rtol=0, atol=2e-5 * np.abs(x).max())


def test_the_residual_stream_can_be_left_early() -> None:
    model, _, _ = small.dit()
    calls = []
    model.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    stream = model.residual_stream(torch.zeros(1, 4, 8, 8), torch.tensor([0]), torch.tensor([0]))
    for block, _ in zip(range(3), stream, strict=False):
        assert block <= 2
    assert not calls


@pytest.mark.parametrize("t", [0, 30, 500, 999])
def test_the_diffusers_convention_is_that_of_diffusers(t: int) -> None:
    from diffusers import DiTTransformer2DModel

    model, tensors, config = small.dit(timestep_embedding="diffusers")
    other = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=4,
        out_channels=8,
        num_layers=config.depth,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=config.num_classes,
    ).eval()
    assert isinstance(other.pos_embed.pos_embed, torch.Tensor)
    other.load_state_dict(diffusers_layout(tensors, config.depth), strict=False)
    z, label = torch.randn(3, 4, 8, 8), torch.tensor([0, 2, 5])
    with torch.no_grad():
        other.pos_embed.pos_embed.copy_(tensors["pos_embed"])
        expected = other(z, timestep=torch.full((3,), t), class_labels=label).sample
        found = model(z, torch.full((3,), t), label)
    assert (found - expected).norm() / expected.norm() < 1e-5
    original = DiT.from_config(small.DIT)
    original.load_state_dict(tensors)
    if t:
        with torch.no_grad():
            trap = (original(z, torch.full((3,), t), label) - expected).norm() / expected.norm()
        assert trap > 1e-3, "the two conventions must differ, or this test shows nothing"


def diffusers_layout(tensors: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """The tensors under diffusers' names, written out here once more as an independent check of the loader."""
    out = {f"pos_embed.proj.{part}": tensors[f"x_embedder.proj.{part}"] for part in ("weight", "bias")}
    for part in ("weight", "bias"):
        out[f"proj_out_1.{part}"] = tensors[f"final_layer.adaLN_modulation.1.{part}"]
        out[f"proj_out_2.{part}"] = tensors[f"final_layer.linear.{part}"]
        for index in range(depth):
            ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
            for name, chunk in zip("qkv", tensors[f"{ours}.attn.qkv.{part}"].chunk(3), strict=True):
                out[f"{theirs}.attn1.to_{name}.{part}"] = chunk
            out[f"{theirs}.attn1.to_out.0.{part}"] = tensors[f"{ours}.attn.proj.{part}"]
            out[f"{theirs}.ff.net.0.proj.{part}"] = tensors[f"{ours}.mlp.fc1.{part}"]
            out[f"{theirs}.ff.net.2.{part}"] = tensors[f"{ours}.mlp.fc2.{part}"]
            out[f"{theirs}.norm1.linear.{part}"] = tensors[f"{ours}.adaLN_modulation.1.{part}"]
            out[f"{theirs}.norm1.emb.timestep_embedder.linear_1.{part}"] = tensors[f"t_embedder.mlp.0.{part}"]
            out[f"{theirs}.norm1.emb.timestep_embedder.linear_2.{part}"] = tensors[f"t_embedder.mlp.2.{part}"]
    for index in range(depth):
        out[f"transformer_blocks.{index}.norm1.emb.class_embedder.embedding_table.weight"] = tensors["y_embedder.embedding_table.weight"]
    return out


def test_positions_are_sine_cosine_with_w_first() -> None:
    positions = sincos_position_embedding(16, 3)
    row, column = 2, 1
    omega = 10000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)])
    np.testing.assert_allclose(positions[row * 3 + column], expected)


def test_frequencies_of_both_conventions() -> None:
    assert timestep_frequencies("original")[-1] == pytest.approx(10000 ** (-127 / 128))
    assert timestep_frequencies("diffusers")[-1] == pytest.approx(1e-4)


def test_adaln_zero_is_the_identity_at_the_start() -> None:
    model = DiT.from_config(small.DIT)
    initialise_adaln_zero(model, torch.Generator().manual_seed(0))
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        first, *_, last = model.residual_stream(z, torch.tensor([10]), torch.tensor([0]))
        assert torch.equal(first, last)
        assert not model(z, torch.tensor([10]), torch.tensor([0])).any()
