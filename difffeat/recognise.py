"""What a path is, for messages: every verb says what it was given in place of what it wants, and which command helps.

Names of files and the first bytes of some decide; nothing is loaded, and nothing here decides what is read.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow")
_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_LOOKED_AT = 2000
_HEAD = 1 << 20
_SHOWN = 4

SOURCES = ("images", "image", "table", "tar", "coco", "captions", "tars", "data set")


@dataclass(frozen=True)
class Thing:
    """`kind` one word for the program, `words` for people; `inside` what it holds that could be meant, as paths."""

    kind: str
    words: str
    inside: tuple[str, ...] = ()

    @property
    def is_source(self) -> bool:
        """Whether samples can be read from it."""
        return self.kind in SOURCES


def quoted(path: str | os.PathLike[str]) -> str:
    """A path as it is typed into a shell: quoted where it must be, and never taken for an option."""
    return shlex.quote(not_an_option(os.fspath(path)))


def not_an_option(text: str) -> str:
    """A path that begins with a dash, written so that it is not taken for an option."""
    return f"./{text}" if text.startswith("-") else text


def recognise(path: str | os.PathLike[str]) -> Thing:
    """What lies at a path. Never raises: what cannot be looked at is said to be so."""
    place = Path(path).expanduser()
    try:
        if not place.exists():
            return Thing("nothing", "does not exist", _neighbour(place))
        return _folder(place) if place.is_dir() else _file(place)
    except OSError as error:
        return Thing("unreadable", f"cannot be read ({error.strerror or error})")


def _neighbour(place: Path) -> tuple[str, ...]:
    folder = place.parent
    names = [entry.name for entry in itertools.islice(folder.iterdir(), _LOOKED_AT)] if folder.is_dir() else []
    return tuple(str(folder / name) for name in difflib.get_close_matches(place.name, names, 1))


def _folder(place: Path) -> Thing:
    entries = sorted(itertools.islice(place.iterdir(), _LOOKED_AT))
    names = {entry.name for entry in entries}
    if not names:
        return Thing("empty", "is an empty folder")
    if "model.onnx" in names:
        unfinished = place.name.endswith((".partial", ".failed", ".replaced"))
        return Thing("artifact", "is what an unfinished export left" if unfinished else _artifact_words(place))
    if "manifest.json" in names and ("shards" in names or "receipts" in names):
        return _store(place)
    for name, kind, words in (
        ("difffeat.json", "converted", "is a store converted for other tools"),
        ("model_index.json", "weights", "is a pipeline's folder of weights"),
        ("dataset_info.json", "data set", "is a saved data set"),
        ("dataset_dict.json", "data set", "is a saved data set"),
        ("metrics.json", "results", "is a folder of results"),
        ("search.json", "results", "is a folder of results"),
    ):
        if name in names:
            return Thing(kind, words)
    if "config.json" in names and any(name.endswith(_CHECKPOINTS) for name in names):
        return Thing("weights", "is a folder of weights")
    return _folder_of(place, entries)


def _folder_of(place: Path, entries: list[Path]) -> Thing:
    """A folder by what lies in it, and in the folders in it."""
    folders = [entry for entry in entries if entry.is_dir()]
    for name, kind, words in (
        ("model.onnx", "artifacts", "artifacts"), ("manifest.json", "stores", "feature stores"), ("metrics.json", "results", "results"),
        ("search.json", "results", "results"),
    ):  # fmt: skip
        if held := [str(entry) for entry in folders if (entry / name).is_file() and entry.suffix not in (".partial", ".failed", ".replaced")]:
            return Thing(kind, f"is a folder of {words}", tuple(held))
    if (place / "features").is_dir() and (place / "artifacts").is_dir():
        return Thing("quickstart", "is a quickstart's folder", tuple(sorted(str(entry) for entry in (place / "features").iterdir())))
    deeper = itertools.chain.from_iterable(itertools.islice(entry.iterdir(), _LOOKED_AT // 20) for entry in folders[:20] if os.access(entry, os.R_OK))
    suffixes = {entry.suffix.lower() for entry in (*entries, *deeper)}
    if suffixes & set(_IMAGES):
        return Thing("images", "is a folder of images")
    if ".tar" in suffixes:
        return Thing("tars", "is a folder of tar shards")
    if suffixes & set(_CHECKPOINTS):
        return Thing("weights", "is a folder of weights")
    return Thing("folder", f"is a folder with {', '.join(entry.name for entry in entries[:3])}{' ...' if len(entries) > 3 else ''} in it")


def _artifact_words(place: Path) -> str:
    recipe = _json(place / "recipe.json")
    known = isinstance(recipe.get("kind"), str) and isinstance(recipe.get("backbone"), str)
    return f"is an artifact ({recipe['kind']} graph of {recipe['backbone']})" if known else "is an artifact (a graph, as export writes it)"


def _store(place: Path) -> Thing:
    recipe = _json(place / "manifest.json").get("recipe")
    graph = recipe.get("graph") if isinstance(recipe, dict) else None
    latents = isinstance(graph, dict) and graph.get("kind") == "latents"
    return Thing("latent cache", "is a latent cache") if latents else Thing("store", "is a feature store")


def _file(place: Path) -> Thing:
    suffix = place.suffix.lower()
    if not place.is_file():
        return Thing("special", "is neither a file nor a folder (a pipe or a device)")
    if suffix == ".onnx" or place.name.endswith(".onnx_data"):
        return Thing("graph", "is a graph's file", (str(place.parent),) if (place.parent / "model.onnx").is_file() else ())
    if suffix == ".plan":
        return Thing("plan", "is a TensorRT plan")
    if suffix == ".safetensors":
        probe = b"difffeat.probe" in _head(place)
        return Thing("probe", "is a trained probe") if probe else Thing("checkpoint", "is a file of weights")
    if suffix in _CHECKPOINTS:
        return Thing("checkpoint", "is a file of weights")
    if suffix == ".json":
        return _json_file(place)
    for endings, kind, words in (
        (_IMAGES, "image", "is one image"),
        (_TABLES, "table", "is a table of samples"),
        ((".tar",), "tar", "is a tar of samples"),
        ((".html", ".htm"), "report", "is a report"),
    ):
        if suffix in endings:
            return Thing(kind, words)
    return Thing("file", f"is a file{f' of type {suffix}' if suffix else ''} that no command here reads")


def _json_file(place: Path) -> Thing:
    """A JSON file by its name and the keys near its beginning; annotations may be too large to be read for a message."""
    if place.name == "recipe.json" and (place.parent / "model.onnx").is_file():
        return Thing("graph", "is the recipe of an artifact", (str(place.parent),))
    if place.name == "manifest.json" and (place.parent / "shards").is_dir():
        return Thing("part", "is the manifest of a feature store", (str(place.parent),))
    if place.name.startswith(("metrics", "search")):
        return Thing("results", "is a file of results")
    head = _head(place)
    if b'"annotations"' in head or (b'"images"' in head and b'"file_name"' in head):
        caption = b'"caption"' in head or "caption" in place.name
        return Thing("captions", "is a file of COCO captions") if caption else Thing("coco", "is a file of COCO annotations")
    if b'"split"' in head and b'"sentences"' in head:
        return Thing("coco", "is a file of Karpathy's splits")
    return Thing("json", "is a JSON file")


def _head(place: Path) -> bytes:
    with place.open("rb") as file:
        return file.read(_HEAD)


def _json(place: Path) -> dict[str, Any]:
    try:
        found = json.loads(place.read_bytes()) if place.stat().st_size < (_HEAD << 6) else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def not_a_store(path: str | os.PathLike[str]) -> str:
    """What to say where a feature store is wanted and `path` is none."""
    thing, name = recognise(path), quoted(path)
    store = f"features/{_name(path)}"
    if thing.kind in ("nothing", "empty"):
        where = f"{path} {thing.words}, so it is not a feature store{_meant(thing)}."
        return f"{where} Make one with: difffeat extract ARTIFACT SOURCE -o {name}"
    said = f"{path} is not a feature store: it {thing.words}{_meant(thing)}."
    if thing.kind == "artifact":
        return f"{said} Extract features with it first: difffeat extract {name} SOURCE -o features/NAME, then give features/NAME."
    if thing.is_source:
        return f"{said} Extract its features first: difffeat extract ARTIFACT {name} -o {store}, then give {store}."
    if thing.inside:
        return said
    return f"{said} A store is made with: difffeat extract ARTIFACT SOURCE -o features/NAME"


def not_an_artifact(path: str | os.PathLike[str]) -> str:
    """What to say where an artifact is wanted and `path` is none."""
    thing, name = recognise(path), quoted(path)
    if thing.kind in ("nothing", "empty"):
        where = f"{path} {thing.words}, so it holds no model.onnx and is not an artifact{_meant(thing)}."
        return f"{where} Make an artifact with: difffeat export --model dit --weights PATH -o {name}"
    said = f"{path} is not an artifact: it {thing.words}{_meant(thing)}."
    if thing.kind in ("checkpoint", "weights"):
        return f"{said} Make an artifact of it first: difffeat export --model dit --weights {name} (or --model plaid), then give that."
    if thing.is_source:
        return (
            f"{said} An artifact is made with: difffeat export --model dit-digits. What it is then given is written after it: "
            f"difffeat extract ARTIFACT {name}"
        )
    if thing.inside:
        return said
    return f"{said} An artifact is made with: difffeat export --model dit --weights PATH -o artifacts/NAME"


def not_a_source(path: str | os.PathLike[str]) -> str | None:
    """What to say where a source is wanted and `path` is something else that this program made or reads; None where it may be one."""
    thing, name = recognise(path), quoted(path)
    if thing.kind in ("store", "latent cache", "converted", "stores"):
        return (
            f"{path} is not a source of samples: it {thing.words}{_meant(thing)}. Name what its samples came from (difffeat inspect {name} may say)."
        )
    if thing.kind in ("artifact", "artifacts", "graph", "plan", "probe", "checkpoint", "weights", "results", "report"):
        return f"{path} is not a source of samples: it {thing.words}{_meant(thing)}. Name a folder of images, a table, tars or COCO annotations."
    return None


def _meant(thing: Thing) -> str:
    if not thing.inside:
        return ""
    shown = ", ".join(map(quoted, thing.inside[:_SHOWN]))
    more = f" and {len(thing.inside) - _SHOWN} more" if len(thing.inside) > _SHOWN else ""
    return f" (is it {shown}?)" if thing.kind in ("nothing", "graph", "part") else f" ({shown}{more}; give one of them)"


def _name(path: str | os.PathLike[str]) -> str:
    """A name for a store, that needs no quotes."""
    kept = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in Path(path).absolute().stem)
    return kept.strip("-.") or "NAME"
