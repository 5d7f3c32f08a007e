"""`difffeat probe`, `fuse` and `search`: stores in, numbers and classifiers out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import ConfigError
from difffeat.probe.bootstrap import bootstrap_interval, paired_bootstrap
from difffeat.probe.evaluate import SCHEMA, probe_store, split_rows, write_metrics
from difffeat.probe.fusion import FusionProbe, join
from difffeat.probe.search import Grid, grid_search, halving, local_search
from difffeat.recipe import parse_tap
from difffeat.runtime.store import Store
from difffeat.workflows.pairs import Split, TapEvaluator, fit_ridge

RESULTS = Path("results")


def run_probe(
    store: Path, *, validation: Path | None, test: Path | None, taps: str | None, method: str, seed: int, output: Path | None
) -> dict[str, Any]:
    """Probe every tap on validation, the best one once on test. Writes metrics.json and the probe as safetensors."""
    train = Store.open(store)
    others: dict[str, Any] = {"validation": Store.open(validation) if validation else None, "test": Store.open(test) if test else None}
    names = tuple(part.strip() for part in taps.split(",")) if taps else train.taps
    for name in names:
        parse_tap(name)
    scored = {}
    if len(names) > 1:
        for name in names:
            probed = probe_store(train, name, **others, report_on="validation", method=method, seed=seed, n_resamples=200)
            scored[name] = probed.result["interval"]
    best = max(scored, key=lambda name: scored[name]["value"]) if scored else next(iter(names))
    final = probe_store(train, best, **others, report_on="test", method=method, seed=seed)
    out = output or RESULTS / f"probe-{store.name}"
    result = {**final.result, "candidates": scored, "selected_on": "validation" if scored else final.result["selected_on"]}
    metrics = write_metrics(out, result)
    beside = metrics.with_name(f"{metrics.stem.replace('metrics', 'probe')}.safetensors")
    classifier = final.probe.save(beside, {"tap": best, "fingerprint": train.fingerprint})
    lines = [f"{name}: validation mAP {_interval(value)}{'   <- best' if name == best else ''}" for name, value in scored.items()]
    lines += [
        f"{best} on test ({result['splits']['test']['rows']} rows, {result['splits']['test']['from']}): mAP {_interval(result['interval'])}",
        f"  method {method}; chosen on {result['selected_on']}",
        f"  {metrics}, {classifier}",
    ]
    return {**result, "metrics_file": str(metrics), "classifier": str(classifier), "text": "\n".join(lines)}


def run_fuse(
    image_store: Path,
    text_store: Path,
    *,
    image_tap: str | None,
    text_tap: str | None,
    test_image: Path | None,
    test_text: Path | None,
    fusion: str,
    width: int,
    seed: int,
    output: Path | None,
) -> dict[str, Any]:
    """Train the fused classifier, with image alone, text alone and the closed-form fusion beside it, on the same rows."""
    if (test_image is None) != (test_text is None):
        raise ConfigError("give both --test-image and --test-text, or neither")
    stores = Store.open(image_store), Store.open(text_store)
    taps = _one_tap(stores[0], image_tap, "--image-tap"), _one_tap(stores[1], text_tap, "--text-tap")
    train, held, test, summary = _fusion_splits(stores, test_image, test_text, seed)
    fused = FusionProbe(width=width, kind=fusion, seed=seed).fit(train.pair(*taps), train.labels, classes=train.joined.classes)
    ridges = {
        "image": (train.image(taps[0]), held.image(taps[0]), test.image(taps[0])),
        "text": (train.text(taps[1]), held.text(taps[1]), test.text(taps[1])),
        "concatenation (ridge)": (train.pair(*taps), held.pair(*taps), test.pair(*taps)),
    }
    scores = {name: fit_ridge(x, train.labels, v, held.labels).decision_function(y) for name, (x, v, y) in ridges.items()}
    name = f"fusion by {fusion}"
    scores[name] = fused.decision_function(test.pair(*taps))
    rng = np.random.Generator(np.random.PCG64(seed))
    intervals = {key: bootstrap_interval(test.labels, value, rng=rng).to_dict() for key, value in scores.items()}
    gains = {key: paired_bootstrap(test.labels, scores[name], scores[key], rng=rng).to_dict() for key in ("image", "text")}
    out = output or RESULTS / f"fusion-{image_store.name}"
    result = {
        "schema": SCHEMA,
        "kind": "fusion",
        "taps": list(taps),
        "join": summary,
        "rows": {"train": len(train.rows), "validation": len(held.rows), "test": len(test.rows)},
        "selected_on": "validation (ridge alphas only)",
        "reported_on": "test",
        "settings": fused.settings(),
        "mAP": intervals,
        "gain": gains,
    }
    metrics = write_metrics(out, result)
    classifier = fused.save(metrics.with_name(f"{metrics.stem.replace('metrics', 'fusion')}.safetensors"), {"taps": ",".join(taps)})
    lines = [summary, *(f"{key}: test mAP {_interval(value)}" for key, value in intervals.items())]
    lines += [f"{name} less {key} alone: {_interval(value, 'difference')}" for key, value in gains.items()]
    lines.append(f"  {metrics}, {classifier}")
    return {**result, "metrics_file": str(metrics), "classifier": str(classifier), "text": "\n".join(lines)}


def _fusion_splits(stores: tuple[Store, Store], test_image: Path | None, test_text: Path | None, seed: int) -> tuple[Split, Split, Split, str]:
    joined = join(*stores)
    if joined.labels is None:
        raise ConfigError("neither store has labels, so nothing can be trained. Extract from a source that has them.")
    if test_image is None or test_text is None:
        parts = split_rows(joined.labels, seed=seed)
        return (*(Split(joined, parts[name]) for name in ("train", "validation", "test")), joined.summary())  # type: ignore[return-value]
    parts = split_rows(joined.labels, fractions=(0.8, 0.2, 0.0), seed=seed)
    test = Split.whole(Store.open(test_image), Store.open(test_text))
    return Split(joined, parts["train"]), Split(joined, parts["validation"]), test, f"{joined.summary()}; test: {test.joined.summary()}"


def run_search(image_store: Path, text_store: Path, *, strategy: str, neighbourhood: int, seed: int, output: Path | None) -> dict[str, Any]:
    """Search the best pair of taps; everything is selected on a validation share of the joined rows."""
    stores = Store.open(image_store), Store.open(text_store)
    grids = [Grid.of_taps(store.taps) for store in stores]
    joined = join(*stores)
    if joined.labels is None:
        raise ConfigError("neither store has labels, so nothing can be searched. Extract from a source that has them.")
    parts = split_rows(joined.labels, fractions=(0.7, 0.3, 0.0), seed=seed)
    evaluator = TapEvaluator(Split(joined, parts["train"]), Split(joined, parts["validation"]))
    options: dict[str, Any] = {"image_grid": grids[0], "text_grid": grids[1]}
    if strategy == "local":
        found = local_search(evaluator.image, evaluator.text, evaluator.pair, block_radius=neighbourhood, t_radius=neighbourhood, **options)
    elif strategy == "grid":
        found = grid_search(evaluator.pair, **options)
    elif strategy == "halving":
        least = min(evaluator.rows, max(evaluator.rows // 9, 10 * joined.labels.shape[1]))
        found = halving(evaluator.pair_within, max_budget=evaluator.rows, min_budget=least, **options)
    else:
        raise ConfigError(f"strategy must be local, grid or halving, got {strategy!r}")
    result = {"schema": SCHEMA, "selected_on": "validation", "rows": {name: len(rows) for name, rows in parts.items()}, **found.to_dict()}
    metrics = write_metrics(output or RESULTS / f"search-{image_store.name}", result, "search.json")
    counts = ", ".join(f"{count} {kind}" for kind, count in found.counts.items())
    lines = [
        f"best pair: {found.image_tap} + {found.text_tap}, validation mAP {100 * found.value:.2f}",
        f"  strategy {strategy}; probes: {counts}",
        f"  {metrics}",
    ]
    return {**result, "metrics_file": str(metrics), "text": "\n".join(lines)}


def _one_tap(store: Store, tap: str | None, option: str) -> str:
    if tap is not None:
        parse_tap(tap)
        return tap
    if len(store.taps) > 1:
        raise ConfigError(f"{store.path} has {len(store.taps)} taps; say which with {option}, one of: {', '.join(store.taps)}")
    return next(iter(store.taps))


def _interval(value: dict[str, Any], key: str = "value") -> str:
    return f"{100 * value[key]:.2f} [{100 * value['low']:.2f}, {100 * value['high']:.2f}]"
