"""The quickstart's report.html, from numbers that are already final."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines import Artifact
from difffeat.probe.report import BarChart, Expectations, Gallery, Heading, HeatMap, LineChart, Paragraph, Report, Section, Table, search_steps
from difffeat.probe.search import Grid, SearchResult
from difffeat.workflows.loading import BUNDLED, provenance

GALLERY = 12


def write_report(
    run: Any, search: SearchResult, exhaustive: SearchResult, random_surface: tuple[Grid, np.ndarray], findings: Any, artifacts: dict[str, Artifact]
) -> Path:
    """Write report.html into the run's folder."""
    made = provenance()
    sections: list[Section] = [
        Paragraph(
            "Real handwritten digits (UCI, 13 writers) in synthetic layouts with synthetic captions. The glyphs were split first, so the test split "
            "holds handwriting that no model has seen. A small autoencoder, a DiT and a Plaid of the same architecture as the full-size ones were "
            "trained "
            "on an endless stream of training scenes, never on labels; the features below come out of their truncated, folded ONNX graphs."
        ),
        *_headline(findings),
        Heading("What was expected, and what came"),
        Paragraph("Written down and committed before any of the models was trained."),
        Expectations(findings.outcomes),
        Heading("The scenes"),
        _gallery(run),
        Paragraph(f"Captions name {100 * findings.named_share:.0f} % of the positive labels of the test split; the rest only the image can tell."),
        Heading("Where the features are good"),
        *_maps(search, random_surface, artifacts),
        Heading("The search"),
        *_search(search, exhaustive),
        Heading("How the models were made"),
        *_training(made),
        Heading("Reproducing this"),
        *_reproduce(run, artifacts),
    ]
    subtitle = f"Chosen on validation, reported on test, which was read once for these weights. Training attempts: {made['attempts']}."
    return Report("Diff-Feat on digit scenes", sections, subtitle).save(run.out / "report.html")


def _headline(findings: Any) -> list[Section]:
    rows = findings.rows
    chart = BarChart(
        "mAP on test, ridge probes",
        [row.name for row in rows],
        [row.value for row in rows],
        [(row.low, row.high) for row in rows],
        unit="mAP (%)",
        caption="Bars: mean over noise seeds. Whiskers: 95 % bootstrap interval of the "
        "first seed, of the mean over test sets of this size. Upper three: the method; the others: controls.",
    )
    table = Table(
        ["features", "mAP (%)", "low", "high", "by noise seed", "paper's probe (Adam)"],
        [[row.name, row.value, row.low, row.high, ", ".join(f"{v:.1f}" for v in row.seeds), row.adam] for row in rows],
        caption="Ridge: closed form, alpha chosen on validation; fused: on the standardised concatenation. Adam: the paper's linear probe, and "
        "its projection to 512 and addition for the fused row, learning rates chosen on validation; compare it with itself, not with ridge.",
        digits=1,
    )
    pairs = Table(
        ["difference", "points of mAP", "low", "high"],
        [[name, value["difference"], value["low"], value["high"]] for name, value in findings.differences.items()],
        caption="Both by ridge. Paired bootstrap over test samples, 1 000 resamples, 95 %.",
        digits=1,
    )
    adam = Table(
        ["difference, both by Adam", "points of mAP", "low", "high"],
        [[name, value["difference"], value["low"], value["high"]] for name, value in findings.adam_differences.items()],
        caption="The paper's probes, each with its own learning rate: " + ", ".join(f"{k} {v['value']:g}" for k, v in findings.adam_chosen.items()),
        digits=1,
    )
    return [chart, table, pairs, adam]


def _gallery(run: Any) -> Gallery:
    scenes = run.scenes["test"][:GALLERY]
    return Gallery([item.pixels for item in scenes], [f"{item.caption} - digits: {', '.join(map(str, item.labels))}" for item in scenes])


def _maps(search: SearchResult, random_surface: tuple[Grid, np.ndarray], artifacts: dict[str, Artifact]) -> Iterable[Section]:
    def heat(title: str, grid: Grid, values: np.ndarray, artifact: Artifact, steps: Any = (), caption: str = "") -> HeatMap:
        snr = dict(zip(artifact.recipe.timesteps, artifact.recipe.log_snr, strict=True))
        return HeatMap(
            title, 100 * values, grid.blocks, grid.timesteps, [snr[t] for t in grid.timesteps], unit="mAP (%)", steps=steps, caption=caption
        )

    image_taps = [e.taps[0] for e in search.trace if e.kind == "image"]
    text_taps = [e.taps[0] for e in search.trace if e.kind == "text"]
    visited = "Framed: the chosen pair's tap. Dotted: the best tap alone. Small numbers: the order in which the search tried these taps in pairs."
    yield heat(
        "Image taps, validation", Grid.of_taps(image_taps), search.surfaces["image"], artifacts["image"], search_steps(search, "image"), visited
    )
    yield heat("Text taps, validation", Grid.of_taps(text_taps), search.surfaces["text"], artifacts["text"], search_steps(search, "text"), visited)
    yield heat("The same DiT, randomly initialised, validation", *random_surface, artifacts["random"])


def _search(search: SearchResult, exhaustive: SearchResult) -> list[Section]:
    counts = search.counts
    broken = [name for name, check in search.unimodality.items() if not check.holds]
    trace = [[e.order, e.taps[0], e.taps[1], 100 * e.value] for e in search.trace if e.kind == "pair"]
    return [
        Paragraph(
            f"Algorithm 1 of the paper: {counts['image']} image taps and {counts['text']} text taps alone, then {counts['pair']} pairs around the "
            f"two "
            f"peaks. It ended at {search.image_tap} with {search.text_tap}, validation mAP {100 * search.value:.2f}. All {len(exhaustive.trace)} "
            f"pairs: the best is "
            f"{exhaustive.image_tap} with {exhaustive.text_tap}, {100 * exhaustive.value:.2f}. Regret: {100 * (search.regret or 0.0):.2f} points. "
            f"The search assumes unimodality, which {'held' if not broken else 'did not hold everywhere for ' + ' and '.join(broken)}."
        ),
        Table(["step", "image tap", "text tap", "mAP (%)"], trace, caption="Pairs in the order tried, validation."),
    ]


def _training(made: dict[str, Any]) -> list[Section]:
    lines = []
    for name, key in (("DiT, noise error", "dit"), ("Plaid, nats per token", "plaid")):
        entries = [json.loads(line) for line in (BUNDLED / f"{key}-training.jsonl").read_text().splitlines()]
        field = "loss" if key == "dit" else "nats_per_token"
        points = [(entry["samples"], entry[field]) for entry in entries if field in entry]
        lines.append(LineChart(name, [(name, [p[0] for p in points], [p[1] for p in points])], "training samples", name, log_x=True))
    return [Paragraph(made["note"]), *lines]


def _reproduce(run: Any, artifacts: dict[str, Artifact]) -> list[Section]:
    recipes = [[name, artifact.recipe.kind, artifact.recipe.backbone, artifact.recipe.fingerprint[:16]] for name, artifact in artifacts.items()]
    seconds = [[name, value] for name, value in run.seconds.items()]
    return [
        Table(["graph", "kind", "backbone", "fingerprint"], recipes),
        Table(["step", "seconds"], seconds, digits=1, caption="Wall-clock time of this run; not a benchmark."),
        Paragraph("difffeat quickstart runs this; difffeat quickstart --full runs the whole grid with three noise seeds."),
    ]
