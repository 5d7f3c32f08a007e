"""Reading tensors from files that may be hostile: safetensors, or torch's own format without any code in it."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difffeat.errors import CheckpointMismatch, CheckpointNotFound, UntrustedFile

PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def read_tensors(path: Path, *, sha256: str | None = None, nested: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """All tensors of a file by name, memory-mapped where the format allows it.

    **Arguments:** `sha256` digest that the file must have; `nested` keys under which the state dict may lie, in order of preference.

    Raises CheckpointNotFound, UntrustedFile (code in the file, wrong digest), CheckpointMismatch (not a file of tensors).
    """
    if not path.is_file():
        raise CheckpointNotFound(f"{path} does not exist.")
    if sha256 is not None:
        check_digest(path, sha256)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLES:
        return _flat(_read_pickle(path), path, nested)
    raise CheckpointMismatch(f"{path} has a suffix we do not read; expected .safetensors, {', '.join(PICKLES)}.")


def check_digest(path: Path, expected: str) -> None:
    """Raises UntrustedFile unless the file's SHA-256 is the expected one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise UntrustedFile(f"{path} has SHA-256 {found}, but {expected} was pinned. Download it again, or correct --sha256.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointMismatch(f"{path} is not a readable safetensors file ({error}). Download it again.") from None


def _read_pickle(path: Path) -> Any:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise UntrustedFile(
            f"reading {path.suffix} files safely needs torch 2.10 or newer, this is {torch.__version__}. Upgrade torch, or convert to safetensors."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns of foreign pickle protocols just before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UntrustedFile(
            f"{path} wants to run code or holds more than tensors, so it was not opened ({reason}). Convert it to safetensors."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise CheckpointMismatch(f"{path} is no readable torch file ({type(error).__name__}: {error}). Download it again.") from None


def _flat(loaded: Any, path: Path, nested: tuple[str, ...]) -> dict[str, Tensor]:
    """The state dict itself, taken out of what a training checkpoint wraps around it."""
    for key in nested:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        keys = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise CheckpointMismatch(f"{path} holds no flat dict of tensors (found: {keys}).")
    return {str(name): tensor for name, tensor in loaded.items()}


def check_keys(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises CheckpointMismatch naming missing, surplus and wrongly shaped tensors."""
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append(f"missing: {_few(missing)}")
    if surplus := sorted(set(found) - set(expected)):
        problems.append(f"surplus: {_few(surplus)}")
    wrong = [
        f"{k} (expected {list(expected[k])}, found {list(found[k].shape)})"
        for k in sorted(set(expected) & set(found))
        if tuple(found[k].shape) != expected[k]
    ]
    if wrong:
        problems.append(f"wrong shape: {_few(wrong)}")
    if problems:
        raise CheckpointMismatch(f"{what} does not fit. {'; '.join(problems)}.")


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 bytes, sorted by name: the same for equal tensors, whatever file they came from."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to(torch.float32).contiguous()
        total.update(f"{name}:{list(tensor.shape)}\n".encode())
        total.update(memoryview(tensor.numpy().data).cast("B") if tensor.numel() else b"")
    return total.hexdigest()


def upcast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32, contiguous; tensors that are so already are shared, not copied."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointMismatch(f"{name} is {tensor.dtype}, expected floating point.")
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}


def draw(name: str, shape: tuple[int, ...], seed: int, *, mean: float = 0.0, std: float | None = None) -> Tensor:
    """A random tensor that depends on (seed, name) alone; std 1/√(fan-in) unless given."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")
    fan_in = 1
    for size in shape[1:]:
        fan_in *= size
    tensor = torch.empty(shape, dtype=torch.float32)
    return tensor.normal_(mean, std if std is not None else fan_in**-0.5, generator=torch.Generator().manual_seed(key))


def _few(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
