"""What was understood of a source: which rows and classes there are, where each came from, what was passed over and why. Made by readers, said
here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from difffeat.runtime.blobs import UnreadableBlob

if TYPE_CHECKING:
    from difffeat.runtime.samples import Source

COUNTS = ("with_image", "with_caption", "captions", "labelled", "with_unknown_classes", "unreadable")
FIRST = 8
"""How many names of classes, columns or suffixes a sentence holds before it counts the others."""


@dataclass(frozen=True, kw_only=True)
class Understood:
    """What a reader took from where, each a phrase that can follow its name: `ids: the column 'id'`.

    **Fields:** `form` what the source is; `ids`, `labels`, `captions` where each comes from, or `none` and why; `classes` what names the classes and
    gives their order; `unread` columns that nobody asked for.
    """

    form: str = "a source"
    ids: str = "as given"
    labels: str = "none"
    classes: str = ""
    captions: str = "none"
    unread: tuple[str, ...] = ()


def understood_dict(source: Source) -> dict[str, Any]:
    """Plain JSON types: counts of the rows and of what they hold, classes, and where everything comes from."""
    known, samples = source.understood, source.samples
    rows = Counter[str]()
    positives = Counter[str]()
    for sample in samples:
        rows["unreadable"] += isinstance(sample.image, UnreadableBlob)
        rows["with_image"] += sample.image is not None and not isinstance(sample.image, UnreadableBlob)
        rows["with_caption"] += bool(sample.captions)
        rows["captions"] += len(sample.captions)
        rows["labelled"] += sample.labels is not None
        rows["with_unknown_classes"] += bool(sample.unknown)
        positives.update(sample.labels or ())
    empty = [name for name in source.classes if not positives[name]]
    return {
        "source": source.name,
        "form": known.form,
        "rows": {"all": len(samples)} | {name: rows[name] for name in COUNTS},
        "classes": {
            "count": len(source.classes), "first": list(source.classes[:FIRST]), "without_a_row": len(empty), "first_without_a_row": empty[:FIRST],
        },
        "from": {"ids": known.ids, "labels": known.labels, "classes": known.classes, "captions": known.captions},
        "first_ids": [sample.id for sample in samples[:3]],
        "columns_not_read": list(known.unread),
        "passed_over": dict(source.ignored),
        "notes": list(source.notes),
    }  # fmt: skip


def say_understood(source: Source, say: Callable[..., None]) -> None:
    """Print what was understood of a source, before anything is done with it."""
    for line in lines_of(understood_dict(source)):
        say(line)


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """Lines of what `understood_dict` made, as it may have been read again from a summary."""
    rows, classes, origin = found["rows"], found["classes"], found["from"]
    lines = [f"{found['source']}: {rows['all']} rows, read as {found['form']}", f"  ids: {origin['ids']} (first {', '.join(found['first_ids'])})"]
    if classes["count"]:
        line = f"  classes: {classes['count']} ({_listed(classes['first'], classes['count'])})"
        if origin["classes"]:
            line += f", named by {origin['classes']}"
        if classes["without_a_row"]:
            line += f"; {classes['without_a_row']} of them have no row: {_listed(classes['first_without_a_row'], classes['without_a_row'])}"
        lines.append(line)
    counts = [f"{rows['labelled']} of {rows['all']} rows are labelled"] if classes["count"] or rows["labelled"] else []
    if rows["with_unknown_classes"]:
        counts.append(f"of {rows['with_unknown_classes']} rows some classes are unknown")
    lines.append(f"  labels: {'; '.join((origin['labels'], *counts))}")
    several = f"; {rows['captions']} in {rows['with_caption']} of {rows['all']} rows" if rows["captions"] else ""
    lines.append(f"  captions: {origin['captions']}{several}")
    if found["columns_not_read"]:
        lines.append(f"  columns that are not read: {_listed(found['columns_not_read'], len(found['columns_not_read']))}")
    if found["passed_over"]:
        lines.append(f"  passed over: {passed_over(found['passed_over'])}")
    return [*lines, *(f"  note: {note}" for note in found["notes"])]


def passed_over(ignored: Mapping[str, int]) -> str:
    """Counts of files by suffix, the most frequent first, the rare ones together."""
    ordered = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{count} × {suffix or 'no suffix'}" for suffix, count in ordered[:FIRST]]
    if len(ordered) > FIRST:
        told.append(f"{sum(count for _, count in ordered[FIRST:])} of {len(ordered) - FIRST} other kinds")
    return ", ".join(told)


def _listed(names: list[str] | tuple[str, ...], count: int) -> str:
    shown = [name if len(name) <= 60 else f"{name[:60]} ..." for name in names[:FIRST]]
    return ", ".join(shown) + (" ..." if count > len(shown) else "")
