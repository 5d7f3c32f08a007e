"""Where probes write: whole files or none, and never over an older result unless asked."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from difffeat.errors import ConfigError, OutputError


def replace_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `path` as a whole: a reader sees the old file or the new one, never a part. Makes the folder.

    Raises ConfigError where `path` is a folder, OutputError when the system refuses the file.
    """
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name a file in it")
    with _told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _written_aside(target, data) as temporary:
            os.replace(temporary, target)
    return target


@contextlib.contextmanager
def _written_aside(target: Path, data: bytes) -> Iterator[Path]:
    """The bytes in a file of their own beside `target`, on disk, with the rights that the umask gives; gone in the end, whatever happens."""
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    """What the system refuses becomes an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename not in (None, str(target)) else ""
        reason = f"{place}{error.strerror or type(error).__name__}"
        raise OutputError(f"{target} could not be written: {reason}. Free space, or mend the path or its permissions, then try again.") from error


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raises ConfigError where results could not be written into `folder`, because it or a folder above it is a file, or it is a store or an
    artifact.
    """
    path = Path(folder)
    if (path / "manifest.json").is_file() and (path / "shards").is_dir():
        raise ConfigError(f"{path} is a feature store, whose files must stay as they are. Choose another -o for the results.")
    if (path / "recipe.json").is_file() and (path / "model.onnx").is_file():
        raise ConfigError(f"{path} is an artifact, which is replaced as a whole. Choose another -o for the results.")
    for place in (path, *path.parents):
        if place.is_dir():
            return
        if place.exists():
            raise ConfigError(f"{place} is a file, so results cannot be written into {path}. Choose another -o.")


def write_fresh(path: str | os.PathLike[str], data: bytes, beside: Sequence[str] = ()) -> Path:
    """Write to `path`, or to the first free of `name-2.suffix`, `name-3.suffix`, ... when it exists. Returns where it went.

    **Arguments:** `beside` names of files that will be written next to it under the same number, which must be free as well.
    Raises OutputError when the system refuses the file.
    """
    wanted = Path(path)
    with _told(wanted):
        wanted.parent.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            number += 1
            target = _numbered(wanted, number)
            if any(_numbered(wanted.with_name(name), number).exists() for name in beside):
                continue
            try:
                _take_name(target, data)
                return target
            except FileExistsError:
                continue


def _take_name(target: Path, data: bytes) -> None:
    """Raises FileExistsError where the name is taken, in one step with taking it: two runs that end at once cannot both have it."""
    with _written_aside(target, data) as temporary:
        try:
            os.link(temporary, target)
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            target.open("xb").close()
            os.replace(temporary, target)


def _numbered(path: Path, number: int) -> Path:
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
