"""What labels cannot carry is named, class by class."""

from __future__ import annotations

import numpy as np
import pytest

from difffeat.errors import ProbeError
from difffeat.probe.cautions import cautions, named, require_distinct_classes, require_learnable

CLASSES = ("cat", "dog", "emu")


def test_classes_that_cannot_be_learned_or_scored_are_named() -> None:
    train = np.array([[1, 0, 1]] * 50 + [[0, 0, 1]] * 50)
    test = np.array([[1, 0, 1]] * 3 + [[0, 0, 1]] * 7)
    found = cautions({"train": train, "validation": train[:5], "test": test}, CLASSES)
    assert found == [
        "1 class without a positive in train cannot be learned: 'dog'",
        "1 class that every training row has cannot be learned: 'emu'",
        "1 class without a positive in validation took no part in what was chosen: 'dog'",
        "validation has 5 rows for 3 classes: what is chosen on so few is partly chance",
        "mAP is over 2 of 3 classes; none positive in test: 'dog'",
        "1 class that every test row has score 100 whatever the features: 'emu'",
        "1 class with fewer than 5 positives in test, whose AP says little: 'cat'",
        "test has 10 rows: on so few, differences of some points are chance",
    ]
    plenty = np.tile(np.eye(3, dtype=int), (60, 1))
    assert cautions({"train": plenty, "validation": plenty, "test": plenty}, CLASSES) == []


def test_unknown_cells_are_neither_positive_nor_negative() -> None:
    labels = np.array([[1, -1, 0]] * 60 + [[0, -1, 1]] * 60)
    assert cautions({"train": labels}, CLASSES) == ["1 class without a positive in train cannot be learned: 'dog'"]
    with pytest.raises(ProbeError, match=r"all 2 training rows have the same labels \('cat'\)"):
        require_learnable(np.array([[1, -1], [1, -1]]), CLASSES)
    with pytest.raises(ProbeError, match="no class has a positive among the 2 training rows"):
        require_learnable(np.array([[0, -1], [-1, -1]]), CLASSES)
    require_learnable(np.array([[1, -1], [0, -1]]), CLASSES)


def test_names_are_cut_and_doubles_refused() -> None:
    assert named(list("abcdefg")) == "'a', 'b', 'c', 'd', 'e' and 2 more"
    with pytest.raises(ProbeError, match="the test store has several classes of one name: 'cat'"):
        require_distinct_classes(("cat", "dog", "cat"), "test")
