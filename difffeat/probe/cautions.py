"""What a reader of scores must know of the labels they are of: classes that cannot be learned or scored, and numbers of rows that say little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from difffeat.errors import ProbeError

FEW_ROWS = 100
"""With fewer test rows than this, an interval is wider than most differences between taps."""
FEW_POSITIVES = 5
"""The AP of a class with fewer positives than this moves by tens of points with each of them."""
_SHOWN = 5


def require_learnable(labels: np.ndarray, classes: Sequence[str], name: str = "training") -> None:
    """Raises ProbeError where no class tells rows apart: none has both a positive and a negative. `labels` [n, C] of 1, 0, and -1 for unknown."""
    positive, negative = (labels == 1).any(axis=0), (labels == 0).any(axis=0)
    if (positive & negative).any():
        return
    if not positive.any():
        raise ProbeError(f"no class has a positive among the {len(labels)} {name} rows: nothing can be learned. Look at the labels of the source.")
    always = [str(classes[column]) for column in np.flatnonzero(positive).tolist()]
    raise ProbeError(
        f"all {len(labels)} {name} rows have the same labels ({named(always)}), so nothing tells them apart. Add rows without them, or other classes."
    )


def require_distinct_classes(classes: Sequence[str], name: str) -> None:
    """Raises ProbeError where two classes have one name: a column could not be told from the other."""
    names = list(classes)
    if len(set(names)) != len(names):
        twice = sorted({class_ for class_ in names if names.count(class_) > 1})
        raise ProbeError(f"the {name} store has several classes of one name: {named(twice)}. Give each class a name of its own, and extract again.")


def cautions(labels: Mapping[str, np.ndarray], classes: Sequence[str]) -> list[str]:
    """Sentences on what the labels of each part cannot carry. `labels`: train, validation, test -> [n, C] of 1, 0, and -1 for unknown."""
    found = []
    counts = {part: ((own == 1).sum(axis=0), (own == 0).sum(axis=0)) for part, own in labels.items() if len(own)}

    def some(part: str, mask: np.ndarray, sentence: str) -> None:
        if mask.any():
            names = [str(classes[column]) for column in np.flatnonzero(mask).tolist()]
            found.append(sentence.format(n=len(names), classes="class" if len(names) == 1 else "classes", names=named(names), part=part))

    if "train" in counts:
        positives, negatives = counts["train"]
        some("train", positives == 0, "{n} {classes} without a positive in train cannot be learned: {names}")
        some("train", (negatives == 0) & (positives > 0), "{n} {classes} that every training row has cannot be learned: {names}")
    if "validation" in counts:
        positives = counts["validation"][0]
        rows = len(labels["validation"])
        some("validation", positives == 0, "{n} {classes} without a positive in validation took no part in what was chosen: {names}")
        if rows < max(len(classes), FEW_ROWS // 4):
            found.append(f"validation has {rows} rows for {len(classes)} classes: what is chosen on so few is partly chance")
    if "test" in counts:
        positives, negatives = counts["test"]
        rare = (positives > 0) & (positives < FEW_POSITIVES)
        some("test", positives == 0, f"mAP is over {int((positives > 0).sum())} of {len(classes)} classes; none positive in test: {{names}}")
        some("test", (negatives == 0) & (positives > 0), "{n} {classes} that every test row has score 100 whatever the features: {names}")
        some("test", rare, f"{{n}} {{classes}} with fewer than {FEW_POSITIVES} positives in test, whose AP says little: {{names}}")
        if len(labels["test"]) < FEW_ROWS:
            found.append(f"test has {len(labels['test'])} rows: on so few, differences of some points are chance")
    return found


def named(names: Sequence[str]) -> str:
    """Some names, quoted, and how many more there are."""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
