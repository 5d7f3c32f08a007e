"""`difffeat bench throughput`: inputs to features, as people do it today and as difffeat does, side by side in one run at equal threads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.benchmarks.asking import require_counts, require_device, require_known
from difffeat.benchmarks.baselines import TRUNCATED, Run, eager_candidates, naive_candidate
from difffeat.benchmarks.ceiling import int8_rate, matrix_rate
from difffeat.benchmarks.target import DTYPES
from difffeat.benchmarks.timing import Timing, chart, compare, in_microseconds, machine, on_card, ratios, table
from difffeat.engines import Artifact, EngineOptions, open_engine, winograd
from difffeat.engines.artifact import load_proto, read_specs
from difffeat.engines.cost import graph_cost
from difffeat.engines.int8 import quantisable, quantise_graph
from difffeat.engines.parity import compare as against
from difffeat.engines.torch_precision import exact_products
from difffeat.errors import ConfigError, EngineError, MissingExtra
from difffeat.probe.output import replace_bytes
from difffeat.probe.provenance import provenance
from difffeat.recipe import format_timestep
from difffeat.workflows.exporting import ExportOptions, export_dit, export_plaid
from difffeat.workflows.loading import Backbone, load_backbone

ORT = "difffeat, ONNX Runtime"
DIRECT = "difffeat, ONNX Runtime, direct convolutions"
INT8 = "difffeat, ONNX Runtime int8"
TORCH = "difffeat, folded, torch"
TORCH_COMPILED = "difffeat, folded, torch.compile"
CAPTION_LENGTH = 32
STARTS = ("pixels", "latents")
ENGINES = ("int8", "torch", "naive", "trt", "rtx")
"""Beside ONNX Runtime, which is always timed."""

Say = Callable[..., None]


def run_throughput(
    model: str,
    weights: str | None,
    *,
    vae: str | None,
    tokenizer: str | None = None,
    block: int | None,
    start: str = "pixels",
    dtype: str = "fp32",
    batch_size: int,
    repeats: int,
    threads: int,
    device: str = "cpu",
    engines: tuple[str, ...] = (),
    compiled: bool = False,
    output: Path | None,
    say: Say,
) -> dict[str, Any]:
    """Export graphs into a temporary folder and time them beside eager torch; arguments as the command's options.

    Raises ConfigError and ProviderMissing for what cannot be timed, before anything is loaded; EngineError where none of ours can run.
    """
    require_counts(batch_size=batch_size, repeats=repeats, threads=threads)
    require_known("--start", [start], STARTS)
    require_known("--dtype", [dtype], DTYPES)
    if engines:
        require_known("--engines", engines, ENGINES)
    if "int8" in engines and dtype != "fp32":
        raise ConfigError(f"int8 is made from an fp32 graph: leave int8 out of --engines, or --dtype {dtype}.")
    require_device(device)
    backbone = load_backbone(model, weights, vae=vae, tokenizer=tokenizer, need_vae=start == "pixels")
    chosen = backbone.default_block() if block is None else block
    with tempfile.TemporaryDirectory() as folder:
        artifact = export_for_timing(backbone, chosen, Path(folder) / "artifact", say, start=start, dtype=dtype)
        result = time_artifact(
            backbone, artifact, batch_size=batch_size, repeats=repeats, threads=threads, device=device, engines=engines, compiled=compiled, say=say
        )
    if output is not None:
        write_result(result, output)
    return result


def write_result(result: Mapping[str, Any], output: Path) -> None:
    """JSON with the command and the version, and a chart beside it. Raises OutputError when the system refuses the file."""
    numbers = {key: value for key, value in result.items() if key != "text"}
    replace_bytes(output, (json.dumps({**numbers, "provenance": provenance()}, indent=2) + "\n").encode())
    chart(result, output.with_suffix(".png"))


def export_for_timing(backbone: Backbone, block: int, out: Path, say: Say, *, start: str = "pixels", dtype: str = "fp32") -> Artifact:
    """The image graph at t = 30, from pixels or latents, or the text graph at t = 0."""
    if backbone.family == "dit":
        kind = "image" if start == "pixels" else "from-latents"
        options = ExportOptions(kind=kind, blocks=(block,), timesteps=(30,), noising="random", precision=dtype)
        return export_dit(backbone.weights, backbone.vae if start == "pixels" else None, options, out, say=say, check_samples=2).artifact
    options = ExportOptions(kind="text", blocks=(block,), timesteps=(0,), noising="mean", precision=dtype)
    assert backbone.tokenizer is not None
    return export_plaid(backbone.weights, backbone.tokenizer, options, out, say=say, check_samples=2).artifact


def time_artifact(
    backbone: Backbone,
    artifact: Artifact,
    *,
    batch_size: int,
    repeats: int,
    threads: int,
    device: str = "cpu",
    engines: tuple[str, ...] = (),
    compiled: bool = False,
    say: Say = lambda *_, **__: None,
) -> dict[str, Any]:
    """Time an exported graph beside the eager, unfolded network on the same random inputs (never zeros).

    **Arguments:** `engines` ours to time, besides ONNX Runtime: of `int8`, `torch`, `trt`, `rtx`, and `naive` for the unfolded export; `compiled`
    adds torch.compile, of the unfolded network and of ours (ours is compiled on a card in any case, as in an extraction). What cannot run here is
    listed with the reason, and the rest is timed. All in torch runs under `exact_products`, the unfolded network too.
    """
    import torch

    torch.set_num_threads(threads)
    feeds, precision = random_feeds(artifact, batch_size), artifact.recipe.precision
    with ExitStack() as stack:
        stack.enter_context(exact_products())  # an autoencoder's convolutions in TF32, torch's default, would be no reference
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("running the unfolded network in fp32, the reference")
        reference = eager_candidates(backbone, artifact, feeds, device=device)[TRUNCATED]()
        candidates = eager_candidates(backbone, artifact, feeds, device=device, precision=precision, compiled=compiled)
        if "naive" in engines:
            say("exporting the unfolded network")
            candidates |= naive_candidate(backbone, artifact, feeds, folder, threads)
        own, not_run = ours(artifact, feeds, folder, stack, device=device, threads=threads, engines=engines, compiled=compiled, say=say)
        if not own:
            raise EngineError(f"none of our engines can run here: {'; '.join(not_run.values())}")
        candidates = runnable(candidates, not_run, say) | own
        parity = {name: asdict(against(np.asarray(run()), reference)) for name, run in candidates.items()}
        say(f"timing {repeats} rounds at batch {batch_size} on {device}, {threads} threads")
        timings = compare(candidates, repeats, device=device)
    integers = int8_rate(threads) if INT8 in own else None
    best = min(own, key=lambda name: next(timing.median for timing in timings if timing.name == name)) if on_card(device) else next(reversed(own))
    measured = Measured(timings, parity, not_run, matrix_rate(threads, device, precision), integers, best)
    return _result(artifact, measured, batch_size, threads, device)


def runnable(candidates: Mapping[str, Run], not_run: dict[str, str], say: Say) -> dict[str, Run]:
    """Those that run here; the others, with the reason, go into `not_run`."""
    found: dict[str, Run] = {}
    for name, run in candidates.items():
        try:
            run()
        except Exception as error:  # whatever torch or its compiler says of a network that is not ours: the rest is timed
            not_run[name] = f"{type(error).__name__}: {error}"
            say(f"{name} cannot run here: {not_run[name]}")
            continue
        found[name] = run
    return found


@dataclass(frozen=True)
class Measured:
    """What was timed, how far each is from the unfolded network in fp32, what could not run and why, the rates of products, and which is ours."""

    timings: list[Timing]
    parity: dict[str, dict[str, Any]]
    not_run: dict[str, str]
    rate: float
    int8_rate: float | None
    ours: str


def ours(
    artifact: Artifact,
    feeds: dict[str, np.ndarray],
    folder: Path,
    stack: ExitStack,
    *,
    device: str,
    threads: int,
    engines: tuple[str, ...],
    compiled: bool,
    say: Say,
) -> tuple[dict[str, Run], dict[str, str]]:
    """Our engines over one artifact, opened in `stack`, the one that stands for ours on a CPU last; and those that cannot run, with the reason."""
    found: dict[str, Run] = {}
    not_run: dict[str, str] = {}
    (output,) = (f"b{block}" for block in artifact.recipe.blocks)

    def add(name: str, which: Artifact, engine: str, options: EngineOptions | None = None) -> None:
        on = device if engine in ("ort", "torch") or device != "cpu" else "cuda"
        try:
            opened = stack.enter_context(open_engine(which, engine, device=on, threads=threads, options=options, say=say))
            opened.run(feeds)
        except (EngineError, MissingExtra) as error:
            not_run[name] = str(error)
            say(f"{name} cannot run here: {error}")
            return
        found[name] = lambda: opened.run(feeds)[output]

    if "torch" in engines:
        add(TORCH, artifact, "torch", EngineOptions(compile=False))
        if compiled or on_card(device):
            add(TORCH_COMPILED, artifact, "torch", EngineOptions(compile=True))
    for engine in ("trt", "rtx"):
        if engine in engines:
            add(f"difffeat, {engine}", artifact, engine, EngineOptions(batch=len(next(iter(feeds.values()))), cuda_graphs=True))
    if "int8" in engines:
        say("quantising")
        add(INT8, quantised_for_timing(artifact, feeds, folder / "int8"), "ort")
    if device == "cpu" and winograd.eligible(load_proto(artifact.graph)):
        add(DIRECT, artifact, "ort", EngineOptions(winograd=False))
    add(ORT, artifact, "ort")
    return found, not_run


def quantised_for_timing(artifact: Artifact, feeds: dict[str, np.ndarray], out: Path) -> Artifact:
    """The int8 form of a graph as `difffeat quantize` makes it (linears only), its scales measured on the inputs that it is timed with."""
    from difffeat.engines.artifact import MODEL_FILE, RECIPE_FILE, TOKENIZER_FILE

    out.mkdir()
    recipe = replace(artifact.recipe, precision="int8", calibration="0" * 64)
    quantise_graph(artifact.graph, out / MODEL_FILE, [feeds], quantisable(artifact.graph)["MatMul"], recipe)
    (out / RECIPE_FILE).write_text(json.dumps(recipe.to_dict()))
    if artifact.tokenizer is not None:
        (out / TOKENIZER_FILE).write_bytes(artifact.tokenizer.read_bytes())
    return Artifact.open(out)


def random_feeds(artifact: Artifact, batch_size: int, *, length: int = CAPTION_LENGTH, seed: int = 7) -> dict[str, np.ndarray]:
    """Seeded random inputs for a graph; captions of `length` tokens."""
    rng = np.random.Generator(np.random.Philox(seed))
    specs, _ = read_specs(load_proto(artifact.graph))
    sizes = {"batch": batch_size, "length": length}
    feeds: dict[str, np.ndarray] = {}
    for name, spec in specs.items():
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        if name == "pixels":
            feeds[name] = rng.integers(0, 256, shape, np.uint8)
        elif name == "tokens":
            feeds[name] = rng.integers(0, artifact.recipe.architecture["vocab"], shape)
        elif name == "lengths":
            feeds[name] = np.full(shape, length)
        else:
            feeds[name] = rng.standard_normal(shape, dtype=np.float32)
    return feeds


def _result(artifact: Artifact, measured: Measured, batch_size: int, threads: int, device: str) -> dict[str, Any]:
    recipe, timings, rate = artifact.recipe, measured.timings, measured.rate
    flops = graph_cost(artifact.graph, length=CAPTION_LENGTH).total_flops
    shares = {timing.name: flops * batch_size / timing.median / rate for timing in timings}
    per = f"caption of {CAPTION_LENGTH} tokens" if recipe.family == "plaid" else f"image from {'pixels' if recipe.kind == 'image' else 'latents'}"
    tap = f"block {recipe.blocks[0]}, t = {format_timestep(recipe.timesteps[0])}"
    rounds = f"batch {batch_size}, {threads} threads, median of {len(timings[0].seconds)} paired rounds"
    unit = "microseconds" if in_microseconds(timings, batch_size, device) else "seconds"
    title = f"{recipe.backbone}, {tap}, {recipe.precision} on {device}: {unit} per {per}, {rounds}"
    note = (
        f"  {flops / 1e9:.4g} GFLOP a sample in the truncated graph; matrix products here reach {rate / 1e9:.4g} GFLOP/s ({recipe.precision}); "
        "share of that rate, counting the truncated graph's work only and convolutions as direct ones (fewer products can pass 100 %), and distance "
        "from the unfolded network in fp32:"
    )
    lines = [title, *table(timings, batch_size, measured.ours, "image" if recipe.family == "dit" else "caption", device=device), note]
    lines += [f"    {name:50} {share:6.1%}   relative L2 {measured.parity[name]['relative_l2']:.1e}" for name, share in shares.items()]
    if measured.int8_rate is not None:
        gain = measured.int8_rate / rate
        lines.append(f"  products in int8 reach {measured.int8_rate / 1e9:.4g} Gop/s here, {gain:.2f} × that rate: about what int8 can gain at most")
    lines += [f"  not run: {name}: {reason}" for name, reason in measured.not_run.items()]
    return {
        "benchmark": "throughput",
        "backbone": recipe.backbone,
        "kind": recipe.kind,
        "precision": recipe.precision,
        "blocks": list(recipe.blocks),
        "origin": recipe.origin,
        "fingerprint": recipe.fingerprint,
        "batch_size": batch_size,
        "threads": threads,
        "device": device,
        "machine": machine(device),
        "flops_per_sample": flops,
        "matrix_rate": rate,
        "int8_rate": measured.int8_rate,
        "share_of_matrix_rate": shares,
        "seconds": {timing.name: list(timing.seconds) for timing in timings},
        "median_per_sample": {timing.name: timing.median / batch_size for timing in timings},
        "ours": measured.ours,
        "ours_is_faster_by": ratios(timings, measured.ours),
        "parity_with_unfolded_fp32": measured.parity,
        "not_run": measured.not_run,
        "text": "\n".join(lines),
    }
