"""`difffeat inspect` and `difffeat store verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from difffeat.engines import Artifact
from difffeat.engines.artifact import MODEL_FILE, file_digest, load_proto, read_specs
from difffeat.errors import ConfigError, StoreCorrupt
from difffeat.recipe import format_timestep
from difffeat.runtime.manifest import MANIFEST
from difffeat.runtime.store import Store, verify


def run_inspect(path: Path) -> dict[str, Any]:
    """Say what an artifact or a store is. Raises ConfigError when it is neither."""
    if (path / MODEL_FILE).is_file():
        return _artifact(Artifact.open(path))
    if (path / MANIFEST).is_file():
        return _store(Store.open(path, partial=True))
    raise ConfigError(f"{path} is neither an artifact (no {MODEL_FILE}) nor a feature store (no {MANIFEST}).")


def _artifact(artifact: Artifact) -> dict[str, Any]:
    recipe = artifact.recipe
    inputs, outputs = read_specs(load_proto(artifact.graph))
    parity_file = artifact.path / "parity.json"
    parity = json.loads(parity_file.read_text()) if parity_file.is_file() else None
    shapes = {spec.name: f"{spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in (*inputs.values(), *outputs.values())}
    worst = max((tap["relative_l2"] for tap in parity["taps"].values()), default=None) if parity else None
    lines = [
        f"{artifact.path}: {recipe.kind} graph of {recipe.backbone} ({recipe.origin} weights), {recipe.precision}, {artifact.size / 1e6:.1f} MB",
        f"  blocks {', '.join(map(str, recipe.blocks)) or '-'}; noising {recipe.noising}; pooling {recipe.pooling}; label {recipe.label}",
        *(f"  t = {format_timestep(t)}: log-SNR {snr:+.2f}" for t, snr in zip(recipe.timesteps, recipe.log_snr, strict=True)),
        *(f"  in  {name}: {shapes[name]}" for name in inputs),
        *(f"  out {name}: {shapes[name]}" for name in outputs),
        "  parity: not measured" if worst is None else f"  parity: relative L2 {worst:.1e} at the worst tap against the unfolded fp32 network",
        f"  fingerprint {recipe.fingerprint}",
        f"  digest {artifact.digest}",
    ]
    return {
        "path": str(artifact.path),
        "recipe": recipe.to_dict(),
        "taps": list(recipe.taps),
        "shapes": shapes,
        "bytes": artifact.size,
        "files": {file.name: file_digest(file) for file in sorted(artifact.path.iterdir()) if file.is_file()},
        "parity": parity,
        "fingerprint": recipe.fingerprint,
        "digest": artifact.digest,
        "text": "\n".join(lines),
    }


def _store(store: Store) -> dict[str, Any]:
    manifest = store.manifest
    bad = store.quarantined
    done = store.finished_shards
    lines = [
        f"{store.path}: {len(store)} rows, {len(store.taps)} taps, {done} of {len(manifest['shards'])} shards, {store.recipe.run.store_dtype}",
        *(f"  {name}: {list(shape)}" for name, shape in list(manifest["taps"].items())[:12]),
        *([f"  and {len(store.taps) - 12} more"] if len(store.taps) > 12 else []),
        f"  classes: {len(store.classes)}; quarantined: {len(bad)}",
        *(f"    {entry['id']}: {entry['error']} at {entry['stage']}: {entry['message']}" for entry in bad[:5]),
        f"  engine {manifest['engine']['name']} ({manifest['engine']['precision']}, {manifest['engine']['device']}), batch {manifest['batch_size']}",
        f"  versions {', '.join(f'{name} {version}' for name, version in manifest['versions'].items())}",
        f"  fingerprint {store.fingerprint}",
    ]
    return {"path": str(store.path), "manifest": manifest, "finished_shards": done, "quarantined": bad, "text": "\n".join(lines)}


def run_verify_store(path: Path) -> dict[str, Any]:
    """Hash a store again. Raises StoreCorrupt listing every bad file."""
    problems = verify(path)
    if problems:
        raise StoreCorrupt("\n  ".join([f"{len(problems)} problems in {path}:", *problems]))
    return {"path": str(path), "problems": [], "text": f"{path}: every file is what its receipt says"}
