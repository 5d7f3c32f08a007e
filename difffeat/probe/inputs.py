"""What scikit-learn's and torch's users hand over as features or labels, turned into what NumPy reads.

Tensors (whatever type, device or layout; with or without gradients), data frames and series, sparse matrices and masked arrays. Nothing here
imports torch or pandas: what is no array is recognised by what it can do.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from difffeat.errors import ProbeError


class FeatureTypeError(ProbeError, TypeError):
    """Features of a type that holds no numbers."""


class SparseRows:
    """Rows of a sparse matrix, made dense when they are looked at: a `FeatureMatrix` [n, D]."""

    def __init__(self, matrix: Any) -> None:
        self._matrix = matrix.tocsr()
        self.shape: tuple[int, int] = self._matrix.shape
        self.dtype = self._matrix.dtype

    def __getitem__(self, index: Any, /) -> np.ndarray:
        return self._matrix[index].toarray()


def is_sparse(value: Any) -> bool:
    """Whether this is one of SciPy's sparse matrices or arrays."""
    return hasattr(value, "tocsr") and hasattr(value, "toarray")


def is_tensor(value: Any) -> bool:
    """Whether this is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_frame(value: Any) -> bool:
    """Whether this is a data frame or a series, of pandas or of a library that looks like it."""
    return hasattr(value, "iloc") or (hasattr(value, "to_numpy") and not hasattr(value, "tocsr"))


def is_read_in_pieces(value: Any) -> bool:
    """Whether rows are looked up in it rather than copied out of it: a store's features, a file's array."""
    known = isinstance(value, np.ndarray) or is_sparse(value) or is_tensor(value) or is_frame(value) or hasattr(value, "columns")
    return not known and hasattr(value, "shape") and hasattr(value, "__getitem__")


def plain(value: Any, name: str) -> Any:
    """Tensors, lists of them and masked arrays as NumPy arrays; all else as it is. Raises ProbeError for missing or unreadable values."""
    if is_tensor(value):
        return _tensor(value, name)
    if isinstance(value, list | tuple) and any(is_tensor(part) for part in value):
        return np.stack([np.asarray(plain(part, name)) for part in value])
    if isinstance(value, np.ma.MaskedArray):
        missing = np.ma.getmaskarray(value)
        if missing.any():
            raise ProbeError(f"{int(missing.sum())} values of the {name} are masked. Fill them in, or leave those rows out.")
        return value.data
    return value


def rows_of(value: Any, name: str = "features") -> Any:
    """What rows can be looked up in: an array, a store's features, or what was made of a data frame, a tensor, a list or a sparse matrix."""
    if is_read_in_pieces(value):
        return value
    value = plain(value, name)
    if is_sparse(value):
        return SparseRows(value)
    if isinstance(value, list | tuple) or not isinstance(value, np.ndarray):
        try:
            value = np.asarray(value)
        except (TypeError, ValueError) as error:
            raise ProbeError(f"the {name} are no array [n, D]: {error}") from None
    return value


def numbers(piece: Any, name: str = "features") -> np.ndarray:
    """Rows that were looked up, as float32, or float64 where the numbers are of a wider type. Raises ProbeError unless they are real numbers."""
    array = np.asarray(plain(piece, name))
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "c":
        raise ProbeError(f"{name} must be real numbers: Complex data not supported")
    if (kind == "f" and size <= 4) or (kind in "iu" and size <= 2) or kind == "b":
        return np.asarray(array, np.float32)
    if kind in "fiu":
        return np.asarray(array, np.float64)
    try:
        if kind in "mM":
            raise TypeError("times are no numbers: give seconds or days since some date")
        return array.astype(np.float64 if kind == "O" else np.float32)
    except (TypeError, ValueError) as error:
        raise FeatureTypeError(f"{name} must be numbers, got {array.dtype}: {error}") from None


def _tensor(value: Any, name: str) -> np.ndarray:
    import torch

    try:
        value = value.detach().to("cpu")
        if value.layout != torch.strided:
            value = value.to_dense()
        if value.is_quantized:
            value = value.dequantize()
        value = value.resolve_conj().resolve_neg()
        narrow = value.is_floating_point() and value.dtype not in (torch.float64, torch.float32, torch.float16)
        return (value.float() if narrow else value).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ProbeError(f"the {name} are a tensor that cannot be read: {error}") from None
