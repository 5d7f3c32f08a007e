"""`difffeat probe`: a store in, numbers and a classifier out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from difffeat.probe.choices import OPTIMISTIC, TIES, choice_text, warnings_kept
from difffeat.probe.evaluate import make_parts, probe_parts
from difffeat.probe.factory import make_probe
from difffeat.probe.provenance import provenance
from difffeat.probe.sameness import told, weights_notes
from difffeat.recipe import parse_tap
from difffeat.workflows.per_class import PerClass
from difffeat.workflows.probe_options import ProbeOptions, methods_asked
from difffeat.workflows.probe_stores import (
    BRACKETS,
    features_of,
    interval_text,
    notes_text,
    require_distinct,
    results_folder,
    splits_of,
    taps_asked,
    write_trained,
)


def run_probe(
    store: Path,
    *,
    validation: Path | None,
    test: Path | None,
    taps: str | None,
    method: str,
    seed: int,
    output: Path | None,
    splits: Path | None = None,
    allow_shared: bool = False,
    options: ProbeOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Probe every tap on validation, the best one once on test. Writes metrics.json and the probe as safetensors."""
    options = options or ProbeOptions()
    (known,) = methods_asked(method)
    options.require([known])
    settings = options.settings(known)
    make_probe(known, **settings)  # what makes no sense is told before a store is opened
    out = results_folder(output, f"probe-{store.name}", seed)
    require_distinct({"the training store": store, "--validation": validation, "--test": test})
    train = features_of(store)
    parts = make_parts(
        train, validation=features_of(validation) if validation else None, test=features_of(test) if test else None, seed=seed,
        splits=splits_of(splits), allow_shared=allow_shared,
    )  # fmt: skip
    names = taps_asked(train, taps)
    scored: dict[str, dict[str, Any]] = {}
    how: dict[str, Any] = {"method": known, "settings": settings, "seed": seed}
    with warnings_kept() as kept:
        for number, name in enumerate(names if len(names) > 1 else (), 1):
            say(f"{name}: training, tap {number} of {len(names)} (a store of {len(train.ids)} rows)")
            probed = probe_parts(parts, name, report_on="validation", n_resamples=200, **how)
            found = probed.result
            scored[name] = {**found["interval"], "chosen": found["chosen"], "notes": list(probed.probe.notes_)}
        best = best_tap(scored) if scored else next(iter(names))
        say(f"{best}: training for the number on test (a store of {len(train.ids)} rows)")
        final = probe_parts(parts, best, **how)
    result = {**final.result, "candidates": scored, "selected_on": "validation" if scored else final.result["selected_on"]}
    table = PerClass.of(final.labels, {method: final.scores}, train.classes)
    notes = [*weights_notes(train, "training"), *final.result["notes"], *kept, *_candidates_notes(scored, best)]
    result |= {"per_class": table.to_list(), "notes": list(dict.fromkeys(notes))}
    if scored:
        result["ties"] = TIES
    result["provenance"] = provenance({"train": store, "validation": validation, "test": test, "splits": splits})
    written = write_trained(out, result, "probe", final.probe, {"tap": best, "fingerprint": train.fingerprint}, final.ids, table)
    lines = [*_lines(result, table), f"  {', '.join(written.values())}"]
    return {**result, **written, "text": "\n".join(lines)}


def _lines(result: Mapping[str, Any], table: PerClass) -> list[str]:
    """A result in words, without its files."""
    best, on_test = result["tap"], result["splits"]["test"]
    candidates = [
        f"{name}: validation mAP {interval_text(value)}   {choice_text(value['chosen'])}{'   <- best' if name == best else ''}"
        for name, value in result["candidates"].items()
    ]
    return [
        *candidates,
        f"{best} on test ({on_test['rows']} rows, {on_test['from']}): mAP {interval_text(result['interval'])}",
        *table.lines(),
        *_single_label(result["metrics"]),
        *(f"  left out of the {name} store: {told(counts)}" for name, counts in result["left_out"].items() if told(counts)),
        *notes_text(result["notes"]),
        BRACKETS,
        f"  method {result['method']}, {choice_text(result['chosen'])}; chosen on {result['selected_on']}",
    ]


def best_tap(scored: Mapping[str, Mapping[str, Any]]) -> str:
    """The tap with the highest value; of equal ones the smaller block, then the smaller timestep."""
    return min(scored, key=lambda name: (-scored[name]["value"], *parse_tap(name)))


def _candidates_notes(scored: Mapping[str, Mapping[str, Any]], best: str) -> list[str]:
    """What must be known of the candidates: that their numbers flatter, and which others were fitted at an edge or too briefly."""
    doubtful = [name for name, value in scored.items() if value["notes"] and name != best]
    others = [f"the probes of {', '.join(doubtful[:5])}{', ...' if len(doubtful) > 5 else ''} have notes of their own: see candidates in the metrics"]
    return [*([OPTIMISTIC] if scored else []), *(others if doubtful else [])]


def _single_label(metrics: Mapping[str, Any]) -> list[str]:
    """Top-1 and top-5 accuracy, where every sample has exactly one class."""
    found = [f"{name.replace('top', 'top-')} {100 * metrics['accuracy'][name]:.2f}" for name in metrics.get("accuracy", ())]
    return [f"  every sample has one class: {', '.join(found)}"] if found else []
