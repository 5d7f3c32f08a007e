"""Reading tensors from files that may be hostile: safetensors, or torch's own format without any code in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difffeat.errors import CheckpointMismatch, CheckpointNotFound, UntrustedFile
from difffeat.export.checkpoints import Checkpoint, choose_state, facts_of
from difffeat.export.file_kinds import SAFETENSORS, recognise
from difffeat.export.pickles import load_pickle

MAX_BLOCKS = 1024
EXPANDED = 1 << 22
"""Values that a tensor may have beyond those of its storage."""


def read_checkpoint(path: Path, *, sha256: str | None = None, markers: Sequence[str] = ()) -> Checkpoint:
    """The state dict of a file, whatever is wrapped around it; see `choose_state`. The file is told by its bytes, not by its name.

    **Arguments:** `sha256` digest that the file must have; `markers` names of which the network has one.

    Raises CheckpointNotFound, UntrustedFile (code in the file, wrong digest), CheckpointMismatch (not a file of tensors).
    """
    if not path.exists():
        raise CheckpointNotFound(f"{path} does not exist.")
    if sha256 is not None and path.is_file():
        check_digest(path, sha256)
    kind = recognise(path)
    if kind == SAFETENSORS:
        loaded, metadata = _read_safetensors(path)
    else:
        loaded, metadata = load_pickle(path, kind), {}
    found = choose_state(loaded, str(path), markers)
    facts = {**found.facts, **facts_of(metadata, "metadata")}
    check_storage(found.tensors, path)
    return Checkpoint(found.tensors, found.place, found.averaged, found.others, found.names, facts, found.notes)


def read_tensors(path: Path, *, sha256: str | None = None, markers: Sequence[str] = ()) -> dict[str, Tensor]:
    """All tensors of a file by name, memory-mapped where the format allows it. Arguments and errors as for `read_checkpoint`."""
    return read_checkpoint(path, sha256=sha256, markers=markers).tensors


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path, expected: str) -> None:
    """Raises UntrustedFile unless the file's SHA-256 is the expected one."""
    found = file_digest(path)
    if found != expected.strip().lower().removeprefix("sha256:"):
        raise UntrustedFile(f"{path} has SHA-256 {found}, but {expected} was pinned. Download it again, or correct the pinned digest.")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 it is no mapping
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, MemoryError, OverflowError) as error:
        raise CheckpointMismatch(f"{path} is not a readable safetensors file ({error}): cut short or damaged. Download it again.") from None


def check_storage(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointMismatch for a tensor without data, or of more values than the file can hold: nothing is made larger than the file."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointMismatch(f"{path}: {name} has a shape and no data: it was saved from the meta device. Save it again with its values.")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise CheckpointMismatch(f"{path}: {name} is not a plain tensor ({tensor.layout}, {tensor.dtype}). Save it again as a dense one.")
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    held, size = sum(storages.values()), path.stat().st_size
    if held > size:
        raise CheckpointMismatch(f"{path} claims {held} bytes of tensors, and has {size}: it is damaged or made to fill memory. Download it again.")
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes() + EXPANDED:
            raise CheckpointMismatch(f"{path}: {name} claims {tensor.numel()} values, and its storage holds fewer: it is damaged or expanded.")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > 8 * held + EXPANDED:
        raise CheckpointMismatch(f"{path} claims {claimed} bytes of tensors that share {held} bytes: it is damaged or made to fill memory.")


def block_count(names: Iterable[str], prefix: str, what: str) -> int:
    """How many blocks there are, by names `<prefix><number>.…`. Raises CheckpointMismatch unless they are numbered 0, 1, 2 and so on."""
    texts = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    if bad := sorted(text for text in texts if not (text.isascii() and text.isdigit() and len(text) < 10)):
        raise CheckpointMismatch(f"{what}: {prefix}{bad[0][:40]} is no name of a block; blocks are numbered 0, 1, 2 and so on.")
    numbers = sorted(map(int, texts))
    if len(numbers) > MAX_BLOCKS:
        raise CheckpointMismatch(f"{what} has {len(numbers)} blocks; at most {MAX_BLOCKS} are read.")
    for expected, number in enumerate(numbers):
        if number != expected:
            raise CheckpointMismatch(f"{what} has blocks up to {prefix}{numbers[-1]}, but none called {prefix}{expected}: it does not fit.")
    return len(numbers)


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


def upcast(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """float32, contiguous; tensors that are so already are shared, not copied.

    Raises CheckpointMismatch for a tensor that holds no floating-point numbers, and for one with NaN or infinity.
    """
    found = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointMismatch(f"{what}: {name} is {tensor.dtype}, expected floating point. Quantised weights are not read.")
        try:
            found[name] = tensor.to(torch.float32).contiguous()
        except (RuntimeError, NotImplementedError):
            raise CheckpointMismatch(f"{what}: {name} is {tensor.dtype}, which torch does not turn into float32. Save it in another type.") from None
    if spoiled := [name for name, tensor in found.items() if not _is_finite(tensor)]:
        raise CheckpointMismatch(
            f"{what} holds NaN or infinity in {len(spoiled)} of {len(found)} tensors: {_few(spoiled)}. The training run diverged, or the file is "
            "damaged: take an earlier checkpoint, or download it again."
        )
    return found


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


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
