"""The folder that all processes of a test session share, whoever of them is first."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

SHARED = "DIFFFEAT_TESTS_ARTIFACTS"
"""Names it to sub-processes and to the workers of the session."""


def shared_folder() -> Path:
    """Made by the first process that asks, which also removes it at its end."""
    if SHARED not in os.environ:
        folder = tempfile.mkdtemp(prefix="difffeat-tests-")
        os.environ[SHARED] = folder
        atexit.register(_remove, folder, os.getpid())
    return Path(os.environ[SHARED])


def _remove(folder: str, owner: int) -> None:
    """Not by a fork of the process that made it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
