"""From checkpoints to a checked artifact: recipe, graph(s), table, tokenizer, and parity of the finished file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines import Artifact
from difffeat.engines.artifact import (
    DENOISER_FILE,
    DENOISER_TABLE_FILE,
    LATENTS_FILE,
    MODEL_FILE,
    RECIPE_FILE,
    TABLE_FILE,
    TOKENIZER_FILE,
)
from difffeat.engines.parity import ParityReport
from difffeat.errors import ConfigError
from difffeat.recipe import GraphRecipe, tap_name
from difffeat.workflows.assumptions import dit_diffusion, plaid_diffusion
from difffeat.workflows.checking import Parts, check_captions, check_images, measure_parity, promote
from difffeat.workflows.staging import PARITY_FILE, install, staging_folder
from difffeat.workflows.tables import dit_denoiser_table, dit_sweep_table, plaid_denoiser_table, plaid_sweep_table

FILES = {"model": MODEL_FILE, "latents": LATENTS_FILE, "denoiser": DENOISER_FILE}
CHECK_SAMPLES = 3

DDIM_STEPS = 10
MOST_STEPS = 1000

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is asked of an export, beside the weights.

    **Fields:** `kind` one of `recipe.GRAPH_KINDS`; `blocks` and `timesteps` (more than one timestep for sweeps only); `noising` with `noise_seed`;
    `label` class label (None: the null label); `pooling`; `precision`; `ddim_steps` of the inversion of `ddim`; `self_conditioning` (text) by the
    denoiser's first guess.
    """

    kind: str
    blocks: tuple[int, ...]
    timesteps: tuple[float, ...]
    noising: str
    noise_seed: int = 0
    label: int | None = None
    pooling: str = "mean"
    precision: str = "fp32"
    ddim_steps: int = DDIM_STEPS
    self_conditioning: bool = False

    def __post_init__(self) -> None:
        if self.noising == "ddim" and self.kind in ("image", "latents"):
            raise ConfigError("--noising ddim asks the denoiser between autoencoder and trunk: export with --graph from-latents or sweep.")
        if not 0 <= self.noise_seed < 2**63:
            raise ConfigError(f"--noise-seed must lie in 0..2^63-1, got {self.noise_seed}")
        if self.ddim_steps < 1:
            raise ConfigError(f"--ddim-steps must be at least 1, got {self.ddim_steps}")
        if self.ddim_steps > MOST_STEPS or len(self.timesteps) > MOST_STEPS or len(self.blocks) > MOST_STEPS:
            raise ConfigError(
                f"at most {MOST_STEPS} steps, timesteps or blocks, got {self.ddim_steps}, {len(self.timesteps)} and {len(self.blocks)}."
            )
        if self.self_conditioning and not (self.kind.startswith("text") and self.noising in ("mean", "ddim")):
            raise ConfigError("--self-conditioning is Plaid's, with --noising mean or ddim.")
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
    from difffeat.export.vae_weights import check_channels

    config = weights.config
    if vae is None and options.kind in ("image", "latents"):
        raise ConfigError(f"this graph ({options.kind}) starts at pixels and needs the autoencoder. Pass --vae PATH|HUB_ID, or --graph from-latents.")
    label = config.num_classes if options.label is None else options.label
    if not 0 <= label <= config.num_classes:
        raise ConfigError(f"label must lie in 0..{config.num_classes} ({config.num_classes} is the null label), got {label}")
    if options.kind == "sweep" and max(options.blocks) == 0:
        raise ConfigError("a sweep over block 0 alone has no modulation to sweep. Pass --blocks with a block of 1 or more.")
    if vae is not None:
        check_channels(vae.config, config.in_channels, "given")
    latents = options.kind == "latents"
    timesteps = () if latents else tuple(map(float, options.timesteps))
    architecture: dict[str, Any] = config.architecture()
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
        options={"ddim_steps": options.ddim_steps} if options.noising == "ddim" and not latents else {},
        diffusion=dit_diffusion(weights, vae),
    )


def plaid_recipe(weights: Any, tokenizer_digest: str, options: ExportOptions) -> GraphRecipe:
    """The graph recipe of a Plaid export."""
    from difffeat.export.fold import plaid_schedule

    if options.pooling not in ("mean", "max"):
        raise ConfigError(f"text graphs pool with mean or max, got {options.pooling!r}.")
    if options.kind not in ("text", "text-sweep"):
        raise ConfigError(f"{options.kind} graphs are for images; Plaid has text and text-sweep (--graph sweep).")
    if options.label is not None:
        raise ConfigError("--label is a DiT's, and Plaid has no classes. Leave it out.")
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
        options=({"ddim_steps": options.ddim_steps} if options.noising == "ddim" else {})
        | ({"self_conditioning": True} if options.self_conditioning else {}),
        diffusion=plaid_diffusion(weights),
    )


def export_dit(
    weights: Any, vae: Any | None, options: ExportOptions, out: Path, *, overwrite: bool = False, say: Say = print, check_samples: int = CHECK_SAMPLES
) -> ExportReport:
    """Export a truncated DiT. `weights` and `vae` as the loaders of `difffeat.export.weights` give them.

    Raises ConfigError (options), ParityError (the finished file is kept at `<out>.failed`).
    """
    from difffeat.export.assemble import latent_shape
    from difffeat.export.fold import dit_modulation, fill_dit, fill_dit_denoiser
    from difffeat.export.reference import dit_taps, encode
    from difffeat.export.vae import fill_encoder

    recipe = dit_recipe(weights, vae, options)
    feeds = check_images(recipe, check_samples)
    label = recipe.label or 0

    def fill(module: Any, part: str) -> None:
        if part == "denoiser":
            fill_dit_denoiser(module, weights.tensors, weights.config.patch, weights.config.in_channels)
            return
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
        steps = recipe.options.get("ddim_steps") if recipe.noising == "ddim" else None
        taps = dit_taps(
            weights, latents, noise, timesteps=recipe.timesteps, label=label, blocks=recipe.blocks, pooling=recipe.pooling, ddim_steps=steps
        )
        return found | {tap_name(block, t): x.numpy() for block, t, x in taps}

    table = dit_sweep_table(weights, recipe, label) if recipe.kind == "sweep" else None
    extra = {TABLE_FILE: table} if table is not None else {}
    parts = ["model"]
    if vae is not None and recipe.kind in ("sweep", "from-latents"):
        parts.append("latents")
    if recipe.noised_outside:
        parts.append("denoiser")
        extra[DENOISER_TABLE_FILE] = dit_denoiser_table(weights, recipe, label)
    return _export(recipe, out, feeds, fill, reference, extra, parts, overwrite, say)


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

    from difffeat.export.fold import fill_plaid, fill_plaid_denoiser
    from difffeat.export.reference import plaid_taps
    from difffeat.export.schedule import NoiseLevel

    recipe = plaid_recipe(weights, hashlib.sha256(tokenizer).hexdigest(), options)
    feeds = check_captions(recipe, check_samples)
    swept = recipe.kind == "text-sweep"

    def fill(module: Any, part: str) -> None:
        if part == "denoiser":
            fill_plaid_denoiser(module, weights.tensors, weights.config)
            return
        level = None if swept else NoiseLevel.from_log_snr(recipe.timesteps[0], recipe.log_snr[0])
        fill_plaid(module.trunk, weights.tensors, weights.config.depth, level)

    def reference(recipe: GraphRecipe) -> dict[str, np.ndarray]:
        import torch

        tokens, lengths = torch.tensor(feeds["tokens"]), torch.tensor(feeds["lengths"])
        noise = _reference_noise(recipe, feeds, (*feeds["tokens"].shape, recipe.architecture["embed_dim"]))
        steps = recipe.options.get("ddim_steps") if recipe.noising == "ddim" else None
        taps = plaid_taps(
            weights, tokens, lengths, noise, timesteps=recipe.timesteps, blocks=recipe.blocks, pooling=recipe.pooling, ddim_steps=steps,
            self_conditioning=recipe.self_conditioned,
        )  # fmt: skip
        return {tap_name(block, t): x.numpy() for block, t, x in taps}

    extra: dict[str, Any] = {TOKENIZER_FILE: tokenizer}
    if swept:
        extra[TABLE_FILE] = plaid_sweep_table(weights, recipe)
    parts = ["model"]
    if recipe.noised_outside:
        parts.append("denoiser")
        extra[DENOISER_TABLE_FILE] = plaid_denoiser_table(weights, recipe)
    return _export(recipe, out, feeds, fill, reference, extra, parts, overwrite, say)


def _export(
    recipe: GraphRecipe,
    out: Path,
    feeds: dict[str, np.ndarray],
    fill: Callable[[Any, str], None],
    reference: Callable[[GraphRecipe], dict[str, np.ndarray]],
    extra: dict[str, Any],
    parts: Sequence[str],
    overwrite: bool,
    say: Say,
) -> ExportReport:
    """The part that images and text share: reference, graphs, files, parity, and only then the final name."""
    seconds: dict[str, float] = {}
    with staging_folder(out, overwrite) as staging:
        started = time.perf_counter()
        if recipe.precision != "fp32":
            say(f"looking for parts that {recipe.precision} cannot hold")
            recipe = promote(recipe, feeds, Parts(fill, extra.get(TABLE_FILE), extra.get(DENOISER_TABLE_FILE)), reference, say)
        say("running the unfolded fp32 reference")
        expected = reference(recipe)
        seconds["reference"] = time.perf_counter() - started
        started = time.perf_counter()
        for part in parts:
            say(f"exporting {FILES[part]}")
            _write(staging / FILES[part], recipe, part, fill)
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


def _write(path: Path, recipe: GraphRecipe, part: str, fill: Callable[[Any, str], None]) -> None:
    from difffeat.export.assemble import build_module, graph_spec
    from difffeat.export.graph import write_graph

    module = build_module(recipe, part)
    fill(module, part)
    write_graph(graph_spec(recipe, module, part), path, recipe)


def _write_extra(path: Path, content: Any) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    from safetensors.numpy import save

    path.write_bytes(save(content))  # its own save_file makes files that nobody else may read, whatever the umask


def _reference_noise(recipe: GraphRecipe, feeds: dict[str, np.ndarray], shape: Sequence[int]) -> Any:
    import torch

    from difffeat.export.assemble import constant_noise

    if recipe.noising == "random":
        return torch.tensor(feeds["noise"])
    return constant_noise(recipe).expand(*shape) if recipe.noising == "constant" else None


def _checked_blocks(blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    if bad := [block for block in blocks if not 0 <= block <= depth]:
        raise ConfigError(f"blocks must lie in 0..{depth} (block k is the stream after k blocks, 0 the embedding), got {bad}")
    return tuple(sorted(set(blocks)))
