"""The steps in order of worth, for a card that is lent for minutes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from difffeat.benchmarks.gpu.journal import Journal
from difffeat.benchmarks.gpu.sizes import Sizes
from difffeat.engines import rtx_cards
from difffeat.engines.driver import Driver, probe_driver

ROOT = Path(__file__).parents[3]
"""Of the checkout: tests/gpu lie there."""
REHEARSED_TESTS = "from-latents-fp16 or text-fp16 or in_order"
"""Of tests/gpu, in a rehearsal: all of it takes minutes on two cores."""
MOST_WORKERS = 8
TESTS_OUTPUT = "tests-gpu.txt"


@dataclass(frozen=True)
class Call:
    """What a step is run with: `prepared` artifacts, a `work` folder of its own, CPU `threads`."""

    sizes: Sizes
    prepared: Path
    work: Path
    threads: int


@dataclass(frozen=True)
class Step:
    """**Fields:** `seconds` that it takes on an H100, by estimate, with compilation; `models` whose artifacts it needs; `run` the work."""

    seconds: float
    run: Callable[[Journal, Call], None]
    models: tuple[str, ...] = ()


def _doctor(journal: Journal, call: Call) -> None:
    from difffeat.workflows.building import run_doctor

    report = run_doctor()
    journal.text(report["text"])
    journal.note("doctor", versions=report["versions"], driver=report["driver"]["cuda"], advice=report["advice"])


def _tests(journal: Journal, call: Call) -> None:
    """Pytest in a process of its own; the counts go into the row, what failed into the text."""
    if importlib.util.find_spec("pytest") is None:
        journal.note("tests/gpu", not_run="pytest is not installed")
        return
    workers = min(MOST_WORKERS, (os.cpu_count() or 2) // 2)
    spread = ["-n", str(workers), "--dist", "load"] if workers > 1 and importlib.util.find_spec("xdist") is not None else []
    if not (ROOT / "tests" / "gpu").is_dir():
        journal.note("tests/gpu", not_run="this is an installed package: its tests are in the repository")
        return
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-rfE", "--show-capture=no", "--tb=short", "-W", "default", "-m", "gpu", *spread]
    environment = {**os.environ, "DIFFFEAT_DATA": str(call.work / "data"), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    if call.sizes.device == "cpu":
        command += ["-k", REHEARSED_TESTS]
        environment["DIFFFEAT_GPU_TESTS"] = "rehearse"
    output = journal.folder / TESTS_OUTPUT
    with output.open("w") as file:  # and not a pipe, whose content is lost where the step takes too long
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
    said = output.read_text()
    journal.text(said[-8000:])
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)s?\b", said)}
    journal.note("tests/gpu", exit_code=done.returncode, **counts)
    if done.returncode:
        raise SystemExit("tests/gpu failed")


def _ceilings(journal: Journal, call: Call) -> None:
    from difffeat.benchmarks.gpu.ceilings import run

    run(journal, call.sizes)


def _trunk(journal: Journal, call: Call) -> None:
    from difffeat.benchmarks.gpu.modules import run_trunk

    run_trunk(journal, call.sizes, ("fp16",))


def _encoder(journal: Journal, call: Call) -> None:
    from difffeat.benchmarks.gpu.modules import run_encoder

    run_encoder(journal, call.sizes, ("fp16",))


def _engine(journal: Journal, call: Call) -> None:
    from difffeat.benchmarks.gpu.whole import run_engine

    engines, left_out = runnable_engines(probe_driver())
    for name, reason in left_out.items():
        journal.note(f"engine {name}", not_run=reason)
    run_engine(journal, call.sizes, call.prepared, engines, call.threads)


def _extract(journal: Journal, call: Call) -> None:
    from difffeat.benchmarks.gpu.whole import run_extract

    run_extract(journal, call.sizes, call.prepared, call.threads)


def _resume(journal: Journal, call: Call) -> None:
    from difffeat.benchmarks.gpu.whole import run_resume

    run_resume(journal, call.sizes, call.prepared, call.work)


def _plaid(journal: Journal, call: Call) -> None:
    from difffeat.benchmarks.gpu.whole import run_plaid

    run_plaid(journal, call.sizes, call.prepared, call.threads)


def _bf16(journal: Journal, call: Call) -> None:
    from difffeat.benchmarks.gpu.modules import run_encoder, run_trunk

    run_trunk(journal, call.sizes, ("bf16",))
    run_encoder(journal, call.sizes, ("bf16",))


def _batches(journal: Journal, call: Call) -> None:
    from difffeat.benchmarks.gpu.modules import run_batches

    run_batches(journal, call.sizes)


def _fp8(journal: Journal, call: Call) -> None:
    from difffeat.benchmarks.gpu.ceilings import run_fp8

    run_fp8(journal, call.sizes)


STEPS: Mapping[str, Step] = {
    "doctor": Step(10, _doctor),
    "tests": Step(150, _tests),
    "ceilings": Step(45, _ceilings),
    "trunk": Step(75, _trunk),
    "encoder": Step(90, _encoder),
    "engine": Step(110, _engine, ("dit",)),
    "extract": Step(70, _extract, ("dit",)),
    "resume": Step(90, _resume, ("dit",)),
    "plaid": Step(70, _plaid, ("plaid",)),
    "bf16": Step(130, _bf16),
    "batches": Step(75, _batches),
    "fp8": Step(15, _fp8),
}
"""In order of worth."""
REHEARSAL_SECONDS = 20.0
"""Of any step in a rehearsal."""
UNTIMED = ("doctor", "tests")
"""Steps beside which artifacts may be prepared."""


def runnable_engines(driver: Driver) -> tuple[tuple[str, ...], dict[str, str]]:
    """Engines to time beside torch and ONNX Runtime (which says itself what it lacks), and those left out, with the reason."""
    left_out: dict[str, str] = {}
    for engine, package in (("trt", "tensorrt"), ("rtx", "tensorrt_rtx")):
        gpu = driver.gpu(0)
        if importlib.util.find_spec(package) is None:
            left_out[engine] = f"{package} is not installed"
        elif gpu is None:
            left_out[engine] = driver.problem or "there is no GPU"
        elif engine == "rtx" and not rtx_cards.supported(gpu):
            left_out[engine] = f"TensorRT-RTX does not run on {gpu}"
    return ("torch", *(engine for engine in ("trt", "rtx") if engine not in left_out)), left_out
