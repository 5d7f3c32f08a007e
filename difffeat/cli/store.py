"""`difffeat store`: what can be done with a store that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from difffeat.cli.options import Device, Json, Output, Threads
from difffeat.cli.printing import emit, say
from difffeat.cli.source import with_source_options
from difffeat.runtime.sources_options import SourceOptions

app = typer.Typer(no_args_is_help=True, help="Look into a feature store, check and repair it, compare two, or write one for other tools.")


@app.command("info")
def store_info(path: Annotated[Path, typer.Argument(help="Feature store.")], as_json: Json = False) -> None:
    """Rows, quarantine by reason, taps, classes, recipe and engine of a store, and how to go on where it is unfinished."""
    from difffeat.workflows.storing import run_info

    emit(run_info(path), as_json)


@app.command("verify")
def store_verify(path: Annotated[Path, typer.Argument(help="Feature store.")], as_json: Json = False) -> None:
    """Hash every file again; name each one that is not what its receipt says, and the command that mends it."""
    from difffeat.workflows.repairing import run_verify_store

    result = run_verify_store(path)
    emit(result, as_json)
    raise typer.Exit(result["exit_code"])


@app.command("repair")
@with_source_options
def store_repair(
    path: Annotated[Path, typer.Argument(help="Feature store.")],
    artifact: Annotated[Path | None, typer.Argument(help="The artifact it was made with.")] = None,
    source: Annotated[str | None, typer.Argument(help="The source it was made from.")] = None,
    device: Device = None,
    threads: Threads = None,
    latents: Annotated[Path | None, typer.Option(help="Latent cache, as for extract.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    as_json: Json = False,
    *,
    source_options: SourceOptions,
) -> None:
    """Set aside what is damaged and compute only that again, to the same bytes; without ARTIFACT and SOURCE, print the command that does it."""
    from difffeat.workflows.repairing import run_repair

    result = run_repair(
        path, artifact, source, device=device, threads=threads, latents=latents, source_options=source_options, dry_run=dry_run, say=say(as_json)
    )
    emit(result, as_json)
    raise typer.Exit(result["exit_code"])


@app.command("diff")
def store_diff(
    a: Annotated[Path, typer.Argument(help="Feature store.")],
    b: Annotated[Path, typer.Argument(help="Feature store to hold against it.")],
    taps: Annotated[str | None, typer.Option(help="Taps such as b12/t30, or b12/t30=b8/t30 for unlike ones; default: all that both have.")] = None,
    as_json: Json = False,
) -> None:
    """Compare two stores sample by sample: norms, cosines, distances, linear CKA, and how their configurations differ."""
    from difffeat.workflows.storing import run_diff

    emit(run_diff(a, b, taps=taps), as_json)


@app.command("convert")
def store_convert(
    path: Annotated[Path, typer.Argument(help="Feature store.")],
    to: Annotated[str, typer.Option("--to", help="npy (autofaiss, embedding_reader), parquet (Hugging Face datasets) or webdataset.")],
    output: Output = None,
    taps: Annotated[str | None, typer.Option(help="Taps such as b12/t30, separated by commas; default: all.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp16 or fp32; default: the store's own.")] = None,
    rows_per_file: Annotated[int, typer.Option(help="Most rows in a file.")] = 100_000,
    keep_quarantined: Annotated[bool, typer.Option("--keep-quarantined", help="Keep rows that failed: zeros, with valid = false.")] = False,
    as_json: Json = False,
) -> None:
    """Write a store in a layout that other tools read; features keep every bit, quarantined rows are left out."""
    from difffeat.workflows.storing import run_convert

    result = run_convert(path, output, to, taps=taps, dtype=dtype, rows_per_file=rows_per_file, keep_quarantined=keep_quarantined)
    emit(result, as_json)
