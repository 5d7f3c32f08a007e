"""What of a store is done: which pieces are left to compute, what has come of them, and when there are too many bad samples."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from difffeat.errors import StoreIncomplete, StoreMismatch, TooManyBadSamples
from difffeat.runtime.job import Event, Piece
from difffeat.runtime.manifest import Receipt
from difffeat.runtime.origin import extract_commands, readable_origin
from difffeat.runtime.progress import FIRST_IDS, Clock, Summary
from difffeat.runtime.samples import Sample, Source
from difffeat.runtime.table import renamed
from difffeat.runtime.understood import understood_dict
from difffeat.runtime.witness import require_same_images, same_under_other_ids
from difffeat.runtime.writer import StoreWriter

FIRST_SHARDS = 5
"""Missing shards that an error names."""


class Ledger:
    """Accounts of one run.

    **Arguments:** `writer` open; `samples` of the source; `retry` whether quarantined rows are run again.

    Raises StoreMismatch where an image is another one than its row was computed from, or is added under a second id, TooManyBadSamples where that
    is known already.
    """

    def __init__(self, writer: StoreWriter, samples: Sequence[Sample], clock: Clock, *, retry: bool, max_bad_fraction: float) -> None:
        self._writer, self._samples, self._retry, self._max_bad_fraction = writer, samples, retry, max_bad_fraction
        self.clock = clock
        self._receipts: dict[int, Receipt] = {}
        self._rows: dict[int, np.ndarray] = {}
        self._beyond: list[int] = []
        self._retried = self._still_bad = 0
        for number in range(len(writer.manifest.shards)):
            self._look_up(number)
        require_same_images(writer.path, writer.manifest, self.receipts, samples, writer.match.places)
        self._require_new_images()
        self._require_few_bad()

    def _look_up(self, number: int) -> None:
        """What is to be done about a shard: all of it, its quarantined rows, or nothing. Counts what is done."""
        manifest, places = self._writer.manifest, self._writer.match.places
        first, rows = manifest.first_rows[number], np.arange(manifest.shards[number])
        receipt = self._writer.shards.receipt(number)
        if receipt is None:
            if any(place is None for place in places[first : first + len(rows)]):
                self._beyond.append(number)
            else:
                self._rows[number] = rows
            return
        self._receipts[number] = receipt
        bad = [entry["row"] - first for entry in receipt.quarantined if self._retry and places[entry["row"]] is not None]
        if bad:
            self._rows[number] = np.array(bad)
        self._retried += len(bad)
        self.clock.before += receipt.rows - len(bad)
        self.clock.done = self.clock.before
        self.clock.bad += len(receipt.quarantined) - len(bad)

    def pieces(self) -> Iterator[Piece]:
        """What is left to compute, shard by shard."""
        for number, rows in self._rows.items():
            first = self._writer.manifest.first_rows[number]
            places = [self._writer.match.places[first + int(row)] for row in rows]
            yield Piece(number, first, rows, [self._samples[place] for place in places if place is not None], self._receipts.get(number))

    def take(self, event: Event) -> None:
        """Count what has been done. Raises TooManyBadSamples."""
        if event.receipt is not None:
            bad = event.still_bad if self._retry and event.receipt.shard in self._receipts else len(event.receipt.quarantined)
            self._receipts[event.receipt.shard] = event.receipt
            self._still_bad += event.still_bad
            self.clock.bad += bad
        if event.rows:
            self.clock.tick(event.rows)
        self._require_few_bad()

    @property
    def receipts(self) -> list[Receipt]:
        """Of the shards that are done, in order."""
        return [receipt for _, receipt in sorted(self._receipts.items())]

    def summary(self, source: Source, *, device: str, workers: int, executor: str = "local") -> Summary:
        """What came of the run."""
        clock, manifest, computed = self.clock, self._writer.manifest, len(self._rows)
        return Summary(
            path=self._writer.path,
            rows=manifest.rows,
            quarantined=sum(len(receipt.quarantined) for receipt in self.receipts),
            computed=computed,
            skipped=len(manifest.shards) - computed - len(self._beyond),
            samples=clock.done - clock.before,
            seconds=time.perf_counter() - clock.started,
            stages=clock.stages,
            waiting={stage: clock.waiting[stage] for stage in clock.stages},
            ignored=dict(source.ignored),
            added=self._writer.added,
            healed=self._retried - self._still_bad,
            retried=self._retried if self._retry else None,
            missing=tuple(self._beyond),
            batch_size=manifest.batch_size,
            workers=workers,
            device=device,
            executor=executor,
            reasons=_reasons(self.receipts),
            remarks=clock.remarks,
            understood=understood_dict(source),
            tokens=clock.tokens,
            unknown=clock.unknown,
        )

    def _require_new_images(self) -> None:
        """Raises StoreMismatch where what is to be added is there already under other ids."""
        writer, match = self._writer, self._writer.match
        pairs = renamed(match.columns, writer.manifest.rows - writer.added, match.places) if writer.added else []
        if pairs and same_under_other_ids(writer.path, writer.manifest, self.receipts, self._samples, match.places, pairs):
            (row, new), ids = pairs[0], match.columns["id"]
            raise StoreMismatch(
                f"{writer.path}: {len(pairs)} images are already there under other ids: {ids[row]!r} is now {ids[new]!r}. Adding them would double "
                "their rows. List them with the --id-column they were listed with, or add the new files alone."
            )

    def require_whole(self) -> None:
        """Raises StoreIncomplete, with what to type next, where shards are missing whose samples the source does not hold."""
        if not self._beyond:
            return
        store, manifest = self._writer.path, self._writer.manifest
        commands = extract_commands(store, manifest, readable_origin(store), self._beyond)
        numbers = ", ".join(map(str, self._beyond[:FIRST_SHARDS])) + (" ..." if len(self._beyond) > FIRST_SHARDS else "")
        lacking, whose = ("shard", "its") if len(self._beyond) == 1 else ("shards", "their")
        raise StoreIncomplete(
            f"{store} lacks {lacking} {numbers}, and the source does not hold all of {whose} samples; what it holds is done. "
            f"Next: {'; '.join(commands)}"
        )

    def _require_few_bad(self) -> None:
        total, bad = self._writer.manifest.rows, self.clock.bad
        if bad > math.floor(self._max_bad_fraction * total + 1e-9) or bad == total:  # 0.29 of 100 are 29, whatever their product is in binary
            raise TooManyBadSamples(
                f"{bad} of {total} samples are in quarantine, more than --max-bad-fraction {self._max_bad_fraction:g} allows. The receipts in "
                f"{self._writer.path / 'receipts'} say why each; mend the source and pass --overwrite, or raise the limit and run again to go on."
            )


def _reasons(receipts: Sequence[Receipt]) -> dict[str, dict[str, Any]]:
    """Quarantined samples by stage and error: how many, and the first ids."""
    found: dict[str, dict[str, Any]] = {}
    for entry in (entry for receipt in receipts for entry in receipt.quarantined):
        reason = found.setdefault(f"{entry['stage']}: {entry['error']}", {"samples": 0, "first_ids": [], "example": entry["message"]})
        reason["samples"] += 1
        if len(reason["first_ids"]) < FIRST_IDS:
            reason["first_ids"].append(entry["id"])
    return found
