"""Where an artifact is made: in a folder beside its place, which gets the name when it is whole and checked. One writer at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from difffeat.engines.artifact import DENOISER_FILE, DENOISER_TABLE_FILE, LATENTS_FILE, MODEL_FILE, RECIPE_FILE, TABLE_FILE, TOKENIZER_FILE
from difffeat.errors import ConfigError, OutputError, ParityError, StoreLocked
from difffeat.runtime.files import LOCK, TEMPORARY, Files, Lock

PARITY_FILE, REPORT_FILE = "parity.json", "verify.json"
_GRAPHS = (MODEL_FILE, LATENTS_FILE, DENOISER_FILE)
_OURS = {
    *_GRAPHS, *(f"{name}_data" for name in _GRAPHS), RECIPE_FILE, TABLE_FILE, DENOISER_TABLE_FILE, TOKENIZER_FILE, PARITY_FILE, REPORT_FILE, LOCK,
    "engines",
}  # fmt: skip
"""Names of what an artifact holds: a folder with nothing else is what a killed export left."""


def check_place(out: Path, overwrite: bool, *inputs: Path) -> None:
    """Raises ConfigError, before any work, where an artifact cannot be written to `out`, or where that would destroy one of the `inputs`."""
    if out.name in ("", ".."):
        raise ConfigError(f"-o {out} has no name of its own; an artifact is a folder that is replaced whole, such as artifacts/dit-b12-t30.")
    target = out.resolve()
    for given in inputs:
        source = given.expanduser().resolve()
        within = source in target.parents and (source / MODEL_FILE).is_file()
        if target == source or within or target in source.parents:
            raise ConfigError(f"-o {out} is {given}, which this command reads, or lies within it, or holds it. Choose another -o.")
    for folder in (target, *target.parents):
        if folder.exists() and not folder.is_dir():
            what = f"-o {out}" if folder == target else f"{folder}, where -o {out} would lie,"
            raise ConfigError(f"{what} is a file, and an artifact is a folder. Choose another -o.")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / MODEL_FILE).is_file():
        raise ConfigError(f"{out} exists and is not an artifact of ours; choose another -o.")
    if not overwrite:
        raise ConfigError(f"{out} already holds an artifact. Pass --overwrite to replace it, or another -o.")


@contextmanager
def staging_folder(out: Path, overwrite: bool, *inputs: Path) -> Iterator[Path]:
    """An empty folder beside `out` to build an artifact in, for one process alone; gone after an error, taken over from a process that was killed.

    Raises ConfigError as `check_place`, and where that folder holds something else; StoreLocked where another process builds there; OutputError
    where the system refuses a file.
    """
    check_place(out, overwrite, *inputs)
    staging = _beside(out, "partial")
    if staging.exists() and not _is_ours(staging):
        raise ConfigError(f"{staging}, where {out} would be made, holds something else; choose another -o, or move it away.")
    with _refused(out):
        staging.mkdir(parents=True, exist_ok=True)
        lock = Lock(staging)
        try:
            lock.__enter__()
        except StoreLocked as error:
            raise StoreLocked(f"another process makes {out}: {error}") from None
        own = staging.stat()
        try:
            _clear(staging)
            yield staging
        except BaseException:
            if staging.is_dir() and os.path.samestat(own, staging.stat()):  # else it has its name already, and this one is another process's
                shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            lock.__exit__(None, None, None)


def install(staging: Path, out: Path, parity: Any) -> Path:
    """Give a checked artifact its name; one that fails goes to `<out>.failed` and raises ParityError."""
    target = out if parity.passed else out.with_name(f"{out.name}.failed")
    replace_folder(staging, target)
    try:
        parity.require()
    except ParityError as error:
        raise ParityError(f"{error} It was kept at {target} for inspection.") from None
    return target


def replace_folder(staging: Path, target: Path) -> None:
    """Give a finished folder its name, durably; what had the name is removed only when the new one stands. A link stays, and what it leads to is
    replaced.
    """
    for file in staging.iterdir():
        Files().fsync(file)
    place = target.resolve()
    replaced = _beside(place, "replaced")
    if replaced.exists():
        if not _is_ours(replaced):
            raise ConfigError(f"{replaced}, which the old {target} would be called for a moment, holds something else; move it away.")
        shutil.rmtree(replaced)
    if place.exists():
        os.replace(place, replaced)
    os.replace(staging, place)  # with its lock: whoever looks meanwhile finds the name taken, not free
    (place / LOCK).unlink(missing_ok=True)
    Files().fsync(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _beside(out: Path, suffix: str) -> Path:
    """Beside what `out` leads to, so that renaming is one step, on one disk."""
    place = out.resolve()
    return place.with_name(f"{place.name}.{suffix}")


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and all(path.name in _OURS or path.name.endswith(TEMPORARY) for path in folder.iterdir())


def _clear(staging: Path) -> None:
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextmanager
def _refused(out: Path) -> Iterator[None]:
    """What the system refuses while an artifact is made becomes an error that names its place."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # one of ours, which says it already
            raise
        place = error.filename if error.filename is not None else out
        raise OutputError(
            f"writing {out} failed: {place}: {error.strerror or error}. Nothing was left half-written; free space, or mend the path or its "
            "permissions, then run the same command again."
        ) from error
