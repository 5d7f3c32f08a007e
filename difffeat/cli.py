"""The command line: parses, calls one function per verb, prints. No logic lives here.

Every option can also be set as an environment variable DIFFFEAT_<OPTION>, or in a TOML file given by --config (tables named after the verbs).
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from difffeat.cli_source import with_source_options
from difffeat.errors import ConfigError, DifffeatError
from difffeat.runtime.sources_options import SourceOptions

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help="Features from diffusion transformers."
)
bench_app = typer.Typer(no_args_is_help=True, help="Measured claims: every speed figure comes from here.")
store_app = typer.Typer(no_args_is_help=True, help="Look into a feature store, check and repair it, compare two, or write one for other tools.")
app.add_typer(bench_app, name="bench")
app.add_typer(store_app, name="store")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
EngineName = Annotated[str, typer.Option(help="ort, torch, trt (TensorRT) or rtx (TensorRT-RTX).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<n>; default: cpu, for trt and rtx cuda.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine; default: the runtime's choice.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Preprocess = Annotated[str, typer.Option(help="center (crop) or squash (keeps what lies at the edges).")]
CaptionProtocol = Annotated[str, typer.Option(help="joined (all captions of a sample) or first.")]
BatchSize = Annotated[str, typer.Option(help="Samples in a batch, part of the store's identity; auto: the fastest that fits, found by a short run.")]
ShardSize = Annotated[int, typer.Option(help="Rows in a shard.")]
NumWorkers = Annotated[str, typer.Option(help="Threads that decode; auto: every core for a GPU, half of them where the engine uses them too.")]
BenchModel = Annotated[str, typer.Option("-m", "--model", help="As for export.")]
BenchWeights = Annotated[str | None, typer.Option(help="As for export; random for timing.")]
BenchBatch = Annotated[int, typer.Option(help="Samples in a batch.")]
Repeats = Annotated[int, typer.Option(help="Timed rounds; every round runs each candidate once.")]
EqualThreads = Annotated[int, typer.Option(help="Threads, the same for every candidate.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Where to write.")]


def _print_version(asked: bool) -> None:
    if asked:
        from difffeat import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="TOML file with options, in tables named after the verbs.")] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)] = False,
) -> None:
    """Truncate, fold, export; stream features into a store; probe, fuse and search."""
    if config is not None:
        context.default_map = read_config(config)


@app.command()
def export(
    model: Annotated[str, typer.Option("-m", "--model", help="dit, plaid, dit-digits, plaid-digits, or a geometry such as dit-b-4-256.")],
    weights: Annotated[str | None, typer.Option(help="File, folder, hub id, or random (for timing).")] = None,
    vae: Annotated[str | None, typer.Option(help="Autoencoder: folder or hub id. Default: stabilityai/sd-vae-ft-ema.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer.json of a text model.")] = None,
    blocks: Annotated[str | None, typer.Option(help="Blocks to tap, e.g. 12, 4,8,12 or all; block k is the stream after k blocks.")] = None,
    timestep: Annotated[str | None, typer.Option("-t", "--timestep", help="Timestep; for --graph sweep a list such as 0,10,30.")] = None,
    graph: Annotated[str | None, typer.Option(help="image, latents, from-latents, sweep or text.")] = None,
    noising: Annotated[
        str | None, typer.Option(help="random, constant, mean or ddim (inversion). Default: random for images, mean for text.")
    ] = None,
    noise_seed: Annotated[int, typer.Option(help="Seed of the baked-in noise of --noising constant.")] = 0,
    ddim_steps: Annotated[int, typer.Option(help="Steps of the inversion of --noising ddim.")] = 10,
    self_conditioning: Annotated[bool, typer.Option("--self-conditioning", help="Text: a first pass of the denoiser conditions the second.")] = False,
    label: Annotated[int | None, typer.Option(help="Class label of a DiT; default: its null label.")] = None,
    pooling: Annotated[str, typer.Option(help="mean, max, grid or tokens.")] = "mean",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16; for int8 see difffeat quantize.")] = "fp32",
    heads: Annotated[int | None, typer.Option(help="Attention heads, for geometries that were never published.")] = None,
    timestep_embedding: Annotated[str, typer.Option(help="original, or diffusers for weights trained with that library's formula.")] = "original",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Refuse the weights file unless it has this digest.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of --weights random.")] = 0,
    output: Output = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the truncated, folded graph of a backbone as ONNX, and check it against the unfolded network."""
    from difffeat.workflows.commands import run_export

    report = run_export(
        model, weights, vae=vae, tokenizer=tokenizer, blocks=blocks, timestep=timestep, graph=graph, noising=noising, noise_seed=noise_seed,
        ddim_steps=ddim_steps, self_conditioning=self_conditioning,
        label=label, pooling=pooling, dtype=dtype, heads=heads, timestep_embedding=timestep_embedding, revision=revision, sha256=sha256, seed=seed,
        output=output, overwrite=overwrite, say=_say(as_json),
    )  # fmt: skip
    _emit(report, as_json)


@app.command()
def build(
    artifact: Annotated[Path, typer.Argument(help="Folder written by difffeat export.")],
    engine: Annotated[str, typer.Option(help="rtx (builds without a GPU too) or trt (needs the GPU that will run it).")] = "trt",
    min_batch: Annotated[int, typer.Option(help="Smallest batch.")] = 1,
    opt_batch: Annotated[int, typer.Option(help="Batch that the plan is tuned for.")] = 32,
    max_batch: Annotated[int, typer.Option(help="Largest batch.")] = 64,
    opt_length: Annotated[int, typer.Option(help="Text: tokens that the plan is tuned for.")] = 32,
    max_length: Annotated[int, typer.Option(help="Text: most tokens of a caption.")] = 128,
    level: Annotated[int | None, typer.Option(help="Optimisation level of the builder, 0 to 5; default: its own.")] = None,
    as_json: Json = False,
) -> None:
    """Compile an artifact's graphs to TensorRT plans; what is there, sealed and fresh, is not built again."""
    from difffeat.engines.tensorrt_build import Profile
    from difffeat.workflows.building import run_build

    profile = Profile(min_batch=min_batch, opt_batch=opt_batch, max_batch=max_batch, opt_length=opt_length, max_length=max_length)
    _emit(run_build(artifact, engine=engine, profile=profile, level=level, say=_say(as_json)), as_json)


@app.command()
@with_source_options
def quantize(
    artifact: Annotated[Path, typer.Argument(help="fp32 artifact.")],
    source: Annotated[str, typer.Argument(help="Samples to calibrate on, as for extract.")],
    samples: Annotated[int, typer.Option(help="How many of them, evenly spread.")] = 64,
    parts: Annotated[str, typer.Option(help="all, or linears (the autoencoder stays in fp32).")] = "all",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    preprocess: Preprocess = "center",
    captions: CaptionProtocol = "joined",
    threads: Threads = None,
    output: Output = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    *,
    source_options: SourceOptions,
) -> None:
    """Make the int8 form of an fp32 artifact for ONNX Runtime on CPUs, calibrated on real samples."""
    from difffeat.recipe import RunRecipe
    from difffeat.workflows.quantizing import run_quantize

    run = RunRecipe(seed=seed, preprocessing=preprocess, captions=captions)
    result = run_quantize(
        artifact, source, output=output, samples=samples, parts=parts, run=run, source_options=source_options, threads=threads,
        overwrite=overwrite, say=_say(as_json),
    )  # fmt: skip
    _emit(result, as_json)


@app.command()
@with_source_options
def verify(
    artifact: Annotated[Path, typer.Argument(help="Artifact to verify.")],
    source: Annotated[str, typer.Argument(help="Real samples, as for extract.")],
    reference: Annotated[Path | None, typer.Option(help="fp32 artifact of the same taps; default: NAME beside NAME-fp16.")] = None,
    engine: Annotated[str | None, typer.Option(help="Engine to verify; default: ort, for fp16 and bf16 torch (rounds at each operation).")] = None,
    device: Device = None,
    threads: Threads = None,
    samples: Annotated[int, typer.Option(help="How many samples, evenly spread.")] = 64,
    batches: Annotated[str, typer.Option(help="Batch sizes to verify at: smallest, usual, largest.")] = "1,8,32",
    promote: Annotated[bool, typer.Option("--promote", help="Keep in fp32 what fails, write the artifact again, and verify it again.")] = False,
    probe: Annotated[Path | None, typer.Option(help="Frozen probe (safetensors): also print its mAP on both.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    preprocess: Preprocess = "center",
    captions: CaptionProtocol = "joined",
    as_json: Json = False,
    *,
    source_options: SourceOptions,
) -> None:
    """Hold an engine's features of real samples against fp32, tap by tap; beyond tolerance the exit code is 1."""
    from difffeat.engines import EngineOptions
    from difffeat.recipe import RunRecipe
    from difffeat.workflows.commands import parse_numbers
    from difffeat.workflows.verifying import run_verify

    result = run_verify(
        artifact, source, reference=reference, engine=engine, device=device, threads=threads, options=EngineOptions(), samples=samples,
        batches=[int(size) for size in parse_numbers(batches, "--batches", whole=True)], promoting=promote, probe=probe,
        run=RunRecipe(seed=seed, preprocessing=preprocess, captions=captions), source_options=source_options, say=_say(as_json),
    )  # fmt: skip
    _emit(result, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, driver, GPUs, and what each engine can do here, or why it cannot."""
    from difffeat.workflows.building import run_doctor

    _emit(run_doctor(), as_json)


@app.command()
@with_source_options
def extract(
    artifact: Annotated[Path | None, typer.Argument(help="Folder written by difffeat export; default: the newest under artifacts/.")] = None,
    source: Annotated[str | None, typer.Argument(help="Folder, CSV, JSONL, Parquet, tar shards, COCO JSON, data set; path or URL.")] = None,
    output: Output = None,
    engine: EngineName = "ort",
    device: Device = None,
    threads: Threads = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch: torch.compile.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="torch: convolutions with channels innermost.")] = False,
    tensorrt_provider: Annotated[bool, typer.Option("--tensorrt-provider", help="ort: its own TensorRT provider, on a GPU.")] = False,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="trt, rtx: replay CUDA graphs of shapes that come again.")] = False,
    batch_size: BatchSize = "32",
    shard_size: ShardSize = 1024,
    num_workers: NumWorkers = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    draws: Annotated[int, typer.Option(help="Noise draws to average.")] = 1,
    preprocess: Preprocess = "center",
    captions: CaptionProtocol = "joined",
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut captions that are too long instead of setting them aside.")] = False,
    store_dtype: Annotated[str, typer.Option(help="fp16 or fp32.")] = "fp16",
    latents: Annotated[Path | None, typer.Option(help="Latent cache: the store of a --graph latents artifact.")] = None,
    max_bad_fraction: Annotated[float, typer.Option(help="Stop when more than this share of samples is bad.")] = 0.5,
    executor: Annotated[str, typer.Option(help="local, or ray: several engines, on the GPUs of a machine or on many machines.")] = "local",
    workers: Annotated[int | None, typer.Option(help="ray: engines; default: one for each GPU, on CPUs one for each machine.")] = None,
    address: Annotated[str | None, typer.Option(help="ray: address of a cluster; default: this machine.")] = None,
    append: Annotated[bool, typer.Option("--append", help="Add the samples that the store lacks; what is there keeps its bytes.")] = False,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Run quarantined samples again, whose files may have been mended.")
    ] = False,
    allow_rebatch: Annotated[bool, typer.Option("--allow-rebatch", help="Go on with another batch size; the manifest records it.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    *,
    source_options: SourceOptions,
) -> None:
    """Stream samples through a graph into a feature store. Stopped or killed, the same command goes on where it was."""
    from difffeat.recipe import RunRecipe
    from difffeat.runtime.matching import one_mode
    from difffeat.workflows.commands import engine_options, parse_auto, run_extract

    size = parse_auto(batch_size, "--batch-size")
    options = engine_options(engine, size, compile=compile, channels_last=channels_last, tensorrt_provider=tensorrt_provider, cuda_graphs=cuda_graphs)
    run = RunRecipe(seed=seed, draws=draws, preprocessing=preprocess, captions=captions, truncate=truncate, store_dtype=store_dtype)
    result = run_extract(
        artifact, source, output, engine=engine, device=device, threads=threads, options=options, batch_size=size, shard_size=shard_size,
        num_workers=parse_auto(num_workers, "--num-workers"), run=run, latents=latents, source_options=source_options,
        max_bad_fraction=max_bad_fraction, executor=executor, workers=workers, address=address, mode=one_mode(append, retry_quarantined),
        rebatch=allow_rebatch, overwrite=overwrite, say=_say(as_json),
    )  # fmt: skip
    _emit(result, as_json)
    raise typer.Exit(result["exit_code"])


@app.command()
@with_source_options
def plan(
    artifact: Annotated[Path, typer.Argument(help="Folder written by difffeat export.")],
    source: Annotated[str, typer.Argument(help="As for extract.")],
    output: Output = None,
    workers: Annotated[int, typer.Option(help="Also reckon for so many engines, each on a machine or GPU of its own.")] = 1,
    seconds: Annotated[float, typer.Option(help="How long to measure, roughly, after warming up.")] = 10.0,
    engine: EngineName = "ort",
    device: Device = None,
    threads: Threads = None,
    batch_size: BatchSize = "32",
    shard_size: ShardSize = 1024,
    num_workers: NumWorkers = "auto",
    draws: Annotated[int, typer.Option(help="As for extract.")] = 1,
    preprocess: Preprocess = "center",
    captions: CaptionProtocol = "joined",
    store_dtype: Annotated[str, typer.Option(help="fp16 or fp32.")] = "fp16",
    latents: Annotated[Path | None, typer.Option(help="Latent cache, as for extract.")] = None,
    as_json: Json = False,
    *,
    source_options: SourceOptions,
) -> None:
    """Hours, disk and memory that an extraction will take, from a short run on its own samples."""
    from difffeat.recipe import RunRecipe
    from difffeat.runtime.feeding import Opening
    from difffeat.workflows.commands import engine_options, parse_auto
    from difffeat.workflows.planning import run_plan

    size = parse_auto(batch_size, "--batch-size")
    options = engine_options(engine, size)
    opening = Opening(artifact=artifact, engine=engine, device=device, threads=threads, options=options, latent_cache=latents)
    result = run_plan(
        opening, source, output, run=RunRecipe(draws=draws, preprocessing=preprocess, captions=captions, store_dtype=store_dtype), batch_size=size,
        shard_size=shard_size, num_workers=parse_auto(num_workers, "--num-workers"), workers=workers, seconds=seconds,
        source_options=source_options, say=_say(as_json),
    )  # fmt: skip
    _emit(result, as_json)


@app.command()
def probe(
    store: Annotated[Path, typer.Argument(help="Feature store to train on.")],
    validation: Annotated[Path | None, typer.Option(help="Store to select on; default: a seeded fifth of the training store.")] = None,
    test: Annotated[Path | None, typer.Option(help="Store to report on; read once.")] = None,
    taps: Annotated[str | None, typer.Option(help="Taps such as b12/t30, separated by commas; default: all.")] = None,
    method: Annotated[str, typer.Option(help="adam (the paper's), ridge or logistic.")] = "adam",
    seed: Annotated[int, typer.Option(help="Seed of the split and of the training order.")] = 0,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Train linear probes on a store, tap by tap."""
    from difffeat.workflows.probing import run_probe

    _emit(run_probe(store, validation=validation, test=test, taps=taps, method=method, seed=seed, output=output), as_json)


@app.command()
def fuse(
    image_store: Annotated[Path, typer.Argument(help="Image features to train on.")],
    text_store: Annotated[Path, typer.Argument(help="Text features of the same samples.")],
    image_tap: Annotated[str | None, typer.Option(help="Image tap; needed when the store has several.")] = None,
    text_tap: Annotated[str | None, typer.Option(help="Text tap; needed when the store has several.")] = None,
    test_image: Annotated[
        Path | None, typer.Option(help="Image store to report on; read once. Default: a seeded fifth of the training rows.")
    ] = None,
    test_text: Annotated[Path | None, typer.Option(help="Text store to report on.")] = None,
    fusion: Annotated[str, typer.Option(help="add (the paper's) or concat.")] = "add",
    width: Annotated[int, typer.Option(help="Shared width of the projections.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the split and of the training.")] = 0,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Train a fused classifier on image and text features joined by sample id."""
    from difffeat.workflows.probing import run_fuse

    result = run_fuse(
        image_store, text_store, image_tap=image_tap, text_tap=text_tap, test_image=test_image, test_text=test_text, fusion=fusion, width=width,
        seed=seed, output=output,
    )  # fmt: skip
    _emit(result, as_json)


@app.command()
def search(
    image_store: Annotated[Path, typer.Argument(help="Image store with many taps (from --graph sweep).")],
    text_store: Annotated[Path, typer.Argument(help="Text store with many taps.")],
    strategy: Annotated[str, typer.Option(help="local (Algorithm 1 of the paper), grid or halving.")] = "local",
    neighbourhood: Annotated[int, typer.Option(help="Grid steps around each peak, for local.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the selection split.")] = 0,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Find the best pair of image and text taps, with the full trace."""
    from difffeat.workflows.probing import run_search

    _emit(run_search(image_store, text_store, strategy=strategy, neighbourhood=neighbourhood, seed=seed, output=output), as_json)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="Artifact or feature store.")], as_json: Json = False) -> None:
    """Recipe, taps, shapes and sizes of an artifact or a store."""
    from difffeat.workflows.inspecting import run_inspect

    _emit(run_inspect(path), as_json)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for graphs, features and report.html.")] = Path("quickstart-out"),
    full: Annotated[bool, typer.Option("--full", help="The whole grid and three noise seeds throughout.")] = False,
    as_json: Json = False,
) -> None:
    """The whole method on digit scenes with the bundled weights: export, extract, grid, search, fuse, report."""
    from difffeat.workflows.quickstart import run_quickstart

    _emit(run_quickstart(output, full=full, say=_say(as_json)), as_json)


@bench_app.command("throughput")
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
    from difffeat.benchmarks.throughput import run_throughput

    result = run_throughput(
        model, weights, vae=vae, tokenizer=tokenizer, block=block, start=start, dtype=dtype, batch_size=batch_size, repeats=repeats,
        threads=threads, device=device, engines=tuple(part for part in engines.split(",") if part), compiled=compiled, output=output,
        say=_say(as_json),
    )  # fmt: skip
    _emit(result, as_json)


@bench_app.command("grid")
def bench_grid(
    model: BenchModel = "dit-digits",
    weights: BenchWeights = None,
    vae: Annotated[str | None, typer.Option(help="As for export.")] = None,
    blocks: Annotated[int | None, typer.Option(help="Blocks of the grid, from 1; default: up to the paper's relative depth.")] = None,
    batch_size: BenchBatch = 8,
    repeats: Repeats = 7,
    threads: EqualThreads = 2,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """A grid over twelve timesteps and all blocks, against the passes that it cannot do without."""
    from difffeat.benchmarks.grid import run_grid

    result = run_grid(
        model, weights, vae=vae, blocks=blocks, batch_size=batch_size, repeats=repeats, threads=threads, output=output, say=_say(as_json)
    )
    _emit(result, as_json)


@bench_app.command("text")
def bench_text(
    model: BenchModel = "plaid-digits",
    weights: BenchWeights = None,
    tokenizer: Annotated[str | None, typer.Option(help="As for export.")] = None,
    block: Annotated[int | None, typer.Option(help="Block to truncate at; default: the paper's relative depth.")] = None,
    captions: Annotated[int, typer.Option(help="How many captions, of 10 to 70 tokens.")] = 64,
    int8: Annotated[bool, typer.Option("--int8", help="Also ours in int8.")] = False,
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
        output=output, say=_say(as_json),
    )  # fmt: skip
    _emit(result, as_json)


@bench_app.command("extract")
def bench_extract(
    model: BenchModel = "dit-digits",
    weights: BenchWeights = None,
    vae: Annotated[str | None, typer.Option(help="As for export.")] = None,
    block: Annotated[int | None, typer.Option(help="Block to truncate at; default: the paper's relative depth.")] = None,
    images: Annotated[int, typer.Option(help="How many JPEGs.")] = 256,
    num_workers: Annotated[int | None, typer.Option(help="Threads that decode; default: as for extract.")] = None,
    batch_size: BenchBatch = 8,
    repeats: Repeats = 5,
    threads: EqualThreads = 2,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """JPEG files to a finished store, against the bare engine on the same batches; time per stage."""
    from difffeat.benchmarks.extraction import run_extraction

    result = run_extraction(
        model, weights, vae=vae, block=block, images=images, batch_size=batch_size, repeats=repeats, threads=threads, num_workers=num_workers,
        output=output, say=_say(as_json),
    )  # fmt: skip
    _emit(result, as_json)


@bench_app.command("store")
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

    _emit(run_storing(rows=rows, width=width, shard_rows=shard_rows, repeats=repeats, folder=folder, output=output, say=_say(as_json)), as_json)


@bench_app.command("precision")
def bench_precision(
    train: Annotated[int, typer.Option(help="Scenes that the probes are trained on.")] = 2000,
    test: Annotated[int, typer.Option(help="Scenes that features and probes are compared on.")] = 1000,
    precisions: Annotated[str, typer.Option(help="Of fp16, bf16 and int8, separated by commas.")] = "fp16,bf16,int8",
    models: Annotated[str, typer.Option(help="Of dit-digits and plaid-digits, separated by commas.")] = "dit-digits,plaid-digits",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """What low precision costs the bundled backbones, in features and in a frozen probe's mAP, at every tap."""
    from difffeat.benchmarks.precision import run_precision

    result = run_precision(
        train=train, test=test, precisions=tuple(precisions.split(",")), models=tuple(models.split(",")), output=output, say=_say(as_json)
    )
    _emit(result, as_json)


@store_app.command("info")
def store_info(path: Annotated[Path, typer.Argument(help="Feature store.")], as_json: Json = False) -> None:
    """Rows, quarantine by reason, taps, classes, recipe and engine of a store, and how to go on where it is unfinished."""
    from difffeat.workflows.storing import run_info

    _emit(run_info(path), as_json)


@store_app.command("verify")
def store_verify(path: Annotated[Path, typer.Argument(help="Feature store.")], as_json: Json = False) -> None:
    """Hash every file again; name each one that is not what its receipt says, and the command that mends it."""
    from difffeat.workflows.repairing import run_verify_store

    result = run_verify_store(path)
    _emit(result, as_json)
    raise typer.Exit(result["exit_code"])


@store_app.command("repair")
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
        path, artifact, source, device=device, threads=threads, latents=latents, source_options=source_options, dry_run=dry_run, say=_say(as_json)
    )
    _emit(result, as_json)
    raise typer.Exit(result["exit_code"])


@store_app.command("diff")
def store_diff(
    a: Annotated[Path, typer.Argument(help="Feature store.")],
    b: Annotated[Path, typer.Argument(help="Feature store to hold against it.")],
    taps: Annotated[str | None, typer.Option(help="Taps such as b12/t30, or b12/t30=b8/t30 for unlike ones; default: all that both have.")] = None,
    as_json: Json = False,
) -> None:
    """Compare two stores sample by sample: norms, cosines, distances, linear CKA, and how their configurations differ."""
    from difffeat.workflows.storing import run_diff

    _emit(run_diff(a, b, taps=taps), as_json)


@store_app.command("convert")
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
    _emit(result, as_json)


def read_config(path: Path) -> dict[str, Any]:
    """Options from TOML, for click's default map: tables are verbs; keys may be written with dashes."""
    import tomllib

    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from None

    def names(table: dict[str, Any]) -> dict[str, Any]:
        return {key.replace("-", "_"): names(value) if isinstance(value, dict) else value for key, value in table.items()}

    return names(data)


def _say(quiet: bool) -> Any:
    """Progress goes to standard error, so that standard output stays clean for results."""

    def say(message: str, end: str = "\n") -> None:
        if not quiet:
            _tell(message + end)

    return say


def _tell(text: str) -> None:
    """Write to standard error. Where nobody reads it any more (a closed terminal, a pipe that ended) the work goes on, or stops, as it should."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _emit(result: dict[str, Any], as_json: bool) -> None:
    """Print a result: its `text`, or all of it but the text as JSON."""
    if as_json:
        typer.echo(json.dumps({key: value for key, value in result.items() if key != "text"}, indent=2, sort_keys=True, default=str))
    else:
        typer.echo(result["text"])


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
    """Entry point: errors of ours end with their message and exit code, never with a traceback."""
    stops_like_ctrl_c()
    try:
        command()(standalone_mode=True)
    except DifffeatError as error:
        _tell(f"difffeat: {type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _tell("difffeat: stopped. What was finished is kept; run the same command again to go on.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
