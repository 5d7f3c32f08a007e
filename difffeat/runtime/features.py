"""One tap of a store as an array whose shards stay on disk until they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import ConfigError, StoreCorrupt


def map_array(path: Path | str, dtype: Any, offset: int, shape: tuple[int, ...], mode: Any = "r") -> np.ndarray:
    """An array within a file, memory-mapped: `r` read-only, `c` writable in memory alone. Raises StoreCorrupt where the file has gone or shrunk."""
    try:
        return np.memmap(path, dtype=dtype, mode=mode, offset=offset, shape=shape)
    except (OSError, ValueError) as error:
        raise StoreCorrupt(f"{path} cannot be read any more ({error}). Run the extraction again: it recomputes this shard only.") from None


@dataclass(frozen=True)
class Origin:
    """Which features a matrix holds: the tap, the fingerprint of the recipe, and whether they are of an image or of text."""

    tap: str
    fingerprint: str
    modality: str


class Features:
    """One tap of a store: behaves like a read-only array [n, ...] whose shards stay on disk until they are looked at.

    **Arguments:** `parts` the shards' arrays in order; `valid` gives the store's `valid`, for those who must not take zeros for features; `origin`
    says which features they are, for those who must not take others for them.
    """

    def __init__(self, parts: list[np.ndarray], valid: Callable[[], np.ndarray] | None = None, origin: Origin | None = None) -> None:
        self._parts, self._valid, self.origin = parts, valid, origin
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape: tuple[int, ...] = (int(self._ends[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype
        self.ndim = len(self.shape)

    @property
    def valid(self) -> np.ndarray | None:
        """Bool [n]: whether a row holds features, or zeros in place of a sample that is in quarantine. None where that has no meaning."""
        return None if self._valid is None else self._valid()

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False and (len(self._parts) > 1 or dtype not in (None, self.dtype)):
            raise ValueError("features of several shards, or of another type, cannot be an array without a copy")
        whole = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        return np.array(whole, dtype=dtype) if copy or dtype not in (None, self.dtype) else whole

    def __getitem__(self, key: Any) -> np.ndarray:
        """As in NumPy, reading only the rows that are asked for: numbers, slices, lists or arrays of numbers, masks, for the rows and further axes.

        Raises IndexError for what lies outside, ConfigError for what is no place in an array (None, a single truth value, text, fractions).
        """
        rows, *rest = self._by_axis(key)
        if isinstance(rows, slice):
            return self._gather(np.arange(len(self))[rows])[(slice(None), *rest)]
        numbers, *others = self._places(rows)
        gathered = self._gather(numbers.ravel())
        if numbers.ndim == 1 and not others and all(isinstance(part, slice | int | np.integer) or part is ... for part in rest):
            return gathered[(slice(None), *rest)] if rest else gathered
        # What stands for the rows keeps its shape, so that it meets the other axes' numbers as it would in NumPy.
        return gathered[(np.arange(numbers.size).reshape(numbers.shape), *others, *rest)]

    def chunks(self, rows: int = 65536) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows [≤ rows, ...]) in order; never more than that in memory."""
        for end, part in zip(self._ends, self._parts, strict=True):
            for start in range(0, len(part), rows):
                yield int(end) - len(part) + start, part[start : start + rows]

    def torch(self) -> Any:
        """A torch tensor. Of a single shard it is a memory map of its own, read when it is looked at; what is written to it stays in memory."""
        import torch

        part = self._parts[0]
        if len(self._parts) == 1 and isinstance(part, np.memmap) and part.filename is not None:
            return torch.from_numpy(map_array(part.filename, part.dtype, part.offset, part.shape, "c"))
        array = np.asarray(self)
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def _by_axis(self, key: Any) -> tuple[Any, ...]:
        """The index of each axis, that of the rows first."""
        parts = key if isinstance(key, tuple) else (key,)
        if any(part is None or (_is_mask(part) and np.ndim(part) == 0) for part in parts):
            raise ConfigError("features take rows by number, slice, list of numbers or mask, not None and not a single True or False")
        if not parts or parts[0] is ...:
            taken = sum(np.ndim(part) if _is_mask(part) else 1 for part in parts[1:])
            parts = (*[slice(None)] * (self.ndim - taken), *parts[1:])
        if len(parts) > self.ndim + sum(part is ... for part in parts):
            raise IndexError(f"{len(parts)} indices for features of shape {list(self.shape)}")
        return parts

    def _places(self, rows: Any) -> tuple[np.ndarray, ...]:
        """Row numbers 0..n-1, int64 of whatever shape; for a mask over several axes also the places along those."""
        try:
            array = np.asarray(rows)
        except ValueError:
            raise ConfigError("rows must be numbers or a mask; these lists differ in length") from None
        if _is_mask(array):
            if array.shape != self.shape[: array.ndim]:
                raise IndexError(f"a mask of shape {list(array.shape)} does not fit features of shape {list(self.shape)}")
            return array.nonzero()
        if array.size == 0 and not isinstance(rows, np.ndarray):
            array = array.astype(np.int64)
        if not np.issubdtype(array.dtype, np.integer):
            raise ConfigError(f"rows must be whole numbers, a slice or a mask; got {array.dtype}")
        outside = (array >= len(self)) | (array < -len(self))
        if outside.any():
            raise IndexError(f"row {array[outside][0]} of {len(self)}")
        array = array.astype(np.int64)
        return (np.where(array < 0, array + len(self), array),)

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        owner = np.searchsorted(self._ends, rows, side="right")
        for index in np.unique(owner):
            here = owner == index
            out[here] = self._parts[index][rows[here] - (self._ends[index] - len(self._parts[index]))]
        return out


def _is_mask(part: Any) -> bool:
    """Whether an index is a truth value, or an array or list of them."""
    while isinstance(part, list) and part:
        part = part[0]
    return isinstance(part, bool | np.bool_) or (isinstance(part, np.ndarray) and part.dtype == np.dtype(bool))
