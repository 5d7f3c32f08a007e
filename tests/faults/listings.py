"""Every kind of source as files on which its reader can be tried: what is listed is also read and encoded, as an extraction would."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from difffeat.errors import DecodeError
from difffeat.runtime.samples import Source
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.sources_voc import CLASSES as VOC_CLASSES
from difffeat.runtime.table import encode_part, row_digests, sample_columns

ROWS: list[dict[str, Any]] = [
    {"id": "one", "image": "a.png", "captions": ["a cat", "a mat"], "caption": None, "labels": ["cat", "mat"], "label": None, "dog": 1, "mat": 0},
    {"id": 2, "image": "b.png", "captions": [], "caption": "a dog", "labels": [], "label": 1, "dog": 0, "mat": -1},
    {"id": None, "image": "c.png", "captions": "a mat", "caption": "x", "labels": [0, 2], "label": -1, "dog": "1", "mat": "0"},
]
VECTORS = [{**row, "labels": bits} for row, bits in zip(ROWS, ([0, 1, 1], [1, 0, 0], [0, 0, 0]), strict=True)]
TABLE: list[dict[str, Any]] = [
    {"image": {"bytes": None, "path": f"{name}.png"}, "captions": [name], "label": number} for number, name in enumerate("abc")
]
METADATA = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "mat"], "_type": "ClassLabel"}}}}
COCO: dict[str, Any] = {
    "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 4, "file_name": "a.jpg"}],
    "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "zebra"}],
    "annotations": [{"image_id": 9, "category_id": 7}, {"image_id": 4, "category_id": 2}, {"image_id": 4, "caption": " a zebra "}],
}
KARPATHY = {"images": [{"filepath": "val2014", "filename": f"{name}.jpg", "split": "val", "sentences": [{"raw": "a cat"}]} for name in "ab"]}

Listing = tuple[Path, Callable[[], None], bool]
"""A file, what reads it, and whether it is JSON."""


def listings(work: Path) -> dict[str, Listing]:
    """Each reader of sources, on files in a folder of its own."""
    work.mkdir()
    (work / "names").write_text("cat\ndog\nmat\n")
    ways = {
        "": SourceOptions(),
        " with classes": SourceOptions(classes=work / "names"),
        " of vectors": SourceOptions(multi_hot=True, drop_unlabelled=True),
        " with named columns": SourceOptions(image_column="image", caption_column="caption", label_column="dog,mat", id_column="id"),
    }
    found: dict[str, Listing] = {}
    for way, options in ways.items():
        folder, rows = work / f"rows{way}", VECTORS if options.multi_hot else ROWS
        folder.mkdir()
        found |= {
            f"JSONL{way}": _lines(folder / "m.jsonl", rows, options),
            f"JSONL's rows{way}": _rows(folder / "rows.json", rows, options),
            f"JSON in a tar{way}": _member(folder / "member.json", rows, options),
        }
    return found | _plain(work) | _tables(work) | _data_sets(work)


def _plain(work: Path) -> dict[str, Listing]:
    text = "id,image,caption,labels\none,a.png,a cat|a mat,cat;mat\ntwo,b.png,,0|1\n,c.png,x,-1\n"
    (work / "m.csv").write_text(text)
    (work / "m.tsv").write_text(text.replace(",", "\t"))
    (work / "coco.json").write_text(json.dumps(COCO))
    (work / "captions.json").write_text(json.dumps(COCO))
    _tar(work / "a.tar", {"a.png": b"x", "a.json": json.dumps(ROWS[0]).encode(), "sub/b.jpg": b"y" * 600, "sub/b.cls": b"1", "sub/b.txt": b"x"})
    joined = SourceOptions(coco_captions=work / "captions.json")
    found = {name: _file(work / name) for name in ("m.csv", "m.tsv", "a.tar", "coco.json")}
    (work / "karpathy.json").write_text(json.dumps(KARPATHY))
    found["Karpathy's splits"] = (work / "karpathy.json", lambda: _use(f"{work}/karpathy.json::val"), True)
    found["COCO's captions"] = (work / "captions.json", lambda: _use(str(work / "coco.json"), joined), True)
    found["class names"] = (work / "names.txt", lambda: _use(str(work / "m.csv"), SourceOptions(classes=work / "names.txt")), False)
    (work / "names.txt").write_text("cat\ndog\nmat\n")
    return found


def _file(path: Path, options: SourceOptions | None = None) -> Listing:
    return path, lambda: _use(str(path), options), path.suffix == ".json"


def _lines(path: Path, rows: list[dict[str, Any]], options: SourceOptions) -> Listing:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _file(path, options)


def _rows(path: Path, rows: list[dict[str, Any]], options: SourceOptions) -> Listing:
    path.write_text(json.dumps(rows))
    lines = path.with_name("made.jsonl")

    def read() -> None:
        spoiled = _json(path)
        lines.write_text("".join(json.dumps(row) + "\n" for row in (spoiled if isinstance(spoiled, list) else [spoiled])))
        _use(str(lines), options)

    return path, read, True


def _member(path: Path, rows: list[dict[str, Any]], options: SourceOptions) -> Listing:
    path.write_text(json.dumps(rows[2]))
    shard = path.with_name("made.tar")

    def read() -> None:
        _tar(shard, {"a.png": b"x", "a.json": path.read_bytes(), "b.png": b"y", "b.json": json.dumps(rows[0]).encode()})
        _use(str(shard), options)

    return path, read, True


def _tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _tables(work: Path) -> dict[str, Listing]:
    """Parquet and Arrow: their bytes, the values in them, their metadata, and the files of a saved dataset."""
    table = pa.Table.from_pylist(TABLE).replace_schema_metadata({"huggingface": json.dumps(METADATA)})
    pq.write_table(table, work / "a.parquet")
    saved = work / "saved"
    saved.mkdir()
    for path in (work / "a.arrow", saved / "data.arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (saved / "dataset_info.json").write_text("{}")
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}], "_split": "train"}))
    shutil.copytree(saved, work / "splits" / "train")
    (work / "splits" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    (work / "rows.json").write_text(json.dumps([{**row, "id": f"{number}"} for number, row in enumerate(TABLE)]))
    (work / "metadata.json").write_text(json.dumps(METADATA))

    def values() -> None:
        made = _table(_json(work / "rows.json"))
        if made is not None:
            pq.write_table(made, work / "made.parquet")
            pq.write_table(made.replace_schema_metadata(table.schema.metadata), work / "declared.parquet")
            _use(str(work / "made.parquet"))
            _use(f"{work}/{{declared,made}}.parquet", SourceOptions(id_column="id"))

    def metadata() -> None:
        pq.write_table(table.replace_schema_metadata({"huggingface": (work / "metadata.json").read_bytes()}), work / "made.parquet")
        _use(f"{work}/{{made,a}}.parquet")

    return {
        "a.parquet": _file(work / "a.parquet"),
        "a.arrow": _file(work / "a.arrow"),
        "Parquet's values": (work / "rows.json", values, True),
        "Parquet's metadata": (work / "metadata.json", metadata, True),
        "a saved dataset": (saved / "state.json", lambda: _use(str(saved)), True),
        "a saved dataset's splits": (work / "splits" / "dataset_dict.json", lambda: _use(f"{work}/splits::train"), True),
    }


def _table(rows: Any) -> Any:
    """Rows as a table; None where they make none that can be written."""
    try:
        made = pa.Table.from_pylist(rows)
        pq.write_table(made, pa.BufferOutputStream())
    except (pa.ArrowException, AttributeError, LookupError, TypeError, OverflowError, ValueError):
        return None
    return made


DATA_SETS: dict[str, dict[str, str]] = {
    "imagenet::val": {
        "LOC_synset_mapping.txt": "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n",
        "LOC_val_solution.csv": "ImageId,PredictionString\nILSVRC2012_val_00000001,n01443537 85 1 499 272\n",
        "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG": "",
    },
    "tiny-imagenet::val": {
        "wnids.txt": "n02124075\nn02012849\n",
        "words.txt": "n02012849\tcrane\nn02124075\tEgyptian cat\n",
        "val/val_annotations.txt": "val_0.JPEG\tn02124075\t0\t32\t44\t62\n",
        "val/images/val_0.JPEG": "",
    },
    "cifar10::test": {"batches.meta.txt": "airplane\nautomobile\n", "test_batch.bin": "\x01" + "x" * 3072},
    "vg500::test": {"test_list_500.txt": "1.jpg\n2.jpg\n", "vg_category_500_labels_index.json": json.dumps({"1.jpg": [0, 2], "2.jpg": [1]})},
    "nus-wide::test": {
        "Concepts81.txt": "airport\nlake\n",
        "ImageList/TrainImagelist.txt": "zoo\\0003_1.jpg\n",
        "ImageList/TestImagelist.txt": "zoo\\0004_2.jpg\n",
        "TrainTestLabels/Labels_airport_Test.txt": "0\n",
        "TrainTestLabels/Labels_lake_Test.txt": "1\n",
    },
    "voc2007::val": {
        "VOC2007/ImageSets/Main/val.txt": "000005\n000007\n",
        **{f"VOC2007/ImageSets/Main/{label}_val.txt": "000005  1\n000007 -1\n" for label in VOC_CLASSES},
    },
}
"""Data set and split -> its lists; empty files are its images, and stay as they are."""


def _data_sets(work: Path) -> dict[str, Listing]:
    found: dict[str, Listing] = {}
    for place, files in DATA_SETS.items():
        name, _, split = place.partition("::")
        options = SourceOptions(dataset=name, split=split)
        for file, content in files.items():
            path = work / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            if content and not path.name.startswith(VOC_CLASSES[1:]):  # one of VOC's lists of labels is as good as the others
                found[f"{name}'s {path.name}"] = (path, lambda root=work / name, options=options: _use(str(root), options), file.endswith("json"))
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return []


def _use(place: str, options: SourceOptions | None = None) -> None:
    """List a source, read its images, and make the table that a store keeps of it."""
    source: Source = open_source(place, options)
    columns = sample_columns(source.samples)
    assert len(row_digests(columns)) == len(source) > 0
    assert encode_part(columns).nbytes > 0
    json.dumps([*source.classes, *source.notes, source.name]).encode("ascii")
    "".join([*source.classes, *source.notes]).encode()
    for sample in source.samples[:20]:
        with suppress(DecodeError):
            if sample.image is not None:
                sample.image.read(1 << 20)
