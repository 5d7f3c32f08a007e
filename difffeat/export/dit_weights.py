"""DiT checkpoints: the original state dict, or a diffusers folder, to the original layout in float32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difffeat.errors import CheckpointMismatch, ConfigError
from difffeat.export.dit import FREQUENCY_DIM, sincos_position_embedding
from difffeat.export.hub import locate
from difffeat.export.safe_files import check_keys, draw, read_tensors, tensors_digest, upcast

SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
_HEADS = {(depth, width): heads for depth, width, heads in SIZES.values()}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Geometry of a DiT. `input_size` is the side of the latents, `num_classes` the number of real classes (the null label comes after them)."""

    name: str
    depth: int
    width: int
    heads: int
    patch: int
    input_size: int
    in_channels: int = 4
    out_channels: int = 8
    num_classes: int = 1000
    mlp_ratio: int = 4
    timestep_embedding: str = "original"

    def __post_init__(self) -> None:
        if self.timestep_embedding not in ("original", "diffusers"):
            raise ConfigError(f"timestep_embedding must be original or diffusers, got {self.timestep_embedding!r}")
        if self.width % self.heads:
            raise ConfigError(f"{self.heads} heads do not divide the width {self.width}")


@dataclass(frozen=True)
class DiTWeights:
    """Tensors in the original layout, float32; `digest` depends on the tensors alone; `origin` is `file` or `random:<seed>`."""

    config: DiTConfig
    tensors: Mapping[str, Tensor]
    digest: str
    origin: str = "file"


def _published() -> dict[str, DiTConfig]:
    found = {}
    for size, (depth, width, heads) in SIZES.items():
        for patch in (2, 4, 8):
            for pixels in (256, 512):
                name = f"dit-{size}-{patch}-{pixels}"
                found[name] = DiTConfig(name=name, depth=depth, width=width, heads=heads, patch=patch, input_size=pixels // 8)
    return found


DIT_CONFIGS: dict[str, DiTConfig] = _published()


def load_dit(
    path_or_id: str | Path,
    *,
    heads: int | None = None,
    name: str | None = None,
    revision: str | None = None,
    sha256: str | None = None,
    timestep_embedding: str = "original",
) -> DiTWeights:
    """Load a DiT from an original `.pt` (bare or under `ema`), `.safetensors`, a diffusers folder, or a hub id.

    The geometry is read off the shapes; heads are not in the file and come from the published table or from `heads`.

    Raises CheckpointNotFound, CheckpointMismatch, UntrustedFile.
    """
    path = locate(path_or_id, option="--weights", subfolder="transformer", revision=revision)
    if path.is_dir():
        raw, folder_config = read_diffusers_folder(path, sha256=sha256)
        heads = heads or folder_config.get("num_attention_heads")
        tensors = from_diffusers(upcast(raw), folder_config, str(path))
    else:
        tensors = upcast(read_tensors(path, sha256=sha256, nested=("ema", "model", "state_dict")))
        if any(key.startswith("transformer_blocks.") for key in tensors):
            raise CheckpointMismatch(f"{path} is in diffusers' layout; pass its folder, whose config.json says the image size.")
    config = infer_config(tensors, str(path), heads=heads, name=name, timestep_embedding=timestep_embedding)
    check_keys(tensors, expected_shapes(config), f"{path} (taken for {config.name})")
    return DiTWeights(config, tensors, tensors_digest(tensors))


def expected_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original state dict."""
    d, p, hidden = config.width, config.patch, config.mlp_ratio * config.width
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, (config.input_size // p) ** 2, d)}

    def linear(key: str, outputs: int, inputs: int) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (outputs, inputs), (outputs,)

    shapes["x_embedder.proj.weight"], shapes["x_embedder.proj.bias"] = (d, config.in_channels, p, p), (d,)
    linear("t_embedder.mlp.0", d, FREQUENCY_DIM)
    linear("t_embedder.mlp.2", d, d)
    shapes["y_embedder.embedding_table.weight"] = (config.num_classes + 1, d)
    for index in range(config.depth):
        linear(f"blocks.{index}.attn.qkv", 3 * d, d)
        linear(f"blocks.{index}.attn.proj", d, d)
        linear(f"blocks.{index}.mlp.fc1", hidden, d)
        linear(f"blocks.{index}.mlp.fc2", d, hidden)
        linear(f"blocks.{index}.adaLN_modulation.1", 6 * d, d)
    linear("final_layer.adaLN_modulation.1", 2 * d, d)
    linear("final_layer.linear", p * p * config.out_channels, d)
    return shapes


def infer_config(tensors: Mapping[str, Tensor], what: str, *, heads: int | None, name: str | None, timestep_embedding: str) -> DiTConfig:
    """The geometry of an original state dict, from its shapes."""
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight", "blocks.0.mlp.fc1.weight")
    if missing := [key for key in needed if key not in tensors]:
        raise CheckpointMismatch(f"{what} is no DiT checkpoint: it lacks {', '.join(missing)}.")
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        _, tokens, _ = tensors["pos_embed"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
        hidden, classes = tensors["blocks.0.mlp.fc1.weight"].shape[0], tensors["y_embedder.embedding_table.weight"].shape[0]
        outputs = tensors["final_layer.linear.weight"].shape[0] // (patch * patch)
    except (ValueError, ZeroDivisionError):
        raise CheckpointMismatch(f"{what}: its tensors do not have a DiT's number of dimensions.") from None
    if heads is None and (depth, width) not in _HEADS:
        raise CheckpointMismatch(
            f"{what} has {depth} blocks of width {width}, no published size; the file does not say how many heads: pass --heads."
        )
    side = round(tokens**0.5)
    geometry = DiTConfig(
        name=name or f"dit-{depth}x{width}-{patch}-{side * patch * 8}",
        depth=depth,
        width=width,
        heads=heads or _HEADS[depth, width],
        patch=patch,
        input_size=side * patch,
        in_channels=channels,
        out_channels=outputs,
        num_classes=classes - 1,
        mlp_ratio=hidden // width,
        timestep_embedding=timestep_embedding,
    )
    return geometry if name else replace(geometry, name=_published_name(geometry))


def _published_name(config: DiTConfig) -> str:
    for name, published in DIT_CONFIGS.items():
        if replace(published, name=config.name, num_classes=config.num_classes, timestep_embedding=config.timestep_embedding) == config:
            return name
    return config.name


def read_diffusers_folder(folder: Path, *, sha256: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (diffusers' names) and config.json of a diffusers folder: the pipeline's, or its `transformer/`."""
    place = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = read_json(place / "config.json")
    return read_folder(place, sha256=sha256), config


def read_folder(folder: Path, stem: str = "diffusion_pytorch_model", *, sha256: str | None = None) -> dict[str, Tensor]:
    """Tensors of one model folder: safetensors (whole or in parts), else `.bin` read without code."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(Path(part).name != part for part in names):
            raise CheckpointMismatch(f"{index} points outside its folder.")
        merged: dict[str, Tensor] = {}
        for part in names:
            merged |= read_tensors(folder / part)
        return merged
    for suffix in (".safetensors", ".bin"):
        if (folder / f"{stem}{suffix}").is_file():
            return read_tensors(folder / f"{stem}{suffix}", sha256=sha256)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    raise CheckpointMismatch(f"{folder} holds no {stem}.safetensors (it holds {found}).")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointMismatch(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(data, dict):
        raise CheckpointMismatch(f"{path} is no JSON object.")
    return data


_EMBEDDER = {
    "timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
}
_BLOCK = {"attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2", "norm1.linear": "adaLN_modulation.1"}
_ENDS = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1", "proj_out_2": "final_layer.linear"}


def from_diffusers(tensors: Mapping[str, Tensor], folder_config: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """Diffusers' names to the original ones.

    The embedders, which diffusers repeats in every block, must be the same everywhere; positions, which it does not store, are the published table.

    Raises CheckpointMismatch naming what is missing, surplus or contradicts config.json.
    """
    left = dict(tensors)
    depth = 1 + max((int(key.split(".")[1]) for key in tensors if key.startswith("transformer_blocks.")), default=-1)
    if folder_config.get("num_layers", depth) != depth:
        raise CheckpointMismatch(f"{what}: config.json says num_layers = {folder_config['num_layers']}, but the weights have {depth} blocks.")
    found: dict[str, Tensor] = {}
    try:
        for theirs, ours in _ENDS.items():
            for part in ("weight", "bias"):
                found[f"{ours}.{part}"] = left.pop(f"{theirs}.{part}")
        for index in range(depth):
            _convert_block(left, found, index, what)
    except KeyError as error:
        raise CheckpointMismatch(f"{what} does not fit. missing: {error.args[0]}.") from None
    found["pos_embed"] = _positions(found["x_embedder.proj.weight"], folder_config, what)
    stored = left.pop("pos_embed.pos_embed", None)
    if stored is not None and not torch.allclose(stored.reshape(found["pos_embed"].shape), found["pos_embed"], atol=1e-5):
        raise CheckpointMismatch(f"{what}: pos_embed.pos_embed is not the sine-cosine table of a DiT.")
    if left:
        raise CheckpointMismatch(f"{what} does not fit. surplus: {', '.join(sorted(left)[:4])}.")
    return found


def _positions(projection: Tensor, folder_config: Mapping[str, Any], what: str) -> Tensor:
    size = folder_config.get("sample_size")
    patch = projection.shape[-1]
    if not isinstance(size, int) or size < patch or size % patch:
        raise CheckpointMismatch(
            f"{what}: config.json must give the latents' side as sample_size, a multiple of the patch ({patch}); it says {size!r}."
        )
    return torch.tensor(sincos_position_embedding(projection.shape[0], size // patch), dtype=torch.float32)[None]


def _convert_block(left: dict[str, Tensor], found: dict[str, Tensor], index: int, what: str) -> None:
    theirs, ours = f"transformer_blocks.{index}", f"blocks.{index}"
    for part in ("weight", "bias"):
        found[f"{ours}.attn.qkv.{part}"] = torch.cat([left.pop(f"{theirs}.attn1.to_{name}.{part}") for name in "qkv"])
        for source, target in _BLOCK.items():
            found[f"{ours}.{target}.{part}"] = left.pop(f"{theirs}.{source}.{part}")
    for source, target in _EMBEDDER.items():
        tensor = left.pop(f"{theirs}.norm1.emb.{source}")
        if target not in found:
            found[target] = tensor
        elif not torch.equal(found[target], tensor):
            raise CheckpointMismatch(f"{what}: {theirs}.norm1.emb.{source} differs from that of block 0; the embedders must be shared.")


def random_dit(config: DiTConfig, seed: int = 0) -> DiTWeights:
    """Every tensor drawn at random, gates included, in published shapes; for timing and tests. Positions are the true sine-cosine."""
    tensors = {}
    for name, shape in expected_shapes(config).items():
        if name == "pos_embed":
            tensors[name] = positions(config)
        elif name.endswith("embedding_table.weight"):
            tensors[name] = draw(name, shape, seed, std=0.5)
        elif name.endswith("bias"):
            tensors[name] = draw(name, shape, seed, std=0.2)
        else:
            tensors[name] = draw(name, shape, seed)
    return DiTWeights(config, tensors, tensors_digest(tensors), f"random:{seed}")


def positions(config: DiTConfig) -> Tensor:
    """The published sine-cosine positions, float32 [1, N, D]."""
    return torch.tensor(sincos_position_embedding(config.width, config.input_size // config.patch), dtype=torch.float32)[None]


def save_dit_original(weights: DiTWeights, path: Path, *, under_ema: bool = False) -> None:
    """Write the original `.pt` layout, bare or under `ema` as a training checkpoint has it."""
    state = {name: tensor.clone() for name, tensor in weights.tensors.items()} if under_ema else dict(weights.tensors)
    torch.save({"ema": state} if under_ema else state, path)


def save_dit_diffusers(weights: DiTWeights, folder: Path) -> None:
    """Write a diffusers `transformer/` folder: safetensors and config.json."""
    from safetensors.torch import save_file

    config, out = weights.config, {}
    for theirs, ours in _ENDS.items():
        for part in ("weight", "bias"):
            out[f"{theirs}.{part}"] = weights.tensors[f"{ours}.{part}"]
    for index in range(config.depth):
        theirs, ours = f"transformer_blocks.{index}", f"blocks.{index}"
        for part in ("weight", "bias"):
            for name, chunk in zip("qkv", weights.tensors[f"{ours}.attn.qkv.{part}"].chunk(3), strict=True):
                out[f"{theirs}.attn1.to_{name}.{part}"] = chunk.contiguous()
            for target, source in _BLOCK.items():
                out[f"{theirs}.{target}.{part}"] = weights.tensors[f"{ours}.{source}.{part}"]
        for target, source in _EMBEDDER.items():
            out[f"{theirs}.norm1.emb.{target}"] = weights.tensors[source].clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(out, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(diffusers_config(config), indent=2) + "\n")


def diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """config.json of `DiTTransformer2DModel`."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch,
        "num_embeds_ada_norm": config.num_classes,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }
