"""`difffeat verify`: an engine's features of real samples against fp32, and the promotion of what low precision cannot hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines import Artifact, Engine, EngineOptions, open_engine
from difffeat.engines.artifact import MODEL_FILE, RECIPE_FILE, read_initializers
from difffeat.engines.parity import TapStatistics, statistics
from difffeat.errors import ConfigError, ParityError, RecipeMismatch
from difffeat.probe.output import replace_bytes
from difffeat.recipe import GraphRecipe, RunRecipe, tap_name
from difffeat.runtime.feeds import Fed, fed_batches
from difffeat.runtime.inversion import Inversion, open_inversion
from difffeat.runtime.samples import Sample
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.understood import say_understood, understood_dict
from difffeat.workflows.arguments import check_arguments
from difffeat.workflows.checking import Parts, promote, standardised
from difffeat.workflows.checking import exact as exact_form
from difffeat.workflows.staging import PARITY_FILE, REPORT_FILE, replace_folder, staging_folder

LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2, "int8": 0.35}
"""Largest relative L2 of a tap on standardised features, by precision. int8 is judged by a probe (`--probe`); its limit catches what is broken."""
REFERENCE_BATCH = 8
PER_SAMPLE = ("pixels", "latents", "noise", "tokens", "lengths")
PROMOTED, INT8_PARTS = "fp32_parts", "int8_parts"
"""Options of a recipe that go with its precision."""
PROMOTION_SAMPLES = 24
LEAST_SAMPLES = 2
MARGINS = (0.9, 0.7, 0.5)
"""Blocks are judged more strictly than taps, since it is on fewer samples and what several of them lose adds up; as strictly as it takes."""

Say = Callable[..., None]


@dataclass(frozen=True)
class Verification:
    """Taps of one engine against the reference, by batch size."""

    engine: str
    device: str
    precision: str
    limit: float
    reference: str
    unreadable: int
    batches: Mapping[int, Mapping[str, TapStatistics]]
    probe: Mapping[str, float] | None = None

    @property
    def failing(self) -> list[str]:
        """Names of taps beyond the limit at any batch size."""
        return sorted({name for taps in self.batches.values() for name, tap in taps.items() if not tap.within(self.limit)})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "batches": {str(k): v for k, v in asdict(self)["batches"].items()}, "passed": not self.failing}


def run_verify(
    path: Path,
    source: str,
    *,
    reference: Path | None,
    engine: str | None,
    device: str | None,
    threads: int | None,
    options: EngineOptions,
    samples: int,
    batches: Sequence[int],
    promoting: bool,
    probe: Path | None,
    run: RunRecipe,
    source_options: SourceOptions,
    say: Say,
) -> dict[str, Any]:
    """Verify an artifact in an engine; arguments as the command's options. Writes verify.json into the artifact.

    The engine comes before the reference: what it lacks is told before minutes of fp32.

    Raises ParityError beyond the limit (after promotion, where it was asked for), ConfigError, SourceError, EngineError.
    """
    _require_counts(samples, batches)
    check_arguments("verify", path, source)
    artifact = Artifact.open(path)
    exact = find_reference(artifact, reference)
    judge, note = choose_judge(artifact, engine, device)
    listed = open_source(source, source_options)
    chosen = spread(listed.samples, samples)
    _require_enough(f"{source} has", len(listed))
    if note:
        say(note)
    say_understood(listed, say)
    say(f"{len(chosen)} samples in {judge} at batches of {', '.join(map(str, batches))}, then in fp32 ({exact.path})")
    opening = {"device": device, "threads": threads, "options": replace(options, batch=max(batches)), "say": say}
    found = features_at(artifact, judge, chosen, run, batches, **opening)
    _require_enough(f"of {len(chosen)} that were chosen from {source} there could be read", len(found.rows))
    expected, _ = features_of(exact, "ort" if exact is not artifact or judge != "ort" else "torch", chosen, run, REFERENCE_BATCH, threads=threads)

    def measured(current: Artifact, found: Features) -> Verification:
        taps = {batch: {name: statistics(value, expected[name]) for name, value in values.items()} for batch, values in found.batches.items()}
        scored = None if probe is None else probe_difference(probe, expected, found.batches[batches[-1]], listed, chosen, found.rows)
        unreadable, precision = len(chosen) - len(found.rows), current.recipe.precision
        return Verification(judge, found.device, precision, LIMITS[precision], str(exact.path), unreadable, taps, scored)

    verified = measured(artifact, found)
    for margin in MARGINS if promoting else ():
        if not verified.failing:
            break
        artifact = promote_failing(artifact, exact, chosen, run, say, margin=margin)
        verified = measured(artifact, features_at(artifact, judge, chosen, run, batches, **opening))
    replace_bytes(artifact.path / REPORT_FILE, (json.dumps(verified.to_dict(), indent=2, sort_keys=True) + "\n").encode())
    result = {
        **verified.to_dict(),
        "artifact": str(artifact.path),
        "understood": understood_dict(listed),
        "note": note,
        "text": "\n".join(_lines(artifact, verified, note)),
    }
    if verified.failing:
        raise ParityError(_complaint(artifact, verified, promoting))
    return result


def _require_counts(samples: int, batches: Sequence[int]) -> None:
    if not batches or min(batches) < 1:
        raise ConfigError(f"--batches takes batch sizes of at least 1, got {', '.join(map(str, batches)) or 'none'}")
    if samples < LEAST_SAMPLES:
        raise ConfigError(f"--samples must be at least {LEAST_SAMPLES}, since features are standardised over them, got {samples}")


def _require_enough(where: str, count: int) -> None:
    if count < LEAST_SAMPLES:
        samples = f"{count} sample{'' if count == 1 else 's'}"
        raise ConfigError(f"{where} {samples}; features are standardised over at least {LEAST_SAMPLES}, and fewer than 32 say little.")


def find_reference(artifact: Artifact, given: Path | None) -> Artifact:
    """The fp32 artifact that another is held against: itself, the one named, or `<name>` beside `<name>-fp16`."""
    if artifact.recipe.precision == "fp32" and given is None:
        return artifact
    suffix = f"-{artifact.recipe.precision}"
    path = given or artifact.path.with_name(artifact.path.name.removesuffix(suffix))
    if given is None and (path == artifact.path or not (path / MODEL_FILE).is_file()):
        raise ConfigError(
            f"{artifact.path} is {artifact.recipe.precision} and there is no fp32 artifact at {path} to hold it against. "
            "Export the same taps with --dtype fp32 and pass --reference."
        )
    exact = Artifact.open(path)
    ours, theirs = _comparable(artifact.recipe), _comparable(exact.recipe)
    if exact.recipe.precision != "fp32":
        raise ConfigError(f"{path} is {exact.recipe.precision}; a reference is fp32.")
    different = sorted(key for key in ours if ours[key] != theirs[key])
    if different:
        raise RecipeMismatch(f"{path} differs from {artifact.path} in {', '.join(different)}, not in precision alone: it is no reference for it.")
    return exact


def _comparable(recipe: GraphRecipe) -> dict[str, Any]:
    options = {key: value for key, value in recipe.options.items() if key not in (PROMOTED, INT8_PARTS)}
    return {**{key: value for key, value in recipe.to_dict().items() if key not in ("precision", "calibration")}, "options": options}


def choose_judge(artifact: Artifact, engine: str | None, device: str | None) -> tuple[str, str]:
    """The engine that verifies, and what must be said about it."""
    low = artifact.recipe.precision in ("fp16", "bf16")
    if engine is None:
        engine = "torch" if low else "ort"
    on_cpu = engine in ("torch", "ort") and (device or "cpu") == "cpu"
    if not (low and on_cpu):
        return engine, ""
    if engine == "ort":
        return (
            engine,
            "ONNX Runtime's CPU provider computes fp16 graphs in fp32: an overflow would not show. --engine torch rounds at each operation.",
        )
    from difffeat.export.precision import cpu_computes

    precision = artifact.recipe.precision
    if cpu_computes(precision):
        return engine, f"this CPU has units for {precision}: torch computes in it and rounds at each operation"
    return engine, f"no hardware here computes {precision}: torch rounds at each operation instead"


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples, evenly spread."""
    return [samples[int(row)] for row in np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))]


@dataclass(frozen=True)
class Running:
    """The open engines of an artifact: of its main graph, of the autoencoder where that takes latents, and the inversion where it needs one."""

    artifact: Artifact
    main: Engine
    vae: Engine | None
    invert: Inversion | None

    def feeds(self, samples: Sequence[Sample], run: RunRecipe, batch: int) -> Iterable[Fed]:
        """What the main graph is fed for these samples."""
        return self._fed(samples, run, batch, self.invert)

    def clean_feeds(self, samples: Sequence[Sample], run: RunRecipe, batch: int) -> Iterable[Fed]:
        """The same ahead of the denoiser."""
        return self._fed(samples, run, batch, None)

    def _fed(self, samples: Sequence[Sample], run: RunRecipe, batch: int, invert: Inversion | None) -> Iterable[Fed]:
        table, tokenizer = self.artifact.sweep_table(), self.artifact.tokenizer
        return fed_batches(self.main, samples, run, batch_size=batch, latents_engine=self.vae, table=table, tokenizer=tokenizer, invert=invert)


def open_running(stack: ExitStack, artifact: Artifact, engine: str, **opening: Any) -> Running:
    """Open all that an artifact needs to start from samples. Arguments and errors as for `open_engine`."""
    main = stack.enter_context(open_engine(artifact, engine, **opening))
    invert, vae = open_inversion(artifact, stack, engine, **opening), None
    if artifact.recipe.kind in ("from-latents", "sweep"):
        if artifact.latents_graph is None:
            raise ConfigError(f"{artifact.path} takes latents and holds no VAE to make them from samples. Export it with --vae.")
        vae = stack.enter_context(open_engine(artifact, engine, graph="latents", **opening))
    return Running(artifact, main, vae, invert)


@dataclass(frozen=True)
class Features:
    """Of the readable samples, `rows` of those asked for: by batch size, then by tap, as an engine gave them on `device`."""

    batches: Mapping[int, Mapping[str, np.ndarray]]
    rows: np.ndarray
    device: str


def features_at(artifact: Artifact, engine: str, samples: Sequence[Sample], run: RunRecipe, batches: Sequence[int], **opening: Any) -> Features:
    """Features of the same samples at several batch sizes, the engine opened anew for each. Arguments and errors as for `open_engine`."""
    found, rows, device = {}, np.zeros(0, np.int64), ""
    for batch in batches:
        with ExitStack() as stack:
            running = open_running(stack, artifact, engine, **opening)
            device = running.main.device
            found[batch], rows = collect(running, samples, run, batch)
    return Features(found, rows, device)


def features_of(
    artifact: Artifact, engine: str, samples: Sequence[Sample], run: RunRecipe, batch: int, **opening: Any
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features by tap (and `latents`, where the autoencoder's graph gives them) of the readable samples, and their rows."""
    with ExitStack() as stack:
        return collect(open_running(stack, artifact, engine, **opening), samples, run, batch)


def collect(running: Running, samples: Sequence[Sample], run: RunRecipe, batch: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Run open engines over samples; as `features_of`."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for fed in running.feeds(samples, run, batch):
        outputs = running.main.run(fed.feeds)
        if running.vae is not None and running.invert is None:
            outputs = {**outputs, "latents": fed.feeds["latents"]}
        for name, value in outputs.items():
            tap = name if name == "latents" else tap_name(int(name[1:]), fed.t)
            found.setdefault(tap, {}).update(zip(fed.rows.tolist(), value[fed.places], strict=True))
    if not found:
        raise ConfigError("none of the samples could be read. difffeat extract says why, sample by sample.")
    rows = np.array(sorted(next(iter(found.values()))))
    return {tap: np.stack([values[row] for row in rows.tolist()]) for tap, values in found.items()}, rows


def probe_difference(
    path: Path, exact: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], source: Any, chosen: Sequence[Sample], rows: np.ndarray
) -> dict[str, float]:
    """MAP of a frozen probe on the reference's features and on the engine's, same samples."""
    from difffeat.probe.factory import load_probe
    from difffeat.probe.metrics import mean_average_precision

    probe = load_probe(path)
    tap = str(probe.metadata_.get("tap", ""))
    if tap not in exact:
        raise ConfigError(f"{path} is a probe on {tap or 'an unnamed tap'}; the artifact gives {', '.join(exact)}.")
    column = {name: index for index, name in enumerate(probe.classes_)}
    unknown = sorted(set(source.classes) - set(column))
    if not source.classes or unknown:
        raise ConfigError(f"--probe needs labels of its own classes; {source.name} has {', '.join(unknown) or 'no labels'} beside them.")
    labels = np.zeros((len(rows), len(column)), bool)
    for place, row in enumerate(rows.tolist()):
        labels[place, [column[name] for name in chosen[row].labels or ()]] = True
    scores = [mean_average_precision(labels, probe.decision_function(values[tap].reshape(len(rows), -1))).value for values in (exact, found)]
    return {"reference_map": scores[0], "map": scores[1], "difference": scores[1] - scores[0]}


def promote_failing(
    artifact: Artifact, exact: Artifact, samples: Sequence[Sample], run: RunRecipe, say: Say, *, margin: float = MARGINS[0]
) -> Artifact:
    """Write a low-precision artifact again with those parts in fp32 that fail on these samples; weights come out of the fp32 artifact.

    A part fails beyond `margin` times the limit of its precision.

    Raises ConfigError for precisions without parts to promote.
    """
    from difffeat.export.assemble import graph_spec
    from difffeat.export.graph import write_graph

    if artifact.recipe.precision not in ("fp16", "bf16"):
        raise ConfigError(f"only fp16 and bf16 graphs have parts to promote; {artifact.path} is {artifact.recipe.precision}.")
    parts = Parts(filler(exact), exact.sweep_table(), exact.denoiser_table() if exact.recipe.noised_outside else None)
    feeds = sample_feeds(exact, spread(samples, PROMOTION_SAMPLES), run)
    recipe = promote(
        artifact.recipe, feeds, parts, lambda whole: exact_features(parts, whole, feeds), say, standardised,
        LIMITS[artifact.recipe.precision] * margin,
    )  # fmt: skip
    if recipe == artifact.recipe:
        say("no block fails by itself on these samples: nothing was promoted")
        return artifact
    with staging_folder(artifact.path, True) as staging:
        left_out = shutil.ignore_patterns("engines", PARITY_FILE, REPORT_FILE, "*.onnx", "*.onnx_data")
        shutil.copytree(artifact.path, staging, ignore=left_out, dirs_exist_ok=True)
        for part, path in artifact.graphs.items():
            module = parts.module(recipe, part)
            write_graph(graph_spec(recipe, module, part), staging / path.name, recipe)
        (staging / RECIPE_FILE).write_text(json.dumps(recipe.to_dict(), indent=2, sort_keys=True) + "\n")
        replace_folder(staging, artifact.path)
    return Artifact.open(artifact.path)


def filler(exact: Artifact) -> Callable[[Any, str], None]:
    """What fills a module of another precision with the weights of an fp32 artifact's graphs."""
    import torch

    weights = {part: read_initializers(path) for part, path in exact.graphs.items()}

    def fill(module: Any, part: str) -> None:
        found = weights.get(part, weights["model"])
        with torch.no_grad():
            for name, target in module.state_dict().items():
                target.copy_(torch.tensor(np.asarray(found[name])).reshape(target.shape))

    return fill


def sample_feeds(exact: Artifact, samples: Sequence[Sample], run: RunRecipe) -> dict[str, np.ndarray]:
    """One batch of all readable samples: whatever of pixels, latents, noise, tokens and lengths the graphs take."""
    with ExitStack() as stack:
        running = open_running(stack, exact, "ort")
        batches = [running.clean_feeds(samples, run, len(samples))]
        if running.vae is not None:
            batches.append(fed_batches(running.vae, samples, run, batch_size=len(samples)))
        firsts = [fed for batch in batches if (fed := next(iter(batch), None)) is not None]
    return {name: value[fed.places] for fed in firsts for name, value in fed.feeds.items() if name in PER_SAMPLE}


def exact_features(parts: Parts, recipe: GraphRecipe, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tap of a recipe in fp32, and the latents where the samples have pixels."""
    recipe = exact_form(recipe)
    found = {"latents": parts.latents(recipe, feeds)} if "pixels" in feeds else {}
    return found if recipe.kind == "latents" else found | parts.taps(recipe, feeds, parts.noised(recipe, feeds))


def _lines(artifact: Artifact, verified: Verification, note: str) -> list[str]:
    lines = [f"{artifact.path}: {verified.precision} in {verified.engine} on {verified.device} against fp32 ({verified.reference})"]
    if note:
        lines.append(f"  {note}")
    header = f"  {'tap':12} {'batch':>5} {'standardised L2':>16} {'median':>9} {'p99':>9} {'raw L2':>9} {'cosine':>11} {'max':>9} {'nonfinite':>9}"
    lines.append(header)
    for batch, taps in verified.batches.items():
        for name, tap in taps.items():
            lines.append(
                f"  {name:12} {batch:5} {tap.standardised_l2:16.2e} {tap.percentiles['50']:9.1e} {tap.percentiles['99']:9.1e} {tap.relative_l2:9.1e} "
                f"{tap.cosine_min:11.8f} {tap.max_abs:9.2e} {tap.nonfinite:9}{'' if tap.within(verified.limit) else '   <- beyond'}"
            )
    if parts := artifact.recipe.options.get("fp32_parts"):
        lines.append(f"  kept in fp32: {', '.join(map(str, parts))}")
    if verified.probe is not None:
        lines.append(f"  mAP of the probe: {100 * verified.probe['reference_map']:.2f} on fp32, {100 * verified.probe['map']:.2f} on these features")
    if verified.unreadable:
        lines.append(f"  {verified.unreadable} of the samples could not be read; the figures are without them")
    lines.append(f"  {'all taps are within' if not verified.failing else 'NOT within'} {verified.limit:g} on standardised features")
    return lines


def _complaint(artifact: Artifact, verified: Verification, promoted: bool) -> str:
    first = verified.failing[0]
    worst = max((taps[first] for taps in verified.batches.values()), key=lambda tap: (tap.nonfinite, tap.standardised_l2))
    advice = "Export with --dtype fp32." if promoted or verified.precision not in ("fp16", "bf16") else "Run again with --promote."
    return (
        f"{len(verified.failing)} taps of {artifact.path} are beyond {verified.limit:g} in {verified.engine}; {first}: standardised relative L2 "
        f"{worst.standardised_l2:.2e}, {worst.nonfinite} non-finite values. The figures stand in {artifact.path / REPORT_FILE}. {advice}"
    )
