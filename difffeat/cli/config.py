"""Options from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difffeat.errors import ConfigError


def read_config(path: Path) -> dict[str, Any]:
    """Options from TOML, for click's default map: tables are verbs; keys may be written with dashes."""
    import tomllib

    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from None

    def names(table: dict[str, Any]) -> dict[str, Any]:
        return {key.replace("-", "_"): names(value) if isinstance(value, dict) else value for key, value in table.items()}

    return names(data)
