"""`difffeat quantize`: an fp32 artifact and samples in, an int8 artifact out."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines import Artifact
from difffeat.engines.artifact import DENOISER_TABLE_FILE, RECIPE_FILE, TABLE_FILE, TOKENIZER_FILE
from difffeat.engines.int8 import calibration_digest, copy_graph, quantisable, quantise_graph
from difffeat.engines.parity import ParityReport, compare
from difffeat.errors import ConfigError
from difffeat.recipe import GraphRecipe, RunRecipe
from difffeat.recognise import quoted
from difffeat.runtime.feeds import fed_batches
from difffeat.runtime.samples import Sample
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.understood import say_understood, understood_dict
from difffeat.workflows.arguments import check_arguments
from difffeat.workflows.staging import PARITY_FILE, check_place, install, staging_folder
from difffeat.workflows.verifying import PER_SAMPLE, features_of, open_running, spread

SAMPLES = 64
BATCH = 8
TOLERANCE = 0.2
"""Largest relative L2 of a calibrating sample: beyond it something is broken. What int8 costs is measured with a probe."""
PARTS = {"all": ("MatMul", "Conv"), "linears": ("MatMul",)}

Say = Callable[..., None]


def run_quantize(
    path: Path,
    source: str,
    *,
    output: Path | None,
    samples: int,
    parts: str,
    run: RunRecipe,
    source_options: SourceOptions,
    threads: int | None,
    overwrite: bool,
    say: Say,
) -> dict[str, Any]:
    """Calibrate on `samples` samples spread evenly over the source, quantise, and check the result on them against fp32.

    **Arguments:** `parts` `all`, or `linears` to leave the autoencoder in fp32; the rest as the command's options.

    Raises ConfigError, ParityError (the result is kept at `<output>.failed`), SourceError.
    """
    check_arguments("quantize", path, source)
    artifact = Artifact.open(path)
    if artifact.recipe.precision != "fp32":
        raise ConfigError(f"{path} is {artifact.recipe.precision}; int8 is made from an fp32 artifact.")
    if parts not in PARTS:
        raise ConfigError(f"--parts must be one of {', '.join(PARTS)}; got {parts!r}")
    out = output or path.with_name(f"{path.name}-int8")
    check_place(out, overwrite, path)
    listed = open_source(source, source_options)
    say_understood(listed, say)
    chosen = spread(listed.samples, samples)
    started = time.perf_counter()
    with staging_folder(out, overwrite, path) as staging:
        say(f"calibrating on {len(chosen)} of {len(listed.samples)} samples")
        batches = calibration_batches(artifact, chosen, run, threads)
        calibration = calibration_digest(batches, PARTS[parts])
        recipe = replace(artifact.recipe, precision="int8", calibration=calibration, options={**artifact.recipe.options, "int8_parts": parts})
        _write(artifact, staging, recipe, batches, PARTS[parts], say)
        say("checking int8 against fp32 on the calibrating samples")
        parity = _parity(artifact, Artifact.open(staging), chosen, run, threads)
        (staging / PARITY_FILE).write_text(json.dumps(parity.to_dict(), indent=2, sort_keys=True) + "\n")
        final = Artifact.open(install(staging, out, parity))
    worst = max(parity.taps.items(), key=lambda item: item[1].relative_l2)
    lines = [
        f"{final.path}: int8 ({parts}), {final.size / 1e6:.1f} MB for {artifact.size / 1e6:.1f} MB, calibrated on {len(chosen)} samples",
        f"  worst of {len(parity.taps)} taps {worst[0]}: relative L2 {worst[1].relative_l2:.1e} against fp32 (tolerance {parity.tolerance:g})",
        f"next: difffeat verify {quoted(final.path)} {quoted(source)} --probe PROBE   (what it costs in mAP)",
    ]
    return {
        "artifact": str(final.path),
        "recipe": recipe.to_dict(),
        "fingerprint": recipe.fingerprint,
        "parity": parity.to_dict(),
        "understood": understood_dict(listed),
        "seconds": time.perf_counter() - started,
        "text": "\n".join(lines),
    }


def calibration_batches(
    artifact: Artifact, samples: Sequence[Sample], run: RunRecipe, threads: int | None
) -> list[tuple[str, dict[str, np.ndarray]]]:
    """(graph, inputs) for each of the artifact's graphs, padding cut off; batches of `BATCH`."""
    found = []
    with ExitStack() as stack:
        running = open_running(stack, artifact, "ort", threads=threads)
        sources = [("model", running.feeds(samples, run, BATCH))]
        if running.vae is not None:
            sources.append(("latents", fed_batches(running.vae, samples, run, batch_size=BATCH)))
        for graph, batches in sources:
            for fed in batches:
                found.append((graph, {name: value[fed.places] if name in PER_SAMPLE else value for name, value in fed.feeds.items()}))
    return found


def _write(
    artifact: Artifact, staging: Path, recipe: GraphRecipe, batches: list[tuple[str, dict[str, np.ndarray]]], operators: Sequence[str], say: Say
) -> None:
    for graph, path in artifact.graphs.items():
        nodes = [name for operator, names in quantisable(path).items() if operator in operators for name in names]
        if graph == "denoiser" or not nodes:
            say(f"{path.name} stays in fp32" + (": its errors would add up over the steps" if graph == "denoiser" else ""))
            copy_graph(path, staging / path.name, recipe)
            continue
        say(f"quantising {path.name}")
        quantise_graph(path, staging / path.name, (feeds for name, feeds in batches if name == graph), nodes, recipe)
    for name in (TABLE_FILE, DENOISER_TABLE_FILE, TOKENIZER_FILE):
        if (artifact.path / name).is_file():
            shutil.copyfile(artifact.path / name, staging / name)
    (staging / RECIPE_FILE).write_text(json.dumps(recipe.to_dict(), indent=2, sort_keys=True) + "\n")


def _parity(exact: Artifact, quantised: Artifact, samples: Sequence[Sample], run: RunRecipe, threads: int | None) -> ParityReport:
    expected, rows = features_of(exact, "ort", samples, run, BATCH, threads=threads)
    found, _ = features_of(quantised, "ort", samples, run, BATCH, threads=threads)
    taps = {name: compare(value, expected[name]) for name, value in found.items()}
    return ParityReport("ort", "cpu", "int8", TOLERANCE, len(rows), taps, "fp32 graph in ONNX Runtime")
