"""Seals of compiled engines. A plan is native code: only what this user built is ever loaded.

The seal is an HMAC-SHA256 of the sidecar's canonical JSON (which holds the plan's SHA-256), made with a key in the user's own data folder.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difffeat.errors import ConfigError, UntrustedFile
from difffeat.recipe import canonical_json

KEY_BYTES = 32


def key_path() -> Path:
    """Where the key lies: $DIFFFEAT_DATA, or `difffeat` in $XDG_DATA_HOME, or in ~/.local/share."""
    own = os.environ.get("DIFFFEAT_DATA")
    folder = Path(own) if own else Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "difffeat"
    return folder / "engine.key"


def seal(sidecar: Mapping[str, Any]) -> str:
    """The seal (hex) of a sidecar. The key is made when there is none. Raises as `require_key`."""
    return hmac.new(_key(), canonical_json(dict(sidecar)).encode(), hashlib.sha256).hexdigest()


def is_sealed(sidecar: Mapping[str, Any], value: object) -> bool:
    """Whether `value` is this user's seal of the sidecar. Raises as `require_key`."""
    return isinstance(value, str) and value.isascii() and hmac.compare_digest(seal(sidecar), value)


def require_key() -> None:
    """Make the key where there is none. Raises ConfigError where it can be neither made nor read, UntrustedFile where it proves nothing."""
    _key()


def _key() -> bytes:
    path = key_path()
    try:
        return _read_or_made(path)
    except OSError as error:
        raise ConfigError(
            f"the key that seals engines can be neither made nor read: {path}: {error.strerror or error}. Set DIFFFEAT_DATA to a folder of your own "
            "that you may write to."
        ) from error


def _read_or_made(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        _make(path)
    status = path.stat()
    if stat.S_IMODE(status.st_mode) & 0o077 or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
        raise UntrustedFile(f"{path} can be read by others, so its seals prove nothing. Delete it; engines are then built anew.")
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise UntrustedFile(f"{path} is no key ({len(key)} bytes). Delete it; engines are then built anew.")
    return key


def _make(path: Path) -> None:
    """Written aside and linked, so that of two processes that start together both use one key."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(KEY_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        os.link(aside, path)
    except FileExistsError:
        return
    finally:
        aside.unlink()
