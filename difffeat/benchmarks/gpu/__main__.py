"""`make gpu`: the steps one after the other, each in a process of its own, none begun that does not fit into the budget."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from difffeat.benchmarks.asking import require_counts
from difffeat.benchmarks.gpu.journal import ROWS, TEXT, Journal
from difffeat.benchmarks.gpu.prepared import MODELS, prepare
from difffeat.benchmarks.gpu.sizes import CARD, REHEARSAL, Sizes
from difffeat.benchmarks.gpu.steps import REHEARSAL_SECONDS, ROOT, STEPS, UNTIMED, Call
from difffeat.benchmarks.timing import machine
from difffeat.engines.driver import probe_driver
from difffeat.errors import ConfigError, DifffeatError, ProviderMissing
from difffeat.runtime.files import Lock

MODULE = "difffeat.benchmarks.gpu"
SLACK = 3.0
"""A step that takes so many times its estimate is stopped."""
PREPARING_SECONDS, PREPARING_THREADS = 120.0, 4


@dataclass
class Budget:
    """Seconds for all steps together, from `started` on; None: no limit."""

    seconds: float | None
    started: float

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return math.inf if self.seconds is None else self.seconds - (time.monotonic() - self.started)


def run_all(given: argparse.Namespace) -> int:
    """Every step that was asked for and fits. Returns how many failed. Raises ProviderMissing where there is no GPU, unless it is a rehearsal, and
    StoreLocked where another run writes into the folder.
    """
    _require_counts(given)
    if not given.rehearse:
        _require_card()
    budget = Budget(given.budget, time.monotonic())
    given.output.mkdir(parents=True, exist_ok=True)
    with Lock(given.output):
        return _run_locked(given, budget)


def _run_locked(given: argparse.Namespace, budget: Budget) -> int:
    """Every step; nobody else writes into the folder meanwhile, whose steps, artifacts and timings would be of both."""
    journal = Journal(given.output, "run")
    journal.note("begins", **_about(given))
    names = [name for name in STEPS if name in given.only]
    preparing = _start_preparing(given, [model for model in MODELS if any(model in STEPS[name].models for name in names)])
    try:
        failed = _run_steps(names, given, budget, preparing, journal)
    except BaseException as error:
        journal.note("ends", stopped=type(error).__name__, seconds=round(time.monotonic() - budget.started, 1))
        raise
    finally:
        for process in preparing.values():
            process.kill()
    journal.note("ends", failed=failed, seconds=round(time.monotonic() - budget.started, 1))
    return failed


def _run_steps(names: list[str], given: argparse.Namespace, budget: Budget, preparing: dict[str, subprocess.Popen[bytes]], journal: Journal) -> int:
    """The steps in order; how many failed. Those whose artifacts could not be made are left out."""
    failed, lacking = 0, set[str]()
    for name in names:
        if name not in UNTIMED and preparing:
            lacking = _wait_for(preparing, budget, journal)
            failed += len(lacking)
            preparing.clear()
        if missing := lacking.intersection(STEPS[name].models):
            journal.note(name, skipped=f"the artifacts of {', '.join(sorted(missing))} are missing")
            continue
        estimate = REHEARSAL_SECONDS if given.rehearse else STEPS[name].seconds
        if estimate > budget.left:
            journal.note(name, skipped=f"takes about {estimate:.0f} s, and {budget.left:.0f} s are left of the budget")
            continue
        failed += not _in_its_own_process(name, given, min(budget.left, SLACK * max(estimate, 60.0)), journal)
    return failed


def _require_counts(given: argparse.Namespace) -> None:
    require_counts(threads=given.threads)
    if given.budget is not None and not 0 < given.budget < math.inf:
        raise ConfigError(f"--budget must be a number of seconds above 0, got {given.budget:g}; leave it out for no limit.")


def _require_card() -> None:
    """Raises ProviderMissing for a machine without a GPU, and for a torch that does not see it."""
    import torch

    why = probe_driver().problem
    if why is None and not torch.cuda.is_available():
        why = f"torch {torch.__version__} sees none (built for CUDA {torch.version.cuda or 'not at all'}). Run difffeat doctor"
    if why is not None:
        raise ProviderMissing(f"the GPU tables need an NVIDIA GPU, and {why}. Pass --rehearse for the small backbones on the CPU.")


def run_step(name: str, given: argparse.Namespace) -> None:
    """One step in this process."""
    work = _prepared(given) / "work" / name  # with the artifacts: beside results, photos and stores would be in the way of who collects those
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    given.output.mkdir(parents=True, exist_ok=True)
    STEPS[name].run(Journal(given.output, name), Call(_sizes(given), _prepared(given), work, given.threads))


def _in_its_own_process(name: str, given: argparse.Namespace, seconds: float, journal: Journal) -> bool:
    """Whether the step ended well. One that dies, or takes too long, costs its own rows only."""
    started, code = time.monotonic(), _group(_command(given, "--step", name), seconds)
    failed = f"stopped after {seconds:.0f} s" if code is None else f"exit code {code}; its messages stand above"
    journal.note(name, seconds=round(time.monotonic() - started, 1), **({} if code == 0 else {"failed": failed}))
    return code == 0


def _group(command: list[str], seconds: float) -> int | None:
    """A command's exit code; None where it took too long. Its own children end with it: one that is left over would slow what comes next."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start_preparing(given: argparse.Namespace, models: list[str]) -> dict[str, subprocess.Popen[bytes]]:
    """Weights and artifacts are made on the CPU beside the tests, which are not timed. A rehearsal, on few cores, makes them one after the other."""
    found: dict[str, subprocess.Popen[bytes]] = {}
    for model in models:
        found[model] = subprocess.Popen(_command(given, "--prepare-only", model, threads=PREPARING_THREADS))
        if given.rehearse:
            found[model].wait()
    return found


def _wait_for(preparing: dict[str, subprocess.Popen[bytes]], budget: Budget, journal: Journal) -> set[str]:
    """Wait for artifacts; the models that there are none of."""
    lacking, since = set[str](), time.monotonic()
    for model, process in preparing.items():
        try:
            code = process.wait(min(budget.left, SLACK * PREPARING_SECONDS))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        told = {} if code == 0 else {"failed": f"exit code {code}; its messages stand above"}
        lacking |= {model} if told else set()
        journal.note(f"preparing {model}", waited_s=round(time.monotonic() - since, 1), **told)
    return lacking


def _command(given: argparse.Namespace, *what: str, threads: int | None = None) -> list[str]:
    options = ["--output", str(given.output), "--prepare", str(_prepared(given).parent), "--threads", str(threads or given.threads)]
    options += ["--compiler", given.compiler]
    return [sys.executable, "-m", MODULE, *what, *options, *(["--rehearse"] if given.rehearse else [])]


def _prepared(given: argparse.Namespace) -> Path:
    """Weights and artifacts of a rehearsal are others than those of a card, and lie apart from them."""
    return (given.prepare or given.output / "prepared") / ("small" if given.rehearse else "full")


def _sizes(given: argparse.Namespace) -> Sizes:
    return replace(REHEARSAL if given.rehearse else CARD, compiler=given.compiler)


def _about(given: argparse.Namespace) -> dict[str, Any]:
    """Command, commit, date and device, for whoever reads the rows later."""
    import torch

    device = _sizes(given).device
    command = shlex.join(["python", "-m", MODULE, *sys.argv[1:]])
    return {"command": command, "commit": _commit(), "date": f"{datetime.now(UTC):%Y-%m-%d}", "torch": torch.__version__, **machine(device)}


def _commit() -> str:
    """Of the code that runs: named by DIFFFEAT_COMMIT where the history is not at hand."""
    if named := os.environ.get("DIFFFEAT_COMMIT"):
        return named
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-out"), help=f"folder for {ROWS} and {TEXT}")
    parser.add_argument("--prepare", type=Path, help="folder for weights and artifacts, which are made once; default: below --output")
    parser.add_argument("--budget", type=float, help="seconds for everything; no step is begun that does not fit")
    parser.add_argument("--only", type=_names, default=tuple(STEPS), help=f"steps, separated by commas: {','.join(STEPS)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads, the same for every candidate")
    parser.add_argument("--rehearse", action="store_true", help="the small backbones on the CPU: does every step run?")
    parser.add_argument("--compiler", choices=("inductor", "eager"), default="inductor", help="eager rehearses the calls without compiling")
    parser.add_argument("--step", choices=tuple(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--prepare-only", choices=MODELS, help=argparse.SUPPRESS)
    return parser


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"no step was named; there are {', '.join(STEPS)}")
    if unknown := [name for name in names if name not in STEPS]:
        raise argparse.ArgumentTypeError(f"no step is called {', '.join(unknown)}; there are {', '.join(STEPS)}")
    return names


def main(arguments: list[str] | None = None) -> None:
    """All steps, some of them, or one in this process."""
    given = _parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what runs is ended with us
    given.output, given.prepare = given.output.absolute(), given.prepare and given.prepare.absolute()
    try:
        if given.step:
            run_step(given.step, given)
        elif given.prepare_only:
            import torch

            torch.set_num_threads(given.threads)
            prepare(_prepared(given), _sizes(given), given.prepare_only, lambda message, **_: print(message, file=sys.stderr, flush=True))
        elif run_all(given):
            sys.exit(1)
    except (DifffeatError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped. The rows so far are kept.")
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
