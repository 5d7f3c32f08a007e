"""The whole method on digit scenes, with the code that full-size models run: export, extract, grid, search, fuse, report.

Selection happens on validation; the test split is read once, at the end, for the taps that were chosen.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines import Artifact, open_engine
from difffeat.errors import ConfigError, MissingExtra
from difffeat.probe.choices import edge_text
from difffeat.probe.evaluate import write_metrics
from difffeat.probe.output import check_folder
from difffeat.probe.provenance import provenance
from difffeat.probe.search import Grid, SearchResult, grid_search, local_search
from difffeat.recipe import RunRecipe, parse_tap
from difffeat.recognise import recognise
from difffeat.runtime.extract import extract
from difffeat.runtime.files import Lock
from difffeat.runtime.manifest import MANIFEST
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store
from difffeat.workflows.exporting import ExportOptions, export_dit, export_plaid
from difffeat.workflows.loading import Backbone, load_backbone
from difffeat.workflows.pairs import Split, TapEvaluator
from difffeat.workflows.quickstart_adam import OverTimesteps, over_timesteps
from difffeat.workflows.quickstart_data import random_backbone, write_split
from difffeat.workflows.scenes import Scene

OUTPUT = Path("quickstart-out")
SPLIT_SIZES = {"train": 2000, "validation": 1000, "test": 2000}
LIBRARIES = {
    "export": ("torch", "onnx", "onnxscript", "diffusers", "huggingface_hub"), "cpu": ("onnxruntime",), "report": ("matplotlib",),
}  # fmt: skip
"""What the steps import, by extra."""
OWN = ("artifacts", "data", "features", "report.html", "metrics.json")


@dataclass(frozen=True)
class Plan:
    """What is run: the reduced grid of the default, or the whole one of `--full`."""

    image_timesteps: tuple[float, ...] = (0, 10, 30, 50, 100, 200)
    text_timesteps: tuple[float, ...] = (0, 0.1, 0.3)
    text_blocks: tuple[int, ...] = (0, 1, 2, 4, 6, 8)
    random_timesteps: tuple[float, ...] = (0, 10, 30, 100)
    grid_seeds: tuple[int, ...] = (0,)
    final_seeds: tuple[int, ...] = (0, 1, 2)


FULL = Plan(
    image_timesteps=(0, 10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500),
    text_timesteps=(0, 0.05, 0.1, 0.2, 0.3, 0.5),
    text_blocks=tuple(range(9)),
    random_timesteps=(0, 10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500),
    grid_seeds=(0, 1, 2),
)


@dataclass
class Run:
    """One quickstart under way: where it writes, how it speaks, and how long each step took."""

    out: Path
    plan: Plan
    say: Callable[..., None]
    seconds: dict[str, float] = field(default_factory=dict)
    scenes: dict[str, list[Scene]] = field(default_factory=dict)
    manifests: dict[str, Path] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Say what begins, and keep its seconds."""
        self.say(f"[{sum(self.seconds.values()):5.0f} s] {name}")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.say(f"{'':9} took {self.seconds[name]:.1f} s")

    def artifact(self, name: str) -> Path:
        """Where an artifact of this run lies."""
        return self.out / "artifacts" / name

    def extract(self, artifact: Artifact, split: str, name: str, *, seed: int = 0, latents: Path | None = None, dtype: str = "fp16") -> Store:
        """One store of a split, with the options of `difffeat extract`."""
        run = RunRecipe(seed=seed, store_dtype=dtype)
        source, target = open_source(self.manifests[split]), self.out / "features" / f"{split}-{name}"
        with open_engine(artifact) as engine:
            options: dict[str, Any] = {"table": artifact.sweep_table(), "tokenizer": artifact.tokenizer, "latent_cache": latents}
            extract(engine, source, target, run=run, batch_size=128, **options)
        return Store.open(target)

    def latents(self, split: str) -> Path:
        """The latent cache of a split."""
        return self.out / "features" / f"{split}-latents"


def run_quickstart(output: Path | None, *, full: bool, say: Callable[..., None]) -> dict[str, Any]:
    """Run everything into `output`; the table, the path of report.html, and all numbers.

    By default the whole grid has a folder of its own. Raises ConfigError for a folder that holds another grid, before anything in it is replaced.
    """
    output = output or (OUTPUT / "full" if full else OUTPUT)
    require_libraries(say)
    require_own_folder(output)
    run = Run(output, FULL if full else Plan(), say)
    _require_same_grid(run)
    output.mkdir(parents=True, exist_ok=True)
    with Lock(output):
        return _run_locked(run)


def _run_locked(run: Run) -> dict[str, Any]:
    """Every step; no other quickstart writes into the folder meanwhile."""
    from difffeat.workflows.quickstart_final import Chosen, read_test_once
    from difffeat.workflows.quickstart_report import write_report

    output, say = run.out, run.say
    with run.step("drawing scenes"):
        _write_scenes(run)
    with run.step("loading the bundled weights"):
        image, text = load_backbone("dit-digits"), load_backbone("plaid-digits")
    with run.step("exporting the sweep graphs and checking their parity"):
        artifacts = _export_sweeps(run, image, text)
    with run.step("encoding latents, once for every timestep and block"):
        for split in ("train", "validation"):
            run.extract(artifacts["latents"], split, "latents", dtype="fp32")
    with run.step("extracting the grid of blocks and timesteps"):
        grids = _extract_grids(run, artifacts)
    with run.step("probing the grid, searching, and the exhaustive pair grid for the regret"):
        looked = _search(run, grids)
        search, exhaustive, random_surface = looked.search, looked.exhaustive, looked.random_surface
    chosen = Chosen(search.image_tap, search.text_tap, _best_tap(*random_surface))
    say(f"         chosen on validation: image {chosen.image_tap}, text {chosen.text_tap}; random backbone {chosen.random_tap}")
    with run.step("exporting the chosen graphs"):
        finals = _export_finals(run, image, text, chosen)
    with run.step("reading the test split once: features, controls, fusion"):
        findings = read_test_once(run, finals, chosen, artifacts["latents"], search, looked.over_t)
    result = {
        "grid": {name: store.manifest["recipe"]["graph"]["timesteps"] for name, (store, _) in grids.items()},
        "chosen": vars(chosen),
        "search": search.to_dict(),
        "exhaustive": {"pairs": len(exhaustive.trace), "best": [exhaustive.image_tap, exhaustive.text_tap], "value": exhaustive.value},
        "alphas_at_edge": list(looked.at_edge),
        "over_timesteps": dict(looked.over_t),
        **findings.to_dict(),
        "seconds": dict(run.seconds),
        "provenance": provenance({name: train.path for name, (train, _) in grids.items()}),
    }
    metrics = write_metrics(output, result)
    try:
        with run.step("writing the report"):
            report = write_report(run, search, exhaustive, random_surface, findings, artifacts)
    except BaseException:  # the numbers do not wait for the pictures
        say(_text(findings, run, None, metrics, looked.at_edge))
        raise
    text = _text(findings, run, report, metrics, looked.at_edge)
    return {**result, "report": str(report), "metrics_file": str(metrics), "text": text}


def require_libraries(say: Callable[..., None]) -> None:
    """Import all that any step needs, the last one's pictures too. Raises MissingExtra that names every extra, ConfigError for a broken library."""
    missing = {extra: [name for name in names if importlib.util.find_spec(name) is None] for extra, names in LIBRARIES.items()}
    if lacking := [extra for extra, names in missing.items() if names]:
        raise MissingExtra(" and ".join(name for names in missing.values() for name in names), ",".join(lacking), "The quickstart")
    say("[    0 s] importing what the steps need, the pictures of the last one too")
    for name in (name for names in LIBRARIES.values() for name in names):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken library raises
            raise ConfigError(f"The quickstart needs {name}, which is installed and cannot be imported: {type(error).__name__}: {error}") from error


def require_own_folder(out: Path) -> None:
    """Raises ConfigError, before any work, where the folder is a file, or holds something that is not a quickstart's."""
    thing = recognise(out)
    if thing.kind in ("nothing", "empty", "quickstart"):
        check_folder(out)
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {""}
    if out.is_dir() and ((out / "data" / "train.jsonl").is_file() or not names & {*OWN, "recipe.json", "manifest.json", "model.onnx"}):
        return
    raise ConfigError(f"-o {out} {thing.words}; a quickstart needs a folder of its own, of which it replaces {', '.join(OWN)}. Choose another -o.")


def _require_same_grid(run: Run) -> None:
    """Raises ConfigError where the features that lie there are of other blocks or timesteps: their graphs would be replaced, and they not go on."""
    grids = {
        "image": (None, run.plan.image_timesteps),
        "random": (None, run.plan.random_timesteps),
        "text": (run.plan.text_blocks, run.plan.text_timesteps),
    }
    for name, (blocks, timesteps) in grids.items():
        path = run.out / "features" / f"train-{name}-grid"
        if not (path / MANIFEST).is_file():
            continue
        graph = Store.open(path, partial=True).recipe.graph
        if graph.timesteps != tuple(map(float, timesteps)) or blocks not in (None, graph.blocks):
            raise ConfigError(
                f"{run.out} holds a quickstart of another grid ({len(graph.taps)} taps of {name} features), whose graphs and features this one would "
                "replace. Choose another folder with -o, or remove that one first."
            )


def _write_scenes(run: Run) -> None:
    for split, count in SPLIT_SIZES.items():
        run.manifests[split], run.scenes[split] = write_split(run.out / "data", split, count)


def _export_sweeps(run: Run, image: Backbone, text: Backbone) -> dict[str, Artifact]:
    plan, depth = run.plan, image.depth
    blocks = tuple(range(depth + 1))
    control = random_backbone(image.weights)

    def dit(name: str, weights: Any, vae: Any, kind: str, timesteps: tuple[float, ...]) -> Artifact:
        options = ExportOptions(kind=kind, blocks=blocks, timesteps=timesteps, noising="random")
        return export_dit(weights, vae, options, run.artifact(name), overwrite=True, say=_silent).artifact

    options = ExportOptions(kind="text-sweep", blocks=plan.text_blocks, timesteps=plan.text_timesteps, noising="mean")
    assert text.tokenizer is not None
    return {
        "latents": dit("dit-digits-latents", image.weights, image.vae, "latents", (0,)),
        "image": dit("dit-digits-sweep", image.weights, None, "sweep", plan.image_timesteps),
        "random": dit("dit-random-sweep", control, None, "sweep", plan.random_timesteps),
        "text": export_plaid(text.weights, text.tokenizer, options, run.artifact("plaid-digits-sweep"), overwrite=True, say=_silent).artifact,
    }


def _extract_grids(run: Run, artifacts: dict[str, Artifact]) -> dict[str, tuple[Store, Store]]:
    """Name -> (train, validation) stores of every tap; with several grid seeds, the later ones under `image-1`, `image-2`."""

    def both(name: str, artifact: Artifact, seed: int, image: bool) -> tuple[Store, Store]:
        first, second = (
            run.extract(artifact, split, name, seed=seed, latents=run.latents(split) if image else None) for split in ("train", "validation")
        )
        return first, second

    grids = {"image": both("image-grid", artifacts["image"], 0, True), "random": both("random-grid", artifacts["random"], 0, True)}
    grids["text"] = both("text-grid", artifacts["text"], 0, False)
    for seed in run.plan.grid_seeds[1:]:
        grids[f"image-{seed}"] = both(f"image-grid-seed{seed}", artifacts["image"], seed, True)
    return grids


Surface = tuple[Grid, np.ndarray]


@dataclass(frozen=True)
class Looked:
    """What validation showed: Algorithm 1, all pairs, the random backbone's own surface; for `image` and `text` the lead of t = 0 over other
    timesteps (paired bootstrap, in points of mAP); and the probes whose alpha lies at an edge of the grid.
    """

    search: SearchResult
    exhaustive: SearchResult
    random_surface: Surface
    over_t: Mapping[str, OverTimesteps]
    at_edge: tuple[str, ...]


def _search(run: Run, grids: dict[str, tuple[Store, Store]]) -> Looked:
    """Algorithm 1 on validation, its regret against all pairs, and the random backbone's own surface."""

    def of(name: str) -> TapEvaluator:
        return TapEvaluator(*(Split.whole(grids[name][part], grids["text"][part]) for part in (0, 1)))  # pyright: ignore[reportArgumentType]

    evaluator = of("image")
    others = [of(name) for name in grids if name.startswith("image-")]

    def eval_image(block: int, t: float) -> float:
        """Averaged over the grid's noise seeds."""
        return float(np.mean([one.image(block, t) for one in (evaluator, *others)]))

    image_grid, text_grid = (Grid.of_taps(grids[name][0].taps) for name in ("image", "text"))
    exhaustive = grid_search(evaluator.pair, image_grid=image_grid, text_grid=text_grid)
    search = local_search(eval_image, evaluator.text, evaluator.pair, image_grid=image_grid, text_grid=text_grid, exhaustive=exhaustive.pairs)
    random_evaluator = of("random")
    random_grid = Grid.of_taps(grids["random"][0].taps)
    values = [[random_evaluator.image(block, t) for t in random_grid.timesteps] for block in random_grid.blocks]
    over_t = {
        "image": over_timesteps(search.trace, "image", evaluator.image_scores, evaluator.held_labels),
        "text": over_timesteps(search.trace, "text", evaluator.text_scores, evaluator.held_labels),
    }
    at_edge = [name for one in (evaluator, *others, random_evaluator) for name in one.at_edge]
    return Looked(search, exhaustive, (random_grid, np.array(values)), over_t, tuple(at_edge))


def _best_tap(grid: Grid, values: np.ndarray) -> str:
    return grid.taps[int(values.argmax())]


def _export_finals(run: Run, image: Backbone, text: Backbone, chosen: Any) -> dict[str, Artifact]:
    """The graphs of the chosen taps, timestep baked in: what one would deploy. Block 0 rides along as a control."""
    assert text.tokenizer is not None
    image_block, t = parse_tap(chosen.image_tap)
    text_block, text_t = parse_tap(chosen.text_tap)
    random_block, random_t = parse_tap(chosen.random_tap)
    control = random_backbone(image.weights)

    def dit(name: str, weights: Any, block: int, timestep: float) -> Artifact:
        options = ExportOptions(kind="from-latents", blocks=tuple(sorted({0, block})), timesteps=(timestep,), noising="random")
        return export_dit(weights, None, options, run.artifact(name), overwrite=True, say=_silent).artifact

    options = ExportOptions(kind="text", blocks=(text_block,), timesteps=(text_t,), noising="mean")
    return {
        "image": dit("dit-digits-chosen", image.weights, image_block, t),
        "random": dit("dit-random-chosen", control, random_block, random_t),
        "text": export_plaid(text.weights, text.tokenizer, options, run.artifact("plaid-digits-chosen"), overwrite=True, say=_silent).artifact,
    }


def _text(findings: Any, run: Run, report: Path | None, metrics: Path, at_edge: tuple[str, ...]) -> str:
    lines = ["", "mAP on test (2 000 scenes no model or choice has seen), ridge probes: mean over noise seeds, 95 % interval of the first seed", ""]
    lines += [*findings.table(), "", *findings.adam_lines()]
    lines += [f"  note on ridge, {note}" for note in (*findings.notes, *([edge_text(at_edge)] if at_edge else []))]
    kept = sum(outcome.kept for outcome in findings.outcomes)
    lines += ["", f"{kept} of {len(findings.outcomes)} expectations, stated before any model was trained, were kept:"]
    lines += [f"  {'kept  ' if outcome.kept else 'BROKEN'}  {outcome.expected} ({outcome.evidence})" for outcome in findings.outcomes]
    shown = "the report could not be written" if report is None else f"{report} shows the heat maps and the search"
    lines += ["", f"{sum(run.seconds.values()):.0f} s in all; {shown}; all numbers: {metrics}"]
    return "\n".join(lines)


def _silent(message: str) -> None:
    """Exports of the quickstart speak through its own steps."""
