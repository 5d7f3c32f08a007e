"""Fusion: one classifier on an image and a text store, joined by sample id.

Diff-Feat projects both modalities to a shared width, adds them, and classifies linearly. Nothing in it is nonlinear, so it is a linear
classifier of rank <= width on [h_image; h_text], and `merged` gives it as one matrix. With no more classes than the width it can express
what concatenation can, so the fair comparison beside it is `ridge_fusion` on the standardised concatenation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from difffeat.errors import ConfigError, NotYetAvailable, ProbeError
from difffeat.probe.base import Probe
from difffeat.probe.data import FeatureMatrix, FeatureStore, matrix_shape, row_count, take
from difffeat.probe.linear import standardised_reader, train
from difffeat.probe.optim import check_training, is_whole, loss_and_gradient
from difffeat.probe.ridge import ALPHAS, RidgeProbe
from difffeat.probe.sameness import require_modalities
from difffeat.probe.standardize import Standardizer

KINDS = ("add", "concat")
LATER_KINDS = ("gated", "attention")


class PairedFeatures:
    """[h_image; h_text] row by row, without copying either matrix: a `FeatureMatrix` [n, D_image + D_text].

    **Arguments:** the two matrices, and the rows of each that belong together (all, in order, when None).
    """

    def __init__(self, image: FeatureMatrix, text: FeatureMatrix, image_rows: np.ndarray | None = None, text_rows: np.ndarray | None = None) -> None:
        counts = row_count(image, image_rows), row_count(text, text_rows)
        if counts[0] != counts[1]:
            raise ProbeError(f"{counts[0]} rows of images cannot be paired with {counts[1]} of texts. Use join(image_store, text_store).")
        self.image, self.text = image, text
        self.image_rows = np.arange(counts[0]) if image_rows is None else np.asarray(image_rows)
        self.text_rows = np.arange(counts[1]) if text_rows is None else np.asarray(text_rows)
        self.image_width, self.text_width = matrix_shape(image)[1], matrix_shape(text)[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(n, D_image + D_text)."""
        return len(self.image_rows), self.image_width + self.text_width

    def __len__(self) -> int:
        return len(self.image_rows)

    def __getitem__(self, index: Any, /) -> np.ndarray:
        """float32 [m, D_image + D_text]."""
        image, text = take(self.image, self.image_rows[index]), take(self.text, self.text_rows[index])
        return np.concatenate([image, text], axis=1)


@dataclass(frozen=True)
class Join:
    """Samples that both stores have.

    **Fields:** `ids` in the image store's order; `image_rows`, `text_rows` int64 [n]; `labels` uint8 [n, C] or None; `classes`;
    `dropped`: reason -> how many samples were left out for it.
    """

    image_store: FeatureStore
    text_store: FeatureStore
    ids: tuple[str, ...]
    image_rows: np.ndarray
    text_rows: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    dropped: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    def features(self, image_tap: str, text_tap: str) -> PairedFeatures:
        """The joined rows of one tap of each store."""
        return PairedFeatures(self.image_store[image_tap], self.text_store[text_tap], self.image_rows, self.text_rows)

    def summary(self) -> str:
        """One sentence: how many were joined, how many left out and why."""
        left_out = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count)
        return f"{len(self)} samples joined by id; left out: {left_out or 'none'}"


def join(image_store: FeatureStore, text_store: FeatureStore) -> Join:
    """Pair the rows of two stores by sample id, where both are valid and, if there are labels at all, one of them knows the sample's.

    Raises ProbeError when the stores are the wrong way round, when an id stands twice in one store, when nothing is shared (with example ids:
    suffixes are the usual cause), and when known labels or classes of the two stores disagree.
    """
    require_modalities(image_store, text_store)
    places = {"image": _places(image_store, "image"), "text": _places(text_store, "text")}
    shared = [id_ for id_ in image_store.ids if id_ in places["text"]]
    if not shared:
        raise ProbeError(
            f"the stores share no sample id: the image store has {image_store.ids[0]!r}, ..., the text store {text_store.ids[0]!r}, ... "
            "Extract both from sources whose ids agree (a file suffix counts)."
        )
    rows = {name: np.array([places[name][id_] for id_ in shared], np.int64) for name in places}
    valid = {"image": np.asarray(image_store.valid)[rows["image"]], "text": np.asarray(text_store.valid)[rows["text"]]}
    kept = valid["image"] & valid["text"]
    if not kept.any():
        raise ProbeError(f"none of the {len(shared)} shared samples is valid in both stores. Look at difffeat store info for each.")
    labels, classes, known = _agreed_labels(image_store, text_store, rows["image"], rows["text"], kept)
    used = kept & known
    if not used.any():
        raise ProbeError(
            f"neither store knows the labels of any of the {int(kept.sum())} samples that they share. Extract one from a source that does."
        )
    dropped = {
        "only in the image store": len(image_store.ids) - len(shared),
        "only in the text store": len(text_store.ids) - len(shared),
        "invalid in the image store": int((~valid["image"]).sum()),
        "invalid in the text store": int((valid["image"] & ~valid["text"]).sum()),
        "whose labels are unknown": int((kept & ~known).sum()),
    }
    ids = tuple(id_ for id_, keep in zip(shared, used, strict=True) if keep)
    own = None if labels is None else labels[used]
    return Join(image_store, text_store, ids, rows["image"][used], rows["text"][used], own, classes, dropped)


def _places(store: FeatureStore, name: str) -> dict[str, int]:
    places = {id_: row for row, id_ in enumerate(store.ids)}
    if len(places) != len(store.ids):
        twice = next(id_ for id_, count in Counter(store.ids).items() if count > 1)
        raise ProbeError(f"sample id {twice!r} stands more than once in the {name} store: samples cannot be paired")
    if not places:
        raise ProbeError(f"the {name} store has no samples")
    return places


def _agreed_labels(
    image_store: FeatureStore, text_store: FeatureStore, image_rows: np.ndarray, text_rows: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray | None, tuple[str, ...], np.ndarray]:
    """(labels of the shared samples, classes, whether a sample's labels are known); each from the store that knows, and equal where both do."""
    stores = [(store, rows) for store, rows in ((image_store, image_rows), (text_store, text_rows)) if store.labels is not None]
    if not stores:
        return None, (), np.ones(len(image_rows), bool)
    known = [np.asarray(store.labelled)[rows] for store, rows in stores]
    labels = [np.asarray(store.labels)[rows] for store, rows in stores]
    classes = [tuple(store.classes) for store, _ in stores]
    if len(stores) == 1:
        return labels[0], classes[0], known[0]
    if classes[0] != classes[1]:
        raise ProbeError(f"the stores differ in their classes: {_few(classes[0])} against {_few(classes[1])}")
    differing = np.flatnonzero((labels[0] != labels[1]).any(axis=1) & known[0] & known[1] & kept)
    if len(differing):
        first = differing[0]
        names = [", ".join(np.array(classes[0])[own[first].astype(bool)]) or "none" for own in labels]
        example = image_store.ids[int(image_rows[first])]
        raise ProbeError(
            f"labels disagree for {len(differing)} of {int(kept.sum())} samples; {example!r} has {names[0]} in the image store and {names[1]} "
            "in the text store. Extract both from the same annotations."
        )
    return np.where(known[0][:, None], labels[0], labels[1]), classes[0], known[0] | known[1]


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


class FusionProbe(Probe):
    """Projections to a shared width and addition (`add`), or one layer on the concatenation (`concat`), trained as `LinearProbe` is.

        pair = join(image_store, text_store)
        fused = FusionProbe().fit(pair.features("b12/t30", "b20/t0"), pair.labels)

    **Arguments:** `width` of the shared space (`add` only), `kind`; the rest as in `LinearProbe`. `seed` also draws the first projections.
    """

    kind: ClassVar[str] = "fusion"

    def __init__(
        self,
        *,
        width: int = 512,
        kind: str = "add",
        epochs: int = 40,
        lr: float = 1e-3,
        batch_size: int = 256,
        weight_decay: float = 0.0,
        standardize: bool = True,
        loss: str = "bce",
        seed: int = 0,
    ) -> None:
        if kind in LATER_KINDS:
            raise NotYetAvailable(f"fusion by {kind} comes with a later release; available now: {', '.join(KINDS)}")
        if kind not in KINDS or not is_whole(width) or width < 1:
            raise ConfigError(f"fusion must be one of {', '.join(KINDS)} with a width of at least 1; got {kind!r} and {width}")
        check_training(epochs=epochs, lr=lr, batch_size=batch_size, weight_decay=weight_decay, loss=loss, seed=seed)
        self.width, self.fusion = width, kind
        self.epochs, self.lr, self.batch_size, self.weight_decay = epochs, lr, batch_size, weight_decay
        self.standardize, self.loss, self.seed = standardize, loss, seed
        self.link = "softmax" if loss == "softmax" else "sigmoid"
        self.history_: list[float] = []
        self.parameters_: dict[str, np.ndarray] = {}
        self.image_width_ = 0  # not known: a concatenation from a file of an earlier version

    def fit(self, x: PairedFeatures, y: Any, *, classes: Sequence[str] | None = None) -> Self:
        """Train on pairs; `y` has one row a pair. Arguments and errors as in `LinearProbe.fit`."""
        if not isinstance(x, PairedFeatures):
            raise ProbeError(f"fusion needs PairedFeatures, got {type(x).__name__}. Use join(image_store, text_store).features(...).")
        targets, names = self._begin(x, y, None, classes)
        self.standardizer_ = Standardizer.fit(x) if self.standardize else Standardizer.identity(x.shape[1])
        self.image_width_ = x.image_width
        self.parameters_ = self._initial(x.image_width, x.text_width, len(names))
        self.history_ = train(
            self.parameters_,
            self.loss_gradients,
            standardised_reader(x, None, self.standardizer_),
            targets,
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            seed=self.seed,
        )
        return self._finish(names)

    def _initial(self, image_width: int, text_width: int, n_classes: int) -> dict[str, np.ndarray]:
        """`concat` is convex and starts at 0. For `add` that would be a saddle: projections start at N(0, 1/D), the classifier at 0."""
        total = image_width + text_width
        bias = np.zeros(n_classes, np.float32)
        if self.fusion == "concat":
            return {"weights": np.zeros((total, n_classes), np.float32), "bias": bias}
        rng = np.random.Generator(np.random.PCG64(self.seed))
        image, text = (rng.standard_normal((d, self.width), np.float32) / np.float32(d**0.5) for d in (image_width, text_width))
        classifier = np.zeros((self.width, n_classes), np.float32)
        return {
            "project_image": image,
            "project_text": text,
            "shift": np.zeros(self.width, np.float32),
            "weights": classifier,
            "bias": bias,
        }

    def loss_gradients(self, batch: np.ndarray, truth: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        """Loss of a standardised batch [m, D_image + D_text], and its gradient by each of `parameters_`."""
        weights = self.parameters_["weights"]
        hidden = self._hidden(batch)
        value, slope = loss_and_gradient(self.loss, hidden @ weights + self.parameters_["bias"], truth)
        gradients = {"weights": hidden.T @ slope, "bias": slope.sum(axis=0)}
        if self.fusion == "add":
            back = slope @ weights.T
            image_width = len(self.parameters_["project_image"])
            gradients["project_image"] = batch[:, :image_width].T @ back
            gradients["project_text"] = batch[:, image_width:].T @ back
            gradients["shift"] = back.sum(axis=0)
        return value, gradients

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 matrix [D_image + D_text, C], of rank <= width, and bias [C]: the same scores from raw [h_image; h_text]."""
        return self.folded()

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("width", "epochs", "lr", "batch_size", "weight_decay", "standardize", "loss", "seed")
        return {"kind": self.fusion} | {name: getattr(self, name) for name in names}

    def decision_function(self, x: FeatureMatrix, rows: np.ndarray | None = None) -> np.ndarray:
        """Scores float32 [n, C]. Raises ProbeError before fitting, and for pairs whose halves are not as wide as those of training."""
        self._check_fitted()
        if isinstance(x, PairedFeatures) and self.image_width_ and (x.image_width, x.text_width) != self._widths():
            raise ProbeError(
                f"this fusion was fitted on images of width {self._widths()[0]} and texts of {self._widths()[1]}, these pairs have {x.image_width} "
                f"and {x.text_width}. Are they the wrong way round?"
            )
        return super().decision_function(x, rows)

    def _widths(self) -> tuple[int, int]:
        return self.image_width_, len(self.standardizer_.mean) - self.image_width_

    def _hidden(self, batch: np.ndarray) -> np.ndarray:
        if self.fusion == "concat":
            return batch
        image, text = self.parameters_["project_image"], self.parameters_["project_text"]
        return batch[:, : len(image)] @ image + batch[:, len(image) :] @ text + self.parameters_["shift"]

    def _scores(self, standardised: np.ndarray) -> np.ndarray:
        return self._hidden(standardised) @ self.parameters_["weights"] + self.parameters_["bias"]

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        p = {name: value.astype(np.float64) for name, value in self.parameters_.items()}
        if self.fusion == "concat":
            return p["weights"], p["bias"]
        projections = np.concatenate([p["project_image"], p["project_text"]])
        return projections @ p["weights"], p["shift"] @ p["weights"] + p["bias"]

    def _tensors(self) -> dict[str, np.ndarray]:
        return self.parameters_

    def _take(self, tensors: Mapping[str, np.ndarray]) -> None:
        expected = {"weights", "bias"} if self.fusion == "concat" else {"project_image", "project_text", "shift", "weights", "bias"}
        if set(tensors) != expected:
            raise KeyError(f"tensors {sorted(tensors)}")
        self.parameters_ = dict(tensors)
        if self.fusion == "add":
            self.image_width_ = len(tensors["project_image"])
            if {tensors[name].shape[-1] for name in ("project_image", "project_text", "shift")} != {self.width}:
                raise ValueError(f"a width other than {self.width}")

    def _facts(self) -> dict[str, Any]:
        return {"history": self.history_, "image_width": self.image_width_}

    def _recall(self, facts: Mapping[str, Any]) -> None:
        self.history_ = [float(value) for value in facts.get("history", ())]
        self.image_width_ = int(facts.get("image_width", self.image_width_))
        if not 0 <= self.image_width_ < len(self.standardizer_.mean):
            raise ValueError(f"an image width of {self.image_width_}")


def ridge_fusion(
    x: PairedFeatures,
    y: Any,
    *,
    validation: tuple[PairedFeatures, Any] | None = None,
    alphas: Sequence[float] = ALPHAS,
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> RidgeProbe:
    """The closed-form ridge on the standardised concatenation: what fusion by addition is to be held against."""
    return RidgeProbe(alphas=alphas, seed=seed).fit(x, y, validation=validation, classes=classes)
