"""`difffeat plan`: hours, disk and memory of an extraction, before it is begun."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from difffeat.engines import Artifact
from difffeat.errors import ConfigError
from difffeat.recipe import RunRecipe
from difffeat.runtime.batch_size import LARGEST
from difffeat.runtime.feeding import Opening
from difffeat.runtime.plan import HIGH, LOW, Plan, make_plan
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.understood import say_understood, understood_dict
from difffeat.workflows.arguments import check_arguments
from difffeat.workflows.commands import default_store, progress_line


def run_plan(
    opening: Opening,
    source: str,
    output: Path | None,
    *,
    run: RunRecipe,
    batch_size: int | None,
    largest_batch: int = LARGEST,
    shard_size: int,
    num_workers: int | None,
    workers: int,
    seconds: float,
    source_options: SourceOptions,
    say: Callable[..., None],
) -> dict[str, Any]:
    """Plan one extraction; arguments as the command's options. Raises what `extract` raises."""
    if workers < 1 or not 0 < seconds < math.inf:
        raise ConfigError(f"--workers must be at least 1 and --seconds above 0, got {workers} and {seconds:g}")
    check_arguments("plan", Path(opening.artifact), source)
    artifact = Artifact.open(opening.artifact)
    listed = open_source(source, source_options)
    say_understood(listed, say)
    out = output or default_store(source, artifact)
    before = _plans(artifact.path)
    with ExitStack() as stack:
        engine, beside = opening.open(stack, say)
        built = sorted(_plans(artifact.path) - before)
        say(f"measuring on {source}, engine {engine.name} on {engine.device}")
        plan = make_plan(
            engine, listed, out, run=run, batch_size=batch_size, largest_batch=largest_batch, shard_size=shard_size, num_workers=num_workers,
            workers=workers, seconds=seconds, progress=progress_line(say), say=say, **beside,
        )  # fmt: skip
        where = f"{engine.name} ({engine.precision}) on {engine.device}"
    return {
        **vars(plan), "hours": plan.hours, "workers_hours": plan.workers_hours, "fits": plan.fits, "engine": where, "store": str(out),
        "engine_builds": len(built), "understood": understood_dict(listed), "text": _text(plan, where, out, built),
    }  # fmt: skip


def _plans(artifact: Path) -> set[str]:
    return {path.name for path in artifact.glob("engines/*.plan")}


def _text(plan: Plan, where: str, out: Path, built: list[str]) -> str:
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in plan.shares.items())
    builds = f"{len(built)} were needed, and are there now" if built else "none needed"
    spread = f"{plan.low:.4g} to {plan.high:.4g} over stretches of the run, {LOW}th to {HIGH}th percentile"
    lines = [
        f"{plan.samples} samples -> {out}: {plan.shards} shards, {plan.disk_bytes / 1e9:.3g} GB on disk ({plan.free_bytes / 1e9:.3g} GB are free)",
        f"  one worker: {_hours(plan.hours)} at {plan.rate:.4g} samples/s ({spread})",
    ]
    if plan.workers > 1:
        lines.append(
            f"  {plan.workers} workers: {_hours(plan.workers_hours)} at {plan.workers_rate:.4g} samples/s, if each has a machine or GPU like this "
            "one to itself and all write to one disk like this one"
        )
    lines += [
        f"  where time goes: {shares}. {plan.advice}",
        f"  peak memory {plan.peak_bytes / 2**30:.2f} GiB (of this process, on the host); engine builds: {builds}",
        f"  measured on {plan.measured} of the samples in {plan.seconds:.1f} s: {where}, batch size {plan.batch_size}, {plan.num_workers} threads "
        "that decode",
    ]
    if plan.quarantined:
        lines.append(f"  {plan.quarantined} of the measured samples would go to quarantine")
    if not plan.fits:
        lines.append(f"  WARNING: the disk lacks {(plan.disk_bytes - plan.free_bytes) / 1e9:.3g} GB; free space, or choose another -o")
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"
