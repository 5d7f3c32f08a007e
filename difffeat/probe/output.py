"""Where probes write: whole files or none, and never over an older result unless asked."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `path` as a whole: a reader sees the old file or the new one, never a part. Makes the folder."""
    target = Path(path)
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


def write_fresh(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write to `path`, or to the first free of `name-2.suffix`, `name-3.suffix`, ... when it exists. Returns where it went."""
    wanted = Path(path)
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        target = wanted if number == 1 else wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        try:
            # Exclusive creation: two runs that end at once cannot both take the same name.
            with target.open("xb") as file:
                file.write(data)
            return target
        except FileExistsError:
            number += 1
