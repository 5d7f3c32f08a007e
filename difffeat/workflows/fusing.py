"""`difffeat fuse`: an image and a text store in, the fused classifier and what it is held against out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difffeat.probe.evaluate import SCHEMA, write_metrics
from difffeat.probe.provenance import provenance
from difffeat.workflows.fusion_systems import Asked, compared, fit_systems, notes_of, table
from difffeat.workflows.pair_splits import pair_splits
from difffeat.workflows.pairs import Split
from difffeat.workflows.per_class import PerClass
from difffeat.workflows.probe_options import ProbeOptions
from difffeat.workflows.probe_stores import (
    BRACKETS,
    features_of,
    fingerprints_of,
    notes_text,
    one_tap,
    pair_of,
    require_distinct,
    require_whole_pairs,
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
    fusion: str | None,
    width: int,
    seed: int,
    output: Path | None,
    validation_image: Path | None = None,
    validation_text: Path | None = None,
    splits_file: Path | None = None,
    allow_shared: bool = False,
    method: str = "adam,ridge",
    options: ProbeOptions | None = None,
) -> dict[str, Any]:
    """Train the fused classifier; beside it, on the same rows and by each method, image alone, text alone and the other fusions."""
    out = results_folder(output, f"fusion-{image_store.name}", seed)
    given = {"the image store": image_store, "the text store": text_store, "--validation-image": validation_image, "--test-image": test_image}
    require_whole_pairs(validation=(validation_image, validation_text), test=(test_image, test_text))
    require_distinct({**given, "--validation-text": validation_text, "--test-text": test_text})
    asked = Asked.checked(method, fusion, width, seed, options or ProbeOptions())
    stores = features_of(image_store), features_of(text_store)
    taps = one_tap(stores[0], image_tap, "--image-tap"), one_tap(stores[1], text_tap, "--text-tap")
    made = pair_splits(
        stores, validation=pair_of(validation_image, validation_text), test=pair_of(test_image, test_text), seed=seed,
        splits=splits_of(splits_file), allow_shared=allow_shared,
    )  # fmt: skip
    splits, summary = made.parts, made.summary
    systems, kept = fit_systems(splits, taps, asked)
    found = compared(systems, splits["test"].labels, splits["train"].joined.classes, seed)
    fused = systems[asked.saved].probe
    by_name = {asked.saved: systems[asked.saved].scores, **{name: system.scores for name, system in systems.items()}}
    classes = PerClass.of(splits["test"].labels, by_name, splits["train"].joined.classes)
    about = {"seed": seed, "join": summary, "taps": list(taps), "saved": asked.saved, "settings": fused.settings(), "per_class": classes.to_list()}
    notes = list(dict.fromkeys([*made.notes, *notes_of(systems, found["mAP"], kept)]))
    gains = [one for one in found["differences"] if one["method"] == asked.methods[0] and one["of"] == f"fusion by {asked.kind}"]
    about["gain"] = {one["less"]: one for one in gains if one["less"] in ("image", "text")}
    result = {**_origin(splits), **about, "split": dict(made.record), **found, "notes": notes}
    stored = {"image": image_store, "text": text_store, "validation image": validation_image, "validation text": validation_text}
    result["provenance"] = provenance({**stored, "test image": test_image, "test text": test_text, "splits": splits_file})
    metrics = write_metrics(out, result, beside=["fusion.safetensors", "splits.json", "per-class.csv"])
    by_class = classes.write(metrics.with_name(f"{metrics.stem.replace('metrics', 'per-class')}.csv"))
    ids = splits_beside(metrics, "metrics", "splits", made.ids, made.record)
    of = {"taps": ",".join(taps), "fingerprints": result["fingerprints"]["train"]}
    classifier = fused.save(metrics.with_name(f"{metrics.stem.replace('metrics', 'fusion')}.safetensors"), of)
    lines = [summary, *table(result), *classes.lines(), *notes_text(notes), BRACKETS]
    lines.append(f"  saved: {asked.saved}; {metrics}, {classifier}, {ids}, {by_class}")
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
        "selected_on": "validation (learning rates and penalties only)",
        "reported_on": "test",
    }
