"""`difffeat fuse`: an image and a text store in, the fused classifier and what it is held against out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import ConfigError
from difffeat.probe.bootstrap import bootstrap_interval, paired_bootstrap
from difffeat.probe.evaluate import SCHEMA, split_rows, write_metrics
from difffeat.probe.fusion import FusionProbe, join
from difffeat.probe.provenance import provenance
from difffeat.runtime.store import Store
from difffeat.workflows.pairs import Split, fit_ridge
from difffeat.workflows.probe_stores import BRACKETS, features_of, fingerprints_of, interval_text, one_tap, results_folder


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
) -> dict[str, Any]:
    """Train the fused classifier, with image alone, text alone and the closed-form fusion beside it, on the same rows."""
    out = results_folder(output, f"fusion-{image_store.name}", seed)
    if (test_image is None) != (test_text is None):
        raise ConfigError("give both --test-image and --test-text, or neither")
    fused = FusionProbe(width=width, kind=fusion, seed=seed)
    stores = features_of(image_store), features_of(text_store)
    taps = one_tap(stores[0], image_tap, "--image-tap"), one_tap(stores[1], text_tap, "--text-tap")
    tests = None if test_image is None or test_text is None else (features_of(test_image), features_of(test_text))
    splits, summary = _fusion_splits(stores, tests, seed)
    fused.fit(splits["train"].pair(*taps), splits["train"].labels, classes=splits["train"].joined.classes)
    name = f"fusion by {fusion}"
    scores = {**_ridge_scores(splits, taps), name: fused.decision_function(splits["test"].pair(*taps))}
    intervals, gains = _compared(splits["test"].labels, scores, name, seed)
    about = {"seed": seed, "join": summary, "taps": list(taps), "settings": fused.settings()}
    result = {**_origin(splits), **about, "mAP": intervals, "gain": gains}
    result["provenance"] = provenance({"image": image_store, "text": text_store, "test image": test_image, "test text": test_text})
    metrics = write_metrics(out, result, beside=["fusion.safetensors"])
    kept = {"taps": ",".join(taps), "fingerprints": result["fingerprints"]["train"]}
    classifier = fused.save(metrics.with_name(f"{metrics.stem.replace('metrics', 'fusion')}.safetensors"), kept)
    lines = [summary, *(f"{key}: test mAP {interval_text(value)}" for key, value in intervals.items())]
    lines += [f"{name} less {key} alone: {interval_text(value, 'difference')}" for key, value in gains.items()]
    lines += [BRACKETS, f"  {metrics}, {classifier}"]
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
        "selected_on": "validation (ridge alphas only)",
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
