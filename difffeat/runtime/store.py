"""Reading a feature store: memory-mapped, typed, executing nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import ConfigError, StoreCorrupt, StoreIncomplete
from difffeat.recipe import Recipe
from difffeat.runtime.features import Features, Origin, map_array
from difffeat.runtime.manifest import Manifest, Receipt, read_manifest, read_receipt, shard_path
from difffeat.runtime.table import read_samples

_SAFETENSORS_TYPES = {"F16": "float16", "F32": "float32", "BOOL": "bool", "U8": "uint8"}
DIGEST_BYTES = 32

Layout = dict[str, tuple[str, tuple[int, ...], int]]
"""Arrays of a shard by name: type, shape, and the byte at which each begins."""


class Store:
    """A finished feature store. Open with `Store.open`."""

    def __init__(self, path: Path, manifest: Manifest, receipts: list[Receipt | None]) -> None:
        self.path, self._manifest, self._receipts = path, manifest, receipts
        self._layouts: dict[int, Layout] = {}

    @classmethod
    def open(cls, path: str | Path, *, partial: bool = False) -> Store:
        """Open for reading; sizes of all shards are checked, their digests are not (see `verify`).

        Raises StoreNotFound, StoreCorrupt, StoreIncomplete (unless `partial`).
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        receipts = [read_receipt(folder, manifest, shard) for shard in range(len(manifest.shards))]
        missing = [shard for shard, receipt in enumerate(receipts) if receipt is None]
        if missing and not partial:
            raise StoreIncomplete(
                f"{folder} lacks {len(missing)} of {len(receipts)} shards. Run the same difffeat extract command again: it computes only those."
            )
        for shard, receipt in enumerate(receipts):
            if receipt is not None:
                _check_size(shard_path(folder, shard, receipt.generation), receipt)
        return cls(folder, manifest, receipts)

    def __len__(self) -> int:
        return self._manifest.rows

    def __getitem__(self, tap: str) -> Features:
        if tap not in self._manifest.taps:
            raise ConfigError(f"{self.path} has no tap {tap!r}; it has {', '.join(self.taps)}")
        shape, dtype = self._manifest.taps[tap], self._manifest.dtype
        origin = Origin(tap, self.fingerprint, "text" if self.recipe.graph.takes_text else "image")
        return Features([self._rows(shard, tap, shape, dtype) for shard in range(len(self._receipts))], lambda: self._valid, origin)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of all taps, timestep-major as in the recipe (the manifest's JSON has them sorted)."""
        place = {name: index for index, name in enumerate(self.recipe.graph.taps)}
        return tuple(sorted(self._manifest.taps, key=lambda name: place.get(name, len(place))))

    @property
    def recipe(self) -> Recipe:
        """Graph recipe and run recipe."""
        return self._manifest.recipe

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the recipe."""
        return self.recipe.fingerprint

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as plain JSON types."""
        return self._manifest.to_dict()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the label columns; empty without labels."""
        return self._manifest.classes

    @property
    def ids(self) -> list[str]:
        """Sample ids in row order."""
        return self._samples["id"]

    @property
    def captions(self) -> list[list[str]]:
        """Captions of each row."""
        return self._samples["captions"]

    @property
    def images(self) -> list[str | None]:
        """Path of each row's image as its source names it; None where there is none."""
        return self._samples["image"]

    @property
    def label_names(self) -> list[list[str] | None]:
        """Class names of each row; None where the source had none."""
        return self._samples["labels"]

    @property
    def unknown_names(self) -> list[list[str]]:
        """Names of the classes of each row of which alone nobody knows whether it has them; of rows without any labels see `labelled`."""
        return self._samples["unknown"]

    @property
    def labels(self) -> np.ndarray | None:
        """Multi-hot labels, uint8 [n, C]; None where the source had none. 0 says that a sample lacks a class, or that nobody knows: see `labelled`
        for whole rows, `label_known` for single cells, `targets` for all in one.
        """
        return self._labels

    @property
    def label_known(self) -> np.ndarray | None:
        """Bool [n, C]: whether it is known that a sample has a class or lacks it. None where the labels of every labelled row are known for all
        classes, so that `labelled` says everything.
        """
        return self._label_known

    @property
    def targets(self) -> np.ndarray | None:
        """What probes take as labels, int8 [n, C]: 1, 0, and −1 where nobody knows; None where the source had no labels."""
        if self._labels is None:
            return None
        known = self._labelled[:, None] if self._label_known is None else self._label_known
        return np.where(known, self._labels, -1).astype(np.int8)

    @property
    def labelled(self) -> np.ndarray:
        """Bool [n]; false where the source had no labels for the sample, which is not the same as a sample that has none of the classes."""
        return self._labelled

    @property
    def usable(self) -> np.ndarray:
        """Numbers of the rows to train and to score on, int64 [m]: valid, and their labels known."""
        return np.flatnonzero(self._valid & self._labelled)

    @property
    def valid(self) -> np.ndarray:
        """Bool [n]; false where a sample went to quarantine or, in an unfinished store, its shard is not there yet (its features are zero)."""
        return self._valid

    @property
    def inputs(self) -> Features:
        """SHA-256 of what was read for each row (an image file, the tokens of a caption), uint8 [n, 32]; zeros where nothing could be read."""
        return Features([self._rows(shard, "inputs", (DIGEST_BYTES,), "uint8") for shard in range(len(self._receipts))])

    @property
    def sizes(self) -> list[int]:
        """Bytes of each row's image file; −1 where there is none, or nobody knew before it was read."""
        return self._samples["bytes"]

    @cached_property
    def _labels(self) -> np.ndarray | None:
        if not self.classes:
            return None
        column = {name: index for index, name in enumerate(self.classes)}
        labels = np.zeros((len(self), len(column)), np.uint8)
        for row, names in enumerate(self._samples["labels"]):
            labels[row, [column[name] for name in names or ()]] = 1
        return labels

    @cached_property
    def _label_known(self) -> np.ndarray | None:
        unknown = self._samples["unknown"]
        if not self.classes or not any(unknown):
            return None
        column = {name: index for index, name in enumerate(self.classes)}
        known = np.repeat(self._labelled[:, None], len(column), axis=1)
        for row, names in enumerate(unknown):
            known[row, [column[name] for name in names]] = False
        return known

    @cached_property
    def _labelled(self) -> np.ndarray:
        return np.array([names is not None for names in self._samples["labels"]], bool)

    @cached_property
    def _valid(self) -> np.ndarray:
        return np.asarray(Features([self._rows(shard, "valid", (), "bool") for shard in range(len(self._receipts))]))

    @property
    def quarantined(self) -> list[dict[str, Any]]:
        """Row, id, stage, error and message of every sample that was set aside."""
        return [dict(entry) for receipt in self._receipts if receipt is not None for entry in receipt.quarantined]

    def is_finished(self, shard: int) -> bool:
        """Whether a shard has its receipt."""
        return self._receipts[shard] is not None

    @property
    def finished_shards(self) -> int:
        """How many shards have their receipt."""
        return sum(receipt is not None for receipt in self._receipts)

    def shards(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(first row, arrays by tap and `valid`) of each finished shard with rows in start..stop, in order; mapped only while it is looked at."""
        end = len(self) if stop is None else stop
        for shard, (first, rows) in enumerate(zip(self._manifest.first_rows, self._manifest.shards, strict=True)):
            if self._receipts[shard] is not None and first < end and first + rows > start:
                yield first, self._shard(shard)

    @cached_property
    def _samples(self) -> dict[str, list[Any]]:
        return read_samples(self.path, self._manifest, self._receipts)

    def _rows(self, shard: int, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """An array of a shard; zeros that take no memory where the shard is not there yet, so that every row keeps its number."""
        if self._receipts[shard] is None:
            return np.broadcast_to(np.zeros((), dtype), (self._manifest.shards[shard], *shape))
        path = self._path(shard)
        if shard not in self._layouts:  # a header is read once: it lists every tap, and a store may have thousands of shards
            self._layouts[shard] = read_layout(path, self._manifest, self._manifest.shards[shard])
        dtype, shape, offset = self._layouts[shard][name]
        return map_array(path, dtype, offset, shape)

    def _shard(self, shard: int) -> dict[str, np.ndarray]:
        return map_shard(self._path(shard), self._manifest, self._manifest.shards[shard])

    def _path(self, shard: int) -> Path:
        receipt = self._receipts[shard]
        return shard_path(self.path, shard, 0 if receipt is None else receipt.generation)


def map_shard(path: Path, manifest: Manifest, rows: int) -> dict[str, np.ndarray]:
    """The arrays of a shard, memory-mapped: every tap, `valid` bool [n], and `inputs` uint8 [n, 32], the SHA-256 of what was read for each row.

    Raises StoreCorrupt unless they are exactly what the manifest says.
    """
    return {name: map_array(path, dtype, offset, shape) for name, (dtype, shape, offset) in read_layout(path, manifest, rows).items()}


def read_layout(path: Path, manifest: Manifest, rows: int) -> Layout:
    """Where the arrays of a shard lie, from its header. Raises StoreCorrupt unless they are exactly what the manifest says."""
    expected = {name: (manifest.dtype, (rows, *shape)) for name, shape in manifest.taps.items()}
    expected |= {"valid": ("bool", (rows,)), "inputs": ("uint8", (rows, DIGEST_BYTES))}
    header, start = _header(path)
    size, layout = path.stat().st_size, {}
    for name, (dtype, shape) in expected.items():
        entry = header.get(name)
        if not isinstance(entry, dict) or _SAFETENSORS_TYPES.get(str(entry.get("dtype"))) != dtype or entry.get("shape") != list(shape):
            raise StoreCorrupt(f"{path} does not hold {name} as {dtype} {list(shape)}. Delete it and run the extraction again.")
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        offsets = entry.get("data_offsets")
        if not (
            isinstance(offsets, list)
            and len(offsets) == 2
            and all(type(o) is int for o in offsets)
            and offsets[0] >= 0
            and offsets[1] - offsets[0] == count
        ):
            raise StoreCorrupt(f"{path}: the place of {name} is damaged. Delete it and run the extraction again.")
        if start + offsets[1] > size:
            raise StoreCorrupt(f"{path} ends before {name} does. Delete it and run the extraction again.")
        layout[name] = dtype, shape, start + offsets[0]
    return layout


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors header and where the data begins."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(100_000_000, path.stat().st_size):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise StoreCorrupt(f"{path} is missing although its receipt is there. Run the extraction again: it recomputes this shard only.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreCorrupt(f"{path} has a damaged header ({error}). Delete it and run the extraction again: it recomputes this shard only.") from None
    if not isinstance(header, dict):
        raise StoreCorrupt(f"{path} has a damaged header. Delete it and run the extraction again.")
    return header, 8 + length


def _check_size(path: Path, receipt: Receipt) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != receipt.bytes:
        found = "is missing" if size is None else f"has {size} bytes, its receipt says {receipt.bytes}"
        raise StoreCorrupt(f"{path} {found}. Run the extraction again: it recomputes this shard only.")


def verify(path: str | Path) -> list[str]:
    """Read and hash everything; a line for each file that is not what it should be, ending with the command that mends it. Empty when all is well.

    Raises StoreNotFound and StoreCorrupt when the manifest itself cannot be read.
    """
    from difffeat.runtime.check import check  # which reads shards with what stands above

    return [str(problem) for problem in check(path)]
