"""What a user wants to know of a feature store: `difffeat inspect STORE` and `difffeat store info`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.recipe import Recipe, format_timestep
from difffeat.runtime.manifest import read_manifest
from difffeat.runtime.origin import Origin, extract_commands, read_origin
from difffeat.runtime.store import Store
from difffeat.runtime.understood import lines_of
from difffeat.runtime.writer import SUMMARY_JSON
from difffeat.workflows.assumptions import diffusion_lines

SHOWN = 12
"""Taps, classes and reasons that are printed; JSON has all."""


def describe_store(path: Path) -> dict[str, Any]:
    """Rows, quarantine, taps, classes, recipe, engine, and how to go on where it is unfinished. Raises StoreError with its subclasses."""
    store = Store.open(path, partial=True)
    origin = read_origin(path)
    done, shards = store.finished_shards, len(store.manifest["shards"])
    missing = [shard for shard in range(shards) if not store.is_finished(shard)]
    resume = "; ".join(extract_commands(path, read_manifest(path), origin, missing)) or None
    facts: dict[str, Any] = {
        "path": str(path),
        "rows": len(store),
        "valid": int(store.valid.sum()) if done else 0,
        "quarantined": store.quarantined,
        "reasons": _reasons(store),
        "shards": shards,
        "finished_shards": done,
        "resume": resume,
        "taps": {tap: store.manifest["taps"][tap] for tap in store.taps},
        "classes": _positives(store),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "origin": None if origin is None else asdict(origin),
        "understood": _understood(path),
        "fingerprint": store.fingerprint,
        "manifest": store.manifest,
    }
    return {**facts, "text": "\n".join(_lines(facts, store, origin))}


def _understood(path: Path) -> dict[str, Any] | None:
    """What the last run that computed something understood of its source; None where no summary says so, or none that can be read."""
    try:
        found = json.loads((path / SUMMARY_JSON).read_bytes())["understood"]
        lines_of(found)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # the summary is for people, and no digest covers it
        return None
    return found


def _reasons(store: Store) -> list[dict[str, Any]]:
    """Why samples were set aside: each stage and error with its count and first sample, the most frequent first."""
    counts = Counter((entry["stage"], entry["error"]) for entry in store.quarantined)
    first = {(entry["stage"], entry["error"]): entry for entry in reversed(store.quarantined)}
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [
        {"stage": stage, "error": error, "count": count, "id": first[stage, error]["id"], "message": first[stage, error]["message"]}
        for (stage, error), count in ordered
    ]


def _positives(store: Store) -> dict[str, int]:
    """Rows that have each class, in the order of the label columns."""
    labels = store.labels
    return {} if labels is None else dict(zip(store.classes, np.sum(labels, axis=0, dtype=int).tolist(), strict=True))


def _lines(facts: dict[str, Any], store: Store, origin: Origin | None) -> list[str]:
    manifest = store.manifest
    engine = manifest["engine"]
    return [
        f"{facts['path']}: {facts['rows']} rows ({facts['valid']} valid, {len(facts['quarantined'])} in quarantine), {len(facts['taps'])} taps, "
        f"{facts['finished_shards']} of {facts['shards']} shards, {store.recipe.run.store_dtype}, {facts['bytes'] / 1e6:.1f} MB",
        *([f"  unfinished; go on with: {facts['resume']}"] if facts["resume"] else []),
        *_shown([f"  {name}: {list(shape)}" for name, shape in facts["taps"].items()], "taps"),
        *_class_lines(facts["classes"]),
        *_shown([_reason_line(reason) for reason in facts["reasons"]], "reasons"),
        *_recipe_lines(store.recipe),
        f"  engine {engine['name']} ({engine['precision']}, {engine['device']}), batch {manifest['batch_size']}{_identity(engine)}",
        f"  versions {', '.join(f'{name} {version}' for name, version in manifest['versions'].items())}",
        *([f"  made from {origin.source} with {origin.artifact}"] if origin is not None else []),
        *([f"  source: {line.strip()}" for line in lines_of(facts["understood"])] if facts["understood"] else []),
        *([f"  added from {own.source}" for own in _added(origin, manifest)]),
        f"  fingerprint {facts['fingerprint']}",
    ]


def _identity(engine: Mapping[str, str]) -> str:
    """What else of the engine decides a feature's last bits."""
    return "".join(f"; {name} {value}" for name, value in engine.items() if name not in ("name", "precision", "device"))


def _added(origin: Origin | None, manifest: Mapping[str, Any]) -> list[Origin]:
    """Where samples were added from; not what an append that was stopped has only noted."""
    noted = () if origin is None else origin.added[: len(manifest["samples"]) - 1]
    return [own for own in noted if own is not None]


def _reason_line(reason: dict[str, Any]) -> str:
    return f"  quarantine: {reason['count']} × {reason['error']} at {reason['stage']}; the first is {reason['id']}: {reason['message']}"


def _class_lines(classes: dict[str, int]) -> list[str]:
    if not classes:
        return ["  no labels"]
    ordered = sorted(classes.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {count}" for name, count in ordered[:SHOWN])
    rest = f", and {len(ordered) - SHOWN} more down to {ordered[-1][0]} {ordered[-1][1]}" if len(ordered) > SHOWN else ""
    return [f"  {len(classes)} classes, rows with each: {listed}{rest}"]


def _recipe_lines(recipe: Recipe) -> list[str]:
    graph, run = recipe.graph, recipe.run
    draws = f", {run.draws} draws" if run.draws > 1 else ""
    prepared = f"captions {run.captions}" if graph.family == "plaid" else f"preprocessing {run.preprocessing}, pixels {run.pixels}"
    levels = [f"{format_timestep(t)} (log-SNR {snr:+.2f})" for t, snr in zip(graph.timesteps, graph.log_snr, strict=True)]
    return [
        f"  {graph.kind} graph of {graph.backbone} ({graph.origin} weights), {graph.precision}; blocks {', '.join(map(str, graph.blocks)) or '-'}; "
        f"label {graph.label}",
        *(f"  {line}" for line in diffusion_lines(graph) if graph.diffusion),
        f"  t = {', '.join(levels) or '-'}",
        f"  noising {graph.noising}, seed {run.seed}{draws}; pooling {graph.pooling}; {prepared}",
    ]


def _shown(lines: list[str], what: str) -> list[str]:
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"  and {len(lines) - SHOWN} more {what}"]
