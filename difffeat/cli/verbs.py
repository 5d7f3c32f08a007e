"""The verbs: export, build, quantize, verify, extract, plan, probe, fuse, search and what shows their state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from difffeat.cli import bench, probing, store
from difffeat.cli.config import read_config
from difffeat.cli.options import (
    BatchSize,
    CaptionProtocol,
    ChannelsLast,
    Compile,
    CudaGraphs,
    Device,
    EngineName,
    Json,
    NumWorkers,
    Output,
    Overwrite,
    Pixels,
    Preprocess,
    ShardSize,
    StrictPixels,
    TensorrtProvider,
    Tf32,
    Threads,
)
from difffeat.cli.printing import emit, say
from difffeat.cli.source import with_source_options
from difffeat.errors import Interrupted
from difffeat.runtime.sources_options import SourceOptions


class Verbs(TyperGroup):
    """A stop by the user, at whatever moment, ends like one in the middle of an extraction: resumable."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("stopped. What was finished is kept; run the same command again to go on.") from None


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Features from diffusion transformers.",
    epilog="Every option can be set by the environment too: DIFFFEAT_EXTRACT_ENGINE for extract, DIFFFEAT_ENGINE for every verb that has it; "
    "or in the file of --config. The command line counts first.",
)
app.add_typer(bench.app, name="bench")
app.add_typer(store.app, name="store")


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
        context.default_map = read_config(config, context.command)


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
    revision: Annotated[str | None, typer.Option(help="Revision of the weights' hub id.")] = None,
    sha256: Annotated[
        str | None, typer.Option(help="Refuse the weights unless they have this digest; of weights in parts that of `sha256sum PART... | sha256sum`.")
    ] = None,
    vae_revision: Annotated[str | None, typer.Option(help="Revision of the autoencoder's hub id.")] = None,
    vae_sha256: Annotated[str | None, typer.Option(help="The same for the autoencoder's weights.")] = None,
    tokenizer_sha256: Annotated[str | None, typer.Option(help="The same for the tokenizer, which is a file.")] = None,
    assume_dit: Annotated[
        bool, typer.Option("--assume-dit", help="Take the weights for a DiT as published, whatever speaks against it; the recipe says so.")
    ] = False,
    assume_plaid: Annotated[bool, typer.Option("--assume-plaid", help="The same for Plaid.")] = False,
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
        vae_revision=vae_revision, vae_sha256=vae_sha256, tokenizer_sha256=tokenizer_sha256,
        assume="dit" if assume_dit else "plaid" if assume_plaid else None, output=output, overwrite=overwrite, say=say(as_json),
    )  # fmt: skip
    emit(report, as_json)


@app.command()
def build(
    artifact: Annotated[Path, typer.Argument(help="Folder written by difffeat export.")],
    engine: Annotated[str, typer.Option(help="rtx (builds without a GPU too) or trt (needs the GPU that will run it).")] = "trt",
    min_batch: Annotated[int, typer.Option(help="Smallest batch.")] = 1,
    opt_batch: Annotated[int, typer.Option(help="Batch that the plan is tuned for.")] = 32,
    max_batch: Annotated[int, typer.Option(help="Largest batch.")] = 64,
    opt_length: Annotated[int, typer.Option(help="Text: tokens that the plan is tuned for.")] = 32,
    max_length: Annotated[
        int | None, typer.Option(help="Text: most tokens of a caption; default, and for extract: all that the model takes.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="GPU to build for: cuda or cuda:<n>; rtx: cpu builds for other machines. Default: the first that the engine runs on."),
    ] = None,
    level: Annotated[int | None, typer.Option(help="Optimisation level of the builder, 0 to 5; default: its own.")] = None,
    as_json: Json = False,
) -> None:
    """Compile an artifact's graphs to TensorRT plans; what is there, sealed and fresh, is not built again."""
    from difffeat.engines.tensorrt_plans import Profile
    from difffeat.workflows.building import run_build

    profile = Profile(min_batch=min_batch, opt_batch=opt_batch, max_batch=max_batch, opt_length=opt_length, max_length=max_length)
    emit(run_build(artifact, engine=engine, profile=profile, level=level, device=device, say=say(as_json)), as_json)


@app.command()
@with_source_options
def quantize(
    artifact: Annotated[Path, typer.Argument(help="fp32 artifact.")],
    source: Annotated[str, typer.Argument(help="Samples to calibrate on, as for extract.")],
    samples: Annotated[int, typer.Option(help="How many of them, evenly spread.")] = 64,
    parts: Annotated[str, typer.Option(help="linears (the autoencoder stays in fp32, where it is fast), or all.")] = "linears",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    preprocess: Preprocess = "center",
    pixels: Pixels = "shown",
    strict_pixels: StrictPixels = False,
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
    from difffeat.workflows.commands import way_of_pixels
    from difffeat.workflows.quantizing import run_quantize

    run = RunRecipe(seed=seed, preprocessing=preprocess, pixels=way_of_pixels(pixels, strict_pixels), captions=captions)
    result = run_quantize(
        artifact, source, output=output, samples=samples, parts=parts, run=run, source_options=source_options, threads=threads,
        overwrite=overwrite, say=say(as_json),
    )  # fmt: skip
    emit(result, as_json)


@app.command()
@with_source_options
def verify(
    artifact: Annotated[Path, typer.Argument(help="Artifact to verify.")],
    source: Annotated[str, typer.Argument(help="Real samples, as for extract.")],
    reference: Annotated[Path | None, typer.Option(help="fp32 artifact of the same taps; default: NAME beside NAME-fp16.")] = None,
    engine: Annotated[str | None, typer.Option(help="Engine to verify; default: ort, for fp16 and bf16 torch (rounds at each operation).")] = None,
    device: Device = None,
    threads: Threads = None,
    compile: Compile = None,
    tf32: Tf32 = False,
    channels_last: ChannelsLast = False,
    tensorrt_provider: TensorrtProvider = False,
    cuda_graphs: CudaGraphs = None,
    samples: Annotated[int, typer.Option(help="How many samples, evenly spread.")] = 64,
    batches: Annotated[str, typer.Option(help="Batch sizes to verify at: smallest, usual, largest.")] = "1,8,32",
    promote: Annotated[bool, typer.Option("--promote", help="Keep in fp32 what fails, write the artifact again, and verify it again.")] = False,
    probe: Annotated[Path | None, typer.Option(help="Frozen probe (safetensors): also print its mAP on both.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    preprocess: Preprocess = "center",
    pixels: Pixels = "shown",
    strict_pixels: StrictPixels = False,
    captions: CaptionProtocol = "joined",
    as_json: Json = False,
    *,
    source_options: SourceOptions,
) -> None:
    """Hold an engine's features of real samples against fp32, tap by tap; beyond tolerance the exit code is 1."""
    from difffeat.engines import EngineOptions
    from difffeat.recipe import RunRecipe
    from difffeat.workflows.commands import parse_numbers, way_of_pixels
    from difffeat.workflows.verifying import run_verify

    result = run_verify(
        artifact, source, reference=reference, engine=engine, device=device, threads=threads, samples=samples,
        options=EngineOptions(
            compile=compile, tf32=tf32, channels_last=channels_last, tensorrt_provider=tensorrt_provider, cuda_graphs=cuda_graphs
        ),
        batches=[int(size) for size in parse_numbers(batches, "--batches", whole=True)], promoting=promote, probe=probe,
        run=RunRecipe(seed=seed, preprocessing=preprocess, pixels=way_of_pixels(pixels, strict_pixels), captions=captions),
        source_options=source_options, say=say(as_json),
    )  # fmt: skip
    emit(result, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, driver, GPUs, and what each engine can do here, or why it cannot."""
    from difffeat.workflows.building import run_doctor

    emit(run_doctor(), as_json)


@app.command()
@with_source_options
def extract(
    artifact: Annotated[Path | None, typer.Argument(help="Folder written by difffeat export; default: the newest under artifacts/.")] = None,
    source: Annotated[str | None, typer.Argument(help="Folder, CSV, JSONL, Parquet, tar shards, COCO JSON, data set; path or URL.")] = None,
    output: Output = None,
    engine: EngineName = "ort",
    device: Device = None,
    threads: Threads = None,
    compile: Compile = None,
    tf32: Tf32 = False,
    channels_last: ChannelsLast = False,
    tensorrt_provider: TensorrtProvider = False,
    cuda_graphs: CudaGraphs = None,
    batch_size: BatchSize = "32",
    shard_size: ShardSize = 1024,
    num_workers: NumWorkers = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    draws: Annotated[int, typer.Option(help="Noise draws to average.")] = 1,
    preprocess: Preprocess = "center",
    pixels: Pixels = "shown",
    strict_pixels: StrictPixels = False,
    captions: CaptionProtocol = "joined",
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut captions that are too long instead of setting them aside.")] = False,
    store_dtype: Annotated[str, typer.Option(help="fp16 or fp32.")] = "fp16",
    latents: Annotated[Path | None, typer.Option(help="Latent cache: the store of a --graph latents artifact.")] = None,
    max_bad_fraction: Annotated[float, typer.Option(help="Stop when more than this share of samples is bad.")] = 0.5,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Extract captions even if the tokenizer does not know most of their words.")
    ] = False,
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
    from difffeat.workflows.commands import engine_options, parse_auto, run_extract, way_of_pixels

    size = parse_auto(batch_size, "--batch-size")
    options = engine_options(
        engine, size, compile=compile, tf32=tf32, channels_last=channels_last, tensorrt_provider=tensorrt_provider, cuda_graphs=cuda_graphs
    )
    run = RunRecipe(
        seed=seed,
        draws=draws,
        preprocessing=preprocess,
        pixels=way_of_pixels(pixels, strict_pixels),
        captions=captions,
        truncate=truncate,
        store_dtype=store_dtype,
    )
    result = run_extract(
        artifact, source, output, engine=engine, device=device, threads=threads, options=options, batch_size=size, shard_size=shard_size,
        num_workers=parse_auto(num_workers, "--num-workers"), run=run, latents=latents, source_options=source_options,
        max_bad_fraction=max_bad_fraction, allow_unknown=allow_unknown, executor=executor,
        workers=workers, address=address, mode=one_mode(append, retry_quarantined),
        rebatch=allow_rebatch, overwrite=overwrite, say=say(as_json),
    )  # fmt: skip
    emit(result, as_json)
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
    compile: Compile = None,
    tf32: Tf32 = False,
    channels_last: ChannelsLast = False,
    tensorrt_provider: TensorrtProvider = False,
    cuda_graphs: CudaGraphs = None,
    batch_size: BatchSize = "32",
    shard_size: ShardSize = 1024,
    num_workers: NumWorkers = "auto",
    draws: Annotated[int, typer.Option(help="As for extract.")] = 1,
    preprocess: Preprocess = "center",
    pixels: Pixels = "shown",
    strict_pixels: StrictPixels = False,
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
    from difffeat.workflows.commands import engine_options, parse_auto, way_of_pixels
    from difffeat.workflows.planning import run_plan

    size = parse_auto(batch_size, "--batch-size")
    options = engine_options(
        engine, size, compile=compile, tf32=tf32, channels_last=channels_last, tensorrt_provider=tensorrt_provider, cuda_graphs=cuda_graphs
    )
    opening = Opening(artifact=artifact, engine=engine, device=device, threads=threads, options=options, latent_cache=latents)
    way = way_of_pixels(pixels, strict_pixels)
    run = RunRecipe(draws=draws, preprocessing=preprocess, pixels=way, captions=captions, store_dtype=store_dtype)
    result = run_plan(
        opening, source, output, run=run, batch_size=size,
        shard_size=shard_size, num_workers=parse_auto(num_workers, "--num-workers"), workers=workers, seconds=seconds,
        source_options=source_options, say=say(as_json),
    )  # fmt: skip
    emit(result, as_json)


app.command()(probing.probe)
app.command()(probing.fuse)
app.command()(probing.search)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="Artifact or feature store.")], as_json: Json = False) -> None:
    """Recipe, taps, shapes and sizes of an artifact or a store."""
    from difffeat.workflows.inspecting import run_inspect

    emit(run_inspect(path), as_json)


@app.command()
def quickstart(
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for graphs, features and report.html; default: quickstart-out, for --full quickstart-out/full."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The whole grid and three noise seeds throughout.")] = False,
    as_json: Json = False,
) -> None:
    """The whole method on digit scenes with the bundled weights: export, extract, grid, search, fuse, report."""
    from difffeat.workflows.quickstart import run_quickstart

    emit(run_quickstart(output, full=full, say=say(as_json)), as_json)
