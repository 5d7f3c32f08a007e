"""Probes that are trained by Adam: batches, several learning rates side by side, the choice between them, and whether the loss still falls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from difffeat.errors import ProbeError
from difffeat.probe.base import Probe
from difffeat.probe.data import FeatureMatrix, matrix_shape, row_chunks, row_count, take
from difffeat.probe.labels import BINARY, MULTICLASS, Labels
from difffeat.probe.optim import AUTO, LRS, Adam, batches, candidates, check_training, cosine, loss_and_gradient, spent, steps_of
from difffeat.probe.selection import ON_HOLDOUT, ON_VALIDATION, Examples, Judged, by_map, edge_note, hold_out, judge
from difffeat.probe.standardize import Standardizer

CACHE_BYTES = 2**30
"""Standardised features up to this size are held in memory during a training; larger ones are read batch by batch."""

STACK_BYTES = 2**29
"""Learning rates are tried side by side, in one pass over the batches, as long as their weights and moments need no more than this."""

FALLING = 0.05
"""The loss is still falling when the steps of the second half of a training take off more than this share of what the whole of it did."""

_PIECES = 16
"""A training of few epochs is looked at in so many pieces."""

Parameters = dict[str, np.ndarray]
Reader = Callable[[np.ndarray], np.ndarray]
"""Positions among the selected rows -> standardised float32 [m, D]."""


@dataclass(frozen=True)
class Curve:
    """How a loss went: `history`, its mean in each epoch, and `pieces`, the same in pieces of equal length."""

    history: list[float]
    pieces: list[float]


class TrainedProbe(Probe):
    """What the probes by Adam share.

    `lr` None: chosen among `LRS`; several: among those. `loss` auto: softmax where each sample has one of several classes, else bce.

    **Attributes after fitting:** besides those of `Probe`: `lr_`, `lrs_` (the rates that were tried), `loss_`, `history_` (mean loss of each
    epoch).
    """

    epochs: int
    lr: float | Sequence[float] | None
    batch_size: int
    weight_decay: float
    standardize: bool
    loss: str
    seed: int
    lr_: float
    lrs_: list[float]
    history_: list[float]

    @property
    def loss_(self) -> str:
        """The loss that is trained: `bce` or `softmax`."""
        return "softmax" if self.link == "softmax" else "bce"

    def check_settings(self) -> None:
        check_training(
            epochs=self.epochs, lr=self.lr, batch_size=self.batch_size, weight_decay=self.weight_decay, loss=self.loss, seed=self.seed
        )  # fmt: skip

    def _link(self, target: str) -> str:
        single = self.loss == "softmax" or (self.loss == AUTO and target == MULTICLASS)
        return "softmax" if single and target != BINARY else "sigmoid"

    def _train_on(self, examples: Examples, held: Examples | None) -> tuple[Parameters, list[str]]:
        """(trained parameters, notes); sets what is known of the choice. Without `held` a fifth of the rows is held out to choose on."""
        self.target_ = examples.labels.target
        rates = candidates(self.lr, LRS)
        if len(rates) == 1:
            trained, standardizer, curves = self._trainings(examples, rates)
            self.lr_, self.lrs_, self.validation_map_, self.validation_loss_ = rates[0], rates, [], []
            self.selected_on_ = "nothing: lr was given"
            return self._settle(trained[0], standardizer, curves[0])
        inner, outer = (examples, held) if held is not None else hold_out(examples, self.seed, "lr")
        trained, standardizer, curves = self._trainings(inner, rates)
        judged = self._judge(trained, standardizer, outer)
        place = judged.best(last=False)
        self.lr_, self.lrs_ = rates[place], rates
        self.validation_map_, self.validation_loss_ = judged.maps, judged.losses
        self.selected_on_ = ON_VALIDATION if held is not None else ON_HOLDOUT
        edge = edge_note("lr", rates, place, judged)
        if held is None:
            trained, standardizer, curves = self._trainings(examples, [self.lr_])
            place = 0
        parameters, falling = self._settle(trained[place], standardizer, curves[place])
        # Where a larger rate, which goes further, was judged worse, to train on is no remedy.
        return parameters, edge + (falling if self.lr_ == rates[-1] else [])

    def _settle(self, parameters: Parameters, standardizer: Standardizer, curve: Curve) -> tuple[Parameters, list[str]]:
        """Keep what a training was like; (parameters, what should be said about it)."""
        self.standardizer_, self.history_ = standardizer, curve.history
        share = still_falling(curve.pieces)
        if share <= FALLING:
            return parameters, []
        return parameters, [
            f"the loss is still falling after {self.epochs} epochs of batches of {self.batch_size} at lr {self.lr_:g}: {share:.0%} of its fall came "
            "from the steps of the second half. Raise epochs, or lr, or use RidgeProbe (--method ridge)."
        ]

    def _trainings(self, examples: Examples, rates: Sequence[float]) -> tuple[list[Parameters], Standardizer, list[Curve]]:
        """(parameters of each rate, standardisation, how the loss of each went) on some rows."""
        x, rows, labels = examples.x, examples.rows, examples.labels
        width = matrix_shape(x)[1]
        standardizer = Standardizer.fit(x, rows) if self.standardize else Standardizer.identity(width)
        read, first = standardised_reader(x, rows, standardizer), self._initial(width, labels.positive.shape[1])
        together = max(1, STACK_BYTES // (16 * sum(value.size for value in first.values())))
        trained, curves = list[Parameters](), list[Curve]()
        for start in range(0, len(rates), together):
            group = np.asarray(rates[start : start + together], np.float64)
            stacked = {name: np.repeat(value[None], len(group), axis=0) for name, value in first.items()}
            epochs, pieces = self._train(stacked, group, read, labels)
            trained += [{name: value[place].copy() for name, value in stacked.items()} for place in range(len(group))]
            curves += [Curve(*pair) for pair in zip(epochs.T.tolist(), pieces.T.tolist(), strict=True)]
        if len(rates) == 1:
            _check_loss(curves[0].history)
        return trained, standardizer, curves

    def _train(self, parameters: Parameters, rates: np.ndarray, read: Reader, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
        """Train the R stacked `parameters` in place; the mean loss of each epoch float64 [epochs, R], and of each piece for `still_falling`."""
        n = len(labels)
        steps = steps_of(n, epochs=self.epochs, batch_size=self.batch_size)
        adam = Adam(parameters, lr=rates, steps=steps, weight_decay=self.weight_decay)
        losses, by_step = np.zeros((self.epochs, len(rates))), list[np.ndarray]()
        with np.errstate(over="ignore", invalid="ignore"):
            for epoch, positions in batches(n, epochs=self.epochs, batch_size=self.batch_size, seed=self.seed):
                truth = labels.positive[positions].astype(np.float32)
                known = None if labels.known is None else labels.known[positions]
                values, slopes = self._slopes(parameters, read(positions), truth, known)
                losses[epoch] += np.asarray(values) * (len(positions) / n)
                by_step.append(np.asarray(values, np.float64))
                if not np.isfinite(losses[epoch]).any():
                    losses[epoch:] = np.nan
                    break
                adam.step(slopes)
        if self.epochs >= 8 or steps < 4 * _PIECES:
            return losses, losses
        return losses, np.array([np.mean(piece, axis=0) for piece in np.array_split(np.array(by_step), _PIECES)])

    def _judge(self, trained: Sequence[Parameters], standardizer: Standardizer, held: Examples) -> Judged:
        """What each rate reaches on the rows that were kept for the choice."""
        maps, losses = list[float](), list[float]()
        for parameters in trained:
            scores = np.empty(held.labels.positive.shape, np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                for start, chunk in row_chunks(held.x, held.rows):
                    scores[start : start + len(chunk)] = self._logits(parameters, standardizer.transform(chunk))
                value, loss = judge(held.labels, scores, log_loss(self.loss_, held.labels, scores))
            maps.append(value)
            losses.append(loss)
        return Judged(maps, losses, by_map(held.labels))

    def _initial(self, width: int, n_columns: int) -> Parameters:
        """Parameters before the training."""
        raise NotImplementedError

    @staticmethod
    def _logits(parameters: Mapping[str, np.ndarray], batch: np.ndarray) -> np.ndarray:
        """Scores [m, K] of a standardised batch, or [R, m, K]."""
        raise NotImplementedError

    def _slopes(self, parameters: Mapping[str, np.ndarray], batch: np.ndarray, truth: np.ndarray, known: np.ndarray | None) -> tuple[Any, Parameters]:
        """The batch's loss and its gradient by each parameter. Parameters may hold R trainings in their first axis; then there are R losses.

        **Arguments:** batch [m, D], truth float32 [m, K], known bool [m, K] or None.
        """
        raise NotImplementedError

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"history": self.history_, "lr": self.lr_, "lrs": self.lrs_}

    def _recall(self, facts: Mapping[str, Any]) -> None:
        super()._recall(facts)
        self.history_ = [float(value) for value in facts.get("history", ())]
        given = candidates(self.lr, LRS)[0]  # of a file of an earlier version, which took 1e-3 where nothing was given
        self.lr_, self.lrs_ = float(facts.get("lr", given)), [float(value) for value in facts.get("lrs", ())]


def still_falling(curve: Sequence[float]) -> float:
    """The share of a training's fall of the loss that the steps of its second half account for; `curve`: mean losses of equally long pieces.

    Towards the end a loss falls for two reasons: the weights still move, by what is left of the summed rate, and the noise of the steps dies down
    with the rate itself. Both shapes are fitted to the second half, and only the first says that the training ended too soon. 0 where fewer than
    eight pieces tell nothing.
    """
    n, half = len(curve), len(curve) // 2
    whole = curve[0] - curve[-1] if n else 0.0
    if n < 8 or not np.isfinite(curve).all() or whole <= 1e-6 * abs(curve[0]):
        return 0.0
    middles = np.arange(half, n) + 0.5
    moved, rate = np.array([spent(m, n) for m in middles]), np.array([cosine(1.0, m, n) for m in middles])
    shapes = np.stack([np.ones(n - half), -moved, rate], axis=1)
    pace = np.linalg.lstsq(shapes, np.asarray(curve[half:]), rcond=None)[0][1]
    return float(pace * (0.5 - spent(half, n)) / whole)


def log_loss(loss: str, labels: Labels, scores: np.ndarray) -> float:
    """Mean `bce` or `softmax` loss, a few rows at a time."""
    total, count = 0.0, 0
    for start in range(0, len(scores), 4096):
        part = slice(start, start + 4096)
        known = None if labels.known is None else labels.known[part]
        size = len(scores[part]) if loss == "softmax" else int(known.sum()) if known is not None else scores[part].size
        value, _ = loss_and_gradient(loss, scores[part].astype(np.float64), labels.positive[part], known)
        total, count = total + value * size, count + size
    return total / max(count, 1)


def _check_loss(history: Sequence[float]) -> None:
    for epoch, value in enumerate(history):
        if not np.isfinite(value):
            raise ProbeError(f"the loss became {value} in epoch {epoch + 1}. Lower lr, or turn standardisation on.")


def standardised_reader(x: FeatureMatrix, rows: np.ndarray | None, standardizer: Standardizer, cache_bytes: int = CACHE_BYTES) -> Reader:
    """Reads batches from memory when all of it is at most `cache_bytes`, else from `x` each time; the values are the same."""
    count, width = row_count(x, rows), matrix_shape(x)[1]
    if 4 * count * width > cache_bytes:
        return lambda positions: standardizer.transform(take(x, positions if rows is None else rows[positions]))
    held = np.empty((count, width), np.float32)
    for start, chunk in row_chunks(x, rows):
        held[start : start + len(chunk)] = standardizer.transform(chunk)
    return lambda positions: held[positions]
