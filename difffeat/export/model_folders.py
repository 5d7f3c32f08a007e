"""A model's folder in diffusers' layout: its config, its weights whole or in parts, and what pins them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from difffeat.errors import CheckpointMismatch, UntrustedFile
from difffeat.export.file_kinds import recognise
from difffeat.export.safe_files import check_digest, file_digest, read_tensors

STEM = "diffusion_pytorch_model"
MAX_JSON = 1 << 26
MAX_PARTS = 4096


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size} bytes are more than a config or an index has")
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        require_json(path)
        raise CheckpointMismatch(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(data, dict):
        raise CheckpointMismatch(f"{path} is no JSON object.")
    return data


def require_json(path: Path) -> None:
    """Raises CheckpointMismatch that names what else a file is, such as a Git LFS pointer; nothing where it begins like JSON."""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        if not head.startswith((b"{", b"[", b'"')):
            recognise(path)


def read_folder(folder: Path, stem: str = STEM, *, sha256: str | None = None, markers: Sequence[str] = ()) -> dict[str, Tensor]:
    """Tensors of one model folder: safetensors before `.bin`, full precision before a variant such as fp16, whole or in parts.

    `sha256` pins the one file; for weights in parts it is the digest of what `sha256sum PART...` prints, see `check_parts`.
    """
    index = _only(folder, rf"{stem}(\.\w+)?\.(safetensors|bin)\.index(\.\w+)?\.json")
    whole = _only(folder, rf"{stem}(\.\w+)?\.(safetensors|bin)")
    if index is not None and (whole is None or _rank(index.name) <= _rank(whole.name)):
        return read_parts(folder, index, sha256=sha256)
    if whole is not None:
        return read_tensors(whole, sha256=sha256, markers=markers)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    raise CheckpointMismatch(f"{folder} holds no {stem}.safetensors (it holds {found}).{_advice(folder)}")


def _advice(folder: Path) -> str:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".pt", ".pth", ".ckpt", ".safetensors", ".bin") and p.is_file())
    if (folder / ".metadata").is_file() or any(p.suffix == ".distcp" for p in folder.iterdir()):
        return (
            " It is a distributed checkpoint of PyTorch: make one file of it with python -m torch.distributed.checkpoint.format_utils dcp_to_torch."
        )
    return f" If the weights are {files[0].name}, pass that file itself." if files else ""


def _only(folder: Path, pattern: str) -> Path | None:
    """The file to prefer among those of a name's pattern: safetensors, then full precision."""
    found = sorted((p for p in folder.iterdir() if re.fullmatch(pattern, p.name) and p.is_file()), key=lambda p: (_rank(p.name), p.name))
    if len(found) > 1 and _rank(found[0].name) == _rank(found[1].name):
        raise CheckpointMismatch(f"{folder} holds {found[0].name} and {found[1].name}, and nothing says which is meant. Pass the file itself.")
    return found[0] if found else None


def _rank(name: str) -> tuple[bool, int]:
    variant = re.search(r"(?:\.index)?\.(\w+)(?:\.(?:safetensors|bin)|\.json)", name.removeprefix(STEM)) or re.search(r"\.index\.(\w+)\.json", name)
    known = {None: 0, "fp32": 1, "bf16": 2, "fp16": 3}
    word = variant[1] if variant and variant[1] not in ("safetensors", "bin", "index", "json") else None
    return ".safetensors" not in name, known.get(word, 4)


def read_parts(folder: Path, index: Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """Tensors of weights in parts. Raises CheckpointMismatch unless the index and the parts say the same of every tensor."""
    by_part = _weight_map(index)
    missing = [part for part in by_part if not (folder / part).is_file()]
    if missing:
        raise CheckpointMismatch(f"{index} names {len(missing)} parts that are not there: {', '.join(missing[:3])}. Download them too.")
    if sha256 is not None:
        check_parts([folder / part for part in by_part], sha256)
    merged: dict[str, Tensor] = {}
    for part, names in by_part.items():
        tensors = read_tensors(folder / part)
        if absent := sorted(names - set(tensors)):
            raise CheckpointMismatch(f"{index} says that {absent[0]} lies in {part}, and it does not. Download index and parts of one revision.")
        if surplus := sorted(set(tensors) - names):
            raise CheckpointMismatch(f"{folder / part} holds {surplus[0]}, which {index.name} gives to no or another part. Download both again.")
        merged |= tensors
    return merged


def _weight_map(index: Path) -> dict[str, set[str]]:
    """Part -> names of its tensors, parts in order."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(part, str) for part in mapping.values()):
        raise CheckpointMismatch(f"{index} must map tensors' names to files under weight_map; it has {repr(mapping)[:60]} there.")
    by_part: defaultdict[str, set[str]] = defaultdict(set)
    for name, part in mapping.items():
        by_part[part].add(name)
    if outside := [part for part in by_part if Path(part).name != part or part in ("", ".", "..") or "\\" in part or "\0" in part]:
        raise CheckpointMismatch(f"{index} points outside its folder: {outside[0]!r}.")
    if len(by_part) > MAX_PARTS:
        raise CheckpointMismatch(f"{index} names {len(by_part)} parts; at most {MAX_PARTS} are read.")
    return dict(sorted(by_part.items()))


def check_parts(parts: list[Path], expected: str) -> None:
    """Weights in parts have one digest: the SHA-256 of what `sha256sum PART...` prints, parts in the order of their names.

    Raises UntrustedFile unless it is the expected one.
    """
    ordered = sorted(parts, key=lambda part: part.name)
    if len(ordered) == 1:
        return check_digest(ordered[0], expected)
    total = hashlib.sha256("".join(f"{file_digest(part)}  {part.name}\n" for part in ordered).encode()).hexdigest()
    if total != expected.strip().lower().removeprefix("sha256:"):
        names = " ".join(part.name for part in ordered[:4]) + (" ..." if len(ordered) > 4 else "")
        raise UntrustedFile(
            f"the weights in {ordered[0].parent} lie in {len(ordered)} files of the common digest {total}, but {expected} was pinned. "
            "One digest pins "
            f"them all: that of `sha256sum {names} | sha256sum`, run in that folder. Download them again, or correct the digest."
        )
    return None
