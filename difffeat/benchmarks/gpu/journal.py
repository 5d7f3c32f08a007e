"""Where the steps write what they measure: a line a row, kept at once, so that a run that is cut off loses nothing."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difffeat.benchmarks.timing import Timing

ROWS, TEXT = "gpu.jsonl", "gpu.txt"
FARTHEST = 0.25
"""A figure farther from its prediction than this is marked."""


@dataclass
class Journal:
    """Rows of one step.

    **Fields:** `folder` that both files lie in; `step` name; `rows` written so far; `started` seconds of the monotonic clock when the step began.
    """

    folder: Path
    step: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def note(self, name: str, **values: Any) -> None:
        """One row, to the file and to the terminal."""
        row = {"step": self.step, "name": name, "after_s": round(time.monotonic() - self.started, 2), **values}
        self.rows.append(row)
        append(self.folder / ROWS, json.dumps(row) + "\n")
        append(self.folder / TEXT, line(row) + "\n")
        print(line(row), flush=True)

    def rate(self, name: str, timing: Timing, batch: int, *, gflop: float = 0.0, ceiling: float = 0.0, **values: Any) -> None:
        """A row of a timing, in µs a sample: median, quartiles, how many runs; work done and its share of the ceiling (FLOP/s) where given."""
        per = 1e6 / batch
        low, high = timing.spread
        found: dict[str, Any] = {
            "us_a_sample": timing.median * per,
            "quartiles_us": [low * per, high * per],
            "n": len(timing.seconds),
            "batch": batch,
        }
        found["samples_a_second"] = batch / timing.median
        if gflop:
            found["tflops"] = gflop * batch / timing.median / 1e3
            if ceiling:
                found["share_of_ceiling"] = found["tflops"] * 1e12 / ceiling
        self.note(name, **found, **values)

    def text(self, text: str) -> None:
        """A table that is made elsewhere, and lines of other programs."""
        append(self.folder / TEXT, text + "\n")
        print(text, flush=True)


def line(row: dict[str, Any]) -> str:
    """A row as people read it."""
    head = f"{row['after_s']:7.1f} s  {row['step']:9} {row['name']:58}"
    if "us_a_sample" not in row:
        rest = {key: value for key, value in row.items() if key not in ("step", "name", "after_s")}
        return head + "  ".join(f"{key} {_short(value)}" for key, value in rest.items())
    low, high = row["quartiles_us"]
    parts = [f"{row['us_a_sample']:10.1f} µs [{low:.1f}, {high:.1f}] n {row['n']}", f"{row['samples_a_second']:10.1f}/s"]
    if "tflops" in row:
        share = f" {row['share_of_ceiling']:6.1%} of the ceiling" if "share_of_ceiling" in row else ""
        parts.append(f"{row['tflops']:7.1f} TFLOP/s{share}")
    if "relative_l2" in row:
        parts.append(f"L2 {row['relative_l2']:.1e}")
    if "predicted_us" in row:
        off = row["us_a_sample"] / row["predicted_us"] - 1
        parts.append(f"predicted {row['predicted_us']:g} ({off:+.0%}{', a miss' if abs(off) > FARTHEST else ''})")
    return head + "  ".join(parts)


def append(path: Path, text: str) -> None:
    """At the end of a file, flushed to the disk: the machine may be taken away at any moment."""
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
