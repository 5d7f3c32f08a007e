"""`difffeat bench intervals`: how often a nominal 95 % interval holds the mean over test sets of its size, by simulation.

Each simulated test set draws labels and the scores of two systems; the truth is the mean over many such sets. Beside our interval stands the plain
percentile interval, which for mAP is shifted upwards. Seeds make every number come again, whatever the number of processes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from math import sqrt
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.benchmarks.asking import require_counts, require_known
from difffeat.benchmarks.timing import machine
from difffeat.probe.bootstrap import bootstrap_interval, multiplicities, paired_bootstrap
from difffeat.probe.metrics import statistic
from difffeat.probe.optim import check_seed
from difffeat.probe.selection import column_ap

LEVEL = 0.95
LIMITS = (0.92, 0.98)
"""What coverage of a 95 % interval is right in the settings that are held to it."""
PIECE = 10
"""Test sets that one process simulates at a time."""

Say = Callable[..., None]


@dataclass(frozen=True)
class Setting:
    """A kind of test set and two systems that score it.

    **Fields:** `samples`; `shares` of positives by class; `signal` of a positive over unit noise in the first system, `less` of it in the second;
    `kind` of labels: `independent`, `correlated` (one cause behind all classes) or `single` (one class a sample); `metric`; `step` to which scores
    are rounded (0: none), so that ties stand; `held`: whether coverage is held to `LIMITS`.
    """

    about: str
    samples: int
    shares: tuple[float, ...]
    signal: float
    less: float = 0.8
    kind: str = "independent"
    metric: str = "map"
    step: float = 0.0
    held: bool = False


TAIL = (0.54, *np.geomspace(0.11, 0.008, 77).tolist(), 0.0018, 0.0016)
"""Shares as COCO's 80 categories have them: one in every second image, most in a few of a hundred, two in fewer than one of five hundred."""

SETTINGS: dict[str, Setting] = {
    "common": Setting("10 classes in 30 % of 2 000 samples", 2000, (0.3,) * 10, 1.0, held=True),
    "tail": Setting("80 classes with COCO's tail, 1 000 samples", 1000, TAIL, 3.0, held=True),
    "tail-weak": Setting("the same, features that tell less", 1000, TAIL, 1.5, held=True),
    "rare": Setting("100 classes of about 5 positives, 1 000 samples", 1000, (0.005,) * 100, 2.0, held=True),
    "rarest": Setting("100 classes of about 2 positives, 1 000 samples", 1000, (0.002,) * 100, 2.0),
    "correlated": Setting("20 correlated classes, 500 samples", 500, (0.1,) * 20, 1.5, kind="correlated"),
    "ties": Setting("10 classes, scores rounded to halves, 500 samples", 500, (0.2,) * 10, 1.0, step=0.5),
    "small": Setting("5 classes, 40 samples", 40, (0.3,) * 5, 1.0),
    "top1": Setting("top-1 of 10 single labels, 500 samples", 500, (0.1,) * 10, 2.0, kind="single", metric="top1"),
    "of1": Setting("OF1 of 20 classes, 500 samples", 500, (0.1,) * 20, 1.5, metric="of1"),
    "cf1": Setting("CF1 of 80 classes with COCO's tail, 1 000 samples", 1000, TAIL, 1.5, metric="cf1"),
}


@dataclass(frozen=True)
class Coverage:
    """How often intervals of one setting held the truth, over `simulations` test sets.

    **Fields:** `truth`, `difference` the mean scores that were to be held; `centred`, `percentile`, `paired` how many intervals held them; `outside`
    how many percentile intervals did not hold their own score; `width` the mean width of ours.
    """

    truth: float
    difference: float
    simulations: int
    centred: int
    percentile: int
    paired: int
    outside: int
    width: float

    def share(self, count: int) -> tuple[float, float, float]:
        """(share, lower, upper): with Wilson's 95 % interval for a share of so many simulations."""
        n, z = self.simulations, 1.96
        p = count / n
        middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return p, middle - half, middle + half

    @property
    def right(self) -> bool:
        """Whether coverage lies within `LIMITS`."""
        return LIMITS[0] <= self.centred / self.simulations <= LIMITS[1]


def run_intervals(
    *, settings: Sequence[str], simulations: int, resamples: int, truth: int, seed: int, workers: int | None, output: Path | None, say: Say
) -> dict[str, Any]:
    """Simulate every setting; arguments as the command's options. Raises ConfigError for counts below 1 and settings that there are not."""
    require_counts(simulations=simulations, resamples=resamples, truth=truth, workers=workers)
    require_known("--settings", settings, SETTINGS)
    check_seed(seed)
    workers, started = workers or os.cpu_count() or 1, time.perf_counter()
    found = dict(_simulated(settings, simulations, resamples, truth, seed, workers, say))
    result: dict[str, Any] = {
        "benchmark": "intervals",
        "level": LEVEL,
        "limits": list(LIMITS),
        "simulations": simulations,
        "resamples": resamples,
        "truth": truth,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "machine": machine(),
        "settings": {name: _numbers(SETTINGS[name], coverage) for name, coverage in found.items()},
        "kept": all(coverage.right for name, coverage in found.items() if SETTINGS[name].held),
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")
    return {**result, "text": "\n".join(_lines(found, result))}


def _numbers(setting: Setting, coverage: Coverage) -> dict[str, Any]:
    shares = {name: list(coverage.share(getattr(coverage, name))) for name in ("centred", "percentile", "paired", "outside")}
    return {**asdict(setting), **asdict(coverage), "shares": shares, "right": coverage.right}


def _simulated(
    settings: Sequence[str], simulations: int, resamples: int, truth: int, seed: int, workers: int, say: Say
) -> Iterable[tuple[str, Coverage]]:
    """(name, coverage) of each setting, pieces of it in several processes."""
    pieces = [(start, min(start + PIECE, simulations)) for start in range(0, simulations, PIECE)]
    truths = [(start, min(start + 10 * PIECE, truth)) for start in range(0, truth, 10 * PIECE)]

    def every(call: Callable[..., Any], jobs: list[Any]) -> list[Any]:
        return list(map(call, *zip(*jobs, strict=True))) if pool is None else list(pool.map(call, *zip(*jobs, strict=True)))

    pool = None if workers == 1 else ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)
    try:
        for name in dict.fromkeys(settings):
            say(f"{name}: {SETTINGS[name].about}")
            points = np.concatenate(every(_points, [(name, seed, *piece) for piece in truths]))
            mean = float(points[:, 0].mean()), float((points[:, 0] - points[:, 1]).mean())
            counts = np.sum(every(_held, [(name, seed, *piece, resamples, *mean) for piece in pieces]), axis=0)
            found = Coverage(mean[0], mean[1], simulations, *counts[:4].astype(int).tolist(), width=float(counts[4] / simulations))
            say(f"  {100 * found.centred / simulations:.1f} %; plain percentile {100 * found.percentile / simulations:.1f} %")
            yield name, found
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    """Processes share the cores: none of them takes more than one."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)


def _points(name: str, seed: int, first: int, last: int) -> np.ndarray:
    """Scores of both systems on the test sets of a stretch, float64 [m, 2]: other sets than those that intervals are made of."""
    setting = SETTINGS[name]
    return np.array([[_score(setting, labels, one) for one in systems] for labels, *systems in _sets(name, seed, first, last, 0)])


def _held(name: str, seed: int, first: int, last: int, resamples: int, truth: float, difference: float) -> np.ndarray:
    """Of a stretch of test sets: how many centred, percentile, paired intervals hold the truth, percentile ones leave out their score; widths."""
    setting, counts = SETTINGS[name], np.zeros(5)
    for number, (labels, a, b) in enumerate(_sets(name, seed, first, last, 1), first):
        options: dict[str, Any] = {"metric": setting.metric, "n_resamples": resamples, "level": LEVEL}
        rng = [np.random.Generator(np.random.PCG64([seed, 2, number])) for _ in range(3)]
        ours = bootstrap_interval(labels, a, rng=rng[0], **options)
        paired = paired_bootstrap(labels, a, b, rng=rng[1], **options)
        low, high = percentile_interval(labels, a, rng=rng[2], metric=setting.metric, n_resamples=resamples)
        counts += (
            ours.low <= truth <= ours.high, low <= truth <= high, paired.low <= difference <= paired.high, not low <= ours.value <= high,
            ours.high - ours.low,
        )  # fmt: skip
    return counts


def percentile_interval(labels: Any, scores: Any, *, rng: np.random.Generator, metric: str = "map", n_resamples: int) -> tuple[float, float]:
    """The plain percentile interval, which ours is held against."""
    score = statistic(metric, labels, scores)
    values = np.concatenate([score(weights) for weights in multiplicities(len(labels), n_resamples, rng)])
    low, high = np.nanpercentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def _score(setting: Setting, labels: np.ndarray, scores: np.ndarray) -> float:
    if setting.metric == "map":
        return float(np.nanmean(column_ap(labels, scores)))
    return float(statistic(setting.metric, labels, scores)(np.ones((len(labels), 1)))[0])


def _sets(name: str, seed: int, first: int, last: int, purpose: int) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(labels bool [n, C], scores of two systems [n, C]) of the numbered test sets, each from a seed of its own; none is without a positive."""
    setting, kind = SETTINGS[name], list(SETTINGS).index(name)
    for number in range(first, last):
        rng = np.random.Generator(np.random.PCG64([seed, 3, purpose, kind, number]))
        labels = _labels(setting, rng)
        while not labels.any():
            labels = _labels(setting, rng)
        common = rng.normal(size=labels.shape)  # both systems see the same samples, which are as hard for the one as for the other
        systems = []
        for signal in (setting.signal, setting.signal * setting.less):
            logits = signal * labels + 0.8 * common + 0.6 * rng.normal(size=labels.shape)
            systems.append(_shown(setting, logits, signal))
        yield labels, systems[0], systems[1]


def _labels(setting: Setting, rng: np.random.Generator) -> np.ndarray:
    shares, shape = np.array(setting.shares), (setting.samples, len(setting.shares))
    if setting.kind == "single":
        return np.eye(len(shares), dtype=bool)[rng.choice(len(shares), setting.samples, p=shares / shares.sum())]
    if setting.kind == "correlated":
        from scipy.stats import norm

        cause = sqrt(0.8) * rng.normal(size=(setting.samples, 1)) + sqrt(0.2) * rng.normal(size=shape)
        return cause > norm.isf(shares)
    return rng.random(shape) < shares


def _shown(setting: Setting, logits: np.ndarray, signal: float) -> np.ndarray:
    """Scores as the metric wants them: probabilities with the threshold between the two humps for F1, rounded where ties are wanted."""
    if setting.metric in ("of1", "cf1"):
        return 1 / (1 + np.exp(signal - logits))
    return np.round(logits / setting.step) * setting.step if setting.step else logits


def _lines(found: Mapping[str, Coverage], result: Mapping[str, Any]) -> list[str]:
    def shown(coverage: Coverage, count: int) -> str:
        share, low, high = (100 * value for value in coverage.share(count))
        return f"{share:5.1f} [{low:4.1f}, {high:5.1f}]"

    lines = [
        f"coverage (%) of {100 * LEVEL:.0f} % intervals over {result['simulations']} simulated test sets, {result['resamples']} resamples each, "
        f"truth: the mean of {result['truth']} others; seed {result['seed']}",
        f"  {'':50} {'score':>6} {'difffeat':>20} {'plain percentile':>20} {'score outside it':>16} {'paired difference':>20}",
    ]
    for name, coverage in found.items():
        setting, outside = SETTINGS[name], 100 * coverage.outside / coverage.simulations
        mark = "" if coverage.right or not setting.held else "   <- not right"
        lines.append(
            f"  {setting.about + (' *' if setting.held else ''):50} {100 * coverage.truth:6.1f} {shown(coverage, coverage.centred):>20} "
            f"{shown(coverage, coverage.percentile):>20} {outside:16.1f} {shown(coverage, coverage.paired):>20}{mark}"
        )
    limits = " to ".join(f"{100 * limit:.0f}" for limit in LIMITS)
    verdict = "kept" if result["kept"] else "NOT kept"
    return [*lines, f"  * held to {limits} %: {verdict}. In brackets: 95 % intervals of a share of so many test sets. {result['seconds']:.0f} s."]
