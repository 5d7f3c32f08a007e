"""The choice of taps: Algorithm 1 of Diff-Feat (local search), the exhaustive grid, and successive halving.

Local search evaluates every tap of each modality alone, takes each modality's peak, and evaluates fused only the pairs in the
neighbourhoods of the peaks: O(|T||B|) probes instead of O(|T|²|B|²). It assumes that probe quality is unimodal, which is therefore checked
and reported; what the assumption costs is the *regret*, the best value of the exhaustive grid less that grid's value at the pair that was
found.

Equal values: the smaller block wins, then the smaller timestep (the cheaper graph); for pairs the image's tap is compared before the
text's.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from difffeat.errors import ConfigError, ProbeError
from difffeat.recipe import parse_tap, tap_name

IMAGE_TIMESTEPS: tuple[float, ...] = (0, 10, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500)
TEXT_TIMESTEPS: tuple[float, ...] = (0, 0.05, 0.1, 0.2, 0.3, 0.5)

EvaluateTap = Callable[[int, float], float]
"""(block, timestep) -> value, higher is better."""
EvaluatePair = Callable[[str, str], float]
"""(image tap, text tap) -> value of the fused probe."""
Pair = tuple[str, str]


class EvaluatePairWithin(Protocol):
    """A pair's value when at most `budget` training rows are used."""

    def __call__(self, image_tap: str, text_tap: str, /, *, budget: int) -> float: ...


@dataclass(frozen=True)
class Grid:
    """Blocks and timesteps of one modality, ascending."""

    blocks: tuple[int, ...]
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, values in (("blocks", self.blocks), ("timesteps", self.timesteps)):
            if not values or list(values) != sorted(set(values)):
                raise ConfigError(f"{name} of a grid must be ascending and distinct, got {list(values)}")

    @classmethod
    def of_taps(cls, taps: Iterable[str]) -> Grid:
        """The grid that holds all of `taps`. Raises ConfigError on a name that is no tap."""
        parsed = [parse_tap(tap) for tap in taps]
        return cls(tuple(sorted({block for block, _ in parsed})), tuple(sorted({t for _, t in parsed})))

    @property
    def taps(self) -> tuple[str, ...]:
        """All taps in the order in which ties are settled: by block, then timestep."""
        return tuple(tap_name(block, t) for block in self.blocks for t in self.timesteps)

    def around(self, block: int, t: float, *, block_radius: int, t_radius: int) -> tuple[str, ...]:
        """Taps at most so many grid steps away in block and in timestep, in the order of `taps`."""
        row, column = self.blocks.index(block), self.timesteps.index(t)
        blocks = self.blocks[max(0, row - block_radius) : row + block_radius + 1]
        timesteps = self.timesteps[max(0, column - t_radius) : column + t_radius + 1]
        return tuple(tap_name(b, s) for b in blocks for s in timesteps)


@dataclass(frozen=True)
class Evaluation:
    """One probe that was fitted. `kind`: image, text or pair; `taps` one or two names; `budget` training rows, None for all."""

    order: int
    kind: str
    taps: tuple[str, ...]
    value: float
    budget: int | None = None


@dataclass(frozen=True)
class Unimodality:
    """Blocks whose values over timesteps, and timesteps whose values over blocks, rise again after falling by more than `tolerance`."""

    broken_blocks: tuple[int, ...]
    broken_timesteps: tuple[float, ...]
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether every row and every column is unimodal."""
        return not (self.broken_blocks or self.broken_timesteps)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"holds": self.holds, **asdict(self)}


@dataclass(frozen=True)
class SearchResult:
    """The pair that was found and how.

    **Fields:** `value` of the pair as the search measured it; `trace` of every evaluation in order; `surfaces` image/text -> float64
    [blocks, timesteps] (local search only); `unimodality` of each surface; `regret` and `exhaustive_best` when an exhaustive grid was
    given.
    """

    strategy: str
    image_tap: str
    text_tap: str
    value: float
    trace: tuple[Evaluation, ...]
    surfaces: Mapping[str, np.ndarray] = field(default_factory=dict)
    unimodality: Mapping[str, Unimodality] = field(default_factory=dict)
    exhaustive_best: Pair | None = None
    regret: float | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many probes of each kind were fitted, and their `total`."""
        kinds = Counter(evaluation.kind for evaluation in self.trace)
        return {kind: kinds[kind] for kind in ("image", "text", "pair")} | {"total": len(self.trace)}

    @property
    def pairs(self) -> dict[Pair, float]:
        """(image tap, text tap) -> its last value; of a grid search, the `exhaustive` argument of the others."""
        return {(e.taps[0], e.taps[1]): e.value for e in self.trace if e.kind == "pair"}

    @property
    def training_rows(self) -> int | None:
        """Training rows summed over all probes, for searches with a budget."""
        budgets = [evaluation.budget for evaluation in self.trace]
        known = [budget for budget in budgets if budget is not None]
        return sum(known) if len(known) == len(budgets) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "strategy": self.strategy,
            "best": {"image": self.image_tap, "text": self.text_tap, "value": self.value},
            "counts": self.counts,
            "training_rows": self.training_rows,
            "unimodality": {name: check.to_dict() for name, check in self.unimodality.items()},
            "exhaustive_best": None if self.exhaustive_best is None else list(self.exhaustive_best),
            "regret": self.regret,
            "trace": [asdict(evaluation) for evaluation in self.trace],
        }


def local_search(
    eval_image: EvaluateTap,
    eval_text: EvaluateTap,
    eval_pair: EvaluatePair,
    *,
    image_grid: Grid,
    text_grid: Grid,
    block_radius: int = 1,
    t_radius: int = 1,
    tolerance: float = 0.0,
    exhaustive: Mapping[Pair, float] | None = None,
) -> SearchResult:
    """Algorithm 1: each modality's peak, then the pairs around both peaks.

    **Arguments:** evaluators (higher is better, finite); the grids; the neighbourhood's radii in grid steps (the paper leaves them open;
    1); `tolerance` of the unimodality check; `exhaustive` values of pairs (`grid_search(...).pairs`) for the regret.
    """
    if block_radius < 0 or t_radius < 0:
        raise ConfigError(f"radii must be at least 0, got {block_radius} and {t_radius}")
    recorder, surfaces, around = _Recorder(), {}, {}
    for kind, evaluate, grid in (("image", eval_image, image_grid), ("text", eval_text, text_grid)):
        surfaces[kind] = _surface(recorder, kind, evaluate, grid)
        row, column = divmod(int(surfaces[kind].argmax()), len(grid.timesteps))
        around[kind] = grid.around(grid.blocks[row], grid.timesteps[column], block_radius=block_radius, t_radius=t_radius)
    values = {pair: recorder.add("pair", pair, eval_pair(*pair)) for pair in itertools.product(around["image"], around["text"])}
    checks = {kind: check_unimodal(surfaces[kind], grid, tolerance) for kind, grid in (("image", image_grid), ("text", text_grid))}
    return _result("local", _best(values), recorder, exhaustive, surfaces, checks)


def grid_search(eval_pair: EvaluatePair, *, image_grid: Grid, text_grid: Grid) -> SearchResult:
    """Every pair of both grids, fused; its regret is 0 by definition."""
    recorder = _Recorder()
    values = {pair: recorder.add("pair", pair, eval_pair(*pair)) for pair in itertools.product(image_grid.taps, text_grid.taps)}
    return _result("grid", _best(values), recorder, values)


def halving(
    eval_pair: EvaluatePairWithin,
    *,
    image_grid: Grid,
    text_grid: Grid,
    max_budget: int,
    min_budget: int,
    eta: int = 3,
    candidates: Sequence[Pair] | None = None,
    exhaustive: Mapping[Pair, float] | None = None,
) -> SearchResult:
    """Successive halving (Jamieson and Talwalkar 2016): all pairs on few training rows, the best 1/eta on eta times as many, and so on.

    **Arguments:** `eval_pair(image_tap, text_tap, budget=rows)`; budgets rise to exactly `max_budget` and start at or above `min_budget`;
    `candidates` instead of all pairs of the grids; `exhaustive` as in `local_search`. The winner's value is that on `max_budget` rows.
    """
    if not 1 <= min_budget <= max_budget or eta < 2:
        raise ConfigError(f"halving needs 1 <= min_budget <= max_budget and eta >= 2, got {min_budget}, {max_budget} and {eta}")
    alive = list(itertools.product(image_grid.taps, text_grid.taps)) if candidates is None else sorted(set(candidates), key=_pair_key)
    if not alive:
        raise ConfigError("halving needs at least one candidate pair")
    recorder, values = _Recorder(), dict[Pair, float]()
    rungs = int(math.log(max_budget / min_budget, eta) + 1e-9)
    for rung in range(rungs, -1, -1):
        if len(alive) == 1 and rung:
            continue  # nothing left to choose between: go on to the full budget
        budget = max_budget // eta**rung
        values = {pair: recorder.add("pair", pair, eval_pair(*pair, budget=budget), budget) for pair in alive}
        ranked = sorted(alive, key=lambda pair: (-values[pair], _pair_key(pair)))
        alive = sorted(ranked[: math.ceil(len(ranked) / eta)], key=_pair_key)
    return _result("halving", _best(values), recorder, exhaustive)


def check_unimodal(surface: np.ndarray, grid: Grid, tolerance: float = 0.0) -> Unimodality:
    """Whether each row (one block over timesteps) and each column (one timestep over blocks) of [blocks, timesteps] has a single peak."""
    if surface.shape != (len(grid.blocks), len(grid.timesteps)):
        raise ProbeError(f"the surface is {list(surface.shape)}, the grid {[len(grid.blocks), len(grid.timesteps)]}")
    blocks = tuple(block for block, row in zip(grid.blocks, surface, strict=True) if not is_unimodal(row, tolerance))
    timesteps = tuple(t for t, column in zip(grid.timesteps, surface.T, strict=True) if not is_unimodal(column, tolerance))
    return Unimodality(blocks, timesteps, tolerance)


def is_unimodal(values: np.ndarray, tolerance: float = 0.0) -> bool:
    """Whether `values` rise to one peak and then fall, dips and bumps of up to `tolerance` aside."""
    peak = int(np.argmax(values))
    before, after = values[: peak + 1], values[peak:]
    dips = np.maximum.accumulate(before) - before
    bumps = after - np.minimum.accumulate(after)
    return bool(dips.max() <= tolerance and bumps.max() <= tolerance)


class _Recorder:
    """Keeps every evaluation in order and refuses values that cannot be compared."""

    def __init__(self) -> None:
        self.trace: list[Evaluation] = []

    def add(self, kind: str, taps: tuple[str, ...], value: float, budget: int | None = None) -> float:
        number = float(value)
        if not math.isfinite(number):
            raise ProbeError(f"the evaluation of {' and '.join(taps)} gave {number}; the search needs a finite value, higher being better")
        self.trace.append(Evaluation(len(self.trace), kind, taps, number, budget))
        return number


def _surface(recorder: _Recorder, kind: str, evaluate: EvaluateTap, grid: Grid) -> np.ndarray:
    values = [recorder.add(kind, (tap_name(block, t),), evaluate(block, t)) for block in grid.blocks for t in grid.timesteps]
    return np.array(values).reshape(len(grid.blocks), len(grid.timesteps))


def _pair_key(pair: Pair) -> tuple[tuple[int, float], tuple[int, float]]:
    return parse_tap(pair[0]), parse_tap(pair[1])


def _best(values: Mapping[Pair, float]) -> tuple[Pair, float]:
    return min(values.items(), key=lambda item: (-item[1], _pair_key(item[0])))


def _result(
    strategy: str,
    best: tuple[Pair, float],
    recorder: _Recorder,
    exhaustive: Mapping[Pair, float] | None,
    surfaces: Mapping[str, np.ndarray] | None = None,
    checks: Mapping[str, Unimodality] | None = None,
) -> SearchResult:
    pair, value = best
    top, regret = None, None
    if exhaustive is not None:
        if pair not in exhaustive:
            raise ProbeError(f"the exhaustive grid lacks the pair {pair[0]} and {pair[1]} that the search found: use the same grids for both")
        top, highest = _best(exhaustive)
        regret = highest - exhaustive[pair]
    return SearchResult(strategy, *pair, value, tuple(recorder.trace), surfaces or {}, checks or {}, top, regret)
