"""From checkpoints to a checked artifact: recipe, graph(s), table, tokenizer, and parity of the finished file."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines import Artifact
from difffeat.engines.artifact import LATENTS_FILE, MODEL_FILE, RECIPE_FILE, TABLE_FILE, TOKENIZER_FILE
from difffeat.engines.parity import ParityReport
from difffeat.errors import ConfigError, NotYetAvailable, ParityError
from difffeat.recipe import GraphRecipe, tap_name
from difffeat.runtime.files import Files
from difffeat.workflows.checking import check_captions, check_images, measure_parity, promote

PARITY_FILE = "parity.json"
CHECK_SAMPLES = 3

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is asked of an export, beside the weights.

    **Fields:** `kind` one of `recipe.GRAPH_KINDS`; `blocks` and `timesteps` (more than one timestep for sweeps only); `noising` with `noise_seed`;
    `label` class label (None: the null label); `pooling`; `precision`.
    """

    kind: str
    blocks: tuple[int, ...]
    timesteps: tuple[float, ...]
    noising: str
    noise_seed: int = 0
    label: int | None = None
    pooling: str = "mean"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.noising == "ddim" or self.kind == "denoiser":
            raise NotYetAvailable("ddim inversion and denoiser graphs come with the next release; use --noising random, constant or mean.")
        if self.precision == "int8":
            raise ConfigError("int8 is calibrated on real samples: export fp32, then run difffeat quantize ARTIFACT SOURCE.")
        if not self.blocks:
            raise ConfigError("no block was asked for. Pass --blocks, for example --blocks 12 or --blocks 4,8,12.")
        if not self.kind.endswith("sweep") and len(self.timesteps) != 1:
            raise ConfigError(f"a {self.kind} graph has one timestep baked in, got {len(self.timesteps)}. For several, pass --graph sweep.")
        if not self.timesteps or len(set(self.timesteps)) != len(self.timesteps):
            raise ConfigError(f"a sweep needs timesteps that differ, got {list(self.timesteps)}. For example: --timestep 0,10,30.")
        if self.kind.endswith("sweep") and self.noising == "constant":
            raise ConfigError("a sweep graph has no noise baked in; use --noising random or mean.")


@dataclass(frozen=True)
class ExportReport:
    """What came of an export."""

    artifact: Artifact
    parity: ParityReport
    seconds: dict[str, float]


def dit_recipe(weights: Any, vae: Any | None, options: ExportOptions) -> GraphRecipe:
    """The graph recipe of a DiT export. Raises ConfigError on blocks, timesteps or labels that the backbone lacks."""
    from difffeat.export.schedule import dit_noise_level

    config = weights.config
    if vae is None and options.kind in ("image", "latents"):
        raise ConfigError(f"this graph ({options.kind}) starts at pixels and needs the autoencoder. Pass --vae PATH|HUB_ID, or --graph from-latents.")
    label = config.num_classes if options.label is None else options.label
    if not 0 <= label <= config.num_classes:
        raise ConfigError(f"label must lie in 0..{config.num_classes} ({config.num_classes} is the null label), got {label}")
    if options.kind == "sweep" and max(options.blocks) == 0:
        raise ConfigError("a sweep over block 0 alone has no modulation to sweep. Pass --blocks with a block of 1 or more.")
    latents = options.kind == "latents"
    timesteps = () if latents else tuple(map(float, options.timesteps))
    architecture: dict[str, Any] = {key: value for key, value in asdict(config).items() if key != "name"}
    digests = {} if latents else {"backbone": weights.digest}
    if vae is not None:
        architecture |= {"vae": dict(vae.config), "scaling_factor": vae.scaling_factor, "shift_factor": vae.shift_factor}
        digests["vae"] = vae.digest
    return GraphRecipe(
        backbone=config.name,
        family="dit",
        architecture=architecture,
        weights=digests,
        origin=weights.origin,
        kind=options.kind,
        blocks=() if latents else _checked_blocks(options.blocks, config.depth),
        timesteps=timesteps,
        log_snr=tuple(dit_noise_level(t).log_snr for t in timesteps),
        noising="mean" if latents else options.noising,
        noise_seed=options.noise_seed if options.noising == "constant" and not latents else None,
        pooling="mean" if latents else options.pooling,
        label=None if latents else label,
        precision=options.precision,
    )


def plaid_recipe(weights: Any, tokenizer_digest: str, options: ExportOptions) -> GraphRecipe:
    """The graph recipe of a Plaid export."""
    from difffeat.export.fold import plaid_schedule

    if options.pooling not in ("mean", "max"):
        raise ConfigError(f"text graphs pool with mean or max, got {options.pooling!r}.")
    if options.kind not in ("text", "text-sweep"):
        raise ConfigError(f"{options.kind} graphs are for images; Plaid has text and text-sweep (--graph sweep).")
    schedule = plaid_schedule(weights.tensors)
    return GraphRecipe(
        backbone=weights.config.name,
        family="plaid",
        architecture={key: value for key, value in asdict(weights.config).items() if key != "name"},
        weights={"backbone": weights.digest, "tokenizer": tokenizer_digest},
        origin=weights.origin,
        kind=options.kind,
        blocks=_checked_blocks(options.blocks, weights.config.depth),
        timesteps=tuple(map(float, options.timesteps)),
        log_snr=tuple(schedule.noise_level(t).log_snr for t in options.timesteps),
        noising=options.noising,
        noise_seed=options.noise_seed if options.noising == "constant" else None,
        pooling=options.pooling,
        precision=options.precision,
    )


def export_dit(
    weights: Any, vae: Any | None, options: ExportOptions, out: Path, *, overwrite: bool = False, say: Say = print, check_samples: int = CHECK_SAMPLES
) -> ExportReport:
    """Export a truncated DiT. `weights` and `vae` as the loaders of `difffeat.export.weights` give them.

    Raises ConfigError and NotYetAvailable (options), ParityError (the finished file is kept at `<out>.failed`).
    """
    from difffeat.export.assemble import build_module, latent_shape
    from difffeat.export.fold import dit_modulation, fill_dit
    from difffeat.export.reference import dit_taps, encode
    from difffeat.export.vae import fill_encoder

    recipe = dit_recipe(weights, vae, options)
    feeds = check_images(recipe, check_samples)
    label = recipe.label or 0

    def fill(module: Any, latents: bool) -> None:
        if hasattr(module, "vae"):
            assert vae is not None
            fill_encoder(module.vae, vae.tensors, vae.scaling_factor, vae.shift_factor)
        if hasattr(module, "trunk"):
            swept = recipe.kind == "sweep"
            modulation = None if swept else dit_modulation(weights.tensors, weights.config, recipe.timesteps[0], label, len(module.trunk.blocks))
            fill_dit(module.trunk, weights.tensors, modulation)

    def reference(recipe: GraphRecipe) -> dict[str, np.ndarray]:
        import torch

        found: dict[str, np.ndarray] = {}
        if vae is not None and recipe.kind != "from-latents" and recipe.kind != "sweep":
            latents = encode(vae, torch.tensor(feeds["pixels"]))
            found["latents"] = latents.numpy()
        else:
            latents = torch.tensor(feeds["latents"])
            if vae is not None:
                found["latents"] = encode(vae, torch.tensor(feeds["pixels"])).numpy()
        if recipe.kind == "latents":
            return found
        noise = _reference_noise(recipe, feeds, (check_samples, *latent_shape(recipe)))
        taps = dit_taps(weights, latents, noise, timesteps=recipe.timesteps, label=label, blocks=recipe.blocks, pooling=recipe.pooling)
        return found | {tap_name(block, t): x.numpy() for block, t, x in taps}

    table = _dit_table(weights, recipe, label) if recipe.kind == "sweep" else None
    extra = {TABLE_FILE: table} if table is not None else {}
    with_latents = vae is not None and recipe.kind in ("sweep", "from-latents")
    return _export(recipe, out, feeds, fill, reference, build_module, extra, with_latents, overwrite, say)


def export_plaid(
    weights: Any,
    tokenizer: bytes,
    options: ExportOptions,
    out: Path,
    *,
    overwrite: bool = False,
    say: Say = print,
    check_samples: int = CHECK_SAMPLES,
) -> ExportReport:
    """Export a truncated Plaid with its tokenizer (the bytes of `tokenizer.json`). Errors as for `export_dit`."""
    import hashlib

    from difffeat.export.assemble import build_module
    from difffeat.export.fold import fill_plaid
    from difffeat.export.reference import plaid_taps
    from difffeat.export.schedule import NoiseLevel

    recipe = plaid_recipe(weights, hashlib.sha256(tokenizer).hexdigest(), options)
    feeds = check_captions(recipe, check_samples)
    swept = recipe.kind == "text-sweep"

    def fill(module: Any, latents: bool) -> None:
        level = None if swept else NoiseLevel.from_log_snr(recipe.timesteps[0], recipe.log_snr[0])
        fill_plaid(module.trunk, weights.tensors, weights.config.depth, level)

    def reference(recipe: GraphRecipe) -> dict[str, np.ndarray]:
        import torch

        tokens, lengths = torch.tensor(feeds["tokens"]), torch.tensor(feeds["lengths"])
        noise = _reference_noise(recipe, feeds, (*feeds["tokens"].shape, recipe.architecture["embed_dim"]))
        taps = plaid_taps(weights, tokens, lengths, noise, timesteps=recipe.timesteps, blocks=recipe.blocks, pooling=recipe.pooling)
        return {tap_name(block, t): x.numpy() for block, t, x in taps}

    extra: dict[str, Any] = {TOKENIZER_FILE: tokenizer}
    if swept:
        extra[TABLE_FILE] = _plaid_table(weights, recipe)
    return _export(recipe, out, feeds, fill, reference, build_module, extra, False, overwrite, say)


def _export(
    recipe: GraphRecipe,
    out: Path,
    feeds: dict[str, np.ndarray],
    fill: Callable[[Any, bool], None],
    reference: Callable[[GraphRecipe], dict[str, np.ndarray]],
    build: Callable[..., Any],
    extra: dict[str, Any],
    with_latents: bool,
    overwrite: bool,
    say: Say,
) -> ExportReport:
    """The part that images and text share: reference, graphs, files, parity, and only then the final name."""
    staging = staging_folder(out, overwrite)
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    if recipe.precision != "fp32":
        say(f"looking for parts that {recipe.precision} cannot hold")
        recipe = promote(recipe, feeds, extra.get(TABLE_FILE), fill, reference, build, say)
    say("running the unfolded fp32 reference")
    expected = reference(recipe)
    seconds["reference"] = time.perf_counter() - started
    started = time.perf_counter()
    for name, latents in ((MODEL_FILE, False), *(((LATENTS_FILE, True),) if with_latents else ())):
        say(f"exporting {name}")
        _write(staging / name, recipe, latents, fill, build)
    for name, content in extra.items():
        _write_extra(staging / name, content)
    (staging / RECIPE_FILE).write_text(json.dumps(recipe.to_dict(), indent=2, sort_keys=True) + "\n")
    seconds["export"] = time.perf_counter() - started
    say("checking parity of the finished file")
    started = time.perf_counter()
    parity = measure_parity(Artifact.open(staging), feeds, expected)
    seconds["parity"] = time.perf_counter() - started
    (staging / PARITY_FILE).write_text(json.dumps(parity.to_dict(), indent=2, sort_keys=True) + "\n")
    final = install(staging, out, parity)
    return ExportReport(Artifact.open(final), parity, seconds)


def _write(path: Path, recipe: GraphRecipe, latents: bool, fill: Callable[[Any, bool], None], build: Callable[..., Any]) -> None:
    from difffeat.export.assemble import graph_spec
    from difffeat.export.graph import write_graph

    module = build(recipe, latents=latents)
    fill(module, latents)
    write_graph(graph_spec(recipe, module, latents), path, recipe)


def _write_extra(path: Path, content: Any) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    from safetensors.numpy import save_file

    save_file(content, path)


def staging_folder(out: Path, overwrite: bool) -> Path:
    """An empty folder beside `out` to build an artifact in. Raises ConfigError when `out` is taken."""
    if out.name in ("", ".."):
        raise ConfigError(f"-o {out} has no name of its own; an artifact is a folder that is replaced whole, such as artifacts/dit-b12-t30.")
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not (out / MODEL_FILE).is_file():
            raise ConfigError(f"{out} exists and is no artifact of ours; choose another -o.")
        if not overwrite:
            raise ConfigError(f"{out} already holds an artifact. Pass --overwrite to replace it, or another -o.")
    staging = out.with_name(f"{out.name}.partial")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def install(staging: Path, out: Path, parity: Any) -> Path:
    """Give a checked artifact its name; one that fails goes to `<out>.failed` and raises ParityError."""
    target = out if parity.passed else out.with_name(f"{out.name}.failed")
    replace_folder(staging, target)
    try:
        parity.require()
    except ParityError as error:
        raise ParityError(f"{error} It was kept at {target} for inspection.") from None
    return target


def replace_folder(staging: Path, target: Path) -> None:
    """Give a finished folder its name, durably; what had the name is removed only when the new one stands."""
    for file in staging.iterdir():
        Files().fsync(file)
    replaced = target.with_name(f"{target.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if target.exists():
        os.replace(target, replaced)
    os.replace(staging, target)
    Files().fsync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _reference_noise(recipe: GraphRecipe, feeds: dict[str, np.ndarray], shape: Sequence[int]) -> Any:
    import torch

    from difffeat.export.assemble import constant_noise

    if recipe.noising == "random":
        return torch.tensor(feeds["noise"])
    return constant_noise(recipe).expand(*shape) if recipe.noising == "constant" else None


def _dit_table(weights: Any, recipe: GraphRecipe, label: int) -> dict[str, np.ndarray]:
    """Per-timestep inputs of the sweep graph, computed in float64."""
    from difffeat.export.fold import dit_modulation
    from difffeat.export.schedule import dit_noise_level

    levels = [dit_noise_level(t) for t in recipe.timesteps]
    blocks = max(recipe.blocks)
    modulation = [dit_modulation(weights.tensors, weights.config, t, label, blocks).numpy() for t in recipe.timesteps]
    return _table(recipe, levels, modulation=np.stack(modulation))


def _plaid_table(weights: Any, recipe: GraphRecipe) -> dict[str, np.ndarray]:
    from difffeat.export.fold import plaid_gamma_embedding, plaid_input_scale, plaid_schedule

    schedule = plaid_schedule(weights.tensors)
    levels = [schedule.noise_level(t) for t in recipe.timesteps]
    scale = np.array([[plaid_input_scale(level, weights.config.embed_dim)] for level in levels])
    embedding = np.stack([plaid_gamma_embedding(weights.tensors, level).numpy() for level in levels])
    return _table(recipe, levels, input_scale=scale, gamma_embedding=embedding)


def _table(recipe: GraphRecipe, levels: Sequence[Any], **per_timestep: np.ndarray) -> dict[str, np.ndarray]:
    table = {"timesteps": np.array(recipe.timesteps, np.float64), "alpha": np.array([[level.alpha] for level in levels], np.float32)}
    if recipe.noising == "random":
        table["sigma"] = np.array([[level.sigma] for level in levels], np.float32)
    return table | {name: np.ascontiguousarray(value, np.float32) for name, value in per_timestep.items()}


def _checked_blocks(blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    if bad := [block for block in blocks if not 0 <= block <= depth]:
        raise ConfigError(f"blocks must lie in 0..{depth} (block k is the stream after k blocks, 0 the embedding), got {bad}")
    return tuple(sorted(set(blocks)))
