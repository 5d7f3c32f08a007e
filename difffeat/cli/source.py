"""The options that say how SOURCE is to be read, declared once for every command that takes one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from difffeat.runtime.sources_options import SourceOptions

OPTIONS: dict[str, Any] = {
    "images": Annotated[str | None, typer.Option(help="Folder or URL of the images of COCO annotations, or base of a manifest's relative paths.")],
    "coco_captions": Annotated[str | None, typer.Option(help="COCO: captions JSON beside the instances JSON given as SOURCE.")],
    "class_folders": Annotated[bool | None, typer.Option(help="Whether subfolders name classes; default: when they look like it.")],
    "image_column": Annotated[str | None, typer.Option(help="Column of the images (paths, URLs, bytes); default: image.")],
    "caption_column": Annotated[str | None, typer.Option(help="Column of the captions; default: captions or caption.")],
    "label_column": Annotated[str | None, typer.Option(help="Column of the labels, or several 0/1 columns, one a class; default: labels or label.")],
    "id_column": Annotated[str | None, typer.Option(help="Column of the ids; default: id, in tars the key (shard/key where keys repeat).")],
    "classes": Annotated[Path | None, typer.Option(help="File with one class name a line, for labels given as numbers or 0/1 vectors.")],
    "multi_hot": Annotated[
        bool | None,
        typer.Option(help="Whether lists of numbers are 0/1 vectors, of numbered classes without --classes."),
    ],
    "dataset": Annotated[str | None, typer.Option(help="Standard data set whose root SOURCE is; folder for none. Default: recognised.")],
    "split": Annotated[str | None, typer.Option(help="Split of a standard or saved data set; also SOURCE::SPLIT.")],
    "drop_unlabelled": Annotated[bool, typer.Option("--drop-unlabelled", help="Leave out samples without any label.")],
    "timeout": Annotated[float, typer.Option(help="URLs: seconds for an attempt; what goes on at 1 MiB/s is not cut off.")],
    "retries": Annotated[int, typer.Option(help="URLs: attempts after the first one.")],
    "total_timeout": Annotated[float, typer.Option(help="URLs: seconds for all attempts at one object.")],
}
"""Every field of SourceOptions as a command's option."""


def with_source_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `source_options` is made from the options above, which it gets besides its own."""
    own = inspect.signature(command, eval_str=True)
    kept = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, parameter in own.parameters.items() if name != "source_options"]
    defaults = {field.name: field.default for field in fields(SourceOptions)}
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=kind) for name, kind in OPTIONS.items()]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        asked = {name: given.pop(name) for name in OPTIONS}
        command(**given, source_options=SourceOptions(**asked))

    wrapped.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *added)}
    return wrapped
