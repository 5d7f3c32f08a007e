"""What a command prints: its result to standard output, its progress to standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import typer


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
    """Print a result: its `text`, or all of it but the text as JSON."""
    if as_json:
        typer.echo(json.dumps({key: value for key, value in result.items() if key != "text"}, indent=2, sort_keys=True, default=str))
    else:
        typer.echo(result["text"])
