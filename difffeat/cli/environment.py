"""Options from the environment: `DIFFFEAT_<VERB>_<OPTION>`, for one verb, before `DIFFFEAT_<OPTION>`, for all that have the option."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Any

PREFIX = "DIFFFEAT_"
OTHERS = ("DIFFFEAT_DATA", "DIFFFEAT_COMMIT", "DIFFFEAT_GPU_TESTS", "DIFFFEAT_TESTS_ARTIFACTS")
"""Variables that are read elsewhere: the folder of the key, and what tests and benchmarks ask for."""
TRAINING = ("probe", "fuse")
"""Verbs whose --batch-size is one of training: the short variable is for batches of extraction, and is not theirs."""
_COMMANDS_OWN = ("version", "install_completion", "show_completion", "help")
"""Options that end the program: a variable of that name would end every command."""


def name_options(command: Any) -> dict[str, str]:
    """Let every option of a click command, and of its verbs, be set by the environment. Returns the variables, each with the option that it sets."""
    known: dict[str, str] = {}
    for path, parameter in _options(command, ()):
        if parameter.name in _COMMANDS_OWN:
            continue
        option = max((name for name in parameter.opts), key=len)
        names = list(dict.fromkeys([_variable(*path, option), _variable(option)]))
        if parameter.name == "batch_size" and path[:1] in [(verb,) for verb in TRAINING]:
            names = names[:1]
        parameter.envvar, parameter.show_envvar = names, False  # two for each option would fill the help; its last line says how they are made
        known |= {name: f"{' '.join(path)} {option}".strip() for name in names}
    return known


def _options(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield from ((path, parameter) for parameter in command.params if parameter.param_type_name == "option")
    for name, verb in getattr(command, "commands", {}).items():
        yield from _options(verb, (*path, name))


def _variable(*parts: str) -> str:
    return PREFIX + "_".join(part.lstrip("-").replace("-", "_").upper() for part in parts)


def unknown_variables(known: Mapping[str, str], environment: Mapping[str, str] | None = None) -> list[str]:
    """A line for each variable that begins like ours and sets nothing, with the nearest that does."""
    given = os.environ if environment is None else environment
    lines = []
    for name in sorted(given):
        if not name.startswith(PREFIX) or name in known or name in OTHERS:
            continue
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Is it {near[0]}?" if near else ""
        lines.append(f"the environment variable {name} sets no option of difffeat.{hint}")
    return lines


def set_variables(known: Mapping[str, str], environment: Mapping[str, str] | None = None) -> list[str]:
    """Names of our variables that are set: where a command goes wrong, an option that nobody typed may be theirs."""
    given = os.environ if environment is None else environment
    return [name for name in sorted(known) if given.get(name)]
