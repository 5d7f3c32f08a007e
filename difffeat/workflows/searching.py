"""`difffeat search`: two stores of many taps in, the best pair of taps out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import ConfigError
from difffeat.probe.bootstrap import bootstrap_interval
from difffeat.probe.choices import choice_of
from difffeat.probe.evaluate import SCHEMA, write_metrics
from difffeat.probe.provenance import provenance
from difffeat.probe.search import Grid, SearchResult, grid_search, halving, local_search
from difffeat.probe.splits import SPLITS
from difffeat.workflows.pair_splits import pair_splits
from difffeat.workflows.pairs import Split, TapEvaluator, fit_ridge
from difffeat.workflows.probe_stores import (
    features_of,
    fingerprints_of,
    interval_text,
    notes_text,
    pair_of,
    require_distinct,
    require_whole_pairs,
    results_folder,
    splits_beside,
    splits_of,
)

STRATEGIES = ("local", "grid", "halving")


def run_search(
    image_store: Path,
    text_store: Path,
    *,
    strategy: str,
    neighbourhood: int,
    seed: int,
    output: Path | None,
    validation_image: Path | None = None,
    validation_text: Path | None = None,
    test_image: Path | None = None,
    test_text: Path | None = None,
    splits_file: Path | None = None,
    allow_shared: bool = False,
) -> dict[str, Any]:
    """Search the best pair of taps on validation, and score that pair once on test rows that no selection saw.

    The score on test is that of a ridge on both taps side by side, fitted on train, its penalty chosen on validation: what `fuse` gives for the pair.
    """
    out = results_folder(output, f"search-{image_store.name}", seed)
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy must be local, grid or halving, got {strategy!r}")
    given = {"the image store": image_store, "the text store": text_store, "--validation-image": validation_image, "--test-image": test_image}
    require_whole_pairs(validation=(validation_image, validation_text), test=(test_image, test_text))
    require_distinct({**given, "--validation-text": validation_text, "--test-text": test_text})
    stores = features_of(image_store), features_of(text_store)
    asked = pair_splits(
        stores, validation=pair_of(validation_image, validation_text), test=pair_of(test_image, test_text), seed=seed,
        splits=splits_of(splits_file), allow_shared=allow_shared,
    )  # fmt: skip
    train, held, test = (asked.parts[name] for name in SPLITS)
    evaluator = TapEvaluator(train, held, allow_shared=allow_shared)
    found = _search(strategy, evaluator, [Grid.of_taps(store.taps) for store in stores], neighbourhood, len(train.joined.classes))
    scored = _tested(found, train, held, test, seed)
    stored = {"image": image_store, "text": text_store, "validation image": validation_image, "validation text": validation_text}
    result = {
        "schema": SCHEMA,
        "kind": "search",
        "seed": seed,
        "selected_on": "validation",
        "reported_on": None if scored is None else "test",
        "rows": {name: len(split.rows) for name, split in asked.parts.items()},
        "left_out": dict(train.joined.dropped),
        "fingerprints": fingerprints_of(train),
        "classes": list(train.joined.classes),
        "split": dict(asked.record),
        "notes": [*asked.notes, *evaluator.notes, *(scored or {}).get("notes", [])],
        **found.to_dict(),
        "test": scored,
        "provenance": provenance({**stored, "test image": test_image, "test text": test_text, "splits": splits_file}),
    }
    metrics = write_metrics(out, result, "search.json", beside=["search-splits.json"])
    ids = splits_beside(metrics, "search", "search-splits", asked.ids, asked.record)
    counts = ", ".join(f"{count} {kind}" for kind, count in found.counts.items())
    tested = "no test rows" if scored is None else f"test mAP {interval_text(scored)} on {len(test.rows)} rows that no selection saw"
    lines = [
        f"best pair: {found.image_tap} + {found.text_tap}, validation mAP {100 * found.value:.2f} ({len(held.rows)} rows, on which it was chosen)",
        f"  {tested} (ridge on both, fitted on train, its penalty chosen on validation)",
        f"  {asked.summary}",
        f"  strategy {strategy}; probes: {counts}",
        *notes_text(result["notes"]),
        f"  {metrics}, {ids}",
    ]
    return {**result, "metrics_file": str(metrics), "splits_file": str(ids), "text": "\n".join(lines)}


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
