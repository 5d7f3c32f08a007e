"""DiT checkpoints: what people have on disk or on the hub, to the original layout in float32."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difffeat.errors import CheckpointMismatch
from difffeat.export.checkpoints import Checkpoint, facts_of, read_beside
from difffeat.export.claims import (
    DIT_TRAINING,
    model_contradictions,
    name_contradictions,
    output_contradictions,
    setting_contradictions,
    size_notes,
    speaking_names,
    stated_heads,
)
from difffeat.export.dit import sincos_position_embedding
from difffeat.export.dit_config import DIT_CONFIGS, SIZES, DiTConfig, DiTWeights, expected_shapes, infer_config, looks_like
from difffeat.export.dit_diffusers import check_config, diffusers_config, from_diffusers, save_dit_diffusers
from difffeat.export.hub import locate
from difffeat.export.model_folders import read_folder, read_json
from difffeat.export.safe_files import check_keys, draw, read_checkpoint, tensors_digest, upcast

__all__ = [
    "DIT_CONFIGS", "SIZES", "DiTConfig", "DiTWeights", "diffusers_config", "expected_shapes", "infer_config", "load_dit", "looks_like",
    "positions", "random_dit", "save_dit_diffusers", "save_dit_original",
]  # fmt: skip

MARKERS = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "transformer_blocks.0.norm1.linear.weight")


def load_dit(
    path_or_id: str | Path,
    *,
    heads: int | None = None,
    name: str | None = None,
    revision: str | None = None,
    sha256: str | None = None,
    timestep_embedding: str = "original",
    model: str | None = None,
    assume: bool = False,
) -> DiTWeights:
    """Load a DiT from a torch or safetensors file (bare, or a training checkpoint with whatever wraps it), a diffusers folder, or a hub id.

    The geometry is read off the shapes; heads are not in the file and come from the published table, from settings in it, or from `heads`.

    **Arguments:** `name` of weights that are known, such as the bundled ones; `model` what the caller takes them for, such as `dit-xl-2-256`;
    `assume` goes on where something that is said of the network contradicts DiT as published (SiT has the same names and shapes), and records it.

    Raises CheckpointNotFound, CheckpointMismatch, UntrustedFile.
    """
    path = locate(path_or_id, option="--weights", subfolder="transformer", revision=revision)
    read = _read_folder(path, sha256) if path.is_dir() else _read_file(path, sha256)
    what, tensors = read.what, read.tensors
    stated = stated_heads(read.facts)
    config = infer_config(
        tensors,
        what,
        heads=heads if heads is not None else stated[1] if stated else None,
        name=name,
        timestep_embedding=timestep_embedding,
        given=heads,
    )
    config = replace(config, block_embedders=read.block_embedders)
    if config.block_embedders and timestep_embedding == "original" and not assume:
        raise CheckpointMismatch(
            f"{what}: every block has embedders of its own (they differ from those of block 0), as training with diffusers leaves "
            "them. Its formula of the "
            "time embedding is another: pass --timestep-embedding diffusers. If they were trained with the original formula, pass --assume-dit."
        )
    names = speaking_names(path, str(path_or_id))
    found = list(dict.fromkeys(_contradictions(config, read, [] if name else names, model)))
    if found and not assume:
        raise CheckpointMismatch(
            f"{what} may not be what it is taken for, a DiT as published ({DIT_TRAINING}): {'; '.join(found[:5])}. SiT, REPA and "
            "others have DiT's names "
            "and shapes with another schedule, and their features would be wrong without a word. If you know that it is such a DiT, "
            "pass --assume-dit, "
            "and the recipe says so."
        )
    check_keys(tensors, expected_shapes(config), f"{what} (taken for {config.name})")
    notes = [*read.notes, *size_notes(read.facts, config), *(f"goes on although {words}" for words in found)]
    final = upcast(tensors, what)
    if not torch.allclose(final["pos_embed"], positions(config), atol=1e-2):
        notes.append("its positions are not DiT's sines and cosines but others, learned or shifted; they are taken as the file has them")
    return DiTWeights(config, final, tensors_digest(final), notes=tuple(notes), assumed=tuple(found))


@dataclass(frozen=True)
class _Read:
    """Tensors in the original layout as the file has them, and what is said beside them."""

    what: str
    tensors: dict[str, Tensor]
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    state: Checkpoint | None = None
    block_embedders: bool = False


def _read_file(path: Path, sha256: str | None) -> _Read:
    checkpoint = read_checkpoint(path, sha256=sha256, markers=MARKERS)
    if any(key.startswith("transformer_blocks.") for key in checkpoint.tensors):
        if not (path.parent / "config.json").is_file():
            raise CheckpointMismatch(f"{path} is in diffusers' layout; pass its folder, whose config.json says the image size.")
        return _from_folder(path.parent, checkpoint.tensors, read_json(path.parent / "config.json"), str(path), checkpoint.facts)
    beside, notes = read_beside(path)
    return _Read(str(path), checkpoint.tensors, {**checkpoint.facts, **beside}, (*checkpoint.notes, *notes), checkpoint.names, checkpoint)


def _read_folder(path: Path, sha256: str | None) -> _Read:
    place = path / "transformer" if (path / "transformer").is_dir() else path
    if not (place / "config.json").is_file() and any((place / f"{part}.pt").is_file() for part in ("embedding_matrix", "gamma_bounds")):
        raise CheckpointMismatch(f"{path} holds the files of a Plaid. Pass --model plaid.")
    if not (place / "config.json").is_file() and (place / "unet").is_dir():
        raise CheckpointMismatch(f"{path} is a pipeline with a UNet, which is no DiT.")
    tensors, config = read_diffusers_folder(path, sha256=sha256)
    return _from_folder(place, tensors, config, str(path), {})


def _from_folder(place: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], what: str, facts: Mapping[str, Any]) -> _Read:
    said = {**facts, **facts_of(config, "config.json")}
    pipeline = place.parent if place.name == "transformer" else place
    for name in ("model_index.json", "scheduler/scheduler_config.json", "scheduler_config.json"):
        if (pipeline / name).is_file():
            said |= facts_of({key: value for key, value in read_json(pipeline / name).items() if key != "id2label"}, name)
    check_config(config, f"{what}: config.json")
    final = from_diffusers(upcast(tensors, what), config, what)
    return _Read(what, final, said, _card_notes(pipeline), tuple(final), None, "blocks.1.y_embedder.embedding_table.weight" in final)


def _card_notes(folder: Path) -> tuple[str, ...]:
    """What a model card's head says of the base model."""
    card = folder / "README.md"
    if not card.is_file():
        return ()
    with card.open("rb") as file:
        head = file.read(4096).decode("utf-8", "replace")
    bases = re.findall(r"^base_model:\s*([\w./-]+)\s*$", head, re.M) if head.startswith("---") else []
    return tuple(f"its model card names {base} as the base model" for base in bases[:2])


def _contradictions(config: DiTConfig, read: _Read, names: Sequence[str], model: str | None) -> Iterator[str]:
    yield from output_contradictions(config, read.names)
    yield from setting_contradictions(read.facts, config)
    yield from name_contradictions(names, "dit", config)
    if model is not None:
        yield from model_contradictions(model, config)
    state = read.state
    if state is not None and names:
        if re.search(r"(?<![a-z])(no|non|without)[-_ ]?ema(?![a-z])", names[0], re.I):
            if state.averaged:
                yield f"the name {names[0]!r} speaks of weights without EMA, but those taken are under {state.place!r}"
        elif re.search(r"(?<![a-z])ema(?![a-z])", names[0], re.I) and state.place and not state.averaged:
            yield f"the name {names[0]!r} speaks of EMA weights, but the file has only those under {state.place!r}"


def read_diffusers_folder(folder: Path, *, sha256: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (diffusers' names) and config.json of a diffusers folder: the pipeline's, or its `transformer/`."""
    place = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = read_json(place / "config.json")
    return read_folder(place, sha256=sha256, markers=MARKERS), config


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
