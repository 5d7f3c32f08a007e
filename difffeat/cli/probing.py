"""The verbs that read features: probe, fuse and search; the settings of probes are options declared once for both verbs that train some."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from difffeat.cli.options import AllowShared, Json, Output, Splits, ValidationImage, ValidationText
from difffeat.cli.printing import emit, say
from difffeat.workflows.probe_options import ProbeOptions

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


@with_probe_options
def probe(
    store: Annotated[Path, typer.Argument(help="Feature store to train on.")],
    validation: Annotated[Path | None, typer.Option(help="Store to select on; default: a seeded 15 % of the training store.")] = None,
    test: Annotated[Path | None, typer.Option(help="Store to report on, read once; default: another seeded 15 % of the training store.")] = None,
    taps: Annotated[str | None, typer.Option(help="Taps such as b12/t30, separated by commas; default: all.")] = None,
    method: Annotated[str, typer.Option(help="adam (the paper's), ridge or logistic.")] = "adam",
    seed: Annotated[int, typer.Option(help="Seed of the split and of the training order.")] = 0,
    splits: Splits = None,
    allow_shared: AllowShared = False,
    output: Output = None,
    as_json: Json = False,
    *,
    probe_options: ProbeOptions,
) -> None:
    """Train linear probes on a store, tap by tap; learning rate or penalty is chosen on validation."""
    from difffeat.workflows.probing import run_probe

    result = run_probe(
        store, validation=validation, test=test, taps=taps, method=method, seed=seed, output=output, splits=splits, allow_shared=allow_shared,
        options=probe_options, say=say(as_json),
    )  # fmt: skip
    emit(result, as_json)


@with_probe_options
def fuse(
    image_store: Annotated[Path, typer.Argument(help="Image features to train on.")],
    text_store: Annotated[Path, typer.Argument(help="Text features of the same samples.")],
    image_tap: Annotated[str | None, typer.Option(help="Image tap; needed when the store has several.")] = None,
    text_tap: Annotated[str | None, typer.Option(help="Text tap; needed when the store has several.")] = None,
    test_image: Annotated[Path | None, typer.Option(help="Image store to report on; read once. Default: a seeded 15 % of the training rows.")] = None,
    test_text: Annotated[Path | None, typer.Option(help="Text store to report on.")] = None,
    validation_image: ValidationImage = None,
    validation_text: ValidationText = None,
    splits: Splits = None,
    allow_shared: AllowShared = False,
    fusion: Annotated[
        str | None, typer.Option(help="Which fusion is saved: add (the paper's, of adam) or concat. Default: add, without adam concat.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="Methods of all that is compared, of adam, ridge and logistic; the first one's fusion is saved.")
    ] = "adam,ridge",
    width: Annotated[int, typer.Option(help="Shared width of the projections.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the split and of the training.")] = 0,
    output: Output = None,
    as_json: Json = False,
    *,
    probe_options: ProbeOptions,
) -> None:
    """Train a fused classifier on image and text features joined by sample id, and compare it with each alone by the same method."""
    from difffeat.workflows.fusing import run_fuse
    from difffeat.workflows.pair_stores import PairStores

    given = PairStores(image_store, text_store, validation_image, validation_text, test_image, test_text, splits, allow_shared)
    result = run_fuse(
        given, image_tap=image_tap, text_tap=text_tap, fusion=fusion, width=width, seed=seed, output=output, method=method, options=probe_options
    )
    emit(result, as_json)


def search(
    image_store: Annotated[Path, typer.Argument(help="Image store with many taps (from --graph sweep).")],
    text_store: Annotated[Path, typer.Argument(help="Text store with many taps.")],
    strategy: Annotated[str, typer.Option(help="local (Algorithm 1 of the paper), grid or halving.")] = "local",
    neighbourhood: Annotated[int, typer.Option(help="Grid steps around each peak, for local.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    validation_image: ValidationImage = None,
    validation_text: ValidationText = None,
    test_image: Annotated[
        Path | None, typer.Option(help="Image store to score the found pair on, once. Default: a seeded 15 % of the joined rows.")
    ] = None,
    test_text: Annotated[Path | None, typer.Option(help="Text store to score the found pair on.")] = None,
    splits: Splits = None,
    allow_shared: AllowShared = False,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Find the best pair of image and text taps, with the full trace."""
    from difffeat.workflows.pair_stores import PairStores
    from difffeat.workflows.searching import run_search

    given = PairStores(image_store, text_store, validation_image, validation_text, test_image, test_text, splits, allow_shared)
    result = run_search(given, strategy=strategy, neighbourhood=neighbourhood, seed=seed, output=output)
    emit(result, as_json)
