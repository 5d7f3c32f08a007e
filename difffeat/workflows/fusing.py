"""`difffeat fuse`: an image and a text store in, the fused classifier and what it is held against out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import ConfigError
from difffeat.probe.evaluate import SCHEMA, split_rows, write_metrics
from difffeat.probe.fusion import join
from difffeat.probe.provenance import provenance
from difffeat.runtime.store import Store
from difffeat.workflows.fusion_systems import Asked, compared, fit_systems, notes_of, table
from difffeat.workflows.pairs import Split
from difffeat.workflows.probe_options import ProbeOptions
from difffeat.workflows.probe_stores import BRACKETS, features_of, fingerprints_of, one_tap, results_folder


def run_fuse(
    image_store: Path,
    text_store: Path,
    *,
    image_tap: str | None,
    text_tap: str | None,
    test_image: Path | None,
    test_text: Path | None,
    fusion: str | None,
    width: int,
    seed: int,
    output: Path | None,
    method: str = "adam,ridge",
    options: ProbeOptions | None = None,
) -> dict[str, Any]:
    """Train the fused classifier; beside it, on the same rows and by each method, image alone, text alone and the other fusions."""
    out = results_folder(output, f"fusion-{image_store.name}", seed)
    if (test_image is None) != (test_text is None):
        raise ConfigError("give both --test-image and --test-text, or neither")
    asked = Asked.checked(method, fusion, width, seed, options or ProbeOptions())
    stores = features_of(image_store), features_of(text_store)
    taps = one_tap(stores[0], image_tap, "--image-tap"), one_tap(stores[1], text_tap, "--text-tap")
    tests = None if test_image is None or test_text is None else (features_of(test_image), features_of(test_text))
    splits, summary = _fusion_splits(stores, tests, seed)
    systems, kept = fit_systems(splits, taps, asked)
    found = compared(systems, splits["test"].labels, splits["train"].joined.classes, seed)
    fused = systems[asked.saved].probe
    about = {"seed": seed, "join": summary, "taps": list(taps), "saved": asked.saved, "settings": fused.settings()}
    result = {**_origin(splits), **about, **found, "notes": notes_of(systems, found["mAP"], kept)}
    result["provenance"] = provenance({"image": image_store, "text": text_store, "test image": test_image, "test text": test_text})
    metrics = write_metrics(out, result, beside=["fusion.safetensors"])
    of = {"taps": ",".join(taps), "fingerprints": result["fingerprints"]["train"]}
    classifier = fused.save(metrics.with_name(f"{metrics.stem.replace('metrics', 'fusion')}.safetensors"), of)
    lines = [summary, *table(result), BRACKETS, *(f"  note: {note}" for note in result["notes"]), f"  saved: {asked.saved}; {metrics}, {classifier}"]
    return {**result, "metrics_file": str(metrics), "classifier": str(classifier), "text": "\n".join(lines)}


def _origin(splits: Mapping[str, Split]) -> dict[str, Any]:
    """What a fusion's numbers are of, as plain JSON types."""
    return {
        "schema": SCHEMA,
        "kind": "fusion",
        "rows": {part: len(split.rows) for part, split in splits.items()},
        "left_out": {part: dict(split.joined.dropped) for part, split in splits.items() if part != "validation"},
        "fingerprints": {part: fingerprints_of(split) for part, split in splits.items()},
        "classes": list(splits["train"].joined.classes),
        "selected_on": "validation (learning rates and penalties only)",
        "reported_on": "test",
    }


def _fusion_splits(stores: tuple[Store, Store], tests: tuple[Store, Store] | None, seed: int) -> tuple[dict[str, Split], str]:
    """Train, validation and test by name, and how they were joined, in words. Raises ProbeError where the test stores are not comparable."""
    joined = join(*stores)
    if joined.labels is None:
        raise ConfigError("neither store has labels, so nothing can be trained. Extract from a source that has them.")
    if tests is None:
        return {name: Split(joined, rows) for name, rows in split_rows(joined.labels, seed=seed).items()}, joined.summary()
    test = Split.whole(*tests)
    Split(joined, np.arange(len(joined))).require_comparable(test, "test")
    parts = split_rows(joined.labels, fractions=(0.8, 0.2, 0.0), seed=seed)
    own = {name: Split(joined, parts[name]) for name in ("train", "validation")}
    return {**own, "test": test}, f"{joined.summary()}; test: {test.joined.summary()}"
