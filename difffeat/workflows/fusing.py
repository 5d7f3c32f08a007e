"""`difffeat fuse`: an image and a text store in, the fused classifier and what it is held against out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.probe.bootstrap import bootstrap_interval, paired_bootstrap
from difffeat.probe.evaluate import SCHEMA, write_metrics
from difffeat.probe.fusion import FusionProbe
from difffeat.probe.provenance import provenance
from difffeat.workflows.pair_splits import pair_splits
from difffeat.workflows.pairs import Split, fit_ridge
from difffeat.workflows.per_class import PerClass
from difffeat.workflows.probe_stores import (
    BRACKETS,
    features_of,
    fingerprints_of,
    interval_text,
    notes_text,
    one_tap,
    pair_of,
    require_distinct,
    results_folder,
    splits_beside,
    splits_of,
)


def run_fuse(
    image_store: Path,
    text_store: Path,
    *,
    image_tap: str | None,
    text_tap: str | None,
    test_image: Path | None,
    test_text: Path | None,
    fusion: str,
    width: int,
    seed: int,
    output: Path | None,
    validation_image: Path | None = None,
    validation_text: Path | None = None,
    splits_file: Path | None = None,
    allow_shared: bool = False,
) -> dict[str, Any]:
    """Train the fused classifier, with image alone, text alone and the closed-form fusion beside it, on the same rows."""
    out = results_folder(output, f"fusion-{image_store.name}", seed)
    given = {"the image store": image_store, "the text store": text_store, "--validation-image": validation_image, "--test-image": test_image}
    require_distinct({**given, "--validation-text": validation_text, "--test-text": test_text})
    fused = FusionProbe(width=width, kind=fusion, seed=seed)
    stores = features_of(image_store), features_of(text_store)
    taps = one_tap(stores[0], image_tap, "--image-tap"), one_tap(stores[1], text_tap, "--text-tap")
    asked = pair_splits(
        stores, validation=pair_of(validation_image, validation_text, "validation"), test=pair_of(test_image, test_text, "test"), seed=seed,
        splits=splits_of(splits_file), allow_shared=allow_shared,
    )  # fmt: skip
    splits, summary = asked.parts, asked.summary
    fused.fit(splits["train"].pair(*taps), splits["train"].labels, classes=splits["train"].joined.classes)
    name = f"fusion by {fusion}"
    scores = {**_ridge_scores(splits, taps), name: fused.decision_function(splits["test"].pair(*taps))}
    intervals, gains = _compared(splits["test"].labels, scores, name, seed)
    about = {"seed": seed, "join": summary, "taps": list(taps), "settings": fused.settings()}
    table = PerClass.of(splits["test"].labels, {name: scores[name], **scores}, splits["train"].joined.classes)
    about["per_class"] = table.to_list()
    result = {**_origin(splits), **about, "split": dict(asked.record), "notes": list(asked.notes), "mAP": intervals, "gain": gains}
    stored = {"image": image_store, "text": text_store, "validation image": validation_image, "validation text": validation_text}
    result["provenance"] = provenance({**stored, "test image": test_image, "test text": test_text, "splits": splits_file})
    metrics = write_metrics(out, result, beside=["fusion.safetensors", "splits.json", "per-class.csv"])
    by_class = table.write(metrics.with_name(f"{metrics.stem.replace('metrics', 'per-class')}.csv"))
    ids = splits_beside(metrics, "metrics", "splits", asked.ids, asked.record)
    kept = {"taps": ",".join(taps), "fingerprints": result["fingerprints"]["train"]}
    classifier = fused.save(metrics.with_name(f"{metrics.stem.replace('metrics', 'fusion')}.safetensors"), kept)
    lines = [summary, *(f"{key}: test mAP {interval_text(value)}" for key, value in intervals.items())]
    lines += [f"{name} less {key} alone: {interval_text(value, 'difference')}" for key, value in gains.items()]
    lines += [*table.lines(), *notes_text(result["notes"]), BRACKETS, f"  {metrics}, {classifier}, {ids}, {by_class}"]
    return {
        **result,
        "metrics_file": str(metrics),
        "splits_file": str(ids),
        "per_class_file": str(by_class),
        "classifier": str(classifier),
        "text": "\n".join(lines),
    }


def _origin(splits: Mapping[str, Split]) -> dict[str, Any]:
    """What a fusion's numbers are of, as plain JSON types."""
    return {
        "schema": SCHEMA,
        "kind": "fusion",
        "rows": {part: len(split.rows) for part, split in splits.items()},
        "left_out": {part: dict(split.joined.dropped) for part, split in splits.items() if part != "validation"},
        "fingerprints": {part: fingerprints_of(split) for part, split in splits.items()},
        "classes": list(splits["train"].joined.classes),
        "selected_on": "validation (ridge alphas only)",
        "reported_on": "test",
    }


def _ridge_scores(splits: Mapping[str, Split], taps: tuple[str, str]) -> dict[str, np.ndarray]:
    """Test scores [n, C] of ridges on images alone, texts alone, and both side by side."""
    train, held, test = (splits[name] for name in ("train", "validation", "test"))
    features = {
        "image": [split.image(taps[0]) for split in (train, held, test)],
        "text": [split.text(taps[1]) for split in (train, held, test)],
        "concatenation (ridge)": [split.pair(*taps) for split in (train, held, test)],
    }
    return {name: fit_ridge(x, train.labels, v, held.labels).decision_function(y) for name, (x, v, y) in features.items()}


def _compared(labels: np.ndarray, scores: Mapping[str, np.ndarray], name: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The interval of each system, and of what `name` gains over image and text alone."""
    rng = np.random.Generator(np.random.PCG64(seed))
    intervals = {key: bootstrap_interval(labels, value, rng=rng).to_dict() for key, value in scores.items()}
    return intervals, {key: paired_bootstrap(labels, scores[name], scores[key], rng=rng).to_dict() for key in ("image", "text")}
