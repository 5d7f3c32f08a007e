"""Files that say which sample belongs to which split: what `--splits` reads, and what results are written with.

splits.json   {"train": [id, ...], "validation": [...], "test": [...]}, what results are written with; or {id: split}; or [{"id": ..., "split": ...}]
splits.jsonl  {"id": ..., "split": ...} a line
splits.csv    columns `id` and `split` among any others (so the manifest of a source will do where it has both); also .tsv and .parquet
splits.txt    an id and its split a line, the split last
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from difffeat.errors import ConfigError
from difffeat.probe.output import write_fresh
from difffeat.probe.splits import SPLITS, VERSION

NAMES = {
    **dict.fromkeys(("train", "training", "trn", "restval"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
"""How a split may be written, in any case."""
ID_COLUMNS = ("id", "sample_id", "image_id", "file_name", "filename", "image", "path", "name")
SPLIT_COLUMNS = ("split", "subset", "partition", "set")
_NONE = ("", "none", "null", "nan", "unused")


def read_splits(path: str | os.PathLike[str]) -> dict[str, str]:
    """Sample id -> train, validation or test. Raises ConfigError, with the line, where the file says something else, or two things of one id."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--splits: {file} is not a file. Name a JSON, JSONL, CSV, TSV, Parquet or text file of ids and their splits.")
    pairs = _parquet(file) if file.suffix.lower() == ".parquet" else _pairs(file, _text(file))
    splits: dict[str, str] = {}
    for where, id_, split in pairs:
        if split.strip().lower() in _NONE:
            continue
        name = NAMES.get(split.strip().lower())
        if name is None:
            raise ConfigError(f"{file}, {where}: {split!r} is not a split. Write train, validation or test (val, dev), or nothing for none of them.")
        if splits.setdefault(id_, name) != name:
            raise ConfigError(f"{file}, {where}: {id_!r} is {name} here and {splits[id_]} before. A sample stands in one split alone.")
    if not splits:
        raise ConfigError(f"{file} names no sample. Write an id and its split a line, or JSON with lists of ids under train, validation and test.")
    return splits


def write_splits(path: str | os.PathLike[str], parts: Mapping[str, Iterable[str]], record: Mapping[str, Any]) -> Path:
    """Write the ids of each part beside its results, in a form that `read_splits` reads. Returns where it went."""
    document = {
        "version": VERSION,
        **{key: record[key] for key in ("seed", "fractions", "rule") if key in record},
        **{name: list(parts.get(name, ())) for name in SPLITS},
    }
    return write_fresh(path, (json.dumps(document, indent=1) + "\n").encode())


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from None


def _pairs(file: Path, text: str) -> Iterable[tuple[str, str, str]]:
    suffix = file.suffix.lower()
    if suffix == ".json":
        return _json(file, text)
    if suffix in (".jsonl", ".ndjson"):
        return _records(file, [(f"line {n}", _loads(file, line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()])
    if suffix in (".csv", ".tsv"):
        return _table(file, text, "\t" if suffix == ".tsv" else ",")
    return _lines(file, text)


def _loads(file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON ({error}).") from None


def _json(file: Path, text: str) -> list[tuple[str, str, str]]:
    data = _loads(file, text)
    if isinstance(data, dict) and isinstance(data.get("splits"), dict | list):
        data = data["splits"]
    if isinstance(data, list):
        return _records(file, [(f"entry {number}", entry) for number, entry in enumerate(data)])
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds {type(data).__name__}; write lists of ids under train, validation and test.")
    lists = {key: value for key, value in data.items() if key.strip().lower() in NAMES and isinstance(value, list)}
    if lists:
        return [(key, _id(file, key, id_), key) for key, ids in lists.items() for id_ in ids]
    return [(f"entry {id_!r}", id_, _word(file, f"entry {id_!r}", split)) for id_, split in data.items()]


def _records(file: Path, entries: Iterable[tuple[str, Any]]) -> list[tuple[str, str, str]]:
    found = []
    for where, entry in entries:
        if isinstance(entry, list | tuple) and len(entry) == 2:
            entry = {"id": entry[0], "split": entry[1]}
        if not isinstance(entry, dict):
            raise ConfigError(f"{file}, {where}: expected an object with id and split, found {type(entry).__name__}.")
        columns = {str(key).strip().lower(): value for key, value in entry.items()}
        found.append((where, *_of_columns(file, where, columns)))
    return found


def _of_columns(file: Path, where: str, columns: Mapping[str, Any]) -> tuple[str, str]:
    names = [next((name for name in known if name in columns), None) for known in (ID_COLUMNS, SPLIT_COLUMNS)]
    if names[0] is None or names[1] is None:
        raise ConfigError(
            f"{file}, {where}: it has {', '.join(columns) or 'nothing'}; two of its columns must be the id ({', '.join(ID_COLUMNS)}) "
            f"and the split ({', '.join(SPLIT_COLUMNS)})."
        )
    return _id(file, where, columns[names[0]]), _word(file, where, columns[names[1]])


def _table(file: Path, text: str, delimiter: str) -> list[tuple[str, str, str]]:
    rows = [(number, row) for number, row in enumerate(csv.reader(io.StringIO(text), delimiter=delimiter), 1) if any(map(str.strip, row))]
    if not rows:
        return []
    head = [name.strip().lower() for name in rows[0][1]]
    if len(head) == 2 and head[1] in NAMES:  # no header: an id and its split a row
        return [(f"row {number}", *_two(file, f"row {number}", row)) for number, row in rows]
    return [(f"row {number}", *_of_columns(file, f"row {number}", dict(zip(head, row, strict=False)))) for number, row in rows[1:]]


def _lines(file: Path, text: str) -> list[tuple[str, str, str]]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            head, _, tail = line.strip().replace("\t", " ").replace(",", " ").rpartition(" ")
            end = line.strip()[: len(head)].rstrip(" \t,")
            found.append((f"line {number}", *_two(file, f"line {number}", [end, tail])))
    return found


def _two(file: Path, where: str, row: list[str]) -> tuple[str, str]:
    if len(row) != 2 or not row[0].strip():
        raise ConfigError(f"{file}, {where}: expected an id and its split, found {row!r}.")
    return row[0].strip(), row[1]


def _parquet(file: Path) -> list[tuple[str, str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        entries = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{file} cannot be read as Parquet ({error}).") from None
    return _records(file, [(f"row {number}", entry) for number, entry in enumerate(entries)])


def _id(file: Path, where: str, value: Any) -> str:
    """An id as a store has it: whole numbers as they are written."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ConfigError(f"{file}, {where}: {value!r} is not an id. Ids are texts, or whole numbers.")
    return str(value)


def _word(file: Path, where: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"{file}, {where}: {value!r} is not a split. Write train, validation or test.")
    return value
