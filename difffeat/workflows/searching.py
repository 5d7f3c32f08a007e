"""`difffeat search`: two stores of many taps in, the best pair of taps out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difffeat.errors import ConfigError
from difffeat.probe.evaluate import SCHEMA, split_rows, write_metrics
from difffeat.probe.fusion import join
from difffeat.probe.provenance import provenance
from difffeat.probe.search import Grid, SearchResult, grid_search, halving, local_search
from difffeat.workflows.pairs import Split, TapEvaluator
from difffeat.workflows.probe_stores import features_of, fingerprints_of, results_folder

STRATEGIES = ("local", "grid", "halving")


def run_search(image_store: Path, text_store: Path, *, strategy: str, neighbourhood: int, seed: int, output: Path | None) -> dict[str, Any]:
    """Search the best pair of taps; everything is selected on a validation share of the joined rows."""
    out = results_folder(output, f"search-{image_store.name}", seed)
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy must be local, grid or halving, got {strategy!r}")
    stores = features_of(image_store), features_of(text_store)
    joined = join(*stores)
    if joined.labels is None:
        raise ConfigError("neither store has labels, so nothing can be searched. Extract from a source that has them.")
    parts = split_rows(joined.labels, fractions=(0.7, 0.3, 0.0), seed=seed)
    train = Split(joined, parts["train"])
    evaluator = TapEvaluator(train, Split(joined, parts["validation"]))
    found = _search(strategy, evaluator, [Grid.of_taps(store.taps) for store in stores], neighbourhood, joined.labels.shape[1])
    result = {
        "schema": SCHEMA,
        "kind": "search",
        "seed": seed,
        "selected_on": "validation",
        "rows": {name: len(parts[name]) for name in ("train", "validation")},
        "left_out": dict(joined.dropped),
        "fingerprints": fingerprints_of(train),
        "classes": list(joined.classes),
        **found.to_dict(),
        "provenance": provenance({"image": image_store, "text": text_store}),
    }
    metrics = write_metrics(out, result, "search.json")
    counts = ", ".join(f"{count} {kind}" for kind, count in found.counts.items())
    lines = [
        f"best pair: {found.image_tap} + {found.text_tap}, validation mAP {100 * found.value:.2f}",
        f"  {joined.summary()}",
        f"  strategy {strategy}; probes: {counts}",
        f"  {metrics}",
    ]
    return {**result, "metrics_file": str(metrics), "text": "\n".join(lines)}


def _search(strategy: str, evaluator: TapEvaluator, grids: list[Grid], neighbourhood: int, n_classes: int) -> SearchResult:
    options: dict[str, Any] = {"image_grid": grids[0], "text_grid": grids[1]}
    if strategy == "local":
        return local_search(evaluator.image, evaluator.text, evaluator.pair, block_radius=neighbourhood, t_radius=neighbourhood, **options)
    if strategy == "grid":
        return grid_search(evaluator.pair, **options)
    least = min(evaluator.rows, max(evaluator.rows // 9, 10 * n_classes))
    return halving(evaluator.pair_within, max_budget=evaluator.rows, min_budget=least, **options)
