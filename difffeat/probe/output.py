"""Where probes write: whole files or none, and never over an older result unless asked."""

from __future__ import annotations

import contextlib
import os
import tempfile
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
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return target


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
    """Raises ConfigError where results could not be written into `folder`, because it or a folder above it is a file."""
    path = Path(folder)
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
                # Exclusive creation: two runs that end at once cannot both take the same name.
                with target.open("xb") as file:
                    file.write(data)
                return target
            except FileExistsError:
                continue


def _numbered(path: Path, number: int) -> Path:
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
