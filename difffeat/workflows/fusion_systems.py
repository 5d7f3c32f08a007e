"""What a fusion is compared with: image alone, text alone and both, by one method at a time, each with its own learning rate or penalty.

A difference between two methods says nothing of fusion: on 2 000 rows 280 steps of Adam lose more to a tuned ridge than a modality brings. So every
difference here is of two systems of one method, each tuned on the same validation rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from difffeat.errors import ConfigError
from difffeat.probe.base import Probe
from difffeat.probe.bootstrap import bootstrap_interval, paired_bootstrap
from difffeat.probe.choices import brief_notes, choice_of, choice_text, warnings_kept
from difffeat.probe.factory import make_probe
from difffeat.probe.fusion import KINDS, FusionProbe
from difffeat.workflows.pairs import Split
from difffeat.workflows.probe_options import ProbeOptions, methods_asked
from difffeat.workflows.probe_stores import interval_text

NAMES = {"adam": "Adam", "ridge": "ridge", "logistic": "logistic"}
WIDEST = 28
"""Characters of the longest system's name, for a table."""


@dataclass(frozen=True)
class Asked:
    """What is to be compared. **Fields:** `methods`; `kind` of the first method's fusion, which is saved; `width` of `add`."""

    methods: tuple[str, ...]
    kind: str
    width: int
    seed: int
    options: ProbeOptions

    @classmethod
    def checked(cls, method: str, fusion: str | None, width: int, seed: int, options: ProbeOptions) -> Asked:
        """From options as they were typed. Raises ConfigError or NotYetAvailable for what makes no sense, before a store is opened."""
        methods = methods_asked(method)
        options.require(methods)
        kind = fusion or KINDS[0 if methods[0] == "adam" else 1]
        FusionProbe(kind=kind, width=width, seed=seed)
        if kind == "add" and methods[0] != "adam":
            raise ConfigError(
                f"--fusion add is trained by adam; --method {method} begins with {methods[0]}, whose fusion is concat. Put adam first, or pass "
                "--fusion concat."
            )
        asked = cls(methods, kind, width, seed, options)
        for one in methods:
            make_probe(one, **asked.settings(one))
        return asked

    def settings(self, method: str) -> dict[str, Any]:
        """The constructor's arguments of a method's probes."""
        return {"seed": self.seed, **self.options.settings(method)}

    @property
    def saved(self) -> str:
        """The name of the system that is saved."""
        return system_name(f"fusion by {self.kind}", self.methods[0])


@dataclass(frozen=True)
class System:
    """A fitted classifier of one method on image, text or both, and its scores [n, C] of the test rows."""

    inputs: str
    method: str
    probe: Probe
    scores: np.ndarray

    @property
    def name(self) -> str:
        """As it stands in tables and JSON, such as `image (ridge)`."""
        return system_name(self.inputs, self.method)


def system_name(inputs: str, method: str) -> str:
    """`image (ridge)`."""
    return f"{inputs} ({NAMES[method]})"


def fit_systems(splits: Mapping[str, Split], taps: tuple[str, str], asked: Asked) -> tuple[dict[str, System], list[str]]:
    """Every method's image, text and fusions by name, fitted on train, tuned on validation and scored on test; what scikit-learn warned of."""
    train, held, test = (splits[name] for name in ("train", "validation", "test"))
    features = {
        "image": [split.image(taps[0]) for split in (train, held, test)],
        "text": [split.text(taps[1]) for split in (train, held, test)],
        "both": [split.pair(*taps) for split in (train, held, test)],
    }
    classes, found = train.joined.classes, dict[str, System]()
    with warnings_kept() as kept:
        for method in asked.methods:
            for inputs, probe in _unfitted(method, asked).items():
                x, v, y = features[inputs if inputs in features else "both"]
                probe.fit(x, train.labels, classes=classes, validation=(v, held.labels))
                system = System(inputs, method, probe, probe.decision_function(y))
                found[system.name] = system
    return found, list(dict.fromkeys(kept))


def _unfitted(method: str, asked: Asked) -> dict[str, Any]:
    settings = asked.settings(method)
    alone = {inputs: make_probe(method, **settings) for inputs in ("image", "text")}
    if method != "adam":
        return {**alone, "fusion by concat": make_probe(method, **settings)}
    return {**alone, **{f"fusion by {kind}": FusionProbe(kind=kind, width=asked.width, **settings) for kind in KINDS}}


def compared(systems: Mapping[str, System], labels: np.ndarray, classes: Sequence[str], seed: int) -> dict[str, Any]:
    """Intervals of every system and, within each method, of what each fusion gains over image and text alone, and concat over add."""

    def rng() -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(seed))

    intervals = {name: bootstrap_interval(labels, system.scores, rng=rng(), classes=classes).to_dict() for name, system in systems.items()}
    differences = []
    for first, second in _pairs(systems):
        found = paired_bootstrap(labels, first.scores, second.scores, rng=rng()).to_dict()
        differences.append({"method": first.method, "of": first.inputs, "less": second.inputs, **found})
    chosen = {name: {"method": system.method, **choice_of(system.probe)} for name, system in systems.items()}
    return {"mAP": intervals, "differences": differences, "chosen": chosen}


def _pairs(systems: Mapping[str, System]) -> list[tuple[System, System]]:
    """What is subtracted from what: always two systems of one method."""
    pairs = [("fusion by add", "image"), ("fusion by add", "text"), ("fusion by concat", "image"), ("fusion by concat", "text")]
    pairs.append(("fusion by concat", "fusion by add"))
    methods = dict.fromkeys(system.method for system in systems.values())
    named = [(systems.get(system_name(a, method)), systems.get(system_name(b, method))) for method in methods for a, b in pairs]
    return [(first, second) for first, second in named if first is not None and second is not None]


def table(result: Mapping[str, Any]) -> list[str]:
    """Systems and differences as aligned text."""
    lines = ["each with its own learning rate or penalty, chosen on validation where it was not given:"]
    for name, interval in result["mAP"].items():
        lines.append(f"  {name + ':':{WIDEST}} test mAP {interval_text(interval)}   {choice_text(result['chosen'][name])}")
    lines.append("differences, each of two by one method on the same samples:")
    for value in result["differences"]:
        alone = " alone" if value["less"] in ("image", "text") else ""
        name = f"{value['of']} less {value['less']}{alone} ({NAMES[value['method']]}):"
        lines.append(f"  {name:{2 * WIDEST - 6}} {interval_text(value, 'difference')}")
    return lines


def notes_of(systems: Mapping[str, System], intervals: Mapping[str, Any], kept: Sequence[str]) -> list[str]:
    """What each fit and interval says of itself; the same words of several once."""
    by_note: dict[str, list[str]] = {}
    for name, system in systems.items():
        for note in (*system.probe.notes_, *brief_notes(system.probe), *intervals[name]["notes"]):
            by_note.setdefault(note, []).append(name)
    return [f"{note} ({', '.join(names) if len(names) < len(systems) else 'all'})" for note, names in by_note.items()] + list(kept)
