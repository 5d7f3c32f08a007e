"""`difffeat search`: two stores of many taps in, the best pair of taps out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import ConfigError
from difffeat.probe.bootstrap import bootstrap_interval
from difffeat.probe.choices import choice_of
from difffeat.probe.evaluate import SCHEMA, write_metrics
from difffeat.probe.search import Grid, SearchResult, grid_search, halving, local_search
from difffeat.probe.split_files import write_splits
from difffeat.probe.splits import SPLITS
from difffeat.workflows.pair_stores import PairStores
from difffeat.workflows.pairs import Split, TapEvaluator, fit_ridge
from difffeat.workflows.probe_stores import fingerprints_of, interval_text, notes_text, results_folder

STRATEGIES = ("local", "grid", "halving")


def run_search(given: PairStores, *, strategy: str, neighbourhood: int, seed: int, output: Path | None) -> dict[str, Any]:
    """Search the best pair of taps on validation, and score that pair once on test rows that no selection saw.

    The score on test is that of a ridge on both taps side by side, fitted on train, its penalty chosen on validation: what `fuse` gives for the pair.
    """
    out = results_folder(output, f"search-{given.image.name}", seed)
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy must be local, grid or halving, got {strategy!r}")
    stores = given.open()
    made = given.split(stores, seed)
    train, held, test = (made.parts[name] for name in SPLITS)
    evaluator = TapEvaluator(train, held, allow_shared=given.allow_shared)
    found = _search(strategy, evaluator, [Grid.of_taps(store.taps) for store in stores], neighbourhood, len(train.joined.classes))
    scored = _tested(found, train, held, test, seed)
    result = {
        "schema": SCHEMA,
        "kind": "search",
        "seed": seed,
        "selected_on": "validation",
        "reported_on": None if scored is None else "test",
        "join": made.summary,
        "rows": {name: len(split.rows) for name, split in made.parts.items()},
        "left_out": dict(train.joined.dropped),
        "fingerprints": fingerprints_of(train),
        "classes": list(train.joined.classes),
        "split": dict(made.record),
        "notes": [*made.notes, *evaluator.notes, *(scored or {}).get("notes", [])],
        **found.to_dict(),
        "test": scored,
        "provenance": given.provenance(),
    }
    metrics = write_metrics(out, result, "search.json", beside=["search-splits.json"])
    ids = write_splits(metrics.with_name(metrics.name.replace("search", "search-splits")), made.ids, made.record)
    lines = [*_lines(result, found, strategy), f"  {metrics}, {ids}"]
    return {**result, "metrics_file": str(metrics), "splits_file": str(ids), "text": "\n".join(lines)}


def _lines(result: Mapping[str, Any], found: SearchResult, strategy: str) -> list[str]:
    """A result in words, without its files."""
    rows, scored = result["rows"], result["test"]
    counts = ", ".join(f"{count} {kind}" for kind, count in found.counts.items())
    tested = "no test rows" if scored is None else f"test mAP {interval_text(scored)} on {rows['test']} rows that no selection saw"
    return [
        f"best pair: {found.image_tap} + {found.text_tap}, validation mAP {100 * found.value:.2f} "
        f"({rows['validation']} rows, on which it was chosen)",
        f"  {tested} (ridge on both, fitted on train, its penalty chosen on validation)",
        f"  {result['join']}",
        f"  strategy {strategy}; probes: {counts}",
        *notes_text(result["notes"]),
    ]


def _tested(found: SearchResult, train: Split, held: Split, test: Split, seed: int) -> dict[str, Any] | None:
    """The interval of the found pair on test, as plain JSON types; None where there are no test rows."""
    if len(test.rows) == 0:
        return None
    taps = found.image_tap, found.text_tap
    probe = fit_ridge(train.pair(*taps), train.labels, held.pair(*taps), held.labels)
    scores = probe.decision_function(test.pair(*taps))
    rng = np.random.Generator(np.random.PCG64(seed))
    interval = bootstrap_interval(test.labels, scores, rng=rng, classes=train.joined.classes).to_dict()
    return {**interval, "chosen": choice_of(probe), "notes": [*probe.notes_, *interval["notes"]]}


def _search(strategy: str, evaluator: TapEvaluator, grids: list[Grid], neighbourhood: int, n_classes: int) -> SearchResult:
    options: dict[str, Any] = {"image_grid": grids[0], "text_grid": grids[1]}
    if strategy == "local":
        return local_search(evaluator.image, evaluator.text, evaluator.pair, block_radius=neighbourhood, t_radius=neighbourhood, **options)
    if strategy == "grid":
        return grid_search(evaluator.pair, **options)
    least = min(evaluator.rows, max(evaluator.rows // 9, 10 * n_classes))
    return halving(evaluator.pair_within, max_budget=evaluator.rows, min_budget=least, **options)
