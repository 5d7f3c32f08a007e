"""Plaid checkpoints: four state dicts in one folder, or one safetensors file with their names as prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difffeat.errors import CheckpointMismatch, CheckpointNotFound
from difffeat.export.claims import name_contradictions, speaking_names
from difffeat.export.dit_config import looks_like
from difffeat.export.model_folders import check_parts, require_json
from difffeat.export.plaid import HEAD_DIM, rotary_inverse_frequencies
from difffeat.export.safe_files import block_count, check_digest, check_keys, draw, read_tensors, tensors_digest, upcast

PARTS = ("noise_schedule", "gamma_bounds", "embedding_matrix", "model")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
MARKERS = {"noise_schedule": "W1", "gamma_bounds": "gamma_0", "embedding_matrix": "matrix", "model": "output_linear.weight"}
"""A tensor that each of the files has."""
ROTARY = "model.rotary_emb.inv_freq"
SCHEDULE_WIDTH = 1024
MAX_TOKENIZER = 1 << 28


@dataclass(frozen=True, kw_only=True)
class PlaidConfig:
    """Geometry of a Plaid. Heads are of 64 at every size; `width_base` is the width at which the head's multiplier is 1."""

    name: str
    depth: int
    width: int
    vocab: int
    embed_dim: int = 16
    width_base: int = 256
    max_length: int = 1024


@dataclass(frozen=True)
class PlaidWeights:
    """Tensors named `<state dict>.<key>`, float32."""

    config: PlaidConfig
    tensors: Mapping[str, Tensor]
    digest: str
    origin: str = "file"
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


PLAID_1B = PlaidConfig(name="plaid-1b", depth=24, width=2048, vocab=32768)


def load_plaid(path: str | Path, *, name: str | None = None, sha256: str | None = None, max_length: int = 1024, assume: bool = False) -> PlaidWeights:
    """Load a Plaid from its folder (`noise_schedule`, `gamma_bounds`, `embedding_matrix`, `model`; .pt or .safetensors), or one prefixed safetensors
    file.

    `sha256` pins the one file, or the four files together (see `check_parts`); `assume` goes on where a name speaks of another family.

    Raises CheckpointNotFound, CheckpointMismatch, UntrustedFile.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise CheckpointNotFound(f"{place} does not exist. Pass --weights FOLDER with Plaid's four files ({', '.join(f'{p}.pt' for p in PARTS)}).")
    raw = _read_folder(place, sha256) if place.is_dir() else read_tensors(place, sha256=sha256, markers=("model.output_linear.weight",))
    found = [] if name else list(name_contradictions(speaking_names(place, str(path)), "plaid", None))
    if found and not assume:
        raise CheckpointMismatch(
            f"{place} may not be what it is taken for, a Plaid: {'; '.join(found)}. If you know that it is one, pass --assume-plaid, and the recipe "
            "says so."
        )
    rotary = raw.pop(ROTARY, None)
    _check_rotary(rotary, str(place))
    config = infer_config(raw, str(place), name, max_length)
    check_keys(raw, expected_shapes(config), str(place))
    tensors = upcast(raw, str(place))
    low, high = (float(tensors[f"gamma_bounds.gamma_{end}"]) for end in (0, 1))
    if not low < high:
        raise CheckpointMismatch(f"{place}: gamma_0 = {low:g} is not below gamma_1 = {high:g}: this is no schedule of more and more noise.")
    return PlaidWeights(config, tensors, tensors_digest(tensors), notes=tuple(f"goes on although {words}" for words in found), assumed=tuple(found))


def _read_folder(folder: Path, sha256: str | None) -> dict[str, Tensor]:
    if (folder / "plaid.safetensors").is_file():
        return read_tensors(folder / "plaid.safetensors", sha256=sha256)
    if (folder / "config.json").is_file() and not (folder / "noise_schedule.pt").is_file():
        raise CheckpointMismatch(
            f"{folder} is a folder in diffusers' or transformers' layout, and Plaid needs {', '.join(PARTS)}. A DiT is --model dit."
        )
    paths: dict[str, Path] = {}
    for part in PARTS:
        path = next((folder / f"{part}{suffix}" for suffix in SUFFIXES if (folder / f"{part}{suffix}").is_file()), None)
        if path is None:
            raise CheckpointMismatch(f"{folder} lacks {part}.pt (or .safetensors); Plaid needs {', '.join(PARTS)}.")
        paths[part] = path
    if sha256 is not None:
        check_parts(list(paths.values()), sha256)
    return {f"{part}.{key}": tensor for part, path in paths.items() for key, tensor in read_tensors(path, markers=(MARKERS[part],)).items()}


def _check_rotary(found: Tensor | None, what: str) -> None:
    """The stored rotary frequencies are a buffer that we compute ourselves; another base would be another model."""
    if found is None:
        return
    expected = torch.tensor(rotary_inverse_frequencies(), dtype=torch.float32)
    exact = found.dtype in (torch.float32, torch.float64)
    if found.shape != expected.shape or not torch.allclose(found.float(), expected, rtol=1e-3 if exact else 0.1, atol=1e-8 if exact else 1e-2):
        raise CheckpointMismatch(f"{what}: rotary_emb.inv_freq is not 10000^(-2i/64); this is no published Plaid.")


def infer_config(tensors: Mapping[str, Tensor], what: str, name: str | None, max_length: int) -> PlaidConfig:
    """The geometry, from the shapes."""
    needed = ("embedding_matrix.matrix", "model.output_linear.weight", "model.blocks.0.attn_qkv.weight")
    if missing := [key for key in needed if key not in tensors]:
        raise CheckpointMismatch(f"{what} is no Plaid checkpoint: it lacks {', '.join(missing)}.{_otherwise(tensors)}")
    try:
        vocab, embed_dim = tensors["embedding_matrix.matrix"].shape
        _, width = tensors["model.output_linear.weight"].shape
    except ValueError:
        raise CheckpointMismatch(f"{what}: its tensors do not have Plaid's number of dimensions.") from None
    depth = block_count(tensors, "model.blocks.", what)
    if not width or width % HEAD_DIM:
        raise CheckpointMismatch(f"{what}: the width {width} is no multiple of {HEAD_DIM}, the size of a head.")
    published = (depth, width, vocab, embed_dim) == (PLAID_1B.depth, PLAID_1B.width, PLAID_1B.vocab, PLAID_1B.embed_dim)
    chosen = name or (PLAID_1B.name if published else f"plaid-{depth}x{width}")
    return PlaidConfig(name=chosen, depth=depth, width=width, vocab=vocab, embed_dim=embed_dim, max_length=max_length)


def _otherwise(names: Mapping[str, Tensor]) -> str:
    if any(name.endswith("x_embedder.proj.weight") for name in names):
        return " Its names are those of a DiT: pass --model dit."
    return looks_like(name.removeprefix("model.") for name in names if not name.startswith(tuple(f"{part}." for part in PARTS[:3])))


def expected_shapes(config: PlaidConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the four state dicts, prefixed."""
    d, e, v, h = config.width, config.embed_dim, config.vocab, SCHEDULE_WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "noise_schedule.W1": (h, 1),
        "noise_schedule.b1": (h,),
        "noise_schedule.W2": (1, h),
        "gamma_bounds.gamma_0": (),
        "gamma_bounds.gamma_1": (),
        "embedding_matrix.matrix": (v, e),
        "model.input_linear.weight": (d, e),
        "model.selfcond_linear.weight": (d, e),
        "model.gamma_linear.weight": (d, 64),
        "model.output_norm.weight": (d,),
        "model.output_linear.weight": (v, d),
        "model.output_linear.bias": (v,),
    }
    for index in range(config.depth):
        block = f"model.blocks.{index}"
        shapes |= {
            f"{block}.rmsnorm1.weight": (d,),
            f"{block}.attn_qkv.weight": (3 * d, d),
            f"{block}.attn_out.weight": (d, d),
            f"{block}.rmsnorm2.weight": (d,),
            f"{block}.mlp.fc1.weight": (4 * d, d),
            f"{block}.mlp.fc2.weight": (d, 4 * d),
        }
    return shapes


def random_plaid(config: PlaidConfig, seed: int = 0) -> PlaidWeights:
    """Every tensor drawn at random, in published shapes; the γ bounds at their initial −3 and 6."""
    tensors = {}
    for name, shape in expected_shapes(config).items():
        if name.startswith("gamma_bounds"):
            tensors[name] = torch.tensor(-3.0 if name.endswith("0") else 6.0)
        elif "norm" in name:
            tensors[name] = draw(name, shape, seed, mean=1.0, std=0.1)
        else:
            tensors[name] = draw(name, shape, seed, std=1.0 if len(shape) < 2 or "noise_schedule" in name or "matrix" in name else None)
    return PlaidWeights(config, tensors, tensors_digest(tensors), f"random:{seed}")


def save_plaid(weights: PlaidWeights, folder: Path) -> None:
    """Write the four published `.pt` files, the rotary buffer included."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        state = {name.removeprefix(f"{part}."): tensor for name, tensor in weights.tensors.items() if name.startswith(f"{part}.")}
        if part == "model":
            state["rotary_emb.inv_freq"] = torch.tensor(rotary_inverse_frequencies(), dtype=torch.float32)
        torch.save(state, folder / f"{part}.pt")


def load_tokenizer_file(path: str | Path, *, vocab: int | None = None, sha256: str | None = None) -> bytes:
    """The bytes of a `tokenizer.json`, checked to open and to fit the vocabulary; `sha256` pins them.

    Raises CheckpointNotFound, CheckpointMismatch, UntrustedFile.
    """
    from tokenizers import Tokenizer

    place = Path(path).expanduser()
    if place.is_file() and sha256 is not None:
        check_digest(place, sha256)
    if place.is_file() and place.stat().st_size > MAX_TOKENIZER:
        raise CheckpointMismatch(f"{place} has {place.stat().st_size} bytes, more than any tokenizer: it is another file.")
    if not place.is_file():
        raise CheckpointNotFound(f"{place} does not exist. Pass --tokenizer FILE (for Plaid 1B: owt2_tokenizer.json, which comes with the weights).")
    content = place.read_bytes()
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises bare Exception
        require_json(place)
        raise CheckpointMismatch(f"{place} is no tokenizer that the tokenizers library reads ({error}).") from None
    size = tokenizer.get_vocab_size()
    if vocab is not None and size > vocab:
        raise CheckpointMismatch(f"{place} has {size} tokens, the model only {vocab}: it is another model's tokenizer.")
    return content
