"""`difffeat bench`: every speed and accuracy claim is made by one of these."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from difffeat.cli.options import Device, EngineName, Json, Output
from difffeat.cli.printing import emit, say

app = typer.Typer(no_args_is_help=True, help="Measured claims: every speed figure comes from here.")

BenchModel = Annotated[str, typer.Option("-m", "--model", help="As for export.")]
BenchWeights = Annotated[str | None, typer.Option(help="As for export; random for timing.")]
BenchBatch = Annotated[int, typer.Option(help="Samples in a batch.")]
Repeats = Annotated[int, typer.Option(help="Timed rounds; every round runs each candidate once.")]
EqualThreads = Annotated[int, typer.Option(help="Threads, the same for every candidate.")]
Dtype = Annotated[str, typer.Option(help="fp32, fp16 or bf16: the graph's precision, and eager's where it runs beside.")]


@app.command("throughput")
def bench_throughput(
    model: BenchModel = "dit-digits",
    weights: BenchWeights = None,
    vae: Annotated[str | None, typer.Option(help="As for export.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="As for export.")] = None,
    block: Annotated[int | None, typer.Option(help="Block to truncate at; default: the paper's relative depth.")] = None,
    start: Annotated[str, typer.Option(help="pixels (with the autoencoder) or latents.")] = "pixels",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16, of ours and of eager alike.")] = "fp32",
    engines: Annotated[
        str, typer.Option(help="Besides ONNX Runtime: int8, torch, naive (unfolded export), trt, rtx, separated by commas.")
    ] = "torch",
    compiled: Annotated[bool, typer.Option("--compiled", help="Also torch.compile (a minute to warm up).")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<n>.")] = "cpu",
    batch_size: BenchBatch = 8,
    repeats: Repeats = 7,
    threads: EqualThreads = 2,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Inputs to features: eager with a hook, eager truncated, naive exports and our graphs, side by side in one run; JSON and a chart with -o."""
    from difffeat.benchmarks.asking import names
    from difffeat.benchmarks.throughput import run_throughput

    result = run_throughput(
        model, weights, vae=vae, tokenizer=tokenizer, block=block, start=start, dtype=dtype, batch_size=batch_size, repeats=repeats,
        threads=threads, device=device, engines=names(engines), compiled=compiled, output=output,
        say=say(as_json),
    )  # fmt: skip
    emit(result, as_json)


@app.command("grid")
def bench_grid(
    model: BenchModel = "dit-digits",
    weights: BenchWeights = None,
    vae: Annotated[str | None, typer.Option(help="As for export.")] = None,
    blocks: Annotated[int | None, typer.Option(help="Blocks of the grid, from 1; default: up to the paper's relative depth.")] = None,
    engine: EngineName = "ort",
    device: Device = None,
    dtype: Dtype = "fp32",
    batch_size: BenchBatch = 8,
    repeats: Repeats = 7,
    threads: EqualThreads = 2,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """A grid over twelve timesteps and all blocks, against the passes that it cannot do without."""
    from difffeat.benchmarks.grid import run_grid

    result = run_grid(
        model, weights, vae=vae, blocks=blocks, batch_size=batch_size, repeats=repeats, threads=threads, output=output, say=say(as_json),
        engine=engine, device=device, dtype=dtype,
    )  # fmt: skip
    emit(result, as_json)


@app.command("text")
def bench_text(
    model: BenchModel = "plaid-digits",
    weights: BenchWeights = None,
    tokenizer: Annotated[str | None, typer.Option(help="As for export.")] = None,
    block: Annotated[int | None, typer.Option(help="Block to truncate at; default: the paper's relative depth.")] = None,
    captions: Annotated[int, typer.Option(help="How many captions, of 10 to 70 tokens.")] = 64,
    int8: Annotated[bool, typer.Option("--int8", help="Also ours in int8 (ONNX Runtime on the CPU).")] = False,
    engine: EngineName = "ort",
    device: Device = None,
    dtype: Dtype = "fp32",
    batch_size: BenchBatch = 8,
    repeats: Repeats = 7,
    threads: EqualThreads = 2,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Captions of many lengths: ours in buckets of like length, eager padded to the longest."""
    from difffeat.benchmarks.text import run_text

    result = run_text(
        model, weights, tokenizer=tokenizer, block=block, captions=captions, batch_size=batch_size, repeats=repeats, threads=threads, int8=int8,
        output=output, say=say(as_json), engine=engine, device=device, dtype=dtype,
    )  # fmt: skip
    emit(result, as_json)


@app.command("extract")
def bench_extract(
    model: BenchModel = "dit-digits",
    weights: BenchWeights = None,
    vae: Annotated[str | None, typer.Option(help="As for export.")] = None,
    block: Annotated[int | None, typer.Option(help="Block to truncate at; default: the paper's relative depth.")] = None,
    images: Annotated[int, typer.Option(help="How many JPEGs.")] = 256,
    num_workers: Annotated[int | None, typer.Option(help="Threads that decode; default: as for extract.")] = None,
    engine: EngineName = "ort",
    device: Device = None,
    dtype: Dtype = "fp32",
    batch_size: BenchBatch = 8,
    repeats: Repeats = 5,
    threads: EqualThreads = 2,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """JPEG files to a finished store, against the bare engine on the same batches, one by one and overlapped; time per stage."""
    from difffeat.benchmarks.extraction import run_extraction

    result = run_extraction(
        model, weights, vae=vae, block=block, images=images, batch_size=batch_size, repeats=repeats, threads=threads, num_workers=num_workers,
        output=output, say=say(as_json), engine=engine, device=device, dtype=dtype,
    )  # fmt: skip
    emit(result, as_json)


@app.command("store")
def bench_store(
    rows: Annotated[int, typer.Option(help="Rows to write.")] = 1_000_000,
    width: Annotated[int, typer.Option(help="Numbers in a row, fp16.")] = 1152,
    shard_rows: Annotated[int, typer.Option(help="Rows in a shard.")] = 16384,
    folder: Annotated[Path | None, typer.Option(help="Where to write; default: the system's temporary folder.")] = None,
    repeats: Repeats = 3,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Writing a store against the disk's own sequential time for the same bytes, and reading it into a probe."""
    from difffeat.benchmarks.storing import run_storing

    emit(run_storing(rows=rows, width=width, shard_rows=shard_rows, repeats=repeats, folder=folder, output=output, say=say(as_json)), as_json)


@app.command("precision")
def bench_precision(
    train: Annotated[int, typer.Option(help="Scenes that the probes are trained on.")] = 2000,
    test: Annotated[int, typer.Option(help="Scenes that features and probes are compared on.")] = 1000,
    precisions: Annotated[str, typer.Option(help="Of fp16, bf16 and int8, separated by commas.")] = "fp16,bf16,int8",
    models: Annotated[str, typer.Option(help="Of dit-digits and plaid-digits, separated by commas.")] = "dit-digits,plaid-digits",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """What low precision costs the bundled backbones, in features and in a frozen probe's mAP, at every tap."""
    from difffeat.benchmarks.asking import names
    from difffeat.benchmarks.precision import run_precision

    result = run_precision(train=train, test=test, precisions=names(precisions), models=names(models), output=output, say=say(as_json))
    emit(result, as_json)


@app.command("intervals")
def bench_intervals(
    settings: Annotated[str | None, typer.Option(help="Names of settings, separated by commas; default: all.")] = None,
    simulations: Annotated[int, typer.Option(help="Simulated test sets of each setting.")] = 400,
    resamples: Annotated[int, typer.Option(help="Resamples of each interval.")] = 300,
    truth: Annotated[int, typer.Option(help="Further test sets whose mean score is the truth.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one for every core. The numbers do not depend on it.")] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """How often the 95 % intervals of scores hold the mean over test sets, by simulation, beside plain percentile intervals."""
    from difffeat.benchmarks.asking import names
    from difffeat.benchmarks.intervals import SETTINGS, run_intervals

    result = run_intervals(
        settings=tuple(SETTINGS) if settings is None else names(settings), simulations=simulations, resamples=resamples, truth=truth, seed=seed,
        workers=workers, output=output, say=say(as_json),
    )  # fmt: skip
    emit(result, as_json)
