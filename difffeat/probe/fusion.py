"""Fusion: one classifier on an image and a text store, joined by sample id.

Diff-Feat projects both modalities to a shared width, adds them, and classifies linearly. Nothing in it is nonlinear, so it is a linear
classifier of rank <= width on [h_image; h_text], and `merged` gives it as one matrix. With no more classes than the width it can express
what concatenation can, so the fair comparison beside it is `ridge_fusion` on the standardised concatenation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from difffeat.errors import ConfigError, NotYetAvailable, ProbeError
from difffeat.probe.base import Validation
from difffeat.probe.cautions import require_distinct_classes
from difffeat.probe.data import UNKNOWN, FeatureMatrix, FeatureStore, matrix_shape, row_count, take
from difffeat.probe.inputs import rows_of
from difffeat.probe.labels import Labels
from difffeat.probe.optim import is_whole, loss_and_gradient
from difffeat.probe.ridge import RidgeProbe
from difffeat.probe.ridge_solutions import ALPHAS
from difffeat.probe.sameness import require_halves, require_modalities, require_same_classes
from difffeat.probe.selection import Examples
from difffeat.probe.splits import labels_of
from difffeat.probe.training import Parameters, TrainedProbe

KINDS = ("add", "concat")
LATER_KINDS = ("gated", "attention")


class PairedFeatures:
    """[h_image; h_text] row by row, without copying either matrix: a `FeatureMatrix` [n, D_image + D_text].

    **Arguments:** the two matrices, and the rows of each that belong together (all, in order, when None).
    """

    def __init__(self, image: FeatureMatrix, text: FeatureMatrix, image_rows: np.ndarray | None = None, text_rows: np.ndarray | None = None) -> None:
        image, text = rows_of(image, "features of images"), rows_of(text, "features of texts")
        counts = row_count(image, image_rows), row_count(text, text_rows)
        if counts[0] != counts[1]:
            raise ProbeError(f"{counts[0]} rows of images cannot be paired with {counts[1]} of texts. Use join(image_store, text_store).")
        require_halves(image, text)
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

    **Fields:** `ids` in the image store's order; `image_rows`, `text_rows` int64 [n]; `labels` [n, C], -1 for unknown cells, or None; `classes`;
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
    for store, name in ((image_store, "image"), (text_store, "text")):
        require_distinct_classes(store.classes, name)
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
    own = None if labels is None else labels[used] if (labels[used] == UNKNOWN).any() else labels[used].astype(np.uint8)
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
    classes = [tuple(store.classes) for store, _ in stores]
    cells = [
        np.where(np.asarray(store.labelled)[rows][:, None], np.asarray(labels_of(store))[rows], UNKNOWN).astype(np.int8) for store, rows in stores
    ]
    if len(stores) == 2:
        require_same_classes(classes[0], classes[1], "text", "image")
        differing = np.flatnonzero(((cells[0] != cells[1]) & (cells[0] != UNKNOWN) & (cells[1] != UNKNOWN)).any(axis=1) & kept)
        if len(differing):
            first = differing[0]
            example = image_store.ids[int(image_rows[first])]
            names = [", ".join(np.array(classes[0])[own[first] == 1]) or "none" for own in cells]
            raise ProbeError(
                f"labels disagree for {len(differing)} of {int(kept.sum())} samples; {example!r} has {names[0]} in the image store and {names[1]} "
                "in the text store. Extract both from the same annotations."
            )
        cells = [np.where(cells[0] != UNKNOWN, cells[0], cells[1])]
    known = (cells[0] != UNKNOWN).any(axis=1)
    return cells[0], classes[0], known


class FusionProbe(TrainedProbe):
    """Projections to a shared width and addition (`add`), or one layer on the concatenation (`concat`), trained as `LinearProbe` is.

        pair = join(image_store, text_store)
        fused = FusionProbe().fit(pair.features("b12/t30", "b20/t0"), pair.labels)

    **Arguments:** `width` of the shared space (`add` only), `kind`; the rest as in `LinearProbe`. `seed` also draws the first projections.
    `image_width`: fit on plain features [n, D_image + D_text] whose first so many columns are the image's; None: on `PairedFeatures`.
    """

    kind: ClassVar[str] = "fusion"
    parameters_: Parameters
    image_width_: int
    """0 where it is not known: a concatenation from a file of an earlier version."""

    def __init__(
        self,
        *,
        width: int = 512,
        kind: str = "add",
        epochs: int = 40,
        lr: float | Sequence[float] | None = None,
        batch_size: int = 256,
        weight_decay: float = 0.0,
        standardize: bool = True,
        loss: str = "auto",
        seed: int = 0,
        image_width: int | None = None,
    ) -> None:
        self.width, self.kind = width, kind  # pyright: ignore[reportAttributeAccessIssue] - the class's own kind is the file's
        self.epochs, self.lr, self.batch_size, self.weight_decay = epochs, lr, batch_size, weight_decay
        self.standardize, self.loss, self.seed, self.image_width = standardize, loss, seed, image_width
        self.check_settings()

    def check_settings(self) -> None:
        """Raises ConfigError or NotYetAvailable when the settings make no sense; at construction too, before stores are opened."""
        if self.kind in LATER_KINDS:
            raise NotYetAvailable(f"fusion by {self.kind} comes with a later release; available now: {', '.join(KINDS)}")
        if self.kind not in KINDS or not is_whole(self.width) or self.width < 1:
            raise ConfigError(f"fusion must be one of {', '.join(KINDS)} with a width of at least 1; got {self.kind!r} and {self.width}")
        if self.image_width is not None and (not is_whole(self.image_width) or self.image_width < 1):
            raise ConfigError(f"image_width must be a whole number of at least 1, got {self.image_width!r}")
        super().check_settings()

    @property
    def fusion(self) -> str:
        """`add` or `concat`."""
        return self.kind

    def _begin(self, x: Any, y: Any, rows: np.ndarray | None, classes: Sequence[str] | None) -> Examples:
        if not isinstance(x, PairedFeatures) and self.image_width is None:
            raise ProbeError(
                f"fusion needs PairedFeatures, got {type(x).__name__}. Use join(image_store, text_store).features(...), or say which columns are the "
                "image's: FusionProbe(image_width=...)."
            )
        examples = super()._begin(x, y, rows, classes)
        self.image_width_ = x.image_width if isinstance(x, PairedFeatures) else int(self.image_width or 0)
        if not 0 < self.image_width_ < self.n_features_in_:
            raise ProbeError(f"image_width is {self.image_width_} of {self.n_features_in_} features: nothing is left for the text")
        if self.image_width not in (None, self.image_width_):
            raise ProbeError(f"image_width is {self.image_width}, but the images of these pairs have width {self.image_width_}")
        return examples

    def _validation(self, validation: Validation | None, labels: Labels) -> Examples | None:
        if isinstance(validation, tuple | list) and validation:
            self._check_halves(validation[0])
        return super()._validation(validation, labels)

    def _fit(self, examples: Examples, held: Examples | None) -> list[str]:
        self.parameters_, notes = self._train_on(examples, held)
        return notes

    def _initial(self, width: int, n_columns: int) -> Parameters:
        """`concat` is convex and starts at 0. For `add` that would be a saddle: projections start at N(0, 1/D), the classifier at 0."""
        bias = np.zeros(n_columns, np.float32)
        if self.kind == "concat":
            return {"weights": np.zeros((width, n_columns), np.float32), "bias": bias}
        rng = np.random.Generator(np.random.PCG64(self.seed))
        widths = self.image_width_, width - self.image_width_
        image, text = (rng.standard_normal((d, self.width), np.float32) / np.float32(d**0.5) for d in widths)
        return {
            "project_image": image,
            "project_text": text,
            "shift": np.zeros(self.width, np.float32),
            "weights": np.zeros((self.width, n_columns), np.float32),
            "bias": bias,
        }

    def loss_gradients(self, batch: np.ndarray, truth: np.ndarray) -> tuple[float, Parameters]:
        """Loss of a standardised batch [m, D_image + D_text], and its gradient by each of `parameters_`."""
        return self._slopes(self.parameters_, batch, truth, None)

    def _slopes(self, parameters: Mapping[str, np.ndarray], batch: np.ndarray, truth: np.ndarray, known: np.ndarray | None) -> tuple[Any, Parameters]:
        weights, hidden = parameters["weights"], _hidden(parameters, batch)
        value, slope = loss_and_gradient(self.loss_, hidden @ weights + parameters["bias"][..., None, :], truth, known)
        gradients = {"weights": np.swapaxes(hidden, -1, -2) @ slope, "bias": slope.sum(axis=-2)}
        if "shift" in parameters:
            back, image_width = slope @ np.swapaxes(weights, -1, -2), parameters["project_image"].shape[-2]
            gradients["project_image"] = batch[:, :image_width].T @ back
            gradients["project_text"] = batch[:, image_width:].T @ back
            gradients["shift"] = back.sum(axis=-2)
        return value, gradients

    @staticmethod
    def _logits(parameters: Mapping[str, np.ndarray], batch: np.ndarray) -> np.ndarray:
        return _hidden(parameters, batch) @ parameters["weights"] + parameters["bias"][..., None, :]

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 matrix [D_image + D_text, C], of rank <= width, and bias [C]: the same scores from raw [h_image; h_text]."""
        return self.folded()

    def decision_function(self, x: Any, rows: np.ndarray | None = None) -> np.ndarray:
        """Scores [n, C]. Raises ProbeError before fitting, and for pairs whose halves are not as wide as those of training."""
        self._check_fitted()
        self._check_halves(x)
        return super().decision_function(x, rows)

    def _check_halves(self, x: Any) -> None:
        widths = self.image_width_, self.n_features_in_ - self.image_width_
        if isinstance(x, PairedFeatures) and self.image_width_ and (x.image_width, x.text_width) != widths:
            raise ProbeError(
                f"this fusion was fitted on images of width {widths[0]} and texts of {widths[1]}, these pairs have {x.image_width} "
                f"and {x.text_width}. Are they the wrong way round?"
            )

    def _scores(self, standardised: np.ndarray) -> np.ndarray:
        return self._logits(self.parameters_, standardised)

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        p = {name: value.astype(np.float64) for name, value in self.parameters_.items()}
        if self.kind == "concat":
            return p["weights"], p["bias"]
        projections = np.concatenate([p["project_image"], p["project_text"]])
        return projections @ p["weights"], p["shift"] @ p["weights"] + p["bias"]

    def _tensors(self) -> dict[str, np.ndarray]:
        return self.parameters_

    def _take(self, tensors: Mapping[str, np.ndarray]) -> None:
        expected = {"weights", "bias"} if self.kind == "concat" else {"project_image", "project_text", "shift", "weights", "bias"}
        if set(tensors) != expected:
            raise KeyError(f"tensors {sorted(tensors)}")
        self.parameters_, self.image_width_ = dict(tensors), 0
        if self.kind == "add":
            self.image_width_ = len(tensors["project_image"])
            if {tensors[name].shape[-1] for name in ("project_image", "project_text", "shift")} != {self.width}:
                raise ValueError(f"a width other than {self.width}")

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"image_width": self.image_width_}

    def _recall(self, facts: Mapping[str, Any]) -> None:
        super()._recall(facts)
        self.image_width_ = int(facts.get("image_width", self.image_width_))
        if not 0 <= self.image_width_ < len(self.standardizer_.mean):
            raise ValueError(f"an image width of {self.image_width_}")


def _hidden(parameters: Mapping[str, np.ndarray], batch: np.ndarray) -> np.ndarray:
    """What is classified: the batch itself, or both halves projected and added."""
    if "shift" not in parameters:
        return batch
    image, text = parameters["project_image"], parameters["project_text"]
    return batch[:, : image.shape[-2]] @ image + batch[:, image.shape[-2] :] @ text + parameters["shift"][..., None, :]


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
