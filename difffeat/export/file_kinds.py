"""What a file is, by its bytes. A name's suffix is only a name: files are renamed, and downloads go wrong."""

from __future__ import annotations

import zipfile
from pathlib import Path

from difffeat.errors import CheckpointMismatch, CheckpointNotFound

SAFETENSORS, TORCH_ZIP, TORCH_LEGACY, PICKLE = "safetensors", "torch", "legacy torch", "pickle"
READABLE = (SAFETENSORS, TORCH_ZIP, TORCH_LEGACY, PICKLE)

_HEAD = 512
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_ARCHIVE = "unpack it and pass what lies in it"
_SIGNATURES: tuple[tuple[bytes, int, str], ...] = (
    (b"version https://git-lfs", 0, "a Git LFS pointer, not the weights: run git lfs pull in that repository, or download the file itself"),
    (b"/annex/objects/", 0, "a git-annex pointer, not the weights: run git annex get in that repository"),
    (b"../.git/annex/objects/", 0, "a git-annex pointer, not the weights: run git annex get in that repository"),
    (b"# xet version", 0, "a Xet pointer, not the weights: download the file itself"),
    (b"\x1f\x8b", 0, f"compressed by gzip: {_ARCHIVE}"),
    (b"BZh", 0, f"compressed by bzip2: {_ARCHIVE}"),
    (b"\xfd7zXZ\x00", 0, f"compressed by xz: {_ARCHIVE}"),
    (b"\x28\xb5\x2f\xfd", 0, f"compressed by zstd: {_ARCHIVE}"),
    (b"\x04\x22\x4d\x18", 0, f"compressed by lz4: {_ARCHIVE}"),
    (b"7z\xbc\xaf\x27\x1c", 0, f"a 7z archive: {_ARCHIVE}"),
    (b"Rar!\x1a\x07", 0, f"a RAR archive: {_ARCHIVE}"),
    (b"ustar", 257, f"a tar archive: {_ARCHIVE}"),
    (b"GGUF", 0, "a GGUF file; difffeat reads safetensors and torch files"),
    (b"GGML", 0, "a GGML file; difffeat reads safetensors and torch files"),
    (b"tjgg", 0, "a GGML file; difffeat reads safetensors and torch files"),
    (b"\x89HDF\r\n", 0, "an HDF5 (Keras) file; difffeat reads safetensors and torch files"),
    (b"\x93NUMPY", 0, "a single numpy array; difffeat reads safetensors and torch files"),
    (b"TFL3", 4, "a TensorFlow Lite file; difffeat reads safetensors and torch files"),
    (b"ftrt", 0, "a TensorRT plan, not weights"),
    (b"%PDF", 0, "a PDF document, not weights"),
    (b"\x89PNG", 0, "a PNG picture, not weights"),
    (b"\xff\xd8\xff", 0, "a JPEG picture, not weights"),
    (b"\x7fELF", 0, "a program or library, not weights"),
    (b"PAR1", 0, "a Parquet table, not weights"),
)


def recognise(path: Path) -> str:
    """One of `READABLE`. Raises CheckpointNotFound, and CheckpointMismatch that says what else the file is and what to do."""
    if path.is_dir():
        raise CheckpointMismatch(f"{path} is a folder; a file is expected here.")
    if not path.is_file():
        raise CheckpointNotFound(f"{path} does not exist or is not a regular file.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise CheckpointNotFound(f"{path} cannot be read ({error.strerror or error}).") from None
    return _kind(path, head, size)


def _kind(path: Path, head: bytes, size: int) -> str:
    if not head:
        raise CheckpointMismatch(f"{path} is empty (0 bytes): the download or the disk failed. Download it again.")
    if _is_safetensors(head, size) or (path.suffix == ".safetensors" and head[8:9] == b"{"):
        return SAFETENSORS  # with a header of absurd length too: the library says what is wrong with it
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return TORCH_ZIP
    if _LEGACY_MAGIC in head[:32]:
        return TORCH_LEGACY
    for signature, offset, what in _SIGNATURES:
        if head[offset:].startswith(signature):
            raise CheckpointMismatch(f"{path} is {what}.")
    if head[0] == 0x80 and head[1:2] in b"\x02\x03\x04\x05":
        return PICKLE
    raise CheckpointMismatch(f"{path} {_otherwise(head)}")


def _is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= size - 8


def _otherwise(head: bytes) -> str:
    """Words for bytes without a signature: pages, JSON, text, ONNX, or not known."""
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
    printable = sum(character.isprintable() or character in "\r\n\t" for character in text)
    if head.count(0) or printable < 0.95 * max(len(text), 1) or len(text) < 0.5 * len(head):
        if head[0] == 0x08 and (b"pytorch" in head or b"onnx" in head or b"skl2" in head or head[2:3] in b"\x12\x1a"):
            return "is an ONNX graph, not a checkpoint; difffeat exports graphs from safetensors and torch files."
        return f"is neither a safetensors nor a torch file (its first bytes are {head[:8].hex(' ')}). Download it again, or convert it."
    lowered = text.lower()
    shown = " ".join(text[:80].split())
    if lowered.startswith(("<!doctype html", "<html", "<head", "<body", "<title")):
        return "is an HTML page, not weights: the download gave a page (of an error or a login). Download the file itself."
    if lowered.startswith(("<?xml", "<error")):
        return f"is XML, not weights, and begins {shown!r}: most often a storage service's error. Download the file itself."
    if lowered.startswith(("{", "[")):
        return f"is JSON, not weights, and begins {shown!r}: an error of a server, or a config. Download the file itself."
    return f"is text, not weights, and begins {shown!r}. Download the file itself."


def _check_zip(path: Path) -> None:
    """Raises CheckpointMismatch unless a zip file is what torch.save writes: a pickle and records, none of them compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointMismatch(
            f"{path} begins like a torch file and does not end like one ({error}): it is cut short or damaged. Download it again."
        ) from None
    names = [entry.filename for entry in entries]
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        raise CheckpointMismatch(f"{path} {_other_zip(names)}")
    if any(name.endswith("/constants.pkl") for name in names) or any("/code/" in name for name in names):
        raise CheckpointMismatch(
            f"{path} is a TorchScript archive: a program with weights inside. Where it was made, save the state dict: "
            "torch.save(model.state_dict(), FILE), or as safetensors."
        )
    if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size]:
        raise CheckpointMismatch(
            f"{path} has compressed records ({packed[0]}), which torch.save does not write: the archive was packed again, or is made to "
            "fill memory. Download the original."
        )


def _other_zip(names: list[str]) -> str:
    inside = ", ".join(names[:4]) or "nothing"
    if names and all(name.endswith(".npy") for name in names):
        return f"is a numpy archive ({inside}); difffeat reads safetensors and torch files."
    if any("serialized_exported_program" in name or "archive_format" in name for name in names):
        return "is an exported program of torch.export, not weights. Save the state dict where it was made."
    return f"is a zip archive with no torch file's records in it (it holds {inside}): {_ARCHIVE}."
