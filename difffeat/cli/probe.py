"""The settings of probes as options, declared once for the commands that train some."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

OPTIONS: dict[str, Any] = {
    "lr": Annotated[
        str | None, typer.Option(help="adam: learning rate, or several to choose from such as 1e-3,1e-2; default: chosen on validation.")
    ],
    "epochs": Annotated[int | None, typer.Option(help="adam: passes over the training rows; default: 40.")],
    "batch_size": Annotated[int | None, typer.Option(help="adam: rows of a step; default: 256.")],
    "weight_decay": Annotated[float | None, typer.Option(help="adam: added to the gradient; default: 0.")],
    "alphas": Annotated[str | None, typer.Option(help="ridge: penalty, or several to choose from; default: 1e-8 to 1e3, chosen on validation.")],
    "c": Annotated[float | None, typer.Option("--c", help="logistic: inverse strength of the penalty; default: chosen on validation.")],
    "loss": Annotated[str | None, typer.Option(help="adam: bce (several classes a sample), softmax (one) or auto.")],
}
"""Every field of ProbeOptions as a command's option."""


def with_probe_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `probe_options` is made from the options above, which it gets besides its own."""
    own = inspect.signature(command, eval_str=True)
    kept = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, parameter in own.parameters.items() if name != "probe_options"]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in OPTIONS.items()]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        from difffeat.workflows.probe_options import ProbeOptions

        asked = {name: given.pop(name) for name in OPTIONS}
        command(**given, probe_options=ProbeOptions(**asked))

    wrapped.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *added)}
    return wrapped
