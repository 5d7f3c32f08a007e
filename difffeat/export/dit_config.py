"""The geometry of a DiT: published sizes, what its shapes say, what bounds it before anything is built."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from difffeat.errors import CheckpointMismatch, ConfigError
from difffeat.export.dit import FREQUENCY_DIM
from difffeat.export.safe_files import block_count

SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
MAX_TOKENS, MAX_POSITIONS = 1 << 16, 1 << 27
_MOST = {
    "depth": 1024, "width": 1 << 16, "heads": 1 << 12, "patch": 1 << 8, "input_size": 1 << 14, "in_channels": 1 << 12, "out_channels": 1 << 13,
    "num_classes": 1 << 24, "mlp_ratio": 64,
}  # fmt: skip
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
    block_embedders: bool = False

    def __post_init__(self) -> None:
        if self.timestep_embedding not in ("original", "diffusers"):
            raise ConfigError(f"timestep_embedding must be original or diffusers, got {self.timestep_embedding!r}")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not int(name != "num_classes") <= value <= most:
                raise ConfigError(f"{name} of a DiT must be a whole number of at most {most}, got {repr(value)[:40]}")
        if self.width % self.heads:
            raise ConfigError(f"{self.heads} heads do not divide the width {self.width}")
        if self.width % 4:
            raise ConfigError(f"the width of a DiT is a multiple of 4 (its positions are sines and cosines of two coordinates), got {self.width}")
        if self.input_size % self.patch:
            raise ConfigError(f"the latents' side {self.input_size} is no multiple of the patch {self.patch}")
        if (tokens := (self.input_size // self.patch) ** 2) > MAX_TOKENS or tokens * self.width > MAX_POSITIONS:
            raise ConfigError(f"{tokens} tokens of width {self.width} are more than difffeat reads ({MAX_TOKENS}); is {self.input_size} in pixels?")

    def architecture(self) -> dict[str, Any]:
        """The numbers that the graph is built from, for the recipe."""
        left_out = {"name"} if self.block_embedders else {"name", "block_embedders"}
        return {key: value for key, value in asdict(self).items() if key not in left_out}


@dataclass(frozen=True)
class DiTWeights:
    """Tensors in the original layout, float32; `digest` depends on the tensors alone; `origin` is `file` or `random:<seed>`.

    `notes` are what a user should know of how they were read; `assumed` what contradicts a DiT as published, where the caller knows better.
    """

    config: DiTConfig
    tensors: Mapping[str, Tensor]
    digest: str
    origin: str = "file"
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


def _published() -> dict[str, DiTConfig]:
    found = {}
    for size, (depth, width, heads) in SIZES.items():
        for patch in (2, 4, 8):
            for pixels in (256, 512):
                name = f"dit-{size}-{patch}-{pixels}"
                found[name] = DiTConfig(name=name, depth=depth, width=width, heads=heads, patch=patch, input_size=pixels // 8)
    return found


DIT_CONFIGS: dict[str, DiTConfig] = _published()


def expected_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original state dict; with embedders for each block, those of block 0 stand at the top."""
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
        if config.block_embedders and index > 0:
            linear(f"blocks.{index}.t_embedder.mlp.0", d, FREQUENCY_DIM)
            linear(f"blocks.{index}.t_embedder.mlp.2", d, d)
            shapes[f"blocks.{index}.y_embedder.embedding_table.weight"] = (config.num_classes + 1, d)
    linear("final_layer.adaLN_modulation.1", 2 * d, d)
    linear("final_layer.linear", p * p * config.out_channels, d)
    return shapes


def infer_config(
    tensors: Mapping[str, Tensor], what: str, *, heads: int | None, name: str | None, timestep_embedding: str, given: int | None = None
) -> DiTConfig:
    """The geometry of an original state dict, from its shapes. `given` heads are the caller's own, and an error about them is one of an option."""
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight", "blocks.0.mlp.fc1.weight")
    if missing := [key for key in needed if key not in tensors]:
        raise CheckpointMismatch(f"{what} is no DiT checkpoint: it lacks {', '.join(missing)}.{looks_like(tensors)}")
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        _, tokens, _ = tensors["pos_embed"].shape
        hidden, classes = tensors["blocks.0.mlp.fc1.weight"].shape[0], tensors["y_embedder.embedding_table.weight"].shape[0]
        outputs = tensors["final_layer.linear.weight"].shape[0] // (patch * patch)
        mlp_ratio = hidden // width
    except (ValueError, ZeroDivisionError, IndexError):
        raise CheckpointMismatch(f"{what}: its tensors do not have a DiT's number of dimensions.") from None
    depth = block_count(tensors, "blocks.", what)
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= width or width % given):
        raise ConfigError(f"--heads must be a whole number that divides the width {width}, got {given!r}")
    if heads is None and (depth, width) not in _HEADS:
        raise CheckpointMismatch(
            f"{what} has {depth} blocks of width {width}, no published size; the file does not say how many heads: pass --heads."
        )
    side = math.isqrt(tokens)
    try:
        geometry = DiTConfig(
            name=name or f"dit-{depth}x{width}-{patch}-{side * patch * 8}",
            depth=depth,
            width=width,
            heads=_HEADS[depth, width] if heads is None else heads,
            patch=patch,
            input_size=side * patch,
            in_channels=channels,
            out_channels=outputs,
            num_classes=classes - 1,
            mlp_ratio=mlp_ratio,
            timestep_embedding=timestep_embedding,
        )
    except ConfigError as error:
        raise CheckpointMismatch(f"{what}: {error}.") from None
    return geometry if name else replace(geometry, name=_published_name(geometry))


_ELSEWHERE = (
    (r"(.*\.)?(down_blocks|up_blocks|input_blocks|output_blocks)\.\d", "Its names are those of a UNet (Stable Diffusion)."),
    (r"(model\.)?blocks\.\d+\.(rmsnorm1|attn_qkv)|matrix$|embedding_matrix", "Its names are those of a text diffusion; a Plaid is --model plaid."),
    (r"(.*\.)?(joint_blocks|joint_transformer_blocks|double_blocks|single_transformer_blocks)\.", "Its names are those of SD3 or FLUX."),
    (r"(.*\.)?blocks\.\d+\.(cross_attn|scale_shift_table)|caption_projection|t_block", "Its names are those of PixArt."),
    (r"(.*\.)?blocks\.\d+\.mlp\.w12|feat_rope", "Its names are those of LightningDiT."),
    (r"(first_stage_model\.)?(encoder\.|decoder\.|quant_conv)", "Its names are those of an autoencoder: it goes to --vae, in its folder."),
    (r"(.*\.)?(lora_\w+|\w*lora_(A|B|down|up))", "It is a LoRA: merge it into its base model first."),
    (r"(.*\.)?_?flat_param", "It is FSDP's flattened shard: save it with a full state dict (FullStateDictConfig)."),
    (r"(.*\.)?(patch_embed|cls_token|class_token)", "Its names are those of a vision transformer, no diffusion."),
)  # fmt: skip


def looks_like(names: Iterable[str]) -> str:
    """A sentence on what else a state dict may be; empty where nothing is known."""
    known = list(names)
    for pattern, sentence in _ELSEWHERE:
        if any(re.match(pattern, name) for name in known):
            return f" {sentence}"
    return f" It has {', '.join(known[:3])}." if known else ""


def _published_name(config: DiTConfig) -> str:
    for name, published in DIT_CONFIGS.items():
        if replace(published, name=config.name, num_classes=config.num_classes, timestep_embedding=config.timestep_embedding) == config:
            return name
    return config.name
