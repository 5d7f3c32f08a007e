"""What a command prints: its result to standard output, its progress to standard error."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from typing import Any

import typer

from difffeat.errors import OutputError


def say(quiet: bool) -> Any:
    """Progress goes to standard error, so that standard output stays clean for results."""

    def line(message: str, end: str = "\n") -> None:
        if not quiet:
            tell(message + end)

    return line


def tell(text: str) -> None:
    """Write to standard error. Where nobody reads it any more (a closed terminal, a pipe that ended) the work goes on, or stops, as it should."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def emit(result: dict[str, Any], as_json: bool) -> None:
    """Print a result: its `text`, or all of it but the text as JSON. Raises OutputError; a pipe that ended is left to click, which leaves quietly."""
    own = {key: value for key, value in result.items() if key != "text"}
    try:
        typer.echo(json.dumps(own, indent=2, sort_keys=True, default=str) if as_json else result["text"])
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered would fail again at exit
        raise OutputError(
            f"the work is done, but its result could not be printed: {error.strerror}. The same command prints it when there is room."
        ) from error
