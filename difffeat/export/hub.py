"""Hub ids and local paths to folders and files on this disk."""

from __future__ import annotations

import re
from pathlib import Path

from difffeat.errors import CheckpointNotFound, MissingExtra

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def locate(path_or_id: str | Path, *, option: str, subfolder: str | None = None, revision: str | None = None) -> Path:
    """A local path as it is, or a hub id downloaded (through the hub's own cache, token and offline mode).

    **Arguments:** `option` the command-line option to name in errors; `subfolder` the part of the repository that is wanted.

    Raises CheckpointNotFound.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    text = str(path_or_id)
    if not _HUB_ID.fullmatch(text) or path.suffix in (*_PICKLE_SUFFIXES, ".safetensors", ".json"):
        raise CheckpointNotFound(f"{text} does not exist, and is no hub id (owner/name). Pass {option} PATH with a file or folder that does.")
    return download(text, option=option, subfolder=subfolder, revision=revision)


def download(repository: str, *, option: str, subfolder: str | None, revision: str | None) -> Path:
    """Fetch what is needed of a hub repository: its config and safetensors; pickles only where there are no safetensors."""
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtra("huggingface_hub", "export", "Loading a hub id") from None
    prefix = "" if subfolder is None else f"{subfolder}/"
    wanted = [pattern for part in {"", prefix} for pattern in (f"{part}config.json", f"{part}*.safetensors", f"{part}*.safetensors.index.json")]
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted))
        if not any(folder.rglob("*.safetensors")):
            pickles = [f"{part}*.bin" for part in {"", prefix}]
            folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=[*wanted, *pickles]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointNotFound(
            f"{repository} could not be fetched from the hub ({type(error).__name__}: {reason}). With no network, download the files on another "
            f"machine "
            f"and pass {option} PATH (a .pt or .safetensors file, or a diffusers folder); HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured."
        ) from None
    return folder
