"""`difffeat store verify` and `difffeat store repair`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines import Artifact, EngineOptions
from difffeat.engines.base import recorded_switches
from difffeat.errors import EXIT_OK, ConfigError, StoreCorrupt, StoreIncomplete, StoreMismatch
from difffeat.recognise import quoted
from difffeat.runtime.check import UNFINISHED, check
from difffeat.runtime.latents import LatentCache
from difffeat.runtime.manifest import Manifest, differences, read_manifest
from difffeat.runtime.matching import Mode
from difffeat.runtime.origin import Origin, extract_command, extract_commands, readable_origin
from difffeat.runtime.repair import Diagnosis, diagnose, inputs_of, mendable, set_aside, shard_digests_of
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.understood import say_understood
from difffeat.workflows.commands import run_extract

Say = Callable[..., None]


def run_verify_store(path: Path) -> dict[str, Any]:
    """Read and hash everything again; `exit_code` is that of StoreCorrupt when anything is wrong, of StoreIncomplete when shards are only missing."""
    problems = check(path)
    lines = [f"{len(problems)} problems in {path}:", *(f"  {problem}" for problem in problems)]
    kinds = {problem.kind for problem in problems}
    only_unfinished = kinds <= {*UNFINISHED, "leftover"} and not kinds.isdisjoint(UNFINISHED)
    return {
        "path": str(path),
        "problems": [asdict(problem) for problem in problems],
        "exit_code": EXIT_OK if not problems else StoreIncomplete.exit_code if only_unfinished else StoreCorrupt.exit_code,
        "text": "\n".join(lines) if problems else f"{path}: every file is what its receipt says",
    }


def run_repair(
    store: Path,
    artifact: Path | None,
    source: str | None,
    *,
    device: str | None = None,
    threads: int | None = None,
    latents: Path | None = None,
    source_options: SourceOptions | None = None,
    dry_run: bool = False,
    say: Say,
) -> dict[str, Any]:
    """Set aside what is damaged and compute it again with the configuration of the manifest; without artifact and source, say how to.

    **Arguments:** options as for extract; those that are not given are as the store's origin has them.

    Raises ConfigError (only one of artifact and source), StoreMismatch (of another artifact, or other samples; nothing was touched then), and what
    `extract` raises.
    """
    if (artifact is None) != (source is None):
        raise ConfigError(f"give both, the artifact and the source: difffeat store repair {quoted(store)} ARTIFACT SOURCE")
    say(f"reading {store}")
    found, manifest = diagnose(store), read_manifest(store)
    given = {"device": device, "latents": latents, **vars(source_options or SourceOptions())}
    origin = _origin(readable_origin(store), artifact, source, given)
    command = "; ".join(_commands(store, manifest, found, origin, source))
    if not found.problems:
        return _result(store, found, f"{store}: every file is what its receipt says; there is nothing to repair")
    if dry_run:
        return _result(store, found, "\n".join([*_found_lines(store, found), *_plan_lines(found, command)]), command=command)
    if artifact is None or origin is None or not found.needs_extraction:
        return _set_aside_only(store, found, command)
    require_same_graph(store, manifest, Artifact.open(artifact))
    listed = open_source(origin.source, _source_options(origin))
    say_understood(listed, say)
    if "latents" in origin.options:
        cache = LatentCache(Path(origin.options["latents"]), manifest.recipe.graph, manifest.recipe.run)
        cache.require_same_images(listed.samples, [sample.size for sample in listed.samples])
    here = mendable(store, manifest, listed, found)
    damaged = [shard for shard in found.shards if shard in here]
    before, read = shard_digests_of(store, manifest, damaged), inputs_of(store, manifest, damaged)
    removed = set_aside(store, found, shards=damaged)
    with contextlib.suppress(StoreIncomplete):  # of shards that this source does not hold; what is left is told below
        _extract(store, manifest, origin, threads, say)
    return _mended(store, found, here, removed, before, read)


def _commands(store: Path, manifest: Manifest, found: Diagnosis, origin: Origin | None, source: str | None) -> list[str]:
    """What to type to compute what is missing: with the source that was given, or with each that the store remembers to have been made from."""
    missing = sorted({*found.shards, *found.unfinished})
    if source is not None or not missing:
        return [extract_command(store, manifest, origin)]
    return extract_commands(store, manifest, origin, missing)


def require_same_graph(store: Path, manifest: Manifest, artifact: Artifact) -> None:
    """Raises StoreMismatch, naming the fields, unless a store was made with this very artifact."""
    different = differences(manifest.recipe.graph.to_dict(), artifact.recipe.to_dict())
    if manifest.graph_digest != artifact.digest:
        different.append(f"digest of its files: {manifest.graph_digest} -> {artifact.digest}")
    if different:
        listed = "\n  ".join(different[:20])
        raise StoreMismatch(f"{store} was not made with {artifact.path}; nothing was touched. The store has -> this artifact has:\n  {listed}")


def _origin(known: Origin | None, artifact: Path | None, source: str | None, given: Mapping[str, Any]) -> Origin | None:
    """What was given now, else what the store remembers."""
    places = (str(artifact), source) if artifact is not None and source is not None else (known.artifact, known.source) if known is not None else None
    if places is None:
        return None
    now = Origin.of(*places, given, defaults={"device": None, "latents": None, **vars(SourceOptions())})
    return now if known is None else replace(now, options={**known.options, **now.options}, added=known.added)


def _source_options(origin: Origin) -> SourceOptions:
    """How the source was read."""
    known = {field.name.replace("_", "-"): field.name for field in fields(SourceOptions)}
    return SourceOptions(**{known[option]: value for option, value in origin.options.items() if option in known})


def _extract(store: Path, manifest: Manifest, origin: Origin, threads: int | None, say: Say) -> None:
    """The extraction that the manifest describes. Its rows were accepted once, so no share of bad ones stops it."""
    device = manifest.engine["device"]
    noted = {field.name: origin.options.get(field.name.replace("_", "-")) for field in fields(EngineOptions)}
    switches: dict[str, Any] = recorded_switches(manifest.engine) | {name: value for name, value in noted.items() if isinstance(value, bool)}
    run_extract(
        Path(origin.artifact),
        origin.source,
        store,
        engine=manifest.engine["name"],
        device=origin.options.get("device", None if device == "cpu" else device),
        threads=threads,
        options=EngineOptions(batch=manifest.batch_size, **switches),
        batch_size=manifest.batch_size,
        shard_size=manifest.shard_rows,
        num_workers=None,
        run=manifest.recipe.run,
        latents=Path(origin.options["latents"]) if "latents" in origin.options else None,
        source_options=_source_options(origin),
        max_bad_fraction=1.0,
        allow_unknown=True,
        executor="local",
        mode=Mode.REPAIR if len(manifest.samples) > 1 else Mode.RESUME,
        overwrite=False,
        say=say,
    )


def _set_aside_only(store: Path, found: Diagnosis, command: str) -> dict[str, Any]:
    removed = set_aside(store, found)
    lines = [*_found_lines(store, found), _removed_line(removed)]
    if found.needs_extraction:
        lines.append(f"next: {command}")
        return _result(store, found, "\n".join(lines), removed, command, StoreIncomplete.exit_code)
    return _result(store, found, "\n".join(lines), removed, exit_code=StoreCorrupt.exit_code if found.foreign else EXIT_OK)


def _mended(
    store: Path, found: Diagnosis, computed: Sequence[int], removed: list[str], before: Mapping[int, str], read: Mapping[int, np.ndarray]
) -> dict[str, Any]:
    """What came of it: everything is hashed once more, and held against what the receipts said before."""
    after, manifest = diagnose(store), read_manifest(store)
    now = shard_digests_of(store, manifest, tuple(before))
    changed = [shard for shard, sha256 in before.items() if now.get(shard) != sha256]
    others = _read_otherwise(store, manifest, changed, read)
    same = f"; {len(before) - len(changed)} of them have the bytes that their receipts stated before" if before else ""
    lines = [
        *_found_lines(store, found),
        _removed_line(removed),
        f"computed again: {_listed(computed)}{same}",
        *([f"other bytes than before: {_listed(changed)}. {_why(others)}"] if changed else []),
        *(_found_lines(store, after) if after.problems else [f"{store}: every file is what its receipt says"]),
    ]
    return _result(
        store, found, "\n".join(lines), removed, exit_code=StoreCorrupt.exit_code if after.problems or others else EXIT_OK, changed=changed
    )


def _read_otherwise(store: Path, manifest: Manifest, changed: Sequence[int], read: Mapping[int, np.ndarray]) -> list[int]:
    """Rows of these shards whose images hash to something else than before the repair, most of a shard's at once: a few may be the damage itself."""
    now = inputs_of(store, manifest, changed)
    rows = {shard: np.flatnonzero((now[shard] != read[shard]).any(axis=1)) for shard in changed if shard in now and shard in read}
    return [manifest.first_rows[shard] + int(row) for shard, found in rows.items() if 2 * len(found) > manifest.shards[shard] for row in found]


def _why(others: Sequence[int]) -> str:
    if not others:
        return "This machine's processor or libraries compute otherwise."
    return (
        f"{len(others)} of their rows, the first is row {others[0]}, were computed from other images than before, although names and sizes are the "
        "same. Put the images back and repair again, or extract these to another -o."
    )


def _found_lines(store: Path, found: Diagnosis) -> list[str]:
    return [f"{len(found.problems)} problems in {store}:", *(f"  {problem.message}" for problem in found.problems)]


def _plan_lines(found: Diagnosis, command: str) -> list[str]:
    lines = [f"would remove {', '.join(found.remove)}"] if found.remove else []
    if found.shards:
        lines.append(f"would set aside, with their receipts: {_listed(found.shards)}")
    if found.quarantine:
        lines.append("would write quarantine.jsonl again, out of the receipts")
    if found.foreign:
        lines.append(f"would leave alone {', '.join(found.foreign)}")
    return [*lines, *([f"would then compute what is missing: {command}"] if found.needs_extraction else [])]


def _removed_line(removed: list[str]) -> str:
    return f"removed {', '.join(removed)}" if removed else "nothing had to be removed"


def _listed(shards: Sequence[int]) -> str:
    return f"shards {', '.join(map(str, shards))}" if shards else "no shard"


def _result(
    store: Path,
    found: Diagnosis,
    text: str,
    removed: Sequence[str] = (),
    command: str | None = None,
    exit_code: int = EXIT_OK,
    changed: Sequence[int] = (),
) -> dict[str, Any]:
    return {
        "path": str(store),
        "problems": [asdict(problem) for problem in found.problems],
        "shards": sorted({*found.shards, *found.unfinished}),
        "removed": list(removed),
        "changed": list(changed),
        "next": command,
        "exit_code": exit_code,
        "text": text,
    }
