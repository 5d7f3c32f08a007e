"""What a feature's bytes depend on besides its sample: told by whoever runs the engine, here or on another machine, and written into the manifest."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.engines.base import Engine
from difffeat.errors import StoreNotFound
from difffeat.recipe import GraphRecipe, Recipe, RunRecipe
from difffeat.runtime.batches import tap_shapes
from difffeat.runtime.manifest import DTYPES, Manifest, SamplesPart, read_manifest
from difffeat.runtime.matching import cut
from difffeat.runtime.samples import Source
from difffeat.runtime.table import Columns, samples_digest

SHARD_BYTES = 256 << 20
_RUNTIMES = {"ort": ("onnxruntime", "onnxruntime-gpu"), "torch": ("torch",), "trt": ("tensorrt",), "rtx": ("tensorrt-rtx",)}


@dataclass(frozen=True)
class Configuration:
    """An engine with its graph, as a manifest names it: `engine` has name, precision, kind of device and what else its `identity` holds; `versions`
    of the libraries that compute.
    """

    recipe: GraphRecipe
    graph_digest: str
    engine: Mapping[str, str]
    taps: Mapping[str, tuple[int, ...]]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, engine: Engine, beside: Mapping[str, Mapping[str, str]] | None = None) -> Configuration:
        """Of an open engine; `beside` holds the identities of those that its samples go through first, by the part of their graph.

        Raises EngineError where its outputs vary in shape.
        """
        names = {"name": engine.name, "precision": engine.precision, "device": engine.device.partition(":")[0], **engine.identity}
        for part, identity in (beside or {}).items():
            names |= {f"{part} {name}": value for name, value in identity.items() if value != engine.identity.get(name)}
        return cls(engine.recipe, engine.digest, names, tap_shapes(engine), _versions(engine.name))

    def difference(self, other: Configuration) -> str:
        """The first thing in which another one differs, in words; empty when they are the same."""
        mine, theirs = self._named(), other._named()
        for name in (*mine, *(name for name in theirs if name not in mine)):
            if mine.get(name) != theirs.get(name):
                return f"{name} {mine.get(name)!r} and {theirs.get(name)!r}"
        return ""

    def manifest(self, source: Source, columns: Columns, run: RunRecipe, *, batch_size: int, shard_size: int, options: Mapping[str, Any]) -> Manifest:
        """Of a new store of these samples. Shards are of `shard_size` rows, fewer where they would be more than 256 MiB."""
        rows = max(1, min(shard_size, SHARD_BYTES // max(1, self.row_bytes(run))))
        return Manifest(
            recipe=Recipe(self.recipe, run),
            graph_digest=self.graph_digest,
            engine=self.engine,
            batch_size=batch_size,
            rows=len(source),
            samples=(SamplesPart(rows=len(source), digest=samples_digest(columns)),),
            classes=source.classes,
            taps=self.taps,
            shards=cut(len(source), rows),
            shard_rows=rows,
            versions=self.versions,
            options=options,
        )

    def row_bytes(self, run: RunRecipe) -> int:
        """Bytes of one row's features."""
        return sum(int(np.prod(shape)) for shape in self.taps.values()) * np.dtype(DTYPES[run.store_dtype]).itemsize

    def _named(self) -> dict[str, Any]:
        return {
            **{f"engine {key}": value for key, value in self.engine.items()},
            "graph digest": self.graph_digest,
            **{f"version of {key}": value for key, value in self.versions.items()},
            "fingerprint of the graph": self.recipe.fingerprint,
            "taps": {name: tuple(shape) for name, shape in self.taps.items()},
        }


def recorded_plans(store: Path) -> dict[str, str]:
    """SHA-256 of the plans that a store was begun with, by the part of their graph; none where there is no store yet, or an engine without plans.

    Raises StoreCorrupt.
    """
    try:
        engine = read_manifest(store).engine
    except StoreNotFound:
        return {}
    found = {name.removesuffix("plan").strip() or "model": value for name, value in engine.items() if name == "plan" or name.endswith(" plan")}
    return {part: value.rpartition(" ")[2] for part, value in found.items()}


def _versions(engine: str) -> dict[str, str]:
    """Versions of the libraries that a feature's bytes depend on."""
    found = {}
    for name in ("difffeat", "numpy", "pillow", "tokenizers", *_RUNTIMES.get(engine, ())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
