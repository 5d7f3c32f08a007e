"""Options from a file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from difffeat.errors import ConfigError


def read_config(path: Path, command: Any) -> dict[str, Any]:
    """Options from TOML, for click's default map: tables are verbs; keys may be written with dashes.

    **Arguments:** `command` the click group whose verbs and options the file may name. Raises ConfigError for a file that cannot be read, and for
    names that are none of those: a misspelt option would be passed over.
    """
    import tomllib

    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from None
    return _options(data, command, str(path))


def _options(table: dict[str, Any], command: Any, where: str) -> dict[str, Any]:
    """A table with its names as click has them: of a group its verbs, of a verb its options."""
    verbs = getattr(command, "commands", None)
    known = {name.replace("-", "_"): name for name in verbs or ()} if verbs is not None else {option.name: option.name for option in command.params}
    found = {}
    for key, value in table.items():
        name = known.get(key.replace("-", "_"))
        if name is None or (verbs is not None and not isinstance(value, dict)):
            kind = "a verb's table" if verbs is not None else "an option"
            similar = difflib.get_close_matches(key.replace("-", "_"), known, 1)
            hint = f" Is it {similar[0].replace('_', '-')}?" if similar else ""
            raise ConfigError(f"--config {where}: {key!r} is not {kind} that {command.name or 'difffeat'} knows.{hint}")
        found[name] = _options(value, verbs[name], f"{where}, [{key}]") if verbs is not None else value
    return found
