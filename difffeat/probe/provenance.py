"""Where a result comes from: the command, the stores that it is of, and the version, written into every result file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_COMMAND: ContextVar[tuple[str, ...] | None] = ContextVar("command", default=None)


@contextmanager
def typed(command: Sequence[str]) -> Iterator[None]:
    """What is done within is done by this command line: its words, the program's name first."""
    token = _COMMAND.set(tuple(command))
    try:
        yield
    finally:
        _COMMAND.reset(token)


def provenance(stores: Mapping[str, Path | str | None] | None = None) -> dict[str, Any]:
    """What a result's file says of where it comes from, as plain JSON types.

    **Arguments:** `stores` the part that a store or another input plays ("train", "test image") -> its path; those that are None are left out.

    **Returns:** `command`, quoted for a shell, without passwords (None where Python called the function); `folder` in which it ran; `stores` with
    their absolute paths; `difffeat` the version.
    """
    from difffeat import __version__
    from difffeat.runtime.origin import without_password

    words = _COMMAND.get()
    given = {name: path for name, path in (stores or {}).items() if path is not None}
    return {
        "command": None if words is None else without_password(shlex.join(words)),
        "folder": os.getcwd(),
        "stores": {name: os.path.abspath(os.path.expanduser(path)) for name, path in given.items()},
        "difffeat": __version__,
    }
