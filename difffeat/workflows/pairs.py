"""Ridge scores of taps and of pairs of taps on one joined split: what the search and the quickstart evaluate.

Fusion here is the closed-form ridge on the standardised concatenation. With no more classes than the shared width it is the same class of functions
as projection and addition, and it needs no learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from difffeat.probe.fusion import Join, PairedFeatures, join
from difffeat.probe.metrics import mean_average_precision
from difffeat.probe.ridge import ALPHAS, RidgeProbe, ridge_path
from difffeat.recipe import tap_name


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
    def labels(self) -> np.ndarray:
        """uint8 [m, C]."""
        assert self.joined.labels is not None
        return self.joined.labels[self.rows]

    def image(self, tap: str) -> np.ndarray:
        """float32 [m, D]."""
        return np.asarray(self.joined.image_store[tap][self.joined.image_rows[self.rows]], np.float32)

    def text(self, tap: str) -> np.ndarray:
        """float32 [m, D]."""
        return np.asarray(self.joined.text_store[tap][self.joined.text_rows[self.rows]], np.float32)

    def pair(self, image_tap: str, text_tap: str) -> PairedFeatures:
        """Both, row by row."""
        return PairedFeatures(self.image(image_tap), self.text(text_tap))


class TapEvaluator:
    """mAP on `held` of ridges fitted on `train`, alpha chosen on `held` as well (so these numbers are for choosing, not for reporting).

    Callable forms for the searches of `difffeat.probe.search`: `image`, `text`, `pair`, and `pair_within` for halving.
    """

    def __init__(self, train: Split, held: Split, alphas: Sequence[float] = ALPHAS) -> None:
        self._train, self._held, self._alphas = train, held, alphas
        self.pair = cache(self._pair)
        self._images = cache(lambda tap: (train.image(tap), held.image(tap)))
        self._texts = cache(lambda tap: (train.text(tap), held.text(tap)))

    def image(self, block: int, t: float) -> float:
        """Of an image tap alone."""
        return self._score(*self._images(tap_name(block, t)), self._train.labels)

    def text(self, block: int, t: float) -> float:
        """Of a text tap alone."""
        return self._score(*self._texts(tap_name(block, t)), self._train.labels)

    def _pair(self, image_tap: str, text_tap: str) -> float:
        (train_image, image), (train_text, text) = self._images(image_tap), self._texts(text_tap)
        return self._score(np.concatenate([train_image, train_text], axis=1), np.concatenate([image, text], axis=1), self._train.labels)

    def pair_within(self, image_tap: str, text_tap: str, /, *, budget: int) -> float:
        """Of a pair on `budget` training rows: the same for every pair, drawn with a fixed seed (sources are often sorted by class)."""
        small = Split(self._train.joined, np.random.Generator(np.random.PCG64(0)).permutation(self._train.rows)[:budget])
        return self._score(small.pair(image_tap, text_tap), self._held.pair(image_tap, text_tap), small.labels)

    @property
    def rows(self) -> int:
        """Training rows."""
        return len(self._train.rows)

    def _score(self, x: Any, y: Any, labels: np.ndarray) -> float:
        _, scores = ridge_path(x, labels).choose(y, self._held.labels, self._alphas)
        return max(scores)


def fit_ridge(x: Any, labels: np.ndarray, held: Any, held_labels: np.ndarray) -> RidgeProbe:
    """A ridge with alpha chosen on the held-out split."""
    return RidgeProbe().fit(x, labels, validation=(held, held_labels))


def percent_map(labels: np.ndarray, scores: np.ndarray) -> float:
    """MAP in percent."""
    return 100.0 * mean_average_precision(labels, scores).value
