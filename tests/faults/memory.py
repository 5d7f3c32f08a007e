"""Ten thousand batches take no more memory than the first thousand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from difffeat.runtime.blobs import FileBlob
from difffeat.runtime.extract import Progress, extract
from difffeat.runtime.samples import Sample, Source
from tests.faults.forks import in_child
from tests.faults.outcome import Outcome, Size, outcome
from tests.faults.scenarios import ENGINES, make_source

BATCHES = {"short": (300, 1_200), "long": (1_000, 10_000)}
"""When memory is looked at first, and last."""
BOUND = {"short": 3.0, "long": 6.0}
"""MiB that may be added in between. A leak of one batch's inputs (two images of 8 × 8 pixels, their noise) would add 4 MiB in 9 000 batches; of what
libraries hold per call, far more."""
BATCH = 2


def campaign(size: Size, work: Path) -> Iterator[Outcome]:
    """Resident memory of a process that extracts, batch after batch."""
    source = make_source(work / "source", 8)
    for kind in ENGINES:
        early, late = BATCHES[size]
        with outcome(f"memory over {late} batches, {kind}") as found:
            ended = in_child(lambda kind=kind, late=late: _extract(kind, source, work / kind, late))
            found.points = late
            found.expect(not ended.error, f"{ended.error}: {ended.message}")
            if ended.value is not None:
                seen: dict[int, float] = ended.value
                found.reached = max(seen)
                before, after = seen[early], seen[late]
                found.expect(after - before < BOUND[size], f"{before:.1f} MiB after {early} batches, {after:.1f} MiB after {late}")
                found.note = f"{before:.1f} MiB after {early} batches, {after:.1f} MiB after {late}"
        yield found


def _extract(kind: str, source: Path, out: Path, batches: int) -> dict[int, float]:
    """Resident MiB by the number of batches done."""
    images = [FileBlob(str(source), f"{index:02d}.png") for index in (0, 1, 2, 4, 5, 6, 7)]
    samples = tuple(Sample(f"{index:06d}", images[index % 7], f"{index}", ("two the " * (1 + index % 3),)) for index in range(batches * BATCH))
    seen: dict[int, float] = {}
    extract(
        ENGINES[kind](),
        Source("made", samples),
        out,
        batch_size=BATCH,
        shard_size=64,
        num_workers=2,
        tokenizer=source.parent / "tokenizer.json",
        progress=_watch(seen),
    )
    return seen


def _watch(seen: dict[int, float]) -> Callable[[Progress], None]:
    def look(state: Progress) -> None:
        if state.done % (100 * BATCH) == 0:
            seen[state.done // BATCH] = resident()

    return look


def resident() -> float:
    """Resident memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
