"""`difffeat export` and `difffeat extract`: from options to what does the work, and the words that come back."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from difffeat.engines import Artifact, EngineOptions
from difffeat.errors import ConfigError, printable
from difffeat.recipe import RunRecipe, format_timestep
from difffeat.recognise import quoted
from difffeat.runtime.batch_size import LARGEST
from difffeat.runtime.configuration import recorded_plans
from difffeat.runtime.extract import MAX_BAD_FRACTION, extract
from difffeat.runtime.feeding import Opening
from difffeat.runtime.matching import Mode
from difffeat.runtime.origin import Origin
from difffeat.runtime.progress import Progress, Summary
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.summary import summary_dict, summary_text
from difffeat.runtime.understood import say_understood
from difffeat.workflows.arguments import check_arguments, check_images_are_there, check_model, check_store_place
from difffeat.workflows.assumptions import diffusion_lines
from difffeat.workflows.loading import DIGITS, PUBLISHED_DIT
from difffeat.workflows.staging import check_place

ARTIFACTS = Path("artifacts")
FEATURES = Path("features")
EXECUTORS = ("local", "ray")
PLAN_BATCH = 64
"""Largest batch of a TensorRT plan that is built for --batch-size auto."""
UNFINISHED = (".partial", ".failed", ".replaced")
"""What an export leaves beside artifacts that are not to be used: begun, out of tolerance, or about to be removed."""

IMAGE_TIMESTEP, TEXT_TIMESTEP = 30.0, 0.0
REDRAW_SECONDS, LOG_SECONDS = 0.1, 10.0

Say = Callable[..., None]


def run_export(
    model: str,
    weights: str | None,
    *,
    blocks: str | None,
    timestep: str | None,
    graph: str | None,
    noising: str | None,
    pooling: str,
    dtype: str,
    label: int | None,
    noise_seed: int,
    ddim_steps: int,
    self_conditioning: bool,
    vae: str | None,
    tokenizer: str | None,
    output: Path | None,
    overwrite: bool,
    say: Say,
    **loading: Any,
) -> dict[str, Any]:
    """Export one artifact; arguments as the command's options. Raises what `load_backbone` and the exports raise."""
    from difffeat.workflows.exporting import ExportOptions, export_dit, export_plaid
    from difffeat.workflows.loading import load_backbone

    check_model(model, weights)
    _check_idle_options(model, vae=vae, tokenizer=tokenizer, heads=loading.get("heads"))
    text = model.startswith("plaid")
    kind = _kind(graph, text, noising)
    timesteps = parse_numbers(timestep, "--timestep") or ((TEXT_TIMESTEP,) if text else (IMAGE_TIMESTEP,))
    asked = None if blocks is None or blocks == "all" else tuple(int(b) for b in parse_numbers(blocks, "--blocks", whole=True))
    options = ExportOptions(
        kind=kind,
        blocks=asked or (0,),
        timesteps=timesteps,
        noising=noising or ("mean" if text else "random"),
        noise_seed=noise_seed,
        label=label,
        pooling=pooling,
        precision=dtype,
        ddim_steps=ddim_steps,
        self_conditioning=self_conditioning,
    )
    if output is not None:  # ahead of loading, which may be a download
        check_place(output, overwrite, *(Path(given) for given in (weights, vae) if given is not None and Path(given).expanduser().exists()))
    say(f"loading {model} from {_weights_place(model, weights)}")
    if vae is not None:
        say(f"and the autoencoder from {_weights_place(model, vae)}")
    backbone = load_backbone(model, weights, vae=vae, tokenizer=tokenizer, need_vae=graph in (None, "image", "latents"), **loading)
    for note in backbone.notes:
        say(f"note: {printable(note)}")
    if asked is None:
        chosen = tuple(range(backbone.depth + 1)) if blocks == "all" or kind.endswith("sweep") else (backbone.default_block(),)
        options = ExportOptions(**{**vars(options), "blocks": chosen})
    out = output or ARTIFACTS / artifact_name(backbone.weights.config.name, options)
    if text:
        assert backbone.tokenizer is not None
        report = export_plaid(backbone.weights, backbone.tokenizer, options, out, overwrite=overwrite, say=say)
    else:
        report = export_dit(backbone.weights, backbone.vae, options, out, overwrite=overwrite, say=say)
    return {**_export_result(report), "notes": list(backbone.notes)}


def _check_idle_options(model: str, *, vae: str | None, tokenizer: str | None, heads: int | None) -> None:
    """Raises ConfigError for an option of the other modality."""
    idle = {"--vae": vae, "--heads": heads} if model.startswith("plaid") else {"--tokenizer": tokenizer}
    for option, value in idle.items():
        if value is not None:
            raise ConfigError(f"{option} means nothing for --model {model}. Leave it out, or correct --model.")


def _weights_place(model: str, weights: str | None) -> str:
    """Where weights are looked for, in words; a folder of this disk that has a hub id's name is told from the hub."""
    from difffeat.export.hub import place_words

    if weights == "random":
        return "random numbers"
    wanted = weights or PUBLISHED_DIT.get(model)
    return ("the bundled weights" if model in DIGITS else "its published place") if wanted is None else place_words(wanted)


def _export_result(report: Any) -> dict[str, Any]:
    artifact, parity = report.artifact, report.parity
    worst = max(parity.taps.items(), key=lambda item: item[1].relative_l2)
    lines = [
        f"{artifact.path}: {artifact.recipe.backbone}, {artifact.recipe.kind} graph, {artifact.size / 1e6:.1f} MB, "
        f"fingerprint {artifact.recipe.fingerprint[:12]}",
        f"  parity with the unfolded fp32 network: worst of {len(parity.taps)} taps {worst[0]}, relative L2 {worst[1].relative_l2:.1e} "
        f"(tolerance {parity.tolerance:g}), {parity.samples} samples",
    ]
    if artifact.recipe.timesteps:
        levels = zip(artifact.recipe.timesteps, artifact.recipe.log_snr, strict=True)
        lines.insert(1, f"  timesteps {', '.join(f'{format_timestep(t)} (log-SNR {snr:+.2f})' for t, snr in levels)}")
    lines += [f"  {line}" for line in diffusion_lines(artifact.recipe)]
    if parts := artifact.recipe.options.get("fp32_parts"):
        lines.append(f"  kept in fp32, because {artifact.recipe.precision} does not hold there: {', '.join(map(str, parts))}")
    if artifact.recipe.origin != "file":
        lines.append(f"  weights are {artifact.recipe.origin}: good for timing, not for features")
    kind = "a source with captions" if artifact.recipe.family == "plaid" else "a folder of images"
    lines.append(f"next: difffeat extract {quoted(artifact.path)} SOURCE   (SOURCE: {kind})")
    return {
        "artifact": str(artifact.path),
        "recipe": artifact.recipe.to_dict(),
        "fingerprint": artifact.recipe.fingerprint,
        "bytes": artifact.size,
        "parity": parity.to_dict(),
        "seconds": report.seconds,
        "text": "\n".join(lines),
    }


def artifact_name(backbone: str, options: Any) -> str:
    """`dit-xl-2-256-b12-t30`, `dit-xl-2-256-sweep`, `dit-xl-2-256-latents`; `-ddim`, `-sc` (self-conditioning) and `-fp16` where they apply."""
    parts = [_plain_name(backbone, options), *(["ddim"] if options.noising == "ddim" else []), *(["sc"] if options.self_conditioning else [])]
    return "-".join([*parts, *([] if options.precision == "fp32" else [options.precision])])


def _plain_name(backbone: str, options: Any) -> str:
    if options.kind.endswith("sweep"):
        return f"{backbone}-sweep"
    if options.kind == "latents":
        return f"{backbone}-latents"
    blocks = "-".join(map(str, options.blocks)) if len(options.blocks) <= 4 else f"{options.blocks[0]}to{options.blocks[-1]}"
    return f"{backbone}-b{blocks}-t{format_timestep(options.timesteps[0])}"


def parse_numbers(text: str | None, option: str, whole: bool = False) -> tuple[float, ...]:
    """`0,10,30` to numbers, none for None. Raises ConfigError naming the option."""
    if text is None:
        return ()
    try:
        return tuple(float(int(part)) if whole else float(part) for part in str(text).split(","))
    except (ValueError, OverflowError):
        raise ConfigError(f"{option} takes {'whole ' if whole else ''}numbers separated by commas, got {text!r}") from None


def _kind(graph: str | None, text: bool, noising: str | None) -> str:
    """The graph's kind; images that the denoiser noises start from latents, with the autoencoder's graph beside."""
    known = ("sweep", "text", "text-sweep") if text else ("image", "latents", "from-latents", "sweep")
    if graph == "denoiser":
        raise ConfigError(
            "a denoiser is exported beside the graph whose samples go through it: pass --noising ddim or, for text, --self-conditioning."
        )
    if graph is not None and graph not in known:
        raise ConfigError(f"--graph must be one of {', '.join(known)} for this model; got {graph!r}")
    if text:
        return "text-sweep" if graph in ("sweep", "text-sweep") else "text"
    return graph or ("from-latents" if noising == "ddim" else "image")


def run_extract(
    artifact: Path | None,
    source: str | None,
    output: Path | None,
    *,
    engine: str,
    device: str | None,
    threads: int | None,
    options: EngineOptions,
    batch_size: int | None,
    shard_size: int,
    num_workers: int | None,
    run: RunRecipe,
    latents: Path | None,
    source_options: SourceOptions,
    max_bad_fraction: float,
    allow_unknown: bool = False,
    executor: str,
    workers: int | None = None,
    address: str | None = None,
    mode: Mode = Mode.RESUME,
    rebatch: bool = False,
    overwrite: bool,
    say: Say,
) -> dict[str, Any]:
    """Extract one store; arguments as the command's options."""
    if executor not in EXECUTORS:
        raise ConfigError(f"--executor must be one of {', '.join(EXECUTORS)}; got {executor!r}")
    if executor == "local" and (workers is not None or address is not None):
        raise ConfigError("--workers and --address are for --executor ray; --num-workers sets the threads that decode")
    check_arguments("extract", artifact, source)
    opened = Artifact.open(artifact) if artifact is not None else newest_artifact(say)
    if source is None:
        raise ConfigError(f"no source was given. For example: difffeat extract {quoted(opened.path)} photos/ -o features/photos")
    if opened.recipe.kind == "latents" and run.store_dtype == "fp16":
        say("latents are stored as fp32, so that features from the cache equal those from pixels")
        run = replace(run, store_dtype="fp32")
    out = output or default_store(source, opened)
    check_store_place(out, source)
    listed = open_source(source, source_options)
    check_images_are_there(listed, source, source_options, takes_images=not opened.recipe.takes_text)
    options = options if overwrite else replace(options, plans=recorded_plans(out))
    opening = Opening(artifact=opened.path, engine=engine, device=device, threads=threads, options=options, latent_cache=latents)
    how: dict[str, Any] = {
        "run": run, "batch_size": batch_size, "largest_batch": options.batch if batch_size is None else batch_size, "shard_size": shard_size,
        "num_workers": num_workers, "mode": mode, "rebatch": rebatch, "overwrite": overwrite, "max_bad_fraction": max_bad_fraction,
        "allow_unknown": allow_unknown, "progress": progress_line(say), "say": say,
        "origin": _origin(opened, source, device, options, source_options, latents, max_bad_fraction, allow_unknown),
    }  # fmt: skip
    say_understood(listed, say)
    if executor == "ray":
        from difffeat.runtime.cluster import Cluster, extract_on_ray

        say(f"{len(listed)} samples from {source} -> {out}, engine {engine}, on Ray")
        return _extract_result(extract_on_ray(opening, listed, out, Cluster(workers=workers, address=address), **how))
    with ExitStack() as stack:
        main, beside = opening.open(stack, say)
        say(f"{len(listed)} samples from {source} -> {out}, engine {main.name} on {main.device}")
        return _extract_result(extract(main, listed, out, **beside, **how))


def _extract_result(summary: Summary) -> dict[str, Any]:
    return {**summary_dict(summary), "text": summary_text(summary)}


def engine_options(engine: str, batch_size: int | None, **chosen: Any) -> EngineOptions:
    """Options of an engine; one that is built for a largest batch gets `PLAN_BATCH` where the size is left to us, others are tried with more."""
    largest = batch_size or (PLAN_BATCH if engine in ("trt", "rtx") else LARGEST)
    return EngineOptions(batch=largest, **chosen)


def way_of_pixels(pixels: str, strict: bool) -> str:
    """From two options to one. Raises ConfigError where they contradict."""
    if strict and pixels == "pillow":
        raise ConfigError("--pixels pillow converts whatever it can, --strict-pixels refuses it. Leave out one.")
    return "strict" if strict else pixels


def parse_auto(text: str, option: str) -> int | None:
    """A whole number, None for `auto`. Raises ConfigError naming the option."""
    if text == "auto":
        return None
    try:
        return int(text)
    except (ValueError, OverflowError):
        raise ConfigError(f"{option} takes a whole number or auto, got {text!r}") from None


def default_store(source: str, artifact: Artifact) -> Path:
    """`features/SOURCE-ARTIFACT`."""
    return FEATURES / f"{source_name(source)}-{artifact.path.name}"


def source_name(source: str) -> str:
    """A file name for what comes of a source: its last part without suffix, and without what patterns and URLs are made of."""
    return re.sub(r"[^\w.-]+", "-", PurePath(source).stem).strip("-.") or "source"


def _origin(
    artifact: Artifact,
    source: str,
    device: str | None,
    options: EngineOptions,
    source_options: SourceOptions,
    latents: Path | None,
    max_bad_fraction: float,
    allow_unknown: bool,
) -> Origin:
    """Artifact and source as given, and those options that the manifest does not hold."""
    given: dict[str, Any] = {"device": device, "latents": latents, **vars(source_options)}
    given |= options.switches()
    if max_bad_fraction != MAX_BAD_FRACTION:
        given["max_bad_fraction"] = max_bad_fraction
    if allow_unknown:
        given["allow_unknown"] = True
    return Origin.of(str(artifact.path), source, given, defaults={"device": None, "latents": None, **vars(SourceOptions())})


def newest_artifact(say: Say) -> Artifact:
    """The artifact written last under artifacts/. Raises ConfigError when there is none."""
    finished = [path for path in ARTIFACTS.glob("*/recipe.json") if path.parent.suffix not in UNFINISHED]
    found = sorted(finished, key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(
            "no artifact was given and artifacts/ holds none. Make one first: difffeat export --model dit-digits, "
            "then: difffeat extract artifacts/dit-digits-b3-t30 photos/ -o features/photos"
        )
    say(f"taking the newest artifact: {found[-1].parent}")
    return Artifact.open(found[-1].parent)


def progress_line(say: Say) -> Callable[[Progress], None]:
    """Done, samples/s, time left, quarantined: one line written over and over on a terminal, a line every `LOG_SECONDS` in a log."""
    terminal, last = sys.stderr.isatty(), time.monotonic()

    def show(state: Progress) -> None:
        nonlocal last
        finished, now = state.done == state.total, time.monotonic()
        if not finished and now - last < (REDRAW_SECONDS if terminal else LOG_SECONDS):
            return
        last = now
        left = "" if state.eta is None else f", {_duration(state.eta)} left"
        bad = f", {state.quarantined} in quarantine" if state.quarantined else ""
        line = f"{state.done}/{state.total} samples, {state.rate:.1f}/s{left}{bad}"
        say(f"\r{line}    " if terminal else line, end="\n" if finished or not terminal else "")

    return show


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else (f"{minutes} min {rest:02d} s" if minutes else f"{rest} s")
