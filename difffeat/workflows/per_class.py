"""AP of each class by name: in text, in the result, and as a CSV file beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.probe.metrics import average_precision
from difffeat.probe.output import write_fresh

WHOLE = 12
"""So many classes are printed whole; of more, the best and the worst."""
ENDS = 5


@dataclass(frozen=True)
class PerClass:
    """How well each class is found. `positives` and `known` int [C] rows that have it, and of which it is known; `ap` system -> float64 [C], NaN
    where no row has it.
    """

    classes: Sequence[str]
    positives: np.ndarray
    known: np.ndarray
    ap: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, labels: Any, scores: Mapping[str, np.ndarray], classes: Sequence[str]) -> PerClass:
        """Of systems' scores [n, C] by name, the system that matters most first; `labels` [n, C] of 1, 0, and -1 for unknown."""
        own = np.asarray(labels)
        found = {name: average_precision(own, value) for name, value in scores.items()}
        return cls(tuple(map(str, classes)), (own == 1).sum(axis=0), ((own == 1) | (own == 0)).sum(axis=0), found)

    def to_list(self) -> list[dict[str, Any]]:
        """Plain JSON types, one entry a class: its AP (None where no row has it), its positives, and its share, which is what chance scores."""
        rows = []
        for column, name in enumerate(self.classes):
            known = int(self.known[column])
            share = int(self.positives[column]) / known if known else None
            ap = {system: None if np.isnan(value[column]) else float(value[column]) for system, value in self.ap.items()}
            rows.append({"class": name, "AP": ap, "positives": int(self.positives[column]), "rows": known, "share": share})
        return rows

    def lines(self) -> list[str]:
        """The first system's AP in percent, the best class first; of many classes the best and the worst."""
        system = next(iter(self.ap))
        values = self.ap[system]
        order = [int(column) for column in np.argsort(-np.nan_to_num(values, nan=-1.0), kind="stable") if not np.isnan(values[column])]
        text = [f"{self.classes[column]} {100 * values[column]:.1f} ({self.positives[column]})" for column in order]
        missing = len(self.classes) - len(order)
        over = f"{len(order)} of {len(self.classes)} classes" if missing else f"{len(order)} classes"
        head = f"  AP of {system} by class (positives in test), over {over}: "
        if len(text) <= WHOLE:
            return [head + ", ".join(text)]
        return [f"{head}best {', '.join(text[:ENDS])}; worst {', '.join(text[-ENDS:])}"]

    def write(self, path: Path) -> Path:
        """A CSV file: class, positives, rows, share, and the AP of each system. Returns where it went."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["class", "positives", "rows", "share", *(f"AP {system}" for system in self.ap)])
        for row in self.to_list():
            writer.writerow([row["class"], row["positives"], row["rows"], row["share"], *row["AP"].values()])
        return write_fresh(path, text.getvalue().encode())
