"""What probes read: feature matrices in pieces, labels, and the shape of a feature store.

Probes never need the whole matrix at once, and never an engine: a NumPy array, a memory map, or any object with `.shape` that gives
ndarrays for a slice or an integer array will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from difffeat.errors import ProbeError
from difffeat.probe.inputs import numbers

CHUNK_BYTES = 16 * 2**20
"""Features are read in pieces of about this many bytes of float32."""

UNKNOWN = -1
"""In multi-hot labels of whole numbers: nobody knows whether this row has this class. Such a cell trains nothing and is scored by nothing."""

_LABEL_ROWS = 8192
"""Labels are looked at so many rows at a time: of a thousand classes and a million samples every copy is a gigabyte."""


@runtime_checkable
class FeatureMatrix(Protocol):
    """Rows of features [n, D] which need not lie in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, D)."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """The rows of a slice or an integer array, as an ndarray [m, D]."""
        ...


class FeatureStore(Protocol):
    """The part of `difffeat.runtime.store.Store` that probes read."""

    @property
    def taps(self) -> Sequence[str]:
        """Names of the taps, as in `b12/t30`."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """Sample ids, one a row."""
        ...

    @property
    def valid(self) -> np.ndarray:
        """Bool [n]; False where a sample went to quarantine and its features mean nothing."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """uint8 [n, C] multi-hot, or None."""
        ...

    @property
    def labelled(self) -> np.ndarray:
        """Bool [n]; False where nobody knows a sample's labels, and its row of `labels` means nothing."""
        ...

    @property
    def inputs(self) -> Any:
        """SHA-256 of what was read for each row, uint8 [n, 32]."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Names of the C classes."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the recipe."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Plain JSON types, the recipe among them."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, tap: str, /) -> Any:
        """The features of one tap, a `FeatureMatrix`."""
        ...


class RowsOf:
    """Some rows of a feature matrix, in an order of their own, read when they are looked at: a `FeatureMatrix` [m, D]."""

    def __init__(self, matrix: FeatureMatrix, rows: np.ndarray) -> None:
        row_count(matrix, rows)
        self._matrix, self._rows = matrix, rows

    @property
    def origin(self) -> Any:
        """Which features they are, as the matrix says; None where it does not."""
        return getattr(self._matrix, "origin", None)

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, D)."""
        return len(self._rows), *self._matrix.shape[1:]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any, /) -> np.ndarray:
        """float32 [k, D]."""
        return take(self._matrix, self._rows[index])


def matrix_shape(x: FeatureMatrix) -> tuple[int, int]:
    """(n, D) of a feature matrix. Raises ProbeError when it is not two-dimensional or empty."""
    if not hasattr(x, "shape"):
        raise ProbeError(f"features must be an array [n, D] or a store's features, got {type(x).__name__}. Use np.asarray(features, np.float32).")
    shape = tuple(int(size) for size in x.shape)
    if len(shape) != 2:
        raise ProbeError(f"a probe needs features [n, D], got shape {list(shape)}. Extract with --pooling mean, max or grid.")
    if 0 in shape:
        raise ProbeError(f"there are no features to read: shape {list(shape)}")
    return shape[0], shape[1]


def row_count(x: FeatureMatrix, rows: np.ndarray | None) -> int:
    """How many rows `rows` selects of `x` (all when None). Raises ProbeError when some lie outside."""
    n, _ = matrix_shape(x)
    if rows is None:
        return n
    if not isinstance(rows, np.ndarray):
        raise ProbeError(f"rows must be an integer array, got {type(rows).__name__}. Use np.asarray(rows), or np.flatnonzero on a mask.")
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise ProbeError(f"rows must be a list of row numbers, got {rows.dtype} of shape {list(rows.shape)}. Use np.flatnonzero on a mask.")
    if len(rows) == 0:
        raise ProbeError("no rows were selected")
    if rows.min() < 0 or rows.max() >= n:
        raise ProbeError(f"row {int(rows.max() if rows.max() >= n else rows.min())} was asked for, but there are {n} rows of features")
    return len(rows)


def take(x: FeatureMatrix, rows: np.ndarray) -> np.ndarray:
    """The features of `rows`, [m, D] of float32, or of float64 where `x` holds a wider type than float32."""
    return numbers(x[rows])


def row_chunks(x: FeatureMatrix, rows: np.ndarray | None = None, size: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """(start, features [m, D]) over the selected rows, in order; `size` rows at a time, about `CHUNK_BYTES` when None. Types as in `take`.

    Raises ProbeError when a feature is NaN or infinite.
    """
    count, (_, width) = row_count(x, rows), matrix_shape(x)
    size = size or max(1, CHUNK_BYTES // (4 * width))
    for start in range(0, count, size):
        stop = min(start + size, count)
        chunk = numbers(x[start:stop]) if rows is None else take(x, rows[start:stop])
        if not np.isfinite(chunk).all():
            bad = start + int(np.flatnonzero(~np.isfinite(chunk).all(axis=1))[0])
            row = bad if rows is None else int(rows[bad])
            raise ProbeError(f"the features of row {row} hold NaN or infinity. Leave out the rows where store.valid is False.")
        yield start, chunk


def known_cells(labels: Any) -> np.ndarray | None:
    """Bool [n, C]: false where multi-hot labels hold −1, which says that nobody knows whether this row has this class; None where nothing is
    unknown.
    """
    array = np.asarray(labels)
    if array.ndim != 2 or array.dtype == bool or not np.issubdtype(array.dtype, np.number) or not (array == UNKNOWN).any():
        return None
    return array != UNKNOWN


def positive_cells(labels: Any, name: str = "labels") -> np.ndarray:
    """Bool [n, C]: where it is known that a row has a class. Raises ProbeError unless the labels are [n, C] of 0, 1, and −1 for unknown."""
    known = known_cells(labels)
    return as_multi_hot(labels, name) if known is None else as_multi_hot(np.where(known, np.asarray(labels), 0), name)


def as_multi_hot(labels: Any, name: str = "labels") -> np.ndarray:
    """Labels as bool [n, C]. Raises ProbeError unless they are [n, C] of zeros and ones."""
    array = np.asarray(labels)
    if array.ndim != 2 or 0 in array.shape:
        raise ProbeError(f"{name} must be multi-hot [n, C], got shape {list(array.shape)}")
    if array.dtype != bool:
        for start in range(0, len(array), _LABEL_ROWS):
            piece = array[start : start + _LABEL_ROWS]
            other = (piece != 0) & (piece != 1)
            if other.any():
                raise ProbeError(f"{name} must be 0 or 1; found {piece[other][0]!s}")
    return array.astype(bool)


def rarest_class(positive: np.ndarray) -> np.ndarray:
    """The class of each row that fewest rows have, of equally rare ones the first, int64 [n]; C for rows without any. `positive` is bool [n, C]."""
    n_classes = positive.shape[1]
    by_frequency = np.argsort(positive.sum(axis=0), kind="stable")
    result = np.full(len(positive), n_classes)
    for start in range(0, len(positive), _LABEL_ROWS):
        piece = positive[start : start + _LABEL_ROWS][:, by_frequency]
        found = piece.any(axis=1)
        result[start : start + len(piece)][found] = by_frequency[piece[found].argmax(axis=1)]
    return result


def one_hot(labels: Any, n_classes: int | None = None) -> np.ndarray:
    """Multi-hot bool [n, C] as it is; class numbers int [n] become one-hot. Raises ProbeError on anything else."""
    if labels is None:
        raise ProbeError("there are no labels: this store was extracted from a source without them")
    array = np.asarray(labels)
    if array.ndim != 1:
        return as_multi_hot(array)
    if len(array) == 0 or not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
        raise ProbeError("labels must be multi-hot [n, C], or class numbers [n] counted from 0")
    if n_classes is not None and array.max() >= n_classes:
        raise ProbeError(f"label {int(array.max())} was found, but there are {n_classes} classes")
    if n_classes is None and array.max() > 16 * len(array) + 1024:
        raise ProbeError(f"label {int(array.max())} of {len(array)} samples is no class number counted from 0: number the classes without gaps")
    return np.arange(n_classes or int(array.max()) + 1) == array[:, None]
