"""What a fitted probe chose, and on which rows: said beside its numbers, which nobody can compare without it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from difffeat.errors import ProbeWarning
from difffeat.probe.base import Probe
from difffeat.probe.logistic import CS, LogisticProbe
from difffeat.probe.ridge import RidgeProbe
from difffeat.probe.selection import Judged
from difffeat.probe.training import TrainedProbe

OPTIMISTIC = (
    "numbers on validation are for choosing: penalty or learning rate (and of several taps the tap) were chosen on these rows, which flatters them"
)
LEAST_EPOCHS = 4
TIES = "of equal ones the smaller block, then the smaller timestep"


def choice_of(probe: Probe) -> dict[str, Any]:
    """What was chosen or given, as plain JSON types: `name` (lr, alpha or c), `value`, `on`, and the mAP on those rows of each of `candidates`."""
    name, value, tried = _parameter(probe)
    maps = [None if np.isnan(one) else float(one) for one in probe.validation_map_]
    return {"name": name, "value": float(value), "on": probe.selected_on_, "candidates": [float(one) for one in tried] if maps else [], "mAP": maps}


def choice_text(choice: Mapping[str, Any]) -> str:
    """`lr 0.01`, and that it was given where it was."""
    return f"{choice['name']} {choice['value']:.3g}{'' if choice['candidates'] else ' (given)'}"


def brief_notes(probe: Probe) -> list[str]:
    """That a training was too short to see how its loss goes on."""
    if not isinstance(probe, TrainedProbe) or probe.epochs >= LEAST_EPOCHS:
        return []
    return [f"{probe.epochs} epoch{'s are' if probe.epochs > 1 else ' is'} too few to see whether the loss is still falling. Raise --epochs."]


def _parameter(probe: Probe) -> tuple[str, float, Sequence[float]]:
    if isinstance(probe, TrainedProbe):
        return "lr", probe.lr_, probe.lrs_
    if isinstance(probe, RidgeProbe):
        return "alpha", probe.alpha_, probe.alphas
    if isinstance(probe, LogisticProbe):
        return "c", probe.c_, CS
    raise TypeError(f"a {type(probe).__name__} chooses nothing")


def is_at_edge(chosen: float, candidates: Sequence[float], maps: Sequence[float]) -> bool:
    """Whether the chosen candidate is the first or last of its grid and better than the one beside it: the grid may end too soon."""
    order = np.argsort(candidates)
    judged = Judged([float(maps[place]) for place in order], [0.0] * len(order), True)
    return judged.at_an_edge(int(np.searchsorted(np.asarray(candidates)[order], chosen)))


def edge_text(taps: Sequence[str]) -> str:
    """What is said of taps, or pairs of them, whose alpha was chosen at an edge of the grid."""
    return f"alpha was chosen at an edge of its grid at {len(taps)} taps ({', '.join(taps[:5])}{', ...' if len(taps) > 5 else ''}): pass a wider one"


@contextmanager
def warnings_kept() -> Iterator[list[str]]:
    """Within, warnings of fits are not printed: a probe keeps its own in `notes_`; scikit-learn's of too few iterations come into the list."""
    from sklearn.exceptions import ConvergenceWarning

    kept: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        warnings.simplefilter("ignore", ProbeWarning)
        yield kept
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            kept.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
