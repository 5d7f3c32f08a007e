"""`difffeat inspect`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines import Artifact
from difffeat.engines.artifact import MODEL_FILE, file_digest, load_proto, read_specs
from difffeat.engines.cost import Cost, graph_cost
from difffeat.engines.tensorrt_engine import SLOTS
from difffeat.errors import ConfigError
from difffeat.recipe import GraphRecipe, format_timestep
from difffeat.recognise import Thing, quoted, recognise
from difffeat.runtime.manifest import MANIFEST
from difffeat.workflows.assumptions import diffusion_lines
from difffeat.workflows.describing import SHOWN, describe_store
from difffeat.workflows.staging import PARITY_FILE


def run_inspect(path: Path) -> dict[str, Any]:
    """Say what an artifact, a plan or a store is. Raises ConfigError when it is none of them."""
    if path.suffix == ".plan" and path.is_file():
        return _plan_alone(path)
    if path.suffix == ".onnx" and path.is_file() and (path.parent / MODEL_FILE).is_file():
        path = path.parent  # a graph is one of its artifact's files
    if (path / MODEL_FILE).is_file():
        return _artifact(Artifact.open(path))
    if (path / MANIFEST).is_file():
        return describe_store(path)
    thing = recognise(path)
    raise ConfigError(f"{path} {thing.words}: neither an artifact (no {MODEL_FILE}), nor a plan, nor a feature store (no {MANIFEST}).{_held(thing)}")


def _held(thing: Thing) -> str:
    return f" Is it one of {', '.join(map(quoted, thing.inside[:SHOWN]))}?" if thing.inside else ""


def _artifact(artifact: Artifact) -> dict[str, Any]:
    recipe = artifact.recipe
    inputs, outputs = read_specs(load_proto(artifact.graph))
    parity, parity_words = _parity(artifact.path / PARITY_FILE)
    shapes = {spec.name: f"{spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in (*inputs.values(), *outputs.values())}
    costs = {name: graph_cost(path) for name, path in artifact.graphs.items()}
    unit = "a caption of 32 tokens" if recipe.family == "plaid" else "a sample"
    plans = [_plan(file, recipe) for file in sorted((artifact.path / "engines").glob("*.plan"))]
    lines = [
        f"{artifact.path}: {recipe.kind} graph of {recipe.backbone} ({recipe.origin} weights), {recipe.precision}, {artifact.size / 1e6:.1f} MB",
        f"  blocks {', '.join(map(str, recipe.blocks)) or '-'}; noising {recipe.noising}; pooling {recipe.pooling}",
        *(f"  {line}" for line in diffusion_lines(recipe)),
        *(f"  t = {format_timestep(t)}: log-SNR {snr:+.2f}" for t, snr in zip(recipe.timesteps, recipe.log_snr, strict=True)),
        *(f"  in  {name}: {shapes[name]}" for name in inputs),
        *(f"  out {name}: {shapes[name]}" for name in outputs),
        f"  parity: {parity_words}",
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


def _parity(path: Path) -> tuple[dict[str, Any] | None, str]:
    """What was measured when the artifact was made, and in words; a file that cannot be read is none of what the graph's worth depends on."""
    if not path.is_file():
        return None, "not measured"
    try:
        parity = json.loads(path.read_bytes())
        worst = max((float(tap["relative_l2"]) for tap in parity["taps"].values()), default=None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return None, f"{path.name} is damaged ({type(error).__name__}). Export the artifact again, or measure with difffeat verify"
    return parity, "not measured" if worst is None else f"relative L2 {worst:.1e} at the worst tap against the unfolded fp32 network"


def _cost_lines(cost: Cost, unit: str) -> list[str]:
    precision = "; ".join(f"{op} {', '.join(f'{count} in {kind}' for kind, count in kinds.items())}" for op, kinds in cost.precision.items())
    return [
        f"{cost.total_flops / 1e9:.3g} GFLOP {unit}, {cost.parameters / 1e6:.1f} M parameters, weights {cost.weight_bytes / 1e6:.1f} MB, "
        f"activations about {cost.activation_bytes / 1e6:.1f} MB a sample",
        precision,
    ]


def _plan_alone(path: Path) -> dict[str, Any]:
    """A plan with what its artifact, in whose folder it lies, says of it."""
    folder = path.parent.parent
    if not (folder / MODEL_FILE).is_file():
        plan = _plan(path, None)
        return {**plan, "text": f"{path}: {plan['text']}\n  {folder}, where its artifact would be, holds none: nothing runs a plan without it"}
    artifact = Artifact.open(folder)
    recipe, plan = artifact.recipe, _plan(path, artifact.recipe)
    if not plan["sealed"]:
        return plan
    lines, graph = [f"{path}: {plan['text']}"], artifact.graphs.get(plan["graph"])
    fits = graph is not None and plan["graph_digest"] == artifact.digest
    lines.append(f"  of {artifact.path}: {recipe.kind} graph of {recipe.backbone}, taps {', '.join(recipe.taps) or '-'}")
    if not fits or graph is None:
        return {**plan, "text": "\n".join([*lines, "  which has changed since: it will be built anew"])}
    memory = _plan_memory(graph, plan)
    slots = f"in each of {SLOTS} slots activations of up to {memory['activations'] / 1e6:.1f} MB and buffers of {memory['buffers'] / 1e6:.1f} MB"
    lines.append(f"  on the GPU about {memory['weights'] / 1e6:.1f} MB of weights, and at the largest batch {slots}")
    lines += [f"  fingerprint {recipe.fingerprint}", f"  SHA-256 {plan['sha256']}"]
    return {**plan, "recipe": recipe.to_dict(), "taps": list(recipe.taps), "memory": memory, "text": "\n".join(lines)}


def _plan_memory(graph: Path, plan: dict[str, Any]) -> dict[str, int]:
    """Bytes on the device while a plan runs: of its weights, and of activations and buffers for the largest shapes, for each batch under way."""
    from difffeat.engines.tensorrt_plans import Profile

    profile = Profile(**plan["profile"])
    cost = graph_cost(graph, batch=profile.max_batch, length=profile.max_length or 1)
    specs = [spec for part in read_specs(load_proto(graph)) for spec in part.values()]
    buffers = sum(math.prod(profile.shapes(spec)[2]) * np.dtype(spec.dtype).itemsize for spec in specs)
    return {"weights": cost.weight_bytes, "activations": cost.activation_bytes, "buffers": buffers}


def _plan(path: Path, recipe: GraphRecipe | None) -> dict[str, Any]:
    """A plan and whether it may be loaded here."""
    from difffeat.engines.tensorrt_plans import read_sidecar

    stored, reason = read_sidecar(path)
    if stored is None:
        return {"path": str(path), "sealed": False, "reason": reason, "text": f"{path.name} may not be loaded: {reason}; it will be built anew"}
    profile = stored["profile"]
    gpu, _ = stored["device"]
    lengths = f", captions of {profile['min_length']}..{profile['max_length']} tokens" if recipe is not None and recipe.takes_text else ""
    text = (
        f"{stored['engine']} {stored['version']}, {stored['graph']} graph, {stored['precision']}, {stored['bytes'] / 1e6:.1f} MB, "
        f"{'built ' if gpu.startswith('ahead') else 'for '}{gpu}, batches {profile['min_batch']}..{profile['max_batch']} "
        f"(tuned for {profile['opt_batch']}){lengths}, sealed"
    )
    return {"path": str(path), "sealed": True, **stored, "text": text}
