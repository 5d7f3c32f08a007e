"""`difffeat bench precision`: what fp16, bf16 and int8 cost the bundled backbones, in features and in a probe's mAP, on scenes nobody trained on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.benchmarks.asking import require_counts, require_known
from difffeat.benchmarks.timing import machine
from difffeat.engines import Artifact
from difffeat.engines.parity import statistics
from difffeat.probe.metrics import mean_average_precision
from difffeat.probe.output import replace_bytes
from difffeat.probe.provenance import provenance
from difffeat.probe.ridge import RidgeProbe
from difffeat.recipe import RunRecipe
from difffeat.runtime.samples import Sample
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from difffeat.workflows.exporting import ExportOptions, export_dit, export_plaid
from difffeat.workflows.loading import DIGITS, load_backbone
from difffeat.workflows.quantizing import run_quantize
from difffeat.workflows.quickstart_data import write_split
from difffeat.workflows.verifying import MARGINS, choose_judge, features_of, promote_failing

IMAGE_TIMESTEPS, TEXT_TIMESTEPS = (0.0, 10.0, 30.0, 50.0, 100.0, 200.0), (0.0, 0.1, 0.3)
"""Those of the quickstart's grid."""
PRECISIONS = ("fp16", "bf16", "int8")
LIMIT_L2 = {"fp16": 1e-2, "bf16": 1e-2}
LIMIT_MAP = {"fp16": 0.2, "bf16": 0.2, "int8": 0.5}
BATCH = 32
MARGIN = MARGINS[1]
"""Taps must hold on other scenes than those that blocks are judged on."""

Say = Callable[..., None]
Features = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Cost:
    """One precision of one backbone against fp32, over all taps.

    **Fields:** `engine` that computed it; `fp32_parts` kept in fp32; `l2` largest relative L2 on standardised features, at `l2_tap`; `map_points`
    largest change of a probe's mAP in points, at `map_tap`, either way; `best_map_points` the change at the tap where fp32 scores best.
    """

    engine: str
    fp32_parts: list[int | str]
    l2: float
    l2_tap: str
    map_points: float
    map_tap: str
    best_map_points: float

    def within(self, precision: str) -> bool:
        """Whether both limits are kept."""
        return self.l2 <= LIMIT_L2.get(precision, np.inf) and abs(self.map_points) <= LIMIT_MAP[precision]


def run_precision(
    *, train: int, test: int, precisions: tuple[str, ...] = PRECISIONS, models: tuple[str, ...], output: Path | None, say: Say
) -> dict[str, Any]:
    """Export the bundled backbones in every precision and hold features and probes against fp32; arguments as the command's options.

    Parts that fail on training scenes are promoted as `difffeat verify --promote` does, and int8 is calibrated on them. Probes (ridge) are
    trained on fp32 features of `train` scenes at each tap and frozen; both forms are scored on the same `test` scenes.

    Raises ConfigError for counts below 1, and for precisions and models that there are not.
    """
    require_counts(train=train, test=test)
    require_known("--precisions", precisions, PRECISIONS)
    require_known("--models", models, DIGITS)
    costs: dict[str, dict[str, Cost]] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        splits = {split: write_split(base / "data", split, count)[0] for split, count in (("train", train), ("test", test))}
        for model in models:
            costs[model] = _model(model, base / model, splits, precisions, say)
    result: dict[str, Any] = {
        "benchmark": "precision",
        "train": train,
        "test": test,
        "machine": machine(),
        "limits": {"standardised_l2": LIMIT_L2, "map_points": LIMIT_MAP},
        "costs": {model: {precision: asdict(cost) for precision, cost in found.items()} for model, found in costs.items()},
        "kept": all(cost.within(precision) for found in costs.values() for precision, cost in found.items()),
        "text": "\n".join(_lines(costs, train, test)),
    }
    if output is not None:
        numbers = {key: value for key, value in result.items() if key != "text"}
        replace_bytes(output, (json.dumps({**numbers, "provenance": provenance()}, indent=2) + "\n").encode())
    return result


def _model(model: str, folder: Path, splits: Mapping[str, Path], precisions: tuple[str, ...], say: Say) -> dict[str, Cost]:
    sources = {split: open_source(str(path)) for split, path in splits.items()}
    exact = _export(model, folder / "fp32", "fp32")
    say(f"{model}: fp32 features of {len(sources['train'])} and {len(sources['test'])} scenes at {len(exact.recipe.taps)} taps")
    fitted, reference = (_features(exact, source.samples) for source in sources.values())
    labels = {split: _labels(source.samples, source.classes) for split, source in sources.items()}
    probes = {tap: RidgeProbe().fit(fitted[tap], labels["train"]) for tap in exact.recipe.taps}
    found = {}
    for precision in precisions:
        say(f"{model}: {precision}")
        if precision == "int8":
            made = run_quantize(
                exact.path, str(splits["train"]), output=folder / "int8", samples=64, parts="linears", run=RunRecipe(),
                source_options=SourceOptions(), threads=None, overwrite=False, say=say,
            )  # fmt: skip
            low = Artifact.open(made["artifact"])
        else:
            low = _export(model, folder / precision, precision, say)
            low = promote_failing(low, exact, sources["train"].samples, RunRecipe(), say, margin=MARGIN)
        found[precision] = _cost(low, probes, reference, _features(low, sources["test"].samples), labels["test"])
    return found


def _export(model: str, out: Path, precision: str, say: Say = lambda *_: None) -> Artifact:
    """The sweep graph over the quickstart's timesteps and every block."""
    backbone = load_backbone(model)
    blocks = tuple(range(backbone.depth + 1))
    if backbone.family == "dit":
        options = ExportOptions(kind="sweep", blocks=blocks, timesteps=IMAGE_TIMESTEPS, noising="random", precision=precision)
        return export_dit(backbone.weights, backbone.vae, options, out, say=say).artifact
    options = ExportOptions(kind="text-sweep", blocks=blocks, timesteps=TEXT_TIMESTEPS, noising="mean", precision=precision)
    assert backbone.tokenizer is not None
    return export_plaid(backbone.weights, backbone.tokenizer, options, out, say=say).artifact


def _features(artifact: Artifact, samples: tuple[Sample, ...]) -> dict[str, np.ndarray]:
    return features_of(artifact, choose_judge(artifact, None, None)[0], samples, RunRecipe(), BATCH)[0]


def _labels(samples: tuple[Sample, ...], classes: tuple[str, ...]) -> np.ndarray:
    return np.array([[name in (sample.labels or ()) for name in classes] for sample in samples], np.uint8)


def _cost(low: Artifact, probes: Mapping[str, RidgeProbe], reference: Features, found: Features, labels: np.ndarray) -> Cost:
    distances = {tap: statistics(found[tap], reference[tap]).standardised_l2 for tap in probes}
    scores = {tap: [_points(labels, probe, values[tap]) for values in (reference, found)] for tap, probe in probes.items()}
    changes = {tap: after - before for tap, (before, after) in scores.items()}
    worst_l2, worst_map = max(distances, key=lambda tap: distances[tap]), max(changes, key=lambda tap: abs(changes[tap]))
    best = max(scores, key=lambda tap: scores[tap][0])
    engine, parts = choose_judge(low, None, None)[0], list(low.recipe.options.get("fp32_parts", ()))
    return Cost(engine, parts, distances[worst_l2], worst_l2, changes[worst_map], worst_map, changes[best])


def _points(labels: np.ndarray, probe: RidgeProbe, features: np.ndarray) -> float:
    return 100 * mean_average_precision(labels, probe.decision_function(features)).value


def _lines(costs: Mapping[str, Mapping[str, Cost]], train: int, test: int) -> list[str]:
    lines = [
        f"against fp32 at every tap of the quickstart's grid; ridge probes trained on fp32 features of {train} scenes, scored on {test}",
        f"  {'':14} {'':5} {'engine':>6} {'worst standardised L2':>28} {'worst change of mAP, points':>34} {'at the best tap':>16}  kept in fp32",
    ]
    for model, found in costs.items():
        for precision, cost in found.items():
            parts = ", ".join(map(str, cost.fp32_parts)) or "-"
            mark = "" if cost.within(precision) else "   <- beyond its limit"
            lines.append(
                f"  {model:14} {precision:5} {cost.engine:>6} {cost.l2:14.2e} at {cost.l2_tap:10} {cost.map_points:+20.3f} at {cost.map_tap:10} "
                f"{cost.best_map_points:+16.3f}  {parts}{mark}"
            )
    limits = "; ".join(f"{name} {points} points" + (f" and L2 {LIMIT_L2[name]:g}" if name in LIMIT_L2 else "") for name, points in LIMIT_MAP.items())
    return [*lines, f"  limits: {limits}. torch rounds at each operation where no hardware here computes the precision."]
