"""`make full-size`: DiT-XL/2 and Plaid 1B at their published sizes, from files of their published form, every tensor drawn at random.

Each stage runs in a process of its own, so that its peak memory is its own. About 24 GiB of memory and 20 GiB of disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMITS_GIB = {"dit": 10.0, "plaid": 18.0}


def write_checkpoints(folder: Path) -> dict[str, Any]:
    """Files with the published keys and shapes: DiT original `.pt`, VAE folder, Plaid's four files and a tokenizer."""
    from difffeat.export import weights as w
    from difffeat.workflows.loading import counting_tokenizer

    w.save_dit_original(w.random_dit(w.DIT_CONFIGS["dit-xl-2-256"]), folder / "DiT-XL-2-256x256.pt")
    w.save_vae(w.random_vae(w.SD_VAE_CONFIG), folder / "vae")
    w.save_plaid(w.random_plaid(w.PLAID_1B), folder / "plaid")
    (folder / "tokenizer.json").write_bytes(counting_tokenizer(w.PLAID_1B.vocab))
    return {"bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())}


def export(folder: Path, model: str) -> dict[str, Any]:
    """Export through the functions of `difffeat export`, parity included."""
    from difffeat.workflows.exporting import ExportOptions, export_dit, export_plaid

    backbone = _load(folder, model)
    started = time.perf_counter()
    if model == "dit":
        options = ExportOptions(kind="image", blocks=(4, 8, 12), timesteps=(30,), noising="random")
        report = export_dit(backbone.weights, backbone.vae, options, folder / "artifact-dit", overwrite=True, say=_log, check_samples=2)
        latents = ExportOptions(kind="latents", blocks=(0,), timesteps=(0,), noising="random")
        alone = export_dit(backbone.weights, backbone.vae, latents, folder / "artifact-latents", overwrite=True, say=_log, check_samples=2)
        parities = {**report.parity.taps, **alone.parity.taps}
    else:
        options = ExportOptions(kind="text", blocks=(10, 20), timesteps=(0,), noising="mean")
        report = export_plaid(
            backbone.weights, backbone.tokenizer or b"", options, folder / "artifact-plaid", overwrite=True, say=_log, check_samples=2
        )
        parities = dict(report.parity.taps)
    return {
        "seconds": report.seconds,
        "seconds_in_all": time.perf_counter() - started,
        "artifact_bytes": report.artifact.size,
        "relative_l2": {name: tap.relative_l2 for name, tap in parities.items()},
        "cosine": {name: tap.cosine for name, tap in parities.items()},
        "fingerprint": report.artifact.recipe.fingerprint,
    }


def throughput(folder: Path, model: str, start: str = "pixels", engines: tuple[str, ...] = (), dtype: str = "fp32") -> dict[str, Any]:
    """Seconds per sample beside eager torch, one tap."""
    from difffeat.benchmarks.throughput import export_for_timing, time_artifact

    backbone = _load(folder, model)
    artifact = export_for_timing(backbone, 12 if model == "dit" else 20, folder / f"artifact-timed-{time.time_ns()}", _log, start=start, dtype=dtype)
    try:
        return time_artifact(backbone, artifact, batch_size=2 if start == "pixels" else 4, repeats=5, threads=2, engines=engines, say=_log)
    finally:
        shutil.rmtree(artifact.path)


def throughput_bf16(folder: Path, model: str) -> dict[str, Any]:
    """The same in bf16, in torch, on CPUs that have units for it; on others eager torch takes many times as long as in fp32."""
    from difffeat.export.precision import cpu_computes

    if not cpu_computes("bf16"):
        return {"text": "bf16: not run, this CPU has no units for it (amx_bf16 or avx512_bf16)"}
    return throughput(folder, model, engines=("torch",), dtype="bf16")


def grid(folder: Path) -> dict[str, Any]:
    """Twelve timesteps × twelve blocks of XL/2 against their bound."""
    from difffeat.benchmarks.grid import run_grid

    vae = str(folder / "vae")
    return run_grid("dit", str(folder / "DiT-XL-2-256x256.pt"), vae=vae, blocks=12, batch_size=2, repeats=3, threads=2, output=None, say=_log)


def text(folder: Path) -> dict[str, Any]:
    """Captions of 10 to 70 tokens through Plaid 1B, in buckets and padded."""
    from difffeat.benchmarks.text import run_text

    tokenizer = str(folder / "tokenizer.json")
    return run_text(
        "plaid",
        str(folder / "plaid"),
        tokenizer=tokenizer,
        block=20,
        captions=32,
        batch_size=8,
        repeats=3,
        threads=2,
        int8=False,
        output=None,
        say=_log,
    )


def compile_fp16(folder: Path, model: str) -> dict[str, Any]:
    """The fp16 graph, its parity with rounding at each operation, and its TensorRT-RTX plan, built ahead of time."""
    from difffeat.engines.tensorrt_build import build_plan
    from difffeat.engines.tensorrt_plans import Profile
    from difffeat.workflows.exporting import ExportOptions, export_dit, export_plaid

    backbone = _load(folder, model)
    started = time.perf_counter()
    out = folder / f"artifact-{model}-fp16"
    if model == "dit":
        options = ExportOptions(kind="image", blocks=(12,), timesteps=(30,), noising="random", precision="fp16")
        report = export_dit(backbone.weights, backbone.vae, options, out, overwrite=True, say=_log, check_samples=1)
    else:
        options = ExportOptions(kind="text", blocks=(20,), timesteps=(0,), noising="mean", precision="fp16")
        report = export_plaid(backbone.weights, backbone.tokenizer or b"", options, out, overwrite=True, say=_log, check_samples=2)
    exported = time.perf_counter() - started
    plan = build_plan(report.artifact, "rtx", Profile(opt_batch=8, max_batch=16), say=_log)
    return {
        "export_seconds": exported,
        "build_seconds": plan.seconds,
        "plan_bytes": plan.size,
        "builder": plan.sidecar["version"],
        "relative_l2": {name: tap.relative_l2 for name, tap in report.parity.taps.items()},
        "fp32_parts": list(report.artifact.recipe.options.get("fp32_parts", ())),
    }


def _load(folder: Path, model: str) -> Any:
    from difffeat.workflows.loading import load_backbone

    if model == "dit":
        return load_backbone("dit", str(folder / "DiT-XL-2-256x256.pt"), vae=str(folder / "vae"))
    return load_backbone("plaid", str(folder / "plaid"), tokenizer=str(folder / "tokenizer.json"))


STAGES = {
    "checkpoints": lambda folder: write_checkpoints(folder),
    "export-dit": lambda folder: export(folder, "dit"),
    "throughput-dit": lambda folder: throughput(folder, "dit", engines=("naive", "int8")),
    "latents-dit": lambda folder: throughput(folder, "dit", "latents", ("naive", "int8")),
    "bf16-dit": lambda folder: throughput_bf16(folder, "dit"),
    "grid-dit": lambda folder: grid(folder),
    "export-plaid": lambda folder: export(folder, "plaid"),
    "throughput-plaid": lambda folder: throughput(folder, "plaid"),
    "bf16-plaid": lambda folder: throughput_bf16(folder, "plaid"),
    "text-plaid": lambda folder: text(folder),
    "fp16-dit": lambda folder: compile_fp16(folder, "dit"),
    "fp16-plaid": lambda folder: compile_fp16(folder, "plaid"),
}


RESULTS = "full-size.json"
TIMED = ("throughput", "latents", "bf16", "grid", "text")
"""Stages that print a table."""


def run_stage(name: str, folder: Path) -> dict[str, Any]:
    """One stage in this process, with its peak memory (GiB, memory-mapped files that were touched included)."""
    result = STAGES[name](folder)
    return {**result, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def run_all(folder: Path, stages: list[str]) -> dict[str, Any]:
    """Every stage in a process of its own."""
    results: dict[str, Any] = {}
    for name in stages:
        _log(f"== {name}")
        command = [sys.executable, "-m", "difffeat.benchmarks.full_size", "--output", str(folder), "--stage", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout)
        (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n")  # after each, so that a run that is cut short keeps what was done
    return results


def report(results: dict[str, Any]) -> list[str]:
    """What the README quotes, and whether the limits are kept."""
    lines = []
    for model, title in (("dit", "DiT-XL/2 at 256 px with the SD autoencoder, t = 30"), ("plaid", "Plaid 1B, t = 0 without noise")):
        stage = results.get(f"export-{model}")
        if stage is not None:
            taps = ", ".join(f"{name} {value:.1e}" for name, value in stage["relative_l2"].items())
            kept = "kept" if stage["peak_gib"] <= LIMITS_GIB[model] else "EXCEEDED"
            lines += [
                title,
                f"  relative L2 against the unfolded fp32 torch module: {taps} (tolerance 1e-05)",
                f"  export {stage['seconds']['export']:.0f} s, peak memory {stage['peak_gib']:.1f} GiB (limit {LIMITS_GIB[model]:.0f}: {kept}), "
                f"artifact {stage['artifact_bytes'] / 1e9:.2f} GB",
            ]
        for timed in (results[name] for name in (f"{stage}-{model}" for stage in TIMED) if name in results):
            lines += [f"  {line}" for line in timed["text"].splitlines()]
        low = results.get(f"fp16-{model}")
        if low is not None:
            worst = max(low["relative_l2"].values())
            lines.append(
                f"  fp16: relative L2 {worst:.1e} with rounding at each operation; TensorRT-RTX {low['builder']} plan built ahead of time in "
                f"{low['build_seconds']:.0f} s, {low['plan_bytes'] / 1e6:.0f} MB, peak memory {low['peak_gib']:.1f} GiB"
            )
    return lines


def _log(message: str, **_: Any) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    """Run all stages, or one."""
    parser = argparse.ArgumentParser(prog="python -m difffeat.benchmarks.full_size", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("full-size-out"))
    parser.add_argument("--stage", choices=sorted(STAGES))
    parser.add_argument("--only", choices=("dit", "plaid"), help="leave the other model out")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        json.dump(run_stage(arguments.stage, arguments.output), sys.stdout)
        return
    stages = [name for name in STAGES if arguments.only is None or name == "checkpoints" or name.endswith(arguments.only)]
    results = run_all(arguments.output, stages)
    print("\n".join(report(results)))
    over = [m for m, limit in LIMITS_GIB.items() if results.get(f"export-{m}", {}).get("peak_gib", 0) > limit]
    if over:
        sys.exit(f"peak memory beyond the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
