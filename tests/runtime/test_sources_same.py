"""The same content gives the same rows, ids, labels, captions and classes, whatever format it lies in."""

from __future__ import annotations

import csv
import json
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffeat.runtime.file_names import key_of
from difffeat.runtime.samples import Source
from difffeat.runtime.sources import open_source
from tests.runtime.test_sources_tar import shard

CLASSES = ("cat", "sea lion", "café", unicodedata.normalize("NFD", "größe"), "dog, wolf", "it's", '"x"', "7", "10")
STEMS = ("a", "b c", unicodedata.normalize("NFD", "é"), "Ü", "q'", "0001", "n,m")
TEXT = st.text(st.sampled_from("ab é|;,\"'ñ.#"), min_size=1, max_size=9).map(str.strip).filter(bool)


@dataclass(frozen=True)
class Row:
    """`folder/stem.png` with its captions; `labels` None where nobody knows them."""

    folder: str
    stem: str
    captions: tuple[str, ...]
    labels: tuple[str, ...] | None

    @property
    def image(self) -> str:
        return f"{self.folder}/{self.stem}.png"


@st.composite
def content(draw: st.DrawFn, *, class_folders: bool = False) -> list[Row]:
    """Rows in path order: with one label each, which is their folder's name, or with any labels."""
    names = draw(st.lists(st.sampled_from(CLASSES), min_size=2, max_size=4, unique_by=key_of))
    rows = []
    for folder in names:
        for stem in draw(st.lists(st.sampled_from(STEMS), min_size=1, max_size=3, unique_by=key_of)):
            several = st.lists(st.sampled_from(names), max_size=3, unique=True).map(tuple)
            labels = (folder,) if class_folders else draw(several | st.none())
            rows.append(Row(folder, stem, tuple(draw(st.lists(TEXT, max_size=2))), labels))
    return sorted(rows, key=lambda row: row.image)


def as_folder(root: Path, rows: list[Row]) -> Path:
    for row in rows:
        path = root / row.image
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"")
        if row.captions:
            path.with_suffix(".txt").write_text("\n".join(row.captions), encoding="utf-8")
    return root


def cells(row: Row) -> list[str]:
    """Lists as text: data frames write them so, and nothing where there is nothing."""
    labels = "" if row.labels is None else json.dumps(row.labels)
    return [row.image, json.dumps(row.captions), labels]


def as_csv(root: Path, rows: list[Row]) -> Path:
    with (root / "m.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["image", "captions", "labels"], *map(cells, rows)])
    return root / "m.csv"


def as_long_csv(root: Path, rows: list[Row]) -> Path:
    """A row a caption."""
    with (root / "long.csv").open("w", newline="", encoding="utf-8") as file:
        lines = [[row.image, caption, cells(row)[2]] for row in rows for caption in row.captions or ("",)]
        csv.writer(file, delimiter=";").writerows([["image", "caption", "labels"], *lines])
    return root / "long.csv"


def as_tsv(root: Path, rows: list[Row]) -> Path:
    lines = ["\t".join(line) for line in (["image", "captions", "labels"], *map(cells, rows))]
    (root / "m.tsv").write_text("\r\n".join(lines), encoding="utf-8")
    return root / "m.tsv"


def records(rows: list[Row]) -> list[dict[str, object]]:
    return [{"image": row.image, "captions": list(row.captions), "labels": None if row.labels is None else list(row.labels)} for row in rows]


def as_jsonl(root: Path, rows: list[Row]) -> Path:
    (root / "m.jsonl").write_text("\n".join(map(json.dumps, records(rows))))
    return root / "m.jsonl"


def table(rows: list[Row], text: pa.DataType) -> pa.Table:
    fields = [("image", text), ("captions", pa.list_(text)), ("labels", pa.large_list(text))]
    return pa.Table.from_pylist(records(rows), schema=pa.schema(fields))


def as_parquet(root: Path, rows: list[Row]) -> Path:
    pq.write_table(table(rows, pa.large_string()), root / "m.parquet")
    return root / "m.parquet"


def as_arrow(root: Path, rows: list[Row]) -> Path:
    held = table(rows, pa.string_view())
    with pa.OSFile(str(root / "m.arrow"), "wb") as file, pa.ipc.new_file(file, held.schema) as out:
        out.write_table(held)
    return root / "m.arrow"


def as_saved(root: Path, rows: list[Row]) -> Path:
    folder = root / "saved"
    folder.mkdir()
    held = table(rows, pa.string())
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, held.schema) as out:
        out.write_table(held)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def as_tar(root: Path, rows: list[Row]) -> Path:
    members: dict[str, bytes] = {}
    for row, record in zip(rows, records(rows), strict=True):
        key = row.image.removesuffix(".png")
        members |= {f"{key}.png": b"", f"{key}.json": json.dumps(record).encode()}
    return shard(root / "m.tar", members)


def as_coco(root: Path, rows: list[Row]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row.labels or ()))
    annotations: list[dict[str, object]] = []
    for number, row in enumerate(rows):
        annotations += [{"image_id": str(number), "category_id": names.index(name)} for name in row.labels or ()]
        annotations += [{"image_id": number, "caption": caption} for caption in row.captions]
    images = [{"id": number, "file_name": row.image} for number, row in enumerate(rows)]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    (root / "m.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root / "m.json"


FORMS = (as_csv, as_long_csv, as_tsv, as_jsonl, as_parquet, as_arrow, as_saved, as_tar)


def said(source: Source) -> list[tuple[object, ...]]:
    return [(sample.id, sample.labels and frozenset(sample.labels), sample.unknown, sample.captions, sample.problem) for sample in source.samples]


def expected(rows: list[Row]) -> list[tuple[object, ...]]:
    def composed(text: str) -> str:
        return unicodedata.normalize("NFC", text)

    return [(composed(row.image.removesuffix(".png")), row.labels and frozenset(map(composed, row.labels)), (), row.captions, None) for row in rows]


def listed(form: Callable[[Path, list[Row]], Path], rows: list[Row]) -> Source:
    with tempfile.TemporaryDirectory() as folder:
        return open_source(form(Path(folder), rows))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(rows=content())
def test_every_format_says_the_same(form: Callable[[Path, list[Row]], Path], rows: list[Row]) -> None:
    source = listed(form, rows)
    assert said(source) == expected(rows)
    assert source.classes == listed(as_jsonl, rows).classes


@settings(max_examples=50, deadline=None)
@given(rows=content(class_folders=True))
def test_class_folders_patterns_and_annotations_say_the_same_too(rows: list[Row]) -> None:
    source = listed(as_folder, rows)
    assert said(source) == expected(rows)
    assert source.classes == listed(as_csv, rows).classes
    assert said(listed(lambda root, own: as_folder(root, own) / "**/*.png", rows)) == expected(rows)
    coco = listed(as_coco, rows)
    assert said(coco) == expected(rows)
    assert set(coco.classes) == set(source.classes)
