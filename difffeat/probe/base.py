"""What every fitted probe can do: score, give probabilities, decide, fold, save and load.

A probe file is one safetensors file: the tensors, and a JSON text in its metadata. Nothing in it can run code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from difffeat.errors import ConfigError, NotYetAvailable, ProbeError
from difffeat.probe.data import FeatureMatrix, one_hot, row_chunks, row_count
from difffeat.probe.optim import sigmoid, softmax
from difffeat.probe.output import replace_bytes
from difffeat.probe.standardize import Standardizer

FORMAT = "difffeat-probe/1"
METADATA_KEY = "difffeat.probe"


class Probe:
    """A linear classifier on standardised features: scores = standardised(x) @ weights_ + bias_.

    **Attributes after fitting:** `weights_` float32 [D, C], `bias_` float32 [C], `standardizer_`, `classes_` (names), `metadata_` (what
    `load` found). `decision_function` is above 0 where `predict_proba` is above 0.5 (softmax aside).
    """

    kind: ClassVar[str] = ""
    link: str = "sigmoid"
    """How scores become probabilities: `sigmoid`, `softmax`, or `clip` (score + 0.5 cut to 0..1, for least squares)."""

    weights_: np.ndarray
    bias_: np.ndarray
    standardizer_: Standardizer
    classes_: tuple[str, ...]
    metadata_: Mapping[str, Any]

    def decision_function(self, x: FeatureMatrix, rows: np.ndarray | None = None) -> np.ndarray:
        """Scores float32 [n, C] of the selected rows; rank with these. Raises ProbeError before fitting and on another width."""
        self._check_fitted()
        scores = np.empty((row_count(x, rows), len(self.classes_)), np.float32)
        for start, chunk in row_chunks(x, rows):
            scores[start : start + len(chunk)] = self._scores(self.standardizer_.transform(chunk))
        return scores

    def predict_proba(self, x: FeatureMatrix, rows: np.ndarray | None = None) -> np.ndarray:
        """Probabilities float32 [n, C] (multi-label: each class for itself). Those of a ridge probe are not calibrated."""
        return self.probabilities(self.decision_function(x, rows))

    def predict(self, x: FeatureMatrix, rows: np.ndarray | None = None, *, threshold: float = 0.5) -> np.ndarray:
        """Multi-hot uint8 [n, C] where the probability is above `threshold`; class numbers int64 [n] for a softmax probe."""
        chances = self.predict_proba(x, rows)
        return chances.argmax(axis=1) if self.link == "softmax" else (chances > threshold).astype(np.uint8)

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """What `decision_function` gave, as probabilities [n, C]."""
        if self.link == "clip":
            return np.clip(scores + np.float32(0.5), 0, 1)
        return sigmoid(scores) if self.link == "sigmoid" else softmax(scores)

    def folded(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 matrix [D, C] and bias [C] that give the scores from raw features, standardisation included."""
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
                    "kind": self.kind,
                    "link": self.link,
                    "classes": list(self.classes_),
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
        except (TypeError, ValueError, OverflowError, NotYetAvailable) as error:
            raise ProbeError(f"{path} holds settings that this version does not know: {error}") from None
        if header["link"] != probe.link:
            raise ProbeError(f"{path} gives probabilities by {header['link']!r}, its settings by {probe.link!r}. Fit the probe again.")
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
        self.standardizer_ = Standardizer(mean, scale)
        self._take(tensors)
        self._recall(facts)
        weights, bias = self._affine()
        return mean.ndim == 1 and mean.shape == scale.shape and weights.shape == (*mean.shape, *bias.shape) and bias.shape == (len(self.classes_),)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as plain JSON types."""
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
        return {}

    def _recall(self, facts: Mapping[str, Any]) -> None:
        """Take what `_facts` gave; empty in files of earlier versions. Raises TypeError or ValueError when it is something else."""

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights [D, C] and bias [C] on standardised features."""
        return self.weights_, self.bias_

    def _scores(self, standardised: np.ndarray) -> np.ndarray:
        return standardised @ self.weights_ + self.bias_

    def _check_fitted(self) -> None:
        if not hasattr(self, "classes_"):
            raise ProbeError(f"this {type(self).__name__} is not fitted yet: call fit(features, labels) first")

    def _begin(self, x: FeatureMatrix, y: Any, rows: np.ndarray | None, classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
        """(labels bool [n, C], names of the classes) of a fit, checked against the features."""
        count = row_count(x, rows)
        targets = one_hot(y, None if classes is None else len(classes))
        if len(targets) != count:
            raise ProbeError(f"there are {count} rows of features but {len(targets)} of labels")
        names = tuple(classes) if classes is not None else tuple(str(c) for c in range(targets.shape[1]))
        if len(names) != targets.shape[1]:
            raise ProbeError(f"there are {len(names)} names for {targets.shape[1]} classes")
        if not targets.any():
            raise ProbeError("no label is positive: nothing can be learned")
        self._check_rows(x, targets, rows)
        return targets, names

    def _check_rows(self, x: FeatureMatrix, targets: np.ndarray, rows: np.ndarray | None) -> None:
        """Raises ProbeError for a sample of several classes or none under softmax, and for a store's rows that hold zeros in place of features."""
        if self.link == "softmax" and (other := int((targets.sum(axis=1) != 1).sum())):
            raise ProbeError(f"softmax needs exactly one class a sample, and {other} of {len(targets)} have several or none. Use loss='bce'.")
        valid = getattr(x, "valid", None)
        if valid is not None and (bad := int((~(valid if rows is None else valid[rows])).sum())):
            raise ProbeError(
                f"{bad} of these rows are in quarantine: zeros stand there, not features. Fit on the others: "
                "rows = store.usable; fit(store[tap], store.labels[rows], rows=rows)"
            )

    def _finish(self, classes: tuple[str, ...]) -> Self:
        """Marks the probe as fitted."""
        self.classes_, self.metadata_ = classes, {}
        return self


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
