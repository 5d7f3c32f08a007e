"""Weights drawn once, and the artifacts that the later steps run: kept in a folder from call to call."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from difffeat.benchmarks.gpu.sizes import Sizes
from difffeat.benchmarks.throughput import export_for_timing
from difffeat.engines import Artifact
from difffeat.workflows.loading import Backbone, counting_tokenizer, load_backbone

MODELS = ("dit", "plaid")
ARTIFACTS = {"dit": (("pixels", "fp16"), ("latents", "fp16")), "plaid": (("tokens", "fp16"),)}
DIT_FILE, VAE_FOLDER, PLAID_FOLDER, TOKENIZER_FILE = "dit.pt", "vae", "plaid", "tokenizer.json"


def prepare(folder: Path, sizes: Sizes, model: str, say: Callable[..., None]) -> None:
    """Draw the weights of `dit` or `plaid`, keep them as files of their published form, and export its artifacts; what is there already stays."""
    if is_prepared(folder, model):
        return
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if sizes.weights == "random":
        _draw(folder, model)
        say(f"{model}: weights drawn after {time.monotonic() - started:.0f} s")
    backbone = open_backbone(folder, sizes, model)
    for start, dtype in ARTIFACTS[model]:
        target = folder / f"{model}-{start}-{dtype}"
        if not target.is_dir():
            export_for_timing(backbone, sizes.block if model == "dit" else sizes.text_block, target, say, start=start, dtype=dtype)
        say(f"{model}: {target.name} is there after {time.monotonic() - started:.0f} s")
    (folder / f"{model}.done").write_text("")


def is_prepared(folder: Path, model: str) -> bool:
    """Whether everything of a model is there."""
    return (folder / f"{model}.done").is_file()


def open_backbone(folder: Path, sizes: Sizes, model: str) -> Backbone:
    """The weights that were drawn, in fp32; the bundled ones in a rehearsal."""
    name = sizes.models[MODELS.index(model)]
    if sizes.weights != "random":
        return load_backbone(name)
    if model == "dit":
        return load_backbone("dit", str(folder / DIT_FILE), vae=str(folder / VAE_FOLDER))
    return load_backbone("plaid", str(folder / PLAID_FOLDER), tokenizer=str(folder / TOKENIZER_FILE))


def open_prepared(folder: Path, name: str) -> Artifact:
    """An artifact by its name, such as `dit-pixels-fp16`."""
    return Artifact.open(folder / name)


def _draw(folder: Path, model: str) -> None:
    from difffeat.export import weights as w

    if model == "dit":
        w.save_dit_original(w.random_dit(w.DIT_CONFIGS["dit-xl-2-256"]), folder / DIT_FILE)
        w.save_vae(w.random_vae(w.SD_VAE_CONFIG), folder / VAE_FOLDER)
        return
    w.save_plaid(w.random_plaid(w.PLAID_1B), folder / PLAID_FOLDER)
    (folder / TOKENIZER_FILE).write_bytes(counting_tokenizer(w.PLAID_1B.vocab))
