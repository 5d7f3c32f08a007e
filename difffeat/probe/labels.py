"""What a probe learns to tell apart: multi-hot rows, class numbers of named classes, or one value of any kind for each sample.

With the names of the classes given, labels are a store's: multi-hot [n, C] or class numbers [n]. Without, they are read as scikit-learn reads
them: [n, C] of 0 and 1 is multi-label, [n] is one class a sample whatever its value is. In multi-hot labels -1 says that nobody knows whether
this sample has this class; such cells take no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from difffeat.errors import ProbeError
from difffeat.probe.data import as_multi_hot
from difffeat.probe.inputs import is_frame, is_sparse, is_tensor, plain

MULTILABEL, BINARY, MULTICLASS = "multilabel", "binary", "multiclass"

LABEL_LIMIT = 2**33
"""So many cells of labels [n, C] are the most that is tried; more classes than that are ids by mistake."""


@dataclass(frozen=True)
class Labels:
    """**Fields:** `positive` bool [n, K], K being 1 for two classes of which each sample has one, else their number; `known` bool [n, K], or
    None where all is known; `target`: multilabel, binary or multiclass; `classes`: names, or the sorted values of single labels;
    `dtype` of multi-hot labels without names.
    """

    positive: np.ndarray
    known: np.ndarray | None
    target: str
    classes: tuple[str, ...] | np.ndarray
    dtype: Any = np.uint8

    def __len__(self) -> int:
        return len(self.positive)

    def of(self, rows: np.ndarray) -> Labels:
        """Those of some rows."""
        return Labels(self.positive[rows], None if self.known is None else self.known[rows], self.target, self.classes, self.dtype)


def read_labels(y: Any, classes: Sequence[str] | None = None, *, owner: str = "a probe") -> Labels:
    """Labels of a fit. Raises ProbeError (a ValueError) on what cannot be labels, with the reason."""
    if y is None:
        raise ProbeError(f"there are no labels: {owner} requires y to be passed, but the target y is None")
    array = _as_array(y)
    if classes is not None:
        names = class_names(classes)
        return _named(array, names)
    if array.ndim == 2 and array.shape[1] == 1:
        from sklearn.utils import column_or_1d

        array = column_or_1d(array, warn=True)
    if array.ndim == 1:
        return _single(array)
    positive, known = split_unknown(array)
    names = tuple(str(c) for c in range(positive.shape[1]))
    return Labels(positive, known, MULTILABEL, names, array.dtype if array.dtype.kind in "biuf" else np.uint8)


def read_more(y: Any, target: str, classes: tuple[str, ...] | np.ndarray) -> Labels:
    """Labels of rows beside those of the fit (validation), in its classes."""
    if y is None:
        raise ProbeError("there are no labels of the validation rows")
    array = _as_array(y)
    if target == MULTILABEL:
        return _named(array, tuple(str(name) for name in classes))
    values = single_values(array)
    places = np.searchsorted(classes, values) if values.dtype.kind == np.asarray(classes).dtype.kind or values.dtype.kind in "biuf" else None
    if places is None or (np.asarray(classes)[np.minimum(places, len(classes) - 1)] != values).any():
        raise ProbeError(f"the validation rows have classes that the training rows lack; those have {_some(np.asarray(classes))}")
    return Labels(_columns(places, len(classes)), None, target, classes)


def single_values(y: Any) -> np.ndarray:
    """Single labels [n] of bool, int, float or text, whatever held them. Raises ProbeError on anything else, and for missing values."""
    array = _as_array(y)
    return _checked_values(array.ravel() if array.ndim == 2 and array.shape[1] == 1 else array)


def class_names(classes: Any) -> tuple[str, ...]:
    """Names of classes as a tuple. Raises ProbeError unless they are texts, each once."""
    if isinstance(classes, str | bytes):
        raise ProbeError(f"classes must be a list of names, got the single text {classes!r}")
    names = tuple(classes)
    for name in names:
        if not isinstance(name, str):
            raise ProbeError(f"names of classes must be texts, got {name!r}. Use [str(name) for name in classes].")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ProbeError(f"two classes have the name {twice!r}: rename one, or join their columns")
    return tuple(str(name) for name in names)


def split_unknown(labels: Any, name: str = "labels") -> tuple[np.ndarray, np.ndarray | None]:
    """(positive bool [n, C], known bool [n, C] or None) of multi-hot labels of 0 and 1, with -1 where a class is unknown."""
    array = np.asarray(labels)
    if array.dtype.kind == "O":
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError):
            raise ProbeError(f"{name} [n, C] must be 0 or 1, or -1 for unknown; got other things than numbers") from None
    if array.ndim != 2 or array.dtype.kind not in "if" or not (array == -1).any():
        return as_multi_hot(array, name), None
    known = array != -1
    if not known.any():
        raise ProbeError(f"all {name} are -1, unknown: nothing can be learned")
    if not (array == 0).any():
        raise ProbeError(f"{name} hold -1 and 1 but no 0. Here -1 means unknown, not absent: pass labels > 0 if it means absent.")
    return as_multi_hot(np.where(known, array, 0), name), known


def _named(array: np.ndarray, names: tuple[str, ...]) -> Labels:
    if array.ndim == 1:
        numbers = _numbers(array, names)
        _check_size(len(numbers), len(names))
        return Labels(np.arange(len(names)) == numbers[:, None], None, MULTILABEL, names)
    positive, known = split_unknown(array)
    if positive.shape[1] != len(names):
        raise ProbeError(f"there are {len(names)} names for {positive.shape[1]} classes")
    return Labels(positive, known, MULTILABEL, names)


def _numbers(array: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    values = _checked_values(array)
    if values.dtype.kind == "U":
        places = {name: place for place, name in enumerate(names)}
        other = next((value for value in values.tolist() if value not in places), None)
        if other is not None:
            raise ProbeError(f"label {other!r} was found, but it is not one of the {len(names)} classes")
        return np.array([places[value] for value in values.tolist()], np.int64)
    if values.dtype.kind == "b" or values.min() < 0:
        raise ProbeError("labels must be multi-hot [n, C], or class numbers [n] counted from 0")
    if values.max() >= len(names):
        raise ProbeError(f"label {int(values.max())} was found, but there are {len(names)} classes")
    return values.astype(np.int64)


def _single(array: np.ndarray) -> Labels:
    values = _checked_values(array)
    classes, places = np.unique(values, return_inverse=True)
    if len(classes) < 2:
        raise ProbeError(f"a classifier needs samples of at least 2 classes, but the data contains only one class: {classes.tolist()[0]!r}")
    _check_size(len(values), len(classes))
    return Labels(_columns(places, len(classes)), None, BINARY if len(classes) == 2 else MULTICLASS, classes)


def _columns(places: np.ndarray, n_classes: int) -> np.ndarray:
    return places[:, None] == 1 if n_classes == 2 else np.arange(n_classes) == places[:, None]


def _check_size(n: int, n_classes: int) -> None:
    if n * n_classes > LABEL_LIMIT:
        raise ProbeError(f"{n_classes} classes for {n} samples are too many to tell apart. Are these ids rather than labels?")


def _as_array(y: Any) -> np.ndarray:
    """Labels as an array of one of NumPy's types."""
    value = plain(y, "labels")
    if is_sparse(value):
        _check_size(*value.shape)
        return value.toarray()
    if is_frame(value) and not isinstance(value, np.ndarray):
        value = value.to_numpy()
    if isinstance(value, str | bytes | dict | set):
        raise ProbeError(f"labels must be a list or an array, got {type(value).__name__}")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        raise ProbeError(
            "labels must be [n] or [n, C], but these lists differ in length. Lists of class names: sklearn.preprocessing.MultiLabelBinarizer."
        ) from None
    if array.dtype.names is not None:
        raise ProbeError(f"labels have the fields {', '.join(array.dtype.names)}: pass one of them")
    if array.dtype.kind == "U" and isinstance(value, list | tuple) and not all(isinstance(part, str | list | tuple | np.ndarray) for part in value):
        raise ProbeError("labels mix texts with other things: make all of them texts")
    return array


def _checked_values(array: np.ndarray) -> np.ndarray:
    """Single labels [n] of bool, int, float or text. Raises ProbeError on anything else, and for missing values."""
    if array.ndim != 1:
        raise ProbeError(f"labels must be one value a sample [n] or multi-hot [n, C]; y should be a 1d array, got shape {list(array.shape)}")
    if len(array) == 0:
        raise ProbeError("there are no labels: y has 0 sample(s)")
    if array.dtype.kind in "OT":
        array = _of_objects(array.tolist())
    if array.dtype.kind in "f":
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array))[0])
            raise ProbeError(f"Input y contains NaN or infinity, first in row {row}: every sample needs a label")
        if (array != np.floor(array)).any():
            raise ProbeError("Unknown label type: continuous. Labels are classes; these are numbers with fractions, as of a regression.")
        if array.dtype.itemsize > 8:
            array = array.astype(np.float64)
    elif array.dtype.kind not in "biuU":
        raise ProbeError(f"Unknown label type: {array.dtype}. Labels must be texts, whole numbers or truth values.")
    return array


def _of_objects(values: list[Any]) -> np.ndarray:
    """Python objects as an array of one kind."""
    for row, value in enumerate(values):
        if value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value):
            raise ProbeError(f"the label of row {row} is missing ({value}): every sample needs a label. Leave such rows out.")
    kinds = {str if isinstance(v, str) else bool if isinstance(v, bool | np.bool_) else type(v) for v in values}
    if is_tensor(values[0]) or kinds & {list, tuple, set, frozenset, dict, np.ndarray}:
        raise ProbeError("labels must be one value a sample [n] or multi-hot [n, C]. Lists of classes: sklearn.preprocessing.MultiLabelBinarizer.")
    if len(kinds) > 1 and (str in kinds or bool in kinds):
        raise ProbeError(f"labels mix {', '.join(sorted(kind.__name__ for kind in kinds))}: make all of them one")
    return np.array(values) if str not in kinds else np.array(values, dtype=str)


def _some(classes: np.ndarray) -> str:
    first = ", ".join(repr(value) for value in classes[:3].tolist())
    return first + (", ..." if len(classes) > 3 else "")
