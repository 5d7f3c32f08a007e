"""`difffeat inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from difffeat.engines import Artifact
from difffeat.engines.artifact import MODEL_FILE, file_digest, load_proto, read_specs
from difffeat.engines.cost import Cost, graph_cost
from difffeat.errors import ConfigError
from difffeat.recipe import format_timestep
from difffeat.runtime.manifest import MANIFEST
from difffeat.workflows.describing import describe_store


def run_inspect(path: Path) -> dict[str, Any]:
    """Say what an artifact, a plan or a store is. Raises ConfigError when it is none of them."""
    if path.suffix == ".plan" and path.is_file():
        return _plan(path)
    if (path / MODEL_FILE).is_file():
        return _artifact(Artifact.open(path))
    if (path / MANIFEST).is_file():
        return describe_store(path)
    raise ConfigError(f"{path} is neither an artifact (no {MODEL_FILE}), nor a plan, nor a feature store (no {MANIFEST}).")


def _artifact(artifact: Artifact) -> dict[str, Any]:
    recipe = artifact.recipe
    inputs, outputs = read_specs(load_proto(artifact.graph))
    parity_file = artifact.path / "parity.json"
    parity = json.loads(parity_file.read_text()) if parity_file.is_file() else None
    shapes = {spec.name: f"{spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in (*inputs.values(), *outputs.values())}
    costs = {name: graph_cost(path) for name, path in artifact.graphs.items()}
    unit = "a caption of 32 tokens" if recipe.family == "plaid" else "a sample"
    plans = [_plan(file) for file in sorted((artifact.path / "engines").glob("*.plan"))]
    worst = max((tap["relative_l2"] for tap in parity["taps"].values()), default=None) if parity else None
    lines = [
        f"{artifact.path}: {recipe.kind} graph of {recipe.backbone} ({recipe.origin} weights), {recipe.precision}, {artifact.size / 1e6:.1f} MB",
        f"  blocks {', '.join(map(str, recipe.blocks)) or '-'}; noising {recipe.noising}; pooling {recipe.pooling}; label {recipe.label}",
        *(f"  t = {format_timestep(t)}: log-SNR {snr:+.2f}" for t, snr in zip(recipe.timesteps, recipe.log_snr, strict=True)),
        *(f"  in  {name}: {shapes[name]}" for name in inputs),
        *(f"  out {name}: {shapes[name]}" for name in outputs),
        "  parity: not measured" if worst is None else f"  parity: relative L2 {worst:.1e} at the worst tap against the unfolded fp32 network",
        *(f"  {name}: {line}" for name, cost in costs.items() for line in _cost_lines(cost, unit)),
        *([f"  calibration {recipe.calibration}"] if recipe.calibration else []),
        *(f"  plan {plan['path']}: {plan['text']}" for plan in plans),
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
        "cost": {name: cost.to_dict() for name, cost in costs.items()},
        "plans": [{key: value for key, value in plan.items() if key != "text"} for plan in plans],
        "fingerprint": recipe.fingerprint,
        "digest": artifact.digest,
        "text": "\n".join(lines),
    }


def _cost_lines(cost: Cost, unit: str) -> list[str]:
    precision = "; ".join(f"{op} {', '.join(f'{count} in {kind}' for kind, count in kinds.items())}" for op, kinds in cost.precision.items())
    return [
        f"{cost.total_flops / 1e9:.3g} GFLOP {unit}, {cost.parameters / 1e6:.1f} M parameters, weights {cost.weight_bytes / 1e6:.1f} MB, "
        f"activations about {cost.activation_bytes / 1e6:.1f} MB a sample",
        precision,
    ]


def _plan(path: Path) -> dict[str, Any]:
    """A plan and whether it may be loaded here."""
    from difffeat.engines.tensorrt_plans import read_sidecar

    stored, reason = read_sidecar(path)
    if stored is None:
        return {"path": str(path), "sealed": False, "reason": reason, "text": f"{path.name}: may not be loaded: {reason}; it will be built anew"}
    profile = stored["profile"]
    gpu, _ = stored["device"]
    text = (
        f"{stored['engine']} {stored['version']}, {stored['graph']} graph, {stored['precision']}, {stored['bytes'] / 1e6:.1f} MB, "
        f"{'built ' if gpu.startswith('ahead') else 'for '}{gpu}, batches {profile['min_batch']}..{profile['max_batch']} "
        f"(tuned for {profile['opt_batch']}), sealed"
    )
    return {"path": str(path), "sealed": True, **stored, "text": text}
