"""Multi-label and single-label scores, by the conventions that make numbers comparable.

- AP is uninterpolated, Σ (R_n - R_{n-1})·P_n with equal scores taken as one step: scikit-learn's `average_precision_score`. Never VOC's 11
  points.
- mAP is the unweighted mean over classes. Classes without a positive have no AP: `empty="skip"` leaves them out, `empty="zero"` counts them
  as 0.
- CP and CR are means over classes, CF1 is the harmonic mean of *those two* (not the mean of per-class F1); OP, OR, OF1 pool all decisions.

- A label of −1 says that nobody knows whether this sample has this class. The cell is left out: of AP, of every count, and of the `top` highest.

Every score lies in 0..1. Rank with `decision_function`, not with probabilities: those saturate at 0 and 1 and so make ties.
Each score is computed through sample weights [n, r], one column a resample, so that a point estimate and its bootstrap are one formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.data import known_cells, positive_cells

THRESHOLD = 0.5
EMPTY = ("skip", "zero")

Statistic = Callable[[np.ndarray], np.ndarray]
"""Sample weights float64 [n, r] -> one score for each column, float64 [r]; NaN where a resample leaves nothing to score."""


@dataclass(frozen=True)
class MeanAveragePrecision:
    """mAP with what it was taken over. `per_class` float64 [C] is NaN where a class has no positives."""

    value: float
    per_class: np.ndarray
    evaluated: int
    empty: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; None where a class has no positives."""
        per_class = [None if np.isnan(value) else float(value) for value in self.per_class]
        return {"value": self.value, "evaluated": self.evaluated, "classes": len(per_class), "empty": self.empty, "per_class": per_class}


@dataclass(frozen=True)
class PrecisionRecall:
    """Per-class (c) and overall (o) precision, recall and F1 at `threshold`; `top` is k when only the k highest scores may count."""

    cp: float
    cr: float
    cf1: float
    op: float
    or_: float
    of1: float
    threshold: float
    top: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, named CP, CR, CF1, OP, OR, OF1, threshold, top."""
        values = asdict(self)
        settings = {"threshold": values.pop("threshold"), "top": values.pop("top")}
        return {key.rstrip("_").upper(): value for key, value in values.items()} | settings


def average_precision(labels: Any, scores: Any) -> np.ndarray:
    """Uninterpolated AP of each class, ties grouped; float64 [C], NaN where a class has no positives.

    **Arguments:** `labels` 0/1 [n, C], −1 where unknown; `scores` [n, C], higher is more likely. Raises ProbeError when they do not fit.
    """
    positive, ranked = check_scores(labels, scores)
    return _weighted_ap(positive, ranked, known_cells(labels))(_ones(len(positive)))[:, 0]


def mean_average_precision(labels: Any, scores: Any, *, empty: str = "skip") -> MeanAveragePrecision:
    """MAP over classes; see the module's head for `empty`. Raises ProbeError when no class has a positive."""
    _check_empty(empty)
    per_class = average_precision(labels, scores)
    defined = ~np.isnan(per_class)
    kept = per_class[defined] if empty == "skip" else np.nan_to_num(per_class)
    return MeanAveragePrecision(float(kept.mean()), per_class, len(kept), empty)


def precision_recall(labels: Any, probabilities: Any, *, threshold: float = THRESHOLD, top: int | None = None) -> PrecisionRecall:
    """CP, CR, CF1, OP, OR, OF1 of the decisions `probabilities > threshold`, and among the `top` highest of each sample when given.

    A class (or the whole) without predictions has precision 0; recall is averaged over classes with positives. Equal scores at the edge of
    the top: the earlier class goes first. Raises ProbeError when `probabilities` leave 0..1.
    """
    positive, decided = decide(labels, probabilities, threshold=threshold, top=top)
    scores = _precision_recall(positive, decided)(_ones(len(positive)))[:, 0]
    cp, cr, cf1, op, or_, of1 = (float(value) for value in scores)
    return PrecisionRecall(cp, cr, cf1, op, or_, of1, threshold, top)


def top_k_accuracy(labels: Any, scores: Any, k: int = 1) -> float:
    """Share of samples whose class is among the k highest scores.

    **Arguments:** `labels` class numbers int [n], or one-hot [n, C]; `scores` [n, C]. Equal scores: the earlier class goes first, as in
    argmax.
    """
    return float(top_k_hits(labels, scores, k).mean())


def top_k_hits(labels: Any, scores: Any, k: int) -> np.ndarray:
    """Bool [n]: whether each sample's class is among its k highest scores."""
    ranked = _check_ranked(scores)
    n, n_classes = ranked.shape
    truth = _class_numbers(labels, n, n_classes)
    if not 1 <= k <= n_classes:
        raise ProbeError(f"top-{k} was asked for, but there are {n_classes} classes")
    own = ranked[np.arange(n), truth][:, None]
    before = (ranked > own) | ((ranked == own) & (np.arange(n_classes) < truth[:, None]))
    if (known := known_cells(labels)) is not None:
        before &= known
    return before.sum(axis=1) < k


def multi_label_report(labels: Any, scores: Any, probabilities: Any, *, threshold: float = THRESHOLD, empty: str = "skip") -> dict[str, Any]:
    """MAP (from `scores`), CP ... OF1 and their top-3 form (from `probabilities`) as plain JSON types.

    Where every sample has exactly one class also `accuracy`: top-1, and top-5 of more than five classes (of five it is always 1), from `scores`.
    """
    report: dict[str, Any] = {"mAP": mean_average_precision(labels, scores, empty=empty).to_dict()}
    report["all"] = precision_recall(labels, probabilities, threshold=threshold).to_dict()
    if np.shape(scores)[1] >= 3:
        report["top3"] = precision_recall(labels, probabilities, threshold=threshold, top=3).to_dict()
    if known_cells(labels) is None and (positive_cells(labels).sum(axis=1) == 1).all():
        report["accuracy"] = {f"top{k}": top_k_accuracy(labels, scores, k) for k in (1, 5) if k < np.shape(scores)[1]}
    return report


def statistic(metric: str, labels: Any, scores: Any, *, empty: str = "skip", threshold: float = THRESHOLD, top: int | None = None) -> Statistic:
    """The weighted form of a score, for resampling. `metric`: `map`, `cp`, `cr`, `cf1`, `op`, `or`, `of1`, `top1` or `top5`.

    `scores` are probabilities for cp ... of1. Ranks and decisions are found once, here.
    """
    precision_recall_rows = ("cp", "cr", "cf1", "op", "or", "of1")
    if metric == "map":
        return _weighted_map(*check_scores(labels, scores), empty, known_cells(labels))
    if metric in precision_recall_rows:
        every, row = _precision_recall(*decide(labels, scores, threshold=threshold, top=top)), precision_recall_rows.index(metric)
        return lambda weights: every(weights)[row]
    if metric in ("top1", "top5"):
        hits = top_k_hits(labels, scores, int(metric[3:])).astype(np.float64)
        return lambda weights: (hits @ weights) / weights.sum(axis=0)
    raise ConfigError(f"metric must be one of map, {', '.join(precision_recall_rows)}, top1, top5; got {metric!r}")


def class_precisions(labels: Any, scores: Any) -> Statistic:
    """The weighted form of the AP of each class: sample weights [n, r] -> float64 [C, r], NaN where a class has no positive. Ranked once, here."""
    return _weighted_ap(*check_scores(labels, scores), known_cells(labels))


def mean_over_classes(values: np.ndarray, empty: str) -> np.ndarray:
    """AP [C, r], NaN where a class has none, to mAP [r]; NaN where no class has any. `empty`: see the module's head."""
    _check_empty(empty)
    defined = ~np.isnan(values)
    number = defined.sum(axis=0) if empty == "skip" else np.where(defined.any(axis=0), len(values), 0)
    return np.divide(np.nansum(values, axis=0), number, out=np.full(values.shape[1], np.nan), where=number > 0)


def check_scores(labels: Any, scores: Any) -> tuple[np.ndarray, np.ndarray]:
    """(bool [n, C], scores [n, C]), or a ProbeError that says what does not fit."""
    positive, ranked = positive_cells(labels), _check_ranked(scores)
    if positive.shape != ranked.shape:
        raise ProbeError(f"labels {list(positive.shape)} and scores {list(ranked.shape)} differ in shape; both must be [n, C]")
    if not positive.any():
        raise ProbeError(f"none of the {positive.shape[1]} classes has a positive among these {len(positive)} samples: nothing can be scored")
    return positive, ranked


def decide(labels: Any, probabilities: Any, *, threshold: float, top: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(positive, decided), both bool [n, C]; in neither are cells whose label nobody knows."""
    positive, chances = check_scores(labels, probabilities)
    if chances.min() < 0 or chances.max() > 1:
        raise ProbeError(
            f"probabilities must lie in 0..1, found {chances.min():.4g}..{chances.max():.4g}. Pass predict_proba, not decision_function."
        )
    decided, known = chances > threshold, known_cells(labels)
    if known is not None:
        decided, chances = decided & known, np.where(known, chances, -1)
    if top is not None:
        if not 1 <= top <= chances.shape[1]:
            raise ProbeError(f"the top {top} were asked for, but there are {chances.shape[1]} classes")
        first = np.argsort(-chances, axis=1, kind="stable")[:, :top]
        among = np.zeros_like(decided)
        np.put_along_axis(among, first, True, axis=1)
        decided &= among
    return positive, decided


def _check_ranked(scores: Any) -> np.ndarray:
    ranked = np.asarray(scores)
    if ranked.ndim != 2 or 0 in ranked.shape:
        raise ProbeError(f"scores must be [n, C], got shape {list(ranked.shape)}")
    if not np.issubdtype(ranked.dtype, np.floating):
        ranked = ranked.astype(np.float64)  # an unsigned score cannot be negated for sorting
    if np.isnan(ranked).any():
        row, column = (int(index) for index in np.argwhere(np.isnan(ranked))[0])
        raise ProbeError(f"scores hold NaN, first for sample {row} and class {column}: check the features for NaN, or lower the learning rate")
    return ranked


def _check_empty(empty: str) -> None:
    if empty not in EMPTY:
        raise ConfigError(f"empty must be skip or zero, got {empty!r}")


def _class_numbers(labels: Any, n: int, n_classes: int) -> np.ndarray:
    array = np.asarray(labels)
    if array.ndim == 2:
        multi_hot = positive_cells(array)
        if (multi_hot.sum(axis=1) != 1).any():
            raise ProbeError("top-k accuracy needs exactly one class a sample; for several use mean_average_precision")
        array = multi_hot.argmax(axis=1)
    if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
        raise ProbeError(f"labels must be class numbers [{n}], got {array.dtype} of shape {list(array.shape)}")
    if array.min() < 0 or array.max() >= n_classes:
        raise ProbeError(f"labels must lie in 0..{n_classes - 1}, found {int(array.min())}..{int(array.max())}")
    return array


def _ones(n: int) -> np.ndarray:
    return np.ones((n, 1))


def _steps(positive: np.ndarray, scores: np.ndarray, known: np.ndarray | bool = True) -> tuple[Any, Any]:
    """Sparse sums over the steps of one class's precision-recall curve: [G, n] of all samples and [G, n] of positives.

    A step is one distinct score that some positive has; samples scored between two steps join the lower one. Positives have nothing
    below the last step, so samples there are in no row; nor are those that are not `known`.
    """
    from scipy.sparse import csr_array

    rank = np.unique(-scores, return_inverse=True)[1]
    steps = np.unique(rank[positive])
    step = np.searchsorted(steps, rank)
    inside = np.flatnonzero((step < len(steps)) & known)
    hits = np.flatnonzero(positive)

    def sums(samples: np.ndarray) -> Any:
        return csr_array((np.ones(len(samples)), (step[samples], samples)), shape=(len(steps), len(rank)))

    return sums(inside), sums(hits)


def _weighted_ap(positive: np.ndarray, scores: np.ndarray, known: np.ndarray | None = None) -> Statistic:
    """Weights [n, r] -> AP [C, r]: Σ over steps of (positives at the step)·(precision there), over all positives."""
    plans = [
        _steps(positive[:, c], scores[:, c], True if known is None else known[:, c]) if positive[:, c].any() else None
        for c in range(positive.shape[1])
    ]

    def evaluate(weights: np.ndarray) -> np.ndarray:
        result = np.full((len(plans), weights.shape[1]), np.nan)
        for c, plan in enumerate(plans):
            if plan is None:
                continue
            seen, hits = np.cumsum(plan[0] @ weights, axis=0), plan[1] @ weights
            found = np.cumsum(hits, axis=0)
            precision = np.divide(found, seen, out=np.zeros_like(found), where=seen > 0)
            total = found[-1]
            np.divide((hits * precision).sum(axis=0), total, out=result[c], where=total > 0)
        return result

    return evaluate


def _weighted_map(positive: np.ndarray, scores: np.ndarray, empty: str, known: np.ndarray | None = None) -> Statistic:
    _check_empty(empty)
    per_class = _weighted_ap(positive, scores, known)

    return lambda weights: mean_over_classes(per_class(weights), empty)


def _precision_recall(positive: np.ndarray, decided: np.ndarray) -> Statistic:
    """Weights [n, r] -> [6, r]: CP, CR, CF1, OP, OR, OF1."""
    kinds = [kind.T.astype(np.float64) for kind in (positive & decided, decided, positive)]

    def evaluate(weights: np.ndarray) -> np.ndarray:
        right, predicted, present = (kind @ weights for kind in kinds)
        cp = _ratio(right, predicted).mean(axis=0)
        number = (present > 0).sum(axis=0)
        cr = np.divide(_ratio(right, present).sum(axis=0), number, out=np.full(len(number), np.nan), where=number > 0)
        op = _ratio(right.sum(axis=0), predicted.sum(axis=0))
        or_ = np.where(number > 0, _ratio(right.sum(axis=0), present.sum(axis=0)), np.nan)
        return np.stack([cp, cr, _harmonic(cp, cr), op, or_, _harmonic(op, or_)])

    return evaluate


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Part / whole, and 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _harmonic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(a + b), np.nan, _ratio(2 * a * b, a + b))
