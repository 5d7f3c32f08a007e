"""The command line: parses, calls one function per verb, prints. No logic lives here.

Every option can also be set as an environment variable, DIFFFEAT_<VERB>_<OPTION> or DIFFFEAT_<OPTION>, or in a TOML file given by --config (tables
named after the verbs). The command line counts first, then the variable of the verb, then the short one, then the file, then the default.
"""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

import typer

from difffeat.cli.environment import name_options, set_variables, unknown_variables
from difffeat.cli.printing import tell
from difffeat.cli.verbs import app
from difffeat.errors import DifffeatError, OutputError

WRONG_USE = 2
"""Exit code of wrong arguments, click's and ours."""


def command() -> Any:
    """The click command, each option also settable by the environment."""
    built = typer.main.get_command(app)
    name_options(built)
    return built


def stops_like_ctrl_c() -> None:
    """A scheduler's stop is handled like Ctrl-C: finished shards are kept."""
    for number in (signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ())):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def main() -> None:
    """Entry point: errors of ours, and files that the system refuses, end with their message and exit code, never with a traceback."""
    from difffeat.probe.provenance import typed

    stops_like_ctrl_c()
    built = typer.main.get_command(app)
    known = name_options(built)
    for line in unknown_variables(known):
        tell(f"difffeat: {line}\n")
    try:
        with typed(["difffeat", *sys.argv[1:]]):
            built(prog_name="difffeat", standalone_mode=True)
    except DifffeatError as error:
        _leave(error, set_variables(known))
    except OSError as error:  # a pipe that ended is not among them: click leaves without a word
        _leave(OutputError(f"{_told(error)}. Free space, or mend the path or its permissions, then run the same command again."))
    except SystemExit as end:
        if end.code == WRONG_USE:
            _tell_environment(set_variables(known))
        raise


def _tell_environment(names: list[str]) -> None:
    if names:
        tell(f"difffeat: the environment sets options too: {', '.join(names)}\n")


def _leave(error: DifffeatError, variables: list[str] | None = None) -> NoReturn:
    tell(f"difffeat: {type(error).__name__}: {error}\n")
    if error.exit_code == WRONG_USE:
        _tell_environment(variables or [])
    sys.exit(error.exit_code)


def _told(error: OSError) -> str:
    """What the system refused, and which file if it says so."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else f"a file was refused: {reason}"
