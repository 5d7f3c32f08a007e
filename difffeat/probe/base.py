"""What every fitted probe can do: score, give probabilities, decide, fold, save and load. Each is a scikit-learn classifier.

A probe file is one safetensors file: the tensors, and a JSON text in its metadata. Nothing in it can run code (a pickle can).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError

from difffeat.errors import ConfigError, NotYetAvailable, ProbeError, ProbeWarning
from difffeat.probe.data import FeatureMatrix, matrix_shape, row_chunks, row_count
from difffeat.probe.inputs import FeatureTypeError, SparseRows, is_read_in_pieces, is_sparse, plain
from difffeat.probe.labels import BINARY, MULTICLASS, MULTILABEL, Labels, read_labels, read_more, single_values
from difffeat.probe.optim import sigmoid, simplex, softmax
from difffeat.probe.output import replace_bytes
from difffeat.probe.sameness import require_origin
from difffeat.probe.selection import Examples, check_validation
from difffeat.probe.standardize import Standardizer

FORMAT = "difffeat-probe/1"
METADATA_KEY = "difffeat.probe"
EARLIER = "not known: the file is of an earlier version"

Validation = tuple[FeatureMatrix, Any] | tuple[FeatureMatrix, Any, np.ndarray | None]
"""(features, labels) or (features, labels of the rows, rows) on which a penalty or learning rate is chosen."""


class NotFittedProbe(ProbeError, NotFittedError):
    """A probe was asked for scores before it was fitted."""


class Probe(ClassifierMixin, BaseEstimator):
    """A linear classifier on standardised features: scores = standardised(x) @ weights_ + bias_.

    Labels are a store's, with the names of its classes (`fit(x, y, classes=names)`: multi-hot or class numbers; -1 in multi-hot labels means
    unknown), or scikit-learn's (`fit(x, y)`: multi-hot [n, C], or one value of any kind a sample). Features are arrays, a store's features, data
    frames, tensors or sparse matrices; wide ones are read in pieces.

    **Attributes after fitting:** `weights_` float32 [D, K], `bias_` float32 [K] (K: classes; 1 for single labels of two values), `standardizer_`,
    `classes_` (names, or the sorted values of single labels), `target_` (`multilabel`, `binary` or `multiclass`), `selected_on_` (which rows a
    penalty or learning rate was chosen on), `validation_map_` and `validation_loss_` (one for each candidate), `notes_` (what was warned of),
    `n_features_in_`, `metadata_` (what `load` found). `decision_function` is above 0 where `predict_proba` is above 0.5 (softmax aside).
    """

    kind: ClassVar[str] = ""

    weights_: np.ndarray
    bias_: np.ndarray
    standardizer_: Standardizer
    classes_: tuple[str, ...] | np.ndarray
    target_: str
    selected_on_: str
    validation_map_: list[float]
    validation_loss_: list[float]
    notes_: tuple[str, ...]
    n_features_in_: int
    metadata_: Mapping[str, Any]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        tags.input_tags.sparse = True
        return tags

    @property
    def link(self) -> str:
        """How scores become probabilities: `sigmoid`, `softmax`, or `clip` (score + 0.5 cut to 0..1, for least squares)."""
        return self._link(getattr(self, "target_", MULTILABEL))

    def decision_function(self, x: Any, rows: np.ndarray | None = None) -> np.ndarray:
        """Scores float32 [n, C] of the selected rows, [n] for single labels of two values; rank with these.

        Raises ProbeError before fitting, on another width, and on a store's features that are not those of which the probe's file tells.
        """
        self._check_fitted()
        require_origin(self.metadata_, x)
        x = self._features(x, reset=False)
        scores = np.empty((row_count(x, rows), self._n_columns()), np.float32)
        for start, chunk in row_chunks(x, rows):
            scores[start : start + len(chunk)] = self._scores(self.standardizer_.transform(chunk))
        return scores[:, 0] if self.target_ == BINARY else scores

    def predict_proba(self, x: Any, rows: np.ndarray | None = None) -> np.ndarray:
        """Probabilities [n, C]: of multi-label each class for itself, of single labels rows that sum to 1. Those of a ridge are not calibrated."""
        return self.probabilities(self.decision_function(x, rows))

    def predict(self, x: Any, rows: np.ndarray | None = None, *, threshold: float = 0.5) -> np.ndarray:
        """Multi-hot [n, C] where the probability is above `threshold`; one of `classes_` a sample [n] for single labels.

        A softmax probe whose classes were named gives class numbers int64 [n].
        """
        scores = self.decision_function(x, rows)
        if self.target_ == MULTICLASS:
            return np.asarray(self.classes_)[scores.argmax(axis=1)]
        chances = self.probabilities(scores)
        if self.target_ == BINARY:
            return np.asarray(self.classes_)[(chances[:, 1] > threshold).astype(int)]
        return chances.argmax(axis=1) if self.link == "softmax" else (chances > threshold).astype(self._label_dtype)

    def score(self, x: Any, y: Any, sample_weight: Any = None) -> float:
        """Share of samples that are right: of multi-label those with every known label right (scikit-learn's subset accuracy)."""
        predicted = self.predict(x)
        if self.target_ != MULTILABEL:
            values = single_values(y)
            if (values.dtype.kind == "U") != (predicted.dtype.kind == "U"):
                raise ProbeError(f"the labels are {values.dtype}, the classes of this probe {predicted.dtype}: give labels of the same kind")
            right = predicted == values if len(values) == len(predicted) else np.zeros(0)
        else:
            truth = read_more(y, MULTILABEL, self.classes_)
            if predicted.ndim == 1:
                predicted = np.arange(len(self.classes_)) == predicted[:, None]
            wrong = predicted.astype(bool) != truth.positive if len(truth) == len(predicted) else np.zeros(0)
            right = ~(wrong if truth.known is None else wrong & truth.known).any(axis=-1)
        if np.shape(right) != (len(predicted),):
            raise ProbeError(f"there are {len(predicted)} rows of features but another number of labels")
        return float(np.average(right, weights=sample_weight))

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """What `decision_function` gave, as probabilities [n, C]."""
        scores = np.asarray(scores)
        if self.target_ == BINARY:
            # Of a ridge: the logistic curve that meets the estimate at 0.5 with the same slope.
            logits = scores.reshape(-1).astype(np.float64) * (4 if self.link == "clip" else 1)
            return np.stack([sigmoid(-logits), sigmoid(logits)], axis=1)
        if self.target_ == MULTICLASS:
            wide = scores.astype(np.float64)
            if self.link == "clip":
                return simplex(wide + 0.5)
            return softmax(wide if self.link == "softmax" else -np.logaddexp(0, -wide))
        if self.link == "clip":
            return np.clip(scores + np.float32(0.5), 0, 1)
        return sigmoid(scores) if self.link == "sigmoid" else softmax(scores)

    def folded(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 matrix [D, K] and bias [K] that give the scores from raw features, standardisation included."""
        self._check_fitted()
        return self.standardizer_.fold(*self._affine())

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> Path:
        """Write one safetensors file. `metadata`: plain JSON types kept beside the settings, e.g. the tap and the store's fingerprint."""
        from safetensors.numpy import save

        self._check_fitted()
        try:
            header = json.dumps(
                {
                    "format": FORMAT,
                    "kind": type(self).kind,
                    "link": self.link,
                    "classes": [str(name) for name in self.classes_],
                    "settings": self.settings(),
                    "fitted": self._facts(),
                    "metadata": dict(metadata if metadata is not None else self.metadata_),
                },
                sort_keys=True,
                allow_nan=False,
                default=np.generic.item,
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the metadata of a probe must be plain JSON: {error}") from None
        tensors = {**self._tensors(), "mean": self.standardizer_.mean, "scale": self.standardizer_.scale}
        return replace_bytes(path, save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, {METADATA_KEY: header}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Raises ProbeError when the file holds something else; see `load_probe` for any kind."""
        header, tensors = read_probe_file(path)
        if header["kind"] != cls.kind:
            raise ProbeError(f"{path} holds a probe of kind {header['kind']!r}, not {cls.kind!r}. Use difffeat.probe.load_probe.")
        return cls.restore(path, header, tensors)

    @classmethod
    def restore(cls, path: str | os.PathLike[str], header: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> Self:
        """A probe from the parts of its file; `path` is for messages. Raises ProbeError unless they are what `save` writes."""
        try:
            probe = cls(**header["settings"])
            probe.check_settings()
        except (TypeError, ValueError, OverflowError, NotYetAvailable) as error:
            raise ProbeError(f"{path} holds settings that this version does not know: {error}") from None
        expected = probe._link(header.get("fitted", {}).get("target", MULTILABEL))
        if header["link"] != expected:
            raise ProbeError(f"{path} gives probabilities by {header['link']!r}, its settings by {expected!r}. Fit the probe again.")
        probe.classes_, probe.metadata_ = tuple(header["classes"]), header["metadata"]
        try:
            fits = probe._fill(dict(tensors), header.get("fitted", {}))
        except (KeyError, ValueError, TypeError, OverflowError):
            fits = False
        if not fits:
            raise ProbeError(f"{path} lacks tensors, or has others, or they do not fit together. Fit the probe again.")
        if not (probe.standardizer_.scale > 0).all():
            raise ProbeError(f"{path} holds a scale that is not above 0. Fit the probe again.")
        return probe

    def _fill(self, tensors: dict[str, np.ndarray], facts: Mapping[str, Any]) -> bool:
        """Take what a file holds; whether it fits together. Raises KeyError, ValueError, TypeError or OverflowError where it is something else."""
        mean, scale = tensors.pop("mean"), tensors.pop("scale")
        self.standardizer_, self.n_features_in_ = Standardizer(mean, scale), mean.size
        self._take(tensors)
        self._recall(facts)
        weights, bias = self._affine()
        return mean.ndim == 1 and mean.shape == scale.shape and weights.shape == (*mean.shape, *bias.shape) and bias.shape == (self._n_columns(),)

    def check_settings(self) -> None:
        """Raises ConfigError (a ValueError) when the constructor's arguments make no sense. `fit` calls it; the constructor keeps them untouched."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as plain JSON types."""
        return {name: _plain_setting(value) for name, value in self.get_params(deep=False).items()}

    def _link(self, target: str) -> str:
        raise NotImplementedError

    def _tensors(self) -> dict[str, np.ndarray]:
        return {"weights": self.weights_, "bias": self.bias_}

    def _take(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take the tensors of a file besides the standardisation's. Raises KeyError or ValueError when they are not those of `_tensors`."""
        if set(tensors) != {"weights", "bias"}:
            raise KeyError(f"tensors {sorted(tensors)}")
        self.weights_, self.bias_ = tensors["weights"], tensors["bias"]

    def _facts(self) -> dict[str, Any]:
        """What else is known after fitting, as plain JSON types."""
        facts: dict[str, Any] = {"target": self.target_, "selected_on": self.selected_on_, "notes": list(self.notes_)}
        if self.target_ != MULTILABEL:
            values = np.asarray(self.classes_)
            facts |= {"values": values.tolist(), "values_type": values.dtype.str}
        for name in ("validation_map", "validation_loss"):
            facts[name] = [None if np.isnan(value) else float(value) for value in getattr(self, f"{name}_")]
        return facts

    def _recall(self, facts: Mapping[str, Any]) -> None:
        """Take what `_facts` gave; empty in files of earlier versions. Raises TypeError or ValueError when it is something else."""
        self.target_ = str(facts.get("target", MULTILABEL))
        self._label_dtype = np.dtype(np.uint8)
        if self.target_ in (BINARY, MULTICLASS):
            values = np.array(facts["values"], dtype=np.dtype(str(facts["values_type"])))
            if values.dtype.kind not in "biufU" or [str(value) for value in values] != list(self.classes_):
                raise ValueError("values of other classes")
            self.classes_ = values
        elif self.target_ != MULTILABEL:
            raise ValueError(f"a target {self.target_}")
        self.selected_on_, self.notes_ = str(facts.get("selected_on", EARLIER)), tuple(str(note) for note in facts.get("notes", ()))
        for name in ("validation_map", "validation_loss"):
            setattr(self, f"{name}_", [float("nan") if value is None else float(value) for value in facts.get(name, ())])

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights [D, K] and bias [K] on standardised features."""
        return self.weights_, self.bias_

    def _scores(self, standardised: np.ndarray) -> np.ndarray:
        return standardised @ self.weights_ + self.bias_

    def _n_columns(self) -> int:
        return 1 if self.target_ == BINARY else len(self.classes_)

    def _check_fitted(self) -> None:
        if not hasattr(self, "classes_"):
            raise NotFittedProbe(f"this {type(self).__name__} is not fitted yet: call fit(features, labels) first")

    def _features(self, x: Any, *, reset: bool) -> FeatureMatrix:
        """Whatever was handed over, as rows that can be read. `reset`: remember its width and names, else hold it to them."""
        if is_read_in_pieces(x):
            width = matrix_shape(x)[1]
            if reset:
                self.__dict__.pop("feature_names_in_", None)
                self.n_features_in_ = width
            return x
        from sklearn.utils.validation import validate_data

        given = plain(x, "features")
        if isinstance(given, np.ndarray) and given.ndim > 2:
            matrix_shape(given)
        if isinstance(given, np.ndarray) and given.dtype.kind in "mMV":
            raise FeatureTypeError(f"features must be numbers, got {given.dtype}")
        try:
            array: Any = validate_data(cast("Any", self), cast("Any", given), reset=reset, accept_sparse="csr", ensure_all_finite=False)
        except TypeError as error:
            raise FeatureTypeError(str(error)) from None
        except ValueError as error:
            raise ProbeError(str(error)) from None
        return SparseRows(array) if is_sparse(array) else array

    def fit(
        self,
        x: Any,
        y: Any,
        *,
        rows: np.ndarray | None = None,
        classes: Sequence[str] | None = None,
        validation: Validation | None = None,
    ) -> Self:
        """Fit on the selected rows.

        **Arguments:** `x` [n, D], an array or a store's features (read in pieces); `y` one row for each selected row: multi-hot [m, C] (-1:
        unknown, takes no part), class numbers [m] of `classes`, or without `classes` one value of any kind a sample; `classes` their names;
        `validation` (features, labels) or (features, labels, rows) to choose the learning rate or penalty on. Without it, and with several to
        choose from, a seeded fifth of the rows is held out for the choice, and the probe is then fitted on all of them.

        Raises ProbeError when they do not fit, when a feature is not finite, or when a loss runs away. Warns (ProbeWarning, kept in `notes_`) when
        the choice lies at an edge of its candidates and a wider grid might do better, and when a loss is still falling.
        """
        examples = self._begin(x, y, rows, classes)
        return self._finish(examples.labels, self._fit(examples, self._validation(validation, examples.labels)))

    def _fit(self, examples: Examples, held: Examples | None) -> list[str]:
        """Fit on checked rows, choosing on `held` or, for None, on a part of them; what should be said about it."""
        raise NotImplementedError

    def _begin(self, x: Any, y: Any, rows: np.ndarray | None, classes: Sequence[str] | None) -> Examples:
        """The rows and labels of a fit, checked against each other and against the settings."""
        self.check_settings()
        matrix = self._features(x, reset=True)
        count = row_count(matrix, rows)
        labels = read_labels(y, classes, owner=f"this {type(self).__name__} estimator")
        if len(labels) != count:
            raise ProbeError(f"there are {count} rows of features but {len(labels)} of labels")
        if not labels.positive.any():
            raise ProbeError("no label is positive: nothing can be learned")
        if labels.target == MULTILABEL and self._link(MULTILABEL) == "softmax":
            _check_one_class(labels)
        _check_quarantine(matrix, rows)
        return Examples(matrix, rows, labels)

    def _validation(self, validation: Validation | None, labels: Labels) -> Examples | None:
        """The rows to choose on. Raises ProbeError unless they fit those of the fit."""
        if validation is None:
            return None
        if not isinstance(validation, tuple | list) or len(validation) not in (2, 3):
            raise ProbeError("validation must be (features, labels) or (features, labels, rows)")
        rows = validation[2] if len(validation) == 3 else None
        x = self._features(validation[0], reset=False)
        if matrix_shape(x)[1] != self.n_features_in_:
            raise ProbeError(f"the training features have {self.n_features_in_} dimensions, those of validation {matrix_shape(x)[1]}")
        held = read_more(validation[1], labels.target, labels.classes)
        if len(held) != (count := row_count(x, rows)):
            raise ProbeError(f"there are {count} validation rows of features but {len(held)} of labels")
        check_validation(held)
        _check_quarantine(x, rows)
        return Examples(x, rows, held)

    def _finish(self, labels: Labels, notes: Sequence[str]) -> Self:
        """Marks the probe as fitted, and warns of what should be known about it."""
        self.classes_, self.target_, self._label_dtype = labels.classes, labels.target, labels.dtype
        self.metadata_, self.notes_ = {}, tuple(notes)
        for note in self.notes_:
            warnings.warn(note, ProbeWarning, stacklevel=3)
        return self


def _check_one_class(labels: Labels) -> None:
    """Raises ProbeError for a sample of several classes, none or unknown ones: softmax cannot learn from it."""
    if labels.known is not None:
        raise ProbeError("softmax needs to know each sample's class, and some labels are -1, unknown. Use loss='bce'.")
    if other := int((labels.positive.sum(axis=1) != 1).sum()):
        raise ProbeError(f"softmax needs exactly one class a sample, and {other} of {len(labels)} have several or none. Use loss='bce'.")


def _check_quarantine(x: FeatureMatrix, rows: np.ndarray | None) -> None:
    """Raises ProbeError for a store's rows that hold zeros in place of features."""
    valid = getattr(x, "valid", None)
    if valid is not None and (bad := int((~(valid if rows is None else valid[rows])).sum())):
        raise ProbeError(
            f"{bad} of these rows are in quarantine: zeros stand there, not features. Fit on the others: "
            "rows = store.usable; fit(store[tap], store.labels[rows], rows=rows)"
        )


def _plain_setting(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, set | frozenset):
        value = sorted(value)
    return [_plain_setting(part) for part in value] if isinstance(value, tuple | list | np.ndarray) else value


def read_probe_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(header, tensors) of a probe file. Raises ProbeError when it is none."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ProbeError(f"there is no probe at {path}")
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA_KEY, "null")
            tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
        header = json.loads(text)
    except (SafetensorError, OSError, ValueError, OverflowError, RecursionError, TypeError) as error:
        raise ProbeError(f"{path} is no probe file: {error}") from None
    kinds = {"format": str, "kind": str, "link": str, "classes": list, "settings": dict, "metadata": dict}
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ProbeError(f"{path} is no probe file of format {FORMAT}. Fit and save the probe again.")
    if any(not isinstance(header.get(key), kind) for key, kind in kinds.items()) or not isinstance(header.get("fitted", {}), dict):
        raise ProbeError(f"{path} has an incomplete header. Fit and save the probe again.")
    if not header["classes"] or any(not isinstance(name, str) for name in header["classes"]):
        raise ProbeError(f"{path} has classes without a name. Fit and save the probe again.")
    for name, tensor in tensors.items():
        if tensor.dtype not in (np.dtype(np.float32), np.dtype(np.float64)) or not np.isfinite(tensor).all():
            raise ProbeError(f"{path}: {name} must be finite numbers of fp32 or fp64. Fit and save the probe again.")
    return header, tensors
