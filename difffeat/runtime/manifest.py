"""What a store promises to hold: the manifest, the receipts, and reading both without trusting them.

A receipt is bound to the *configuration* (what decides a feature's bytes, without the rows) and to the digest of its own samples, not to the whole
manifest: a store may grow, and its quarantined rows may be healed, while every other shard and receipt keeps its bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from difffeat.engines.base import recorded_switches
from difffeat.errors import ForeignGraph, StoreCorrupt, StoreMismatch, StoreNotFound
from difffeat.recipe import GraphRecipe, Recipe, RunRecipe, digest
from difffeat.recognise import not_a_store

FORMAT = "difffeat-store/2"
MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
QUARANTINE = "quarantine.jsonl"
ROW_FIELDS = ("rows", "samples", "classes", "shards", "shard_rows", "batch_size", "earlier_batch_sizes")
"""Fields of the manifest that are not part of the configuration: they change as a store grows, is healed, or goes on with another batch size."""
DTYPES = {"fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class SamplesPart:
    """One Parquet file of the samples table: `digest` of its rows; `becoming` the digest of what is about to replace it, empty in a settled store."""

    rows: int
    digest: str
    becoming: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"rows": self.rows, "digest": self.digest} | ({"becoming": self.becoming} if self.becoming else {})

    @classmethod
    def from_dict(cls, data: Any) -> SamplesPart:
        """The inverse of `to_dict`."""
        return cls(rows=_count(data["rows"], 1), digest=_text(data["digest"]), becoming=_text(data.get("becoming", "")))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a store's bytes depend on.

    **Fields:** `recipe`; `graph_digest`; `engine` name, precision, device and what else its bytes depend on; `batch_size`, and `earlier_batch_sizes`
    where the run went on with another one; `rows`; `samples` the parts of the samples table, one for each time that samples were added; `classes`;
    `taps` name -> shape of one row; `shards` rows of each shard, in order, `shard_rows` at most; `versions` of the libraries that compute.
    """

    recipe: Recipe
    graph_digest: str
    engine: Mapping[str, str]
    batch_size: int
    rows: int
    samples: tuple[SamplesPart, ...]
    classes: tuple[str, ...]
    taps: Mapping[str, tuple[int, ...]]
    shards: tuple[int, ...]
    shard_rows: int
    versions: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    earlier_batch_sizes: tuple[int, ...] = ()

    @property
    def dtype(self) -> str:
        """NumPy name of the stored type."""
        return DTYPES[self.recipe.run.store_dtype]

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """Where each shard begins."""
        starts, row = [], 0
        for count in self.shards:
            starts.append(row)
            row += count
        return tuple(starts)

    def part_of(self, shard: int) -> int:
        """Which part of the samples table a shard's rows stand in: parts are cut into shards by themselves."""
        first, end = self.first_rows[shard], 0
        for number, part in enumerate(self.samples):
            end += part.rows
            if first < end:
                return number
        raise IndexError(f"shard {shard} of {len(self.shards)}")

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Every batch size that a shard of this store may have been computed with."""
        return (*self.earlier_batch_sizes, self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        data = asdict(self)
        data["recipe"] = self.recipe.to_dict()
        data["taps"] = {name: list(shape) for name, shape in self.taps.items()}
        data["samples"] = [part.to_dict() for part in self.samples]
        data["fingerprint"] = self.recipe.fingerprint
        return {"format": FORMAT, **json.loads(json.dumps(data))}

    @cached_property
    def configuration(self) -> str:
        """SHA-256 of everything but the rows, the samples and how they are cut: what a receipt is bound to."""
        return digest({name: value for name, value in self.to_dict().items() if name not in ROW_FIELDS})

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Manifest:
        """The inverse of `to_dict`. Raises StoreCorrupt on anything else."""
        try:
            if data["format"] != FORMAT:
                raise StoreCorrupt(f"{where} is of format {data['format']!r}, this version reads {FORMAT!r}. Read it with the version that wrote it.")
            recipe = Recipe(GraphRecipe.from_dict(data["recipe"]["graph"]), RunRecipe.from_dict(data["recipe"]["run"]))
            manifest = cls(
                recipe=recipe,
                graph_digest=_text(data["graph_digest"]),
                engine={_text(k): _text(v) for k, v in data["engine"].items()},
                batch_size=_count(data["batch_size"], 1),
                rows=_count(data["rows"]),
                samples=tuple(SamplesPart.from_dict(part) for part in _list(data["samples"])),
                classes=tuple(_text(name) for name in _list(data["classes"])),
                taps={_text(name): tuple(_count(size, 1) for size in _list(shape)) for name, shape in data["taps"].items()},
                shards=tuple(_count(rows, 1) for rows in _list(data["shards"])),
                shard_rows=_count(data["shard_rows"], 1),
                versions={_text(k): _text(v) for k, v in data["versions"].items()},
                options=_mapping(data["options"]),
                earlier_batch_sizes=tuple(_count(size, 1) for size in _list(data["earlier_batch_sizes"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ForeignGraph) as error:
            raise StoreCorrupt(f"{where} is damaged ({type(error).__name__}: {error}). Restore it, or extract again with --overwrite.") from None
        listed = sum(part.rows for part in manifest.samples)
        if not sum(manifest.shards) == listed == manifest.rows:
            raise StoreCorrupt(f"{where} is damaged: its shards hold {sum(manifest.shards)} rows, its samples {listed}, it says {manifest.rows}.")
        if recipe.fingerprint != data.get("fingerprint"):
            raise StoreCorrupt(f"{where} was altered: its recipe does not have the fingerprint it states.")
        return manifest


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Proof that a shard is whole: written after it, with its size and digest, and the rows that went to quarantine.

    **Fields:** `samples_digest` of the samples of its rows, and `healed_from` the one they had before quarantined ones were mended (until the samples
    table is replaced, it still has that one); `configuration` of the manifest; `batch_size` it was computed with; `generation` of its file, one more
    each time that a finished shard is rewritten.
    """

    shard: int
    bytes: int
    sha256: str
    rows: int
    first_row: int
    nonfinite: int
    quarantined: tuple[Mapping[str, Any], ...]
    configuration: str
    samples_digest: str
    batch_size: int
    healed_from: str = ""
    generation: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "quarantined": [dict(entry) for entry in self.quarantined]}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Receipt:
        """The inverse of `to_dict`. Raises StoreCorrupt on anything else."""
        try:
            return cls(
                shard=_count(data["shard"]),
                bytes=_count(data["bytes"]),
                sha256=_text(data["sha256"]),
                rows=_count(data["rows"], 1),
                first_row=_count(data["first_row"]),
                nonfinite=_count(data["nonfinite"]),
                quarantined=tuple(_entry(entry) for entry in _list(data["quarantined"])),
                configuration=_text(data["configuration"]),
                samples_digest=_text(data["samples_digest"]),
                batch_size=_count(data["batch_size"], 1),
                healed_from=_text(data["healed_from"]),
                generation=_count(data["generation"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreCorrupt(
                f"{where} is damaged ({type(error).__name__}: {error}). Run the extraction again: it recomputes this shard only."
            ) from None


def read_json(path: Path) -> Any:
    """A JSON document. Raises StoreCorrupt when it is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StoreCorrupt(f"{path} is damaged: it is not JSON ({error}). Run the extraction again, or restore the file.") from None


def signed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its own digest, so that no bit of it can change unnoticed."""
    return {**document, "digest": digest(dict(document))}


def read_signed(path: Path, remedy: str) -> dict[str, Any]:
    """A document written by `signed`, without its digest. Raises StoreCorrupt, ending with the remedy, when it is none or has changed."""
    try:
        document = json.loads(path.read_bytes())
        stated = document.pop("digest", None) if isinstance(document, dict) else None
        if stated is not None and digest(document) == stated:
            return document
    except (ValueError, RecursionError) as error:
        raise StoreCorrupt(f"{path} is damaged: it is not JSON ({error}). {remedy}") from None
    raise StoreCorrupt(f"{path} was altered: it does not have the digest it states. {remedy}")


def read_manifest(store: Path) -> Manifest:
    """The manifest of a store. Raises StoreNotFound and StoreCorrupt."""
    path = store / MANIFEST
    if not path.is_file():
        raise StoreNotFound(not_a_store(store))
    return Manifest.from_dict(read_signed(path, "Restore it, or extract again with --overwrite."), str(path))


def shard_path(store: Path, shard: int, generation: int = 0) -> Path:
    """Where a shard lies: `00003.safetensors`, rewritten `00003.1.safetensors` and so on. Its receipt says which generation counts."""
    return store / "shards" / f"{shard:05d}{f'.{generation}' if generation else ''}.safetensors"


_SHARD_NAME = re.compile(r"(\d{5,})(?:\.([1-9]\d*))?\.safetensors")


def shard_of(path: Path) -> tuple[int, int] | None:
    """Number and generation of a shard's file, None where the name is no shard's. The inverse of `shard_path`."""
    match = _SHARD_NAME.fullmatch(path.name)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def receipt_path(store: Path, shard: int) -> Path:
    """Where a shard's receipt lies."""
    return store / "receipts" / f"{shard:05d}.json"


def read_receipt(store: Path, manifest: Manifest, shard: int) -> Receipt | None:
    """The receipt of a shard, None where there is none yet. Raises StoreCorrupt when it is not one of this manifest and shard."""
    path = receipt_path(store, shard)
    if not path.is_file():
        return None
    receipt = read_own_receipt(path)
    expected = (shard, manifest.shards[shard], manifest.first_rows[shard], manifest.configuration)
    if (receipt.shard, receipt.rows, receipt.first_row, receipt.configuration) != expected or receipt.batch_size not in manifest.batch_sizes:
        raise StoreCorrupt(f"{path} belongs to another shard or store. Delete it and run the extraction again: it recomputes this shard only.")
    return receipt


def read_own_receipt(path: Path) -> Receipt:
    """A receipt, of whatever shard and store. Raises StoreCorrupt when it is damaged."""
    remedy = "Delete it and run the extraction again: it recomputes this shard only."
    return Receipt.from_dict(read_signed(path, remedy), str(path))


def require_same(found: Manifest, asked: Manifest, store: Path, *, except_for: Collection[str] = (), samples: Sequence[str] = ()) -> None:
    """Raises StoreMismatch naming every field in which a run differs from how the store was begun.

    **Arguments:** `except_for` fields that may differ; `samples` differences of the samples, in words, which are told with the rest.
    """
    derived = {"fingerprint", *except_for}  # the fingerprint only repeats that the recipe differs
    mine, theirs = ({k: v for k, v in manifest.to_dict().items() if k not in derived} for manifest in (found, asked))
    different = [*differences(mine, theirs), *samples]
    if different:
        listed = "\n  ".join(different[:20])
        more = f"\n  and {len(different) - 20} more" if len(different) > 20 else ""
        rebatch = ", pass --allow-rebatch to go on with the new one" if [line.partition(":")[0] for line in different] == ["batch_size"] else ""
        first = _first_versions(found, asked) + _first_plan(found, asked) + _first_switches(found, asked) + _first_pixels(found, asked)
        raise StoreMismatch(
            f"{store} was begun with another configuration; features of two must not mix. It has -> you asked for:\n  {listed}{more}\n"
            f"Repeat the first configuration to go on{first}{rebatch}, choose another -o, or pass --overwrite to begin anew."
        )


def _first_versions(found: Manifest, asked: Manifest) -> str:
    """The command that brings back the libraries that a store was begun with."""
    other = sorted(name for name, version in found.versions.items() if asked.versions.get(name, version) != version)
    pins = " ".join(f"'{name}=={found.versions[name]}'" for name in other)
    return f" (pip install {pins})" if pins else ""


def _first_switches(found: Manifest, asked: Manifest) -> str:
    """The options of the command line that a store was begun with."""
    mine, theirs = recorded_switches(found.engine), recorded_switches(asked.engine)
    flags = {name: name.replace("_", "-") for name in (*mine, *theirs) if mine.get(name) != theirs.get(name)}
    words = [f"with --{'' if mine[name] else 'no-'}{flag}" if name in mine else f"without --{flag}" for name, flag in flags.items()]
    return f" ({', '.join(words)})" if words else ""


def _first_pixels(found: Manifest, asked: Manifest) -> str:
    """How pixels were read; stores that do not state it were begun when all were strict."""
    first, now = found.recipe.run.pixels, asked.recipe.run.pixels
    return f" (with --pixels {first})" if first != now and not found.recipe.graph.takes_text else ""


def _first_plan(found: Manifest, asked: Manifest) -> str:
    """How the plan that a store was begun with is had again."""
    plans = [
        plan.partition(" ")[0]
        for name, plan in found.engine.items()
        if (name == "plan" or name.endswith(" plan")) and asked.engine.get(name, plan) != plan
    ]
    return f" (put {', '.join(plans)} with its .json back into the artifact's engines folder: it is then taken by itself)" if plans else ""


def differences(found: Any, asked: Any) -> list[str]:
    """A line `where.field: this -> that` for each place in which two JSON documents differ."""
    return list(_differences("", found, asked))


def _differences(path: str, found: Any, asked: Any) -> Any:
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in sorted(found.keys() | asked.keys()):
            yield from _differences(f"{path}.{key}" if path else key, found.get(key), asked.get(key))
    elif found != asked:
        yield f"{path}: {_short(found)} -> {_short(asked)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, found {value!r:.60}")
    return value


def _count(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**62:
        raise TypeError(f"expected a whole number of at least {least}, found {value!r:.60}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {value!r:.60}")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {value!r:.60}")
    return value


def _entry(value: Any) -> dict[str, Any]:
    entry = {key: _text(value[key]) for key in ("id", "stage", "error", "message")}
    return {"row": _count(value["row"]), **entry}
