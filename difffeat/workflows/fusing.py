"""`difffeat fuse`: an image and a text store in, the fused classifier and what it is held against out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from difffeat.probe.evaluate import SCHEMA
from difffeat.workflows.fusion_systems import Asked, System, compared, fit_systems, notes_of, table
from difffeat.workflows.pair_stores import PairStores
from difffeat.workflows.pairs import Split
from difffeat.workflows.per_class import PerClass
from difffeat.workflows.probe_options import ProbeOptions
from difffeat.workflows.probe_stores import BRACKETS, fingerprints_of, notes_text, one_tap, results_folder, write_trained


def run_fuse(
    given: PairStores,
    *,
    image_tap: str | None,
    text_tap: str | None,
    fusion: str | None,
    width: int,
    seed: int,
    output: Path | None,
    method: str = "adam,ridge",
    options: ProbeOptions | None = None,
) -> dict[str, Any]:
    """Train the fused classifier; beside it, on the same rows and by each method, image alone, text alone and the other fusions."""
    out = results_folder(output, f"fusion-{given.image.name}", seed)
    asked = Asked.checked(method, fusion, width, seed, options or ProbeOptions())
    stores = given.open()
    taps = one_tap(stores[0], image_tap, "--image-tap"), one_tap(stores[1], text_tap, "--text-tap")
    made = given.split(stores, seed)
    train, test = made.parts["train"], made.parts["test"]
    systems, kept = fit_systems(made.parts, taps, asked)
    found = compared(systems, test.labels, train.joined.classes, seed)
    saved = systems[asked.saved]
    classes = PerClass.of(test.labels, {saved.name: saved.scores, **{name: one.scores for name, one in systems.items()}}, train.joined.classes)
    result = {
        **_origin(made.parts),
        "seed": seed,
        "join": made.summary,
        "taps": list(taps),
        "saved": saved.name,
        "settings": saved.probe.settings(),
        "per_class": classes.to_list(),
        "gain": _gains(found["differences"], saved),
        "split": dict(made.record),
        **found,
        "notes": list(dict.fromkeys([*made.notes, *notes_of(systems, found["mAP"], kept)])),
        "provenance": given.provenance(),
    }
    about = {"taps": ",".join(taps), "fingerprints": result["fingerprints"]["train"]}
    written = write_trained(out, result, "fusion", saved.probe, about, made.ids, classes)
    lines = [made.summary, *table(result), *classes.lines(), *notes_text(result["notes"]), BRACKETS]
    return {**result, **written, "text": "\n".join([*lines, f"  saved: {saved.name}; {', '.join(written.values())}"])}


def _gains(differences: Sequence[Mapping[str, Any]], saved: System) -> dict[str, Any]:
    """What the saved fusion adds to each modality alone by its own method."""
    own = [one for one in differences if (one["method"], one["of"]) == (saved.method, saved.inputs)]
    return {one["less"]: one for one in own if one["less"] in ("image", "text")}


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
