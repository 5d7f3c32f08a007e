import numpy as np
import torch

from difffeat.export.plaid import Plaid, normalise_rows
from tests.export import small


def numpy_plaid(
    tensors: dict[str, torch.Tensor], depth: int, z: np.ndarray, gamma: np.ndarray, mask: np.ndarray, selfcond: np.ndarray
) -> list[np.ndarray]:
    """The residual stream in float64, from the published description."""
    w = {name.removeprefix("model."): tensor.double().numpy() for name, tensor in tensors.items()}
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    gelu = lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))  # noqa: E731
    norm = lambda v, weight: v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-5) * weight  # noqa: E731
    scale = 1 / np.sqrt(sigmoid(-gamma) / 16 + sigmoid(gamma))
    angles = gamma[:, None] * np.exp(np.linspace(-5, 5, 32))[None]
    embedding = np.concatenate([np.sin(angles), np.cos(angles)], 1) @ w["gamma_linear.weight"].T
    x = (z * scale[:, None, None]) @ w["input_linear.weight"].T + 4 * selfcond @ w["selfcond_linear.weight"].T + embedding[:, None]
    batch, length, width = x.shape
    heads = width // 64
    theta = np.arange(length)[:, None] / 10000 ** (np.arange(0, 64, 2) / 64)

    def turn(v: np.ndarray) -> np.ndarray:
        complex_pairs = (v[..., :32] + 1j * v[..., 32:]) * np.exp(1j * theta)
        return np.concatenate([complex_pairs.real, complex_pairs.imag], -1)

    stream = [x]
    for index in range(depth):
        b = f"blocks.{index}."
        qkv = (norm(x, w[b + "rmsnorm1.weight"]) @ w[b + "attn_qkv.weight"].T).reshape(batch, length, 3, heads, 64).transpose(2, 0, 3, 1, 4)
        scores = turn(qkv[0]) @ turn(qkv[1]).swapaxes(-1, -2) / 8 + np.where(mask[:, None, None, :], 0, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True) @ qkv[2]).transpose(0, 2, 1, 3).reshape(batch, length, width)
        x = x + y @ w[b + "attn_out.weight"].T / np.sqrt(depth)
        x = x + gelu(norm(x, w[b + "rmsnorm2.weight"]) @ w[b + "mlp.fc1.weight"].T) @ w[b + "mlp.fc2.weight"].T / np.sqrt(depth)
        stream.append(x)
    return stream


def test_the_residual_stream_is_the_published_one() -> None:
    model, tensors, config = small.plaid()
    rng = np.random.default_rng(0)
    z, selfcond, gamma = rng.normal(size=(2, 7, 16)), rng.normal(size=(2, 7, 16)), np.array([-3.0, 2.0])
    mask = np.arange(7)[None] < np.array([[7], [4]])
    expected = numpy_plaid(tensors, config.depth, z, gamma, mask, selfcond)
    single = [torch.tensor(v, dtype=torch.float32) for v in (z, gamma, selfcond)]
    stream = model.residual_stream(single[0], single[1], torch.tensor(mask), single[2])
    for found, reference in zip(stream, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), reference, rtol=0, atol=2e-5 * np.abs(reference).max())


def test_the_head_adds_the_likelihood_of_the_noisy_embedding() -> None:
    model, tensors, _ = small.plaid()
    rng = np.random.default_rng(1)
    x, z, gamma = rng.normal(size=(1, 3, 128)), rng.normal(size=(1, 3, 16)), np.array([1.5])
    table = tensors["embedding_matrix.matrix"].double().numpy()
    table = table / (np.linalg.norm(table, axis=1, keepdims=True) + 1e-8)
    centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * tensors["model.output_norm.weight"].double().numpy()
    logits = centred / 0.5 @ tensors["model.output_linear.weight"].double().numpy().T + tensors["model.output_linear.bias"].double().numpy()
    alpha, variance = np.sqrt(1 / (1 + np.exp(1.5))), 1 / (1 + np.exp(-1.5))
    logits = logits + alpha / variance * z @ table.T
    single = [torch.tensor(v, dtype=torch.float32) for v in (x, z, gamma)]
    found = model.head(single[0], single[1], single[2], normalise_rows(tensors["embedding_matrix.matrix"]))
    np.testing.assert_allclose(found.numpy(), logits, rtol=0, atol=2e-5 * np.abs(logits).max())


def test_parameter_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        state = Plaid(depth=24, width=2048, vocab=32768).state_dict()
    block = {
        "rmsnorm1.weight": [2048],
        "attn_qkv.weight": [6144, 2048],
        "attn_out.weight": [2048, 2048],
        "rmsnorm2.weight": [2048],
        "mlp.fc1.weight": [8192, 2048],
        "mlp.fc2.weight": [2048, 8192],
    }
    expected = {f"blocks.{i}.{name}": shape for i in range(24) for name, shape in block.items()}
    expected |= {"input_linear.weight": [2048, 16], "selfcond_linear.weight": [2048, 16], "gamma_linear.weight": [2048, 64]}
    expected |= {"output_norm.weight": [2048], "output_linear.weight": [32768, 2048], "output_linear.bias": [32768]}
    assert {name: list(tensor.shape) for name, tensor in state.items()} == expected
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e6, 1) == 1275.4
