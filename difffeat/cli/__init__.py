"""The command line: parses, calls one function per verb, prints. No logic lives here.

Every option can also be set as an environment variable DIFFFEAT_<OPTION>, or in a TOML file given by --config (tables named after the verbs).
"""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

import typer

from difffeat.cli.printing import tell
from difffeat.cli.verbs import app
from difffeat.errors import DifffeatError, OutputError


def command() -> Any:
    """The click command, each option also settable as DIFFFEAT_<OPTION>."""
    built = typer.main.get_command(app)
    pending: list[Any] = [built]
    while pending:
        current = pending.pop()
        pending.extend(getattr(current, "commands", {}).values())
        for parameter in current.params:
            if parameter.param_type_name == "option" and parameter.envvar is None:
                name = max(parameter.opts, key=len).lstrip("-").replace("-", "_").upper()
                parameter.envvar = f"DIFFFEAT_{name}"
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
    try:
        with typed(["difffeat", *sys.argv[1:]]):
            command()(standalone_mode=True)
    except DifffeatError as error:
        _leave(error)
    except OSError as error:  # a pipe that ended is not among them: click leaves without a word
        _leave(OutputError(f"{_told(error)}. Free space, or mend the path or its permissions, then run the same command again."))


def _leave(error: DifffeatError) -> NoReturn:
    tell(f"difffeat: {type(error).__name__}: {error}\n")
    sys.exit(error.exit_code)


def _told(error: OSError) -> str:
    """What the system refused, and which file if it says so."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else f"a file was refused: {reason}"
