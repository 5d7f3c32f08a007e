"""Ridge scores of taps and of pairs of taps on one joined split: what the search and the quickstart evaluate.

Fusion here is the closed-form ridge on the standardised concatenation. With no more classes than the shared width it is the same class of functions
as projection and addition, and it needs no learning rate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from difffeat.errors import ProbeError
from difffeat.probe.choices import OPTIMISTIC, edge_text, is_at_edge, warnings_kept
from difffeat.probe.data import FeatureMatrix, RowsOf
from difffeat.probe.fusion import Join, PairedFeatures, join
from difffeat.probe.metrics import mean_average_precision
from difffeat.probe.ridge import RidgeProbe
from difffeat.probe.ridge_solutions import ALPHAS, ridge_path
from difffeat.probe.sameness import require_apart, require_same_classes, require_same_recipe
from difffeat.recipe import tap_name

HELD_BYTES = 2**30
"""Features up to this size stay in memory between the probes of a search; beyond it the taps used longest ago are read again."""


@dataclass(frozen=True)
class Split:
    """Rows of a join that serve as one split."""

    joined: Join
    rows: np.ndarray

    @classmethod
    def whole(cls, image_store: Any, text_store: Any) -> Split:
        """All rows that two stores share."""
        joined = join(image_store, text_store)
        return cls(joined, np.arange(len(joined)))

    @property
    def ids(self) -> list[str]:
        """Sample ids of the rows."""
        return [self.joined.ids[row] for row in self.rows.tolist()]

    @property
    def labels(self) -> np.ndarray:
        """[m, C]. Raises ProbeError where neither store has labels."""
        if self.joined.labels is None:
            raise ProbeError("neither the image nor the text store has labels. Extract one of them from a source that has.")
        return self.joined.labels[self.rows]

    def image(self, tap: str) -> FeatureMatrix:
        """[m, D], read when it is looked at."""
        return RowsOf(self.joined.image_store[tap], self.joined.image_rows[self.rows])

    def text(self, tap: str) -> FeatureMatrix:
        """[m, D], read when it is looked at."""
        return RowsOf(self.joined.text_store[tap], self.joined.text_rows[self.rows])

    def pair(self, image_tap: str, text_tap: str) -> PairedFeatures:
        """Both, row by row."""
        return PairedFeatures(self.image(image_tap), self.text(text_tap))

    def require_comparable(self, test: Split, name: str, *, allow_shared: bool = False) -> list[str]:
        """Raises ProbeError unless another split has this one's classes and recipes, known labels, and (unless `allow_shared`) other samples.

        Two joined samples are the same where their image is: unrelated pictures may well have the same short caption. Returns what `require_apart`
        does.
        """
        for kind, mine, theirs in (
            ("image", self.joined.image_store, test.joined.image_store),
            ("text", self.joined.text_store, test.joined.text_store),
        ):
            require_same_recipe(mine, theirs, f"{name} {kind}")
        if test.joined.labels is None:
            raise ProbeError(f"neither of the {name} stores has labels, so nothing can be scored. Extract one of them from a source that has.")
        require_same_classes(self.joined.classes, test.joined.classes, name)
        return self.require_apart(test, ("train", name), allow_shared=allow_shared)

    def require_apart(self, other: Split, names: tuple[str, str], *, allow_shared: bool = False) -> list[str]:
        """Raises ProbeError where both splits hold the same image, unless `allow_shared`. Returns sentences on what is shared or may be."""
        mine, theirs = self.joined, other.joined
        rows, others = mine.image_rows[self.rows], theirs.image_rows[other.rows]
        return require_apart(mine.image_store, rows, theirs.image_store, others, names, allow_shared=allow_shared)


class Held:
    """Features by name, float32 in memory, at most `limit` bytes of them: those used longest ago go first. What is larger alone stays on disk."""

    def __init__(self, limit: int = HELD_BYTES) -> None:
        self._limit, self._bytes = limit, 0
        self._held: OrderedDict[str, np.ndarray] = OrderedDict()

    def get(self, name: str, matrix: FeatureMatrix) -> FeatureMatrix:
        """What `matrix` holds."""
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        size = 4 * int(np.prod(matrix.shape))
        if size > self._limit:
            return matrix
        while self._bytes + size > self._limit:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        self._held[name] = np.asarray(matrix[:], np.float32)
        self._bytes += size
        return self._held[name]


class TapEvaluator:
    """mAP on `held` of ridges fitted on `train`, alpha chosen on `held` as well (so these numbers are for choosing, not for reporting).

    Callable forms for the searches of `difffeat.probe.search`: `image`, `text`, `pair`, and `pair_within` for halving.

    Raises ProbeError where both splits hold the same sample, unless `allow_shared`.
    """

    def __init__(
        self, train: Split, held: Split, alphas: Sequence[float] = ALPHAS, *, held_bytes: int = HELD_BYTES, allow_shared: bool = False
    ) -> None:
        train.require_apart(held, ("train", "validation"), allow_shared=allow_shared)
        self._train, self._held, self._alphas = train, held, alphas
        self._labels = train.labels, held.labels
        self._memory = Held(held_bytes)
        self._chosen: dict[str, bool] = {}
        self.pair = cache(self._pair)

    def image(self, block: int, t: float) -> float:
        """Of an image tap alone."""
        tap = tap_name(block, t)
        return self._score(f"image {tap}", *self._images(tap), self._labels[0])

    def text(self, block: int, t: float) -> float:
        """Of a text tap alone."""
        tap = tap_name(block, t)
        return self._score(f"text {tap}", *self._texts(tap), self._labels[0])

    def _images(self, tap: str) -> tuple[FeatureMatrix, FeatureMatrix]:
        """Of train and of the held-out split."""
        train, held = self._train.image(tap), self._held.image(tap)
        return self._memory.get(f"image {tap} train", train), self._memory.get(f"image {tap} held", held)

    def _texts(self, tap: str) -> tuple[FeatureMatrix, FeatureMatrix]:
        train, held = self._train.text(tap), self._held.text(tap)
        return self._memory.get(f"text {tap} train", train), self._memory.get(f"text {tap} held", held)

    def _pair(self, image_tap: str, text_tap: str) -> float:
        train, held = (PairedFeatures(*halves) for halves in zip(self._images(image_tap), self._texts(text_tap), strict=True))
        return self._score(f"{image_tap} + {text_tap}", train, held, self._labels[0])

    def pair_within(self, image_tap: str, text_tap: str, /, *, budget: int) -> float:
        """Of a pair on `budget` training rows: the same for every pair, drawn with a fixed seed (sources are often sorted by class)."""
        small = Split(self._train.joined, np.random.Generator(np.random.PCG64(0)).permutation(self._train.rows)[:budget])
        pairs = small.pair(image_tap, text_tap), self._held.pair(image_tap, text_tap)
        return self._score(f"{image_tap} + {text_tap} on {budget}", *pairs, small.labels)

    @property
    def rows(self) -> int:
        """Training rows."""
        return len(self._train.rows)

    def _score(self, name: str, x: Any, y: Any, labels: np.ndarray) -> float:
        alpha, scores = ridge_path(x, labels).choose(y, self._labels[1], self._alphas)
        self._chosen[name] = is_at_edge(alpha, self._alphas, scores)
        return max(scores)

    @property
    def at_edge(self) -> list[str]:
        """Taps and pairs, of those evaluated so far, whose alpha is the first or last of the grid and better than the one beside it."""
        return [name for name, edge in self._chosen.items() if edge]

    @property
    def notes(self) -> list[str]:
        """What must be known of these values: that they flatter, and which were fitted at an edge of the grid."""
        return [OPTIMISTIC, *([edge_text(self.at_edge)] if self.at_edge else [])]

    def text_scores(self, tap: str) -> np.ndarray:
        """Scores [n, C] of the held-out rows by the ridge of a text tap alone."""
        return self._held_scores(*self._texts(tap))

    def image_scores(self, tap: str) -> np.ndarray:
        """Scores [n, C] of the held-out rows by the ridge of an image tap alone."""
        return self._held_scores(*self._images(tap))

    def _held_scores(self, x: Any, y: Any) -> np.ndarray:
        path = ridge_path(x, self._labels[0])
        return path.scores(y, [path.choose(y, self._labels[1], self._alphas)[0]])[0]

    @property
    def held_labels(self) -> np.ndarray:
        """uint8 [n, C] of the held-out rows."""
        return self._labels[1]


def fit_ridge(x: Any, labels: np.ndarray, held: Any, held_labels: np.ndarray, classes: Sequence[str] | None = None) -> RidgeProbe:
    """A ridge with alpha chosen on the held-out split; what there is to say of the choice stands in its `notes_`."""
    with warnings_kept():
        return RidgeProbe().fit(x, labels, validation=(held, held_labels), classes=classes)


def percent_map(labels: np.ndarray, scores: np.ndarray) -> float:
    """MAP in percent."""
    return 100.0 * mean_average_precision(labels, scores).value
