"""`make gpu`: every GPU table in one call: DiT-XL/2 with and without its autoencoder, and Plaid 1B, full size, random weights.

Each step runs in a process of its own, so that one that dies costs its table only. Eager torch, torch.compile, ONNX Runtime on CUDA, TensorRT and
TensorRT-RTX stand side by side in one run; what is not installed or cannot run is listed with the reason. Every row carries its share of the card's
measured matrix rate and its distance from the unfolded network in fp32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from difffeat.engines.driver import probe_driver
from difffeat.errors import ProviderMissing

STEPS: dict[str, dict[str, Any]] = {
    "dit-latents-fp16": {"model": "dit", "block": 12, "start": "latents", "dtype": "fp16", "batch_size": 64},
    "dit-pixels-fp16": {"model": "dit", "block": 12, "start": "pixels", "dtype": "fp16", "batch_size": 32},
    "plaid-fp16": {"model": "plaid", "block": 20, "dtype": "fp16", "batch_size": 64},
    "dit-latents-bf16": {"model": "dit", "block": 12, "start": "latents", "dtype": "bf16", "batch_size": 64},
    "plaid-bf16": {"model": "plaid", "block": 20, "dtype": "bf16", "batch_size": 64},
    "dit-latents-fp32": {"model": "dit", "block": 12, "start": "latents", "dtype": "fp32", "batch_size": 64},
    "dit-pixels-fp32": {"model": "dit", "block": 12, "start": "pixels", "dtype": "fp32", "batch_size": 32},
}
"""In order of worth, for a card that is lent for minutes."""
ENGINES = ("torch", "trt", "rtx")
REPEATS = 15
STEP_SECONDS = 900


def run_step(name: str, device: str, threads: int, output: Path) -> dict[str, Any]:
    """One table, with its JSON, chart and text in `output`."""
    from difffeat.benchmarks.throughput import run_throughput

    options = {"vae": None, "repeats": REPEATS, "threads": threads, "device": device, "engines": ENGINES, "compiled": True, **STEPS[name]}
    return run_throughput(weights="random", output=output / f"gpu-{name}.json", say=_say, **options)


def run_all(names: list[str], device: str, threads: int, output: Path) -> dict[str, Any]:
    """Every step in a process of its own. Raises ProviderMissing where there is no GPU."""
    driver = probe_driver()
    if driver.problem is not None:
        raise ProviderMissing(f"the GPU tables need an NVIDIA GPU, and {driver.problem}. The CPU's come from: make full-size")
    output.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"gpus": [vars(gpu) for gpu in driver.gpus], "cuda": driver.version, "steps": {}}
    for name in names:
        started = time.monotonic()
        command = [sys.executable, "-m", "difffeat.benchmarks.gpu", "--step", name, "--device", device, "--threads", str(threads)]
        summary["steps"][name] = _process([*command, "--output", str(output)])
        _say(f"{name}: {time.monotonic() - started:.0f} s")
        (output / "gpu-summary.json").write_text(json.dumps(summary, indent=2) + "\n")  # after each, so that a lost machine keeps what was done
    return summary


def _process(command: list[str]) -> dict[str, Any]:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=STEP_SECONDS)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {STEP_SECONDS} s"}
    return {"text": done.stdout} if done.returncode == 0 else {"failed": f"exit code {done.returncode}; its messages stand above"}


def _say(message: str, **_: Any) -> None:
    print(message, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """All steps, some of them, or (with --step) one in this process."""
    parser = argparse.ArgumentParser(prog="python -m difffeat.benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-out"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=8, help="CPU threads, the same for every candidate")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, separated by commas")
    parser.add_argument("--step", choices=sorted(STEPS))
    given = parser.parse_args(arguments)
    if given.step:
        given.output.mkdir(parents=True, exist_ok=True)
        print(run_step(given.step, given.device, given.threads, given.output)["text"])
        return
    try:
        summary = run_all(given.only.split(","), given.device, given.threads, given.output)
    except ProviderMissing as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for name, step in summary["steps"].items():
        print(step.get("text") or f"{name}: failed: {step['failed']}")
    if any("failed" in step for step in summary["steps"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
