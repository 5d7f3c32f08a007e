"""AP of each class by name, bounded in text and whole in files."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from difffeat.probe.metrics import average_precision
from difffeat.workflows.per_class import PerClass


def test_many_classes_are_shown_from_both_ends_and_written_whole(tmp_path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (80, 20))
    labels[:, 7] = 0
    labels[:10, 3] = -1
    scores = {"fusion": rng.normal(size=(80, 20)), "image": rng.normal(size=(80, 20))}
    names = [f"class, {column}" for column in range(20)]
    table = PerClass.of(labels, scores, names)
    (line,) = table.lines()
    assert line.startswith("  AP of fusion by class (positives in test), over 19 of 20 classes: best class, ")
    assert line.count("(") == 11
    rows = list(csv.DictReader(table.write(tmp_path / "per-class.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == names
    assert rows[7]["AP fusion"] == rows[7]["AP image"] == ""
    assert rows[3]["rows"] == "70"
    assert float(rows[0]["AP image"]) == pytest.approx(average_precision(labels, scores["image"])[0])
    assert [entry["positives"] for entry in table.to_list()] == (labels == 1).sum(axis=0).tolist()
    assert table.write(tmp_path / "per-class.csv").name == "per-class-2.csv"
