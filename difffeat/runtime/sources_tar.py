"""Tar shards as WebDataset and img2dataset write them: listed by their headers, read in place. Nothing is unpacked, so no name can do harm."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from difffeat.errors import DuplicateSample, SampleError, SourceFormatError
from difffeat.runtime.blobs import SliceBlob
from difffeat.runtime.places import open_place, path_of
from difffeat.runtime.remote import is_url
from difffeat.runtime.samples import IMAGE_SUFFIXES, Sample, Source, broken_notes, broken_sample, multi_hot_classes
from difffeat.runtime.sources_columns import Columns, named_value, read_captions
from difffeat.runtime.sources_labels import LabelReader, label_notes
from difffeat.runtime.sources_manifest import LOOKED_AT
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.sources_values import is_blank
from difffeat.runtime.understood import Understood

PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
IMAGES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
TEXTS = ("txt", "json", "cls")
SHARD_IDS = {"shard/key": 1, "folder/shard/key": 2}
"""Values of `id_column` that name no column, and how many parts of the shard's path stand before the key."""
MAX_TEXT = 1 << 20
"""Largest caption, JSON or class member, in bytes."""
MAX_HEADER = 1 << 20
"""Most bytes that the tar library may ask for at once: names and extended headers, never bodies."""
SECOND = "second images and texts of a key"
"""What members are counted under whose key has others without a second dot: `0001.seg.png` beside `0001.png`."""


def read_tars(places: Sequence[str], options: SourceOptions, name: str) -> Source:
    """Samples of tar shards, in the order of the shards and of the members in each.

    Members belong together by their key: the folder and the file name up to its first dot, or, where no member of that key has a single suffix, up to
    the last (`IMG.2023-05-01.png`). `.jpg`, `.png`, `.webp` ... is the image, `.txt` the
    captions, one a line, `.json` captions and labels under the names of the columns (captions, caption; labels, label, cls), `.cls` a class number or
    name. Of captions in `.txt` and `.json`, and labels in `.cls` and `.json`, the first that hold something are taken. Other members are passed over
    and counted.

    The id is the key; where `id_column` is given, what the `.json` holds there, or, for `shard/key` and `folder/shard/key`, the key behind the name
    of its shard. An id never depends on which other shards are listed: a sample that was added twice would be another one each time.

    Listing reads every header: for shards behind URLs about a request a member, if images are larger than 256 KiB, so keep large sets near.

    Raises SourceFormatError for a shard that is compressed or damaged, DuplicateSample where the ids of two samples would be the same.
    """
    columns = Columns.of(options)
    ignored: Counter[str] = Counter()
    entries = [entry for place in places for entry in _entries(place, columns, ignored)]
    labels = (
        LabelReader(columns.vector, multi_hot=True, named="the columns' names", columns=True)
        if columns.vector
        else LabelReader(options.class_names(), multi_hot=options.multi_hot, named=options.classes_named())
    )
    labels.look([entry.label for entry in entries[:LOOKED_AT]], name)
    parts = SHARD_IDS.get(columns.id[0], 0)
    _require_distinct(entries, parts, name)
    samples = tuple(_sample(entry, parts, labels) for entry in entries)
    classes = (labels.classes or multi_hot_classes(samples)) if any(sample.labels is not None for sample in samples) else ()
    notes = (*broken_notes(samples), *_dotted_notes(entries), *label_notes([labels], classes, name))
    return Source(name, samples, classes, +ignored, notes, _understood(places, columns, entries, labels))


def _understood(places: Sequence[str], columns: Columns, entries: Sequence[_Entry], labels: LabelReader) -> Understood:
    own = any(entry.identity is not None for entry in entries)
    key = {0: "keys of the members", 1: "shard and key", 2: "folder, shard and key"}[SHARD_IDS.get(columns.id[0], 0)]
    sources = {entry.label_from for entry in entries if entry.label_from}
    texts = {entry.captions_from for entry in entries if entry.captions}
    return Understood(
        form=f"{len(places)} tar shard{'s' if len(places) > 1 else ''}",
        ids=f"{columns.id[0]!r} in the .json members" if own else key,
        labels=(" or ".join(sorted(sources)) or "none (no .cls, no labels in .json)") + (f", as {labels.form}" if labels.form and sources else ""),
        classes=labels.named or "the labels as they are written, sorted",
        captions=" or ".join(sorted(texts)) or "none (no .txt, no captions in .json)",
    )


def _dotted_notes(entries: Sequence[_Entry]) -> tuple[str, ...]:
    dotted = [entry for entry in entries if entry.short is not None]
    if not dotted:
        return ()
    return (f"{len(dotted)} keys hold dots, since no member of what stands before the first dot has a single suffix; the first is {dotted[0].key}",)


@dataclass(slots=True)
class _Entry:
    """What a shard holds under one key."""

    place: str
    key: str
    members: int = 0
    image: SliceBlob | None = None
    member: str | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    label: Any = None
    identity: str | None = None
    problem: str | None = None
    caption_problem: str | None = None
    captions_from: str = ""
    label_from: str = ""
    short: str | None = None
    """The key up to its first dot, where this one goes up to the last."""


def _entries(place: str, columns: Columns, ignored: Counter[str]) -> Iterator[_Entry]:
    """The entries of one shard. Raises SourceFormatError."""
    found: dict[str, _Entry] = {}
    last = "its start"
    try:
        with open_place(place) as file:
            _refuse_packed(place, file)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
                while (member := tar.next()) is not None:
                    tar.members = []  # or it would remember them all
                    if member.size < 0 or (member.isreg() and member.offset_data + member.size > size):
                        raise SourceFormatError(f"{place} is cut off or damaged within {member.name!r}. Get it again.")
                    if not member.isdir():
                        _take(found, place, member, file, ignored)
                    last = repr(member.name)
                _require_end(place, file, tar.offset, last)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise SourceFormatError(f"{place} is no readable tar after {last} ({error}). Get it again.") from None
    except OSError as error:
        raise SourceFormatError(f"{place} cannot be read ({error.strerror or error}).") from None
    for entry in found.values():
        if entry.short is not None and entry.short in found:
            ignored[SECOND] += entry.members
            continue
        _interpret(entry, columns)
        yield entry


def _refuse_packed(place: str, file: Any) -> None:
    head = file.read(6)
    if head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head == b"\xfd7zXZ\x00" or head[:4] == b"\x28\xb5\x2f\xfd":
        raise SourceFormatError(
            f"{place} is compressed: its members cannot be read where they lie, and images hardly shrink. Unpack the compression alone, "
            "for example: gunzip shard.tar.gz"
        )


def _require_end(place: str, file: Any, offset: int, last: str) -> None:
    """The tar library ends quietly at the first header that it cannot read; only zeros are an end. Raises SourceFormatError."""
    file.seek(offset)
    rest = file.read(MAX_HEADER)
    if not rest:
        raise SourceFormatError(f"{place} lacks its end mark after {last}: it is cut off. Get it again, or pack it anew.")
    if rest[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise SourceFormatError(f"{place} has a damaged header after {last}. Get it again.")
    if rest.strip(b"\0"):
        raise SourceFormatError(
            f"{place} goes on after its end mark, which follows {last}: two tars were joined. Pack them as one, or keep them apart."
        )


class _Headers:
    """The shard, as far as the tar library may read it: a header that asks for an absurd length is refused before memory is."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= MAX_HEADER:
            raise tarfile.ReadError(f"a header claims {count} bytes")
        return self._file.read(count)


def _take(found: dict[str, _Entry], place: str, member: tarfile.TarInfo, file: Any, ignored: Counter[str]) -> None:
    folder, _, base = member.name.removeprefix("./").rpartition("/")
    stem, dot, kind = base.partition(".")
    kind, last = kind.lower(), os.path.splitext(base.lower())[1]
    if not stem or not dot or last[1:] not in (*IMAGES, *TEXTS):
        ignored[last] += 1
        return
    short = f"{folder}/{stem}" if folder else stem
    dotted = kind != last[1:]
    key, kind = (f"{short}.{os.path.splitext(base)[0].partition('.')[2]}", last[1:]) if dotted else (short, kind)
    entry = found.setdefault(key, _Entry(place, key, short=short if dotted else None))
    entry.members += 1
    if not member.isreg() or member.issparse():
        entry.problem = f"{member.name!r} is no regular member ({'sparse' if member.issparse() else 'a link or device'}). Pack the file itself."
    elif kind in IMAGES:
        if entry.image is not None:
            entry.problem = f"{place} holds two images of this key: {entry.member!r} and {member.name!r}. Keep one."
        entry.image, entry.member = SliceBlob(place, member.offset_data, member.size), member.name
    elif kind in entry.texts:
        entry.problem = f"{place} holds {member.name!r} twice. Keep one."
    elif member.size > MAX_TEXT:
        entry.problem = f"{member.name!r} has {member.size} bytes, more than the limit of {MAX_TEXT}."
    else:
        back = file.tell()
        file.seek(member.offset_data)
        entry.texts[kind] = file.read(member.size)
        file.seek(back)


def _interpret(entry: _Entry, columns: Columns) -> None:
    """Captions, label and id out of the text members, which are dropped then."""
    texts, entry.texts = entry.texts, {}
    if "json" in texts:
        _interpret_json(entry, texts["json"], columns)
    if "txt" in texts:
        text, problem = _decoded(texts["txt"], "txt")
        if captions := tuple(line.strip() for line in text.splitlines() if line.strip()):
            entry.captions, entry.caption_problem, entry.captions_from = captions, None, ".txt"
        entry.caption_problem = problem or entry.caption_problem
    if "cls" in texts and not columns.vector:
        text, problem = _decoded(texts["cls"], "cls")
        if text.strip() or entry.label is None:
            entry.label, entry.label_from = text.strip(), ".cls"
        entry.problem = entry.problem or problem
    if entry.identity is None and columns.id[0] in columns.asked and columns.id[0] not in SHARD_IDS:
        entry.problem = entry.problem or f"its .json has no {columns.id[0]!r}, the id that was asked for."
        entry.identity = f"{_shard(entry.place, 1)}/{entry.key}"


def _decoded(content: bytes, kind: str) -> tuple[str, str | None]:
    """The text of a member, and what is wrong with it."""
    try:
        return content.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        return "", f"its .{kind} is not UTF-8 (byte {error.start}). Save it as UTF-8."


def _interpret_json(entry: _Entry, content: bytes, columns: Columns) -> None:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        entry.problem = entry.problem or f"its .json is not JSON ({error})."
        return
    if not isinstance(data, dict):
        entry.problem = entry.problem or "its .json is not a JSON object."
        return
    column, value = named_value(data, columns.captions)
    entry.captions, entry.caption_problem, _ = read_captions(value, column)
    entry.captions_from = f"{column!r} in .json"
    key, entry.label = named_value(data, (*columns.labels, "cls"))
    if columns.vector:
        key, entry.label = ", ".join(columns.vector), [data.get(name) for name in columns.vector]
    entry.label_from = f"{key!r} in .json" if key else ""
    if columns.id[0] in columns.asked and columns.id[0] not in SHARD_IDS and not is_blank(data.get(columns.id[0])):
        entry.identity = str(data[columns.id[0]]).strip()


def _shard(place: str, parts: int) -> str:
    """The last parts of a shard's path, without its suffix; they are the same however the path is written."""
    path = place if is_url(place) else os.path.abspath(place)
    return "/".join(PurePosixPath(path_of(path)).with_suffix("").parts[-parts:])


def _identity(entry: _Entry, parts: int) -> str:
    if entry.identity is not None:
        return entry.identity
    return f"{_shard(entry.place, parts)}/{entry.key}" if parts else entry.key


def _require_distinct(entries: Sequence[_Entry], parts: int, name: str) -> None:
    """Raises DuplicateSample naming the first two shards whose samples would have one id, and how to tell them apart."""
    if parts > 1:
        return  # the source itself tells it
    places: dict[str, str] = {}
    for entry in entries:
        if entry.identity is None and (other := places.setdefault(_identity(entry, parts), entry.place)) != entry.place:
            form = list(SHARD_IDS)[parts]
            both = " and ".join(f"{_shard(place, parts + 1)}/{entry.key}" for place in (other, entry.place))
            raise DuplicateSample(
                f"{name}: {other} and {entry.place} both hold the key {entry.key!r}, so that {'shard and key are' if parts else 'it is'} no id. "
                f"With --id-column {form} they are called {both}; or pass --id-column with the key of the .json members that holds ids."
            )


def _sample(entry: _Entry, parts: int, labels: LabelReader) -> Sample:
    where, identity = f"{entry.place}, {entry.key}", _identity(entry, parts)
    folder = f"{_shard(entry.place, parts).partition('/')[0]}/" if parts > 1 else ""
    locator = f"{folder}{os.path.basename(entry.place)}/{entry.member or entry.key}"
    try:
        if entry.problem is not None:
            raise SampleError(entry.problem)
        names, unknown = labels.read(entry.label, where)
        return Sample(identity, entry.image, locator, entry.captions, names, entry.caption_problem, unknown)
    except SampleError as error:
        return broken_sample(identity, locator, str(error))
