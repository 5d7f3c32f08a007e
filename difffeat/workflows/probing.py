"""`difffeat probe`, `fuse` and `search`: stores in, numbers and classifiers out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import ConfigError
from difffeat.probe.bootstrap import bootstrap_interval, paired_bootstrap
from difffeat.probe.evaluate import SCHEMA, probe_store, split_rows, write_metrics
from difffeat.probe.fusion import FusionProbe, join
from difffeat.probe.optim import check_seed
from difffeat.probe.output import check_folder
from difffeat.probe.provenance import provenance
from difffeat.probe.sameness import told
from difffeat.probe.search import Grid, SearchResult, grid_search, halving, local_search
from difffeat.recipe import parse_tap
from difffeat.runtime.store import Store
from difffeat.workflows.pairs import Split, TapEvaluator, fit_ridge

RESULTS = Path("results")
STRATEGIES = ("local", "grid", "halving")
_BRACKETS = "  in brackets: 95 % bootstrap intervals over samples"


def run_probe(
    store: Path, *, validation: Path | None, test: Path | None, taps: str | None, method: str, seed: int, output: Path | None
) -> dict[str, Any]:
    """Probe every tap on validation, the best one once on test. Writes metrics.json and the probe as safetensors."""
    out = _begin(output, f"probe-{store.name}", seed)
    train = _features(store)
    others: dict[str, Any] = {"validation": _features(validation) if validation else None, "test": _features(test) if test else None}
    names = _taps(train, taps)
    scored = {}
    if len(names) > 1:
        for name in names:
            probed = probe_store(train, name, **others, report_on="validation", method=method, seed=seed, n_resamples=200)
            scored[name] = probed.result["interval"]
    best = max(scored, key=lambda name: scored[name]["value"]) if scored else next(iter(names))
    final = probe_store(train, best, **others, report_on="test", method=method, seed=seed)
    result = {**final.result, "candidates": scored, "selected_on": "validation" if scored else final.result["selected_on"]}
    result["provenance"] = provenance({"train": store, "validation": validation, "test": test})
    metrics = write_metrics(out, result, beside=["probe.safetensors"])
    about = {"tap": best, "fingerprint": train.fingerprint}
    classifier = final.probe.save(metrics.with_name(f"{metrics.stem.replace('metrics', 'probe')}.safetensors"), about)
    lines = [f"{name}: validation mAP {_interval(value)}{'   <- best' if name == best else ''}" for name, value in scored.items()]
    lines += [
        f"{best} on test ({result['splits']['test']['rows']} rows, {result['splits']['test']['from']}): mAP {_interval(result['interval'])}",
        *_single_label(result["metrics"]),
        *(f"  left out of the {name} store: {told(counts)}" for name, counts in result["left_out"].items() if told(counts)),
        _BRACKETS,
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
    out = _begin(output, f"fusion-{image_store.name}", seed)
    if (test_image is None) != (test_text is None):
        raise ConfigError("give both --test-image and --test-text, or neither")
    fused = FusionProbe(width=width, kind=fusion, seed=seed)
    stores = _features(image_store), _features(text_store)
    taps = _one_tap(stores[0], image_tap, "--image-tap"), _one_tap(stores[1], text_tap, "--text-tap")
    tests = None if test_image is None or test_text is None else (_features(test_image), _features(test_text))
    splits, summary = _fusion_splits(stores, tests, seed)
    fused.fit(splits["train"].pair(*taps), splits["train"].labels, classes=splits["train"].joined.classes)
    name = f"fusion by {fusion}"
    scores = {**_ridge_scores(splits, taps), name: fused.decision_function(splits["test"].pair(*taps))}
    intervals, gains = _compared(splits["test"].labels, scores, name, seed)
    about = {"seed": seed, "join": summary, "taps": list(taps), "settings": fused.settings()}
    result = {**_origin(splits), **about, "mAP": intervals, "gain": gains}
    result["provenance"] = provenance({"image": image_store, "text": text_store, "test image": test_image, "test text": test_text})
    metrics = write_metrics(out, result, beside=["fusion.safetensors"])
    kept = {"taps": ",".join(taps), "fingerprints": result["fingerprints"]["train"]}
    classifier = fused.save(metrics.with_name(f"{metrics.stem.replace('metrics', 'fusion')}.safetensors"), kept)
    lines = [summary, *(f"{key}: test mAP {_interval(value)}" for key, value in intervals.items())]
    lines += [f"{name} less {key} alone: {_interval(value, 'difference')}" for key, value in gains.items()]
    lines += [_BRACKETS, f"  {metrics}, {classifier}"]
    return {**result, "metrics_file": str(metrics), "classifier": str(classifier), "text": "\n".join(lines)}


def _origin(splits: Mapping[str, Split]) -> dict[str, Any]:
    """What a fusion's numbers are of, as plain JSON types."""
    return {
        "schema": SCHEMA,
        "kind": "fusion",
        "rows": {part: len(split.rows) for part, split in splits.items()},
        "left_out": {part: dict(split.joined.dropped) for part, split in splits.items() if part != "validation"},
        "fingerprints": {part: _fingerprints(split) for part, split in splits.items()},
        "classes": list(splits["train"].joined.classes),
        "selected_on": "validation (ridge alphas only)",
        "reported_on": "test",
    }


def _fusion_splits(stores: tuple[Store, Store], tests: tuple[Store, Store] | None, seed: int) -> tuple[dict[str, Split], str]:
    """Train, validation and test by name, and how they were joined, in words. Raises ProbeError where the test stores are not comparable."""
    joined = join(*stores)
    if joined.labels is None:
        raise ConfigError("neither store has labels, so nothing can be trained. Extract from a source that has them.")
    if tests is None:
        return {name: Split(joined, rows) for name, rows in split_rows(joined.labels, seed=seed).items()}, joined.summary()
    test = Split.whole(*tests)
    Split(joined, np.arange(len(joined))).require_comparable(test, "test")
    parts = split_rows(joined.labels, fractions=(0.8, 0.2, 0.0), seed=seed)
    own = {name: Split(joined, parts[name]) for name in ("train", "validation")}
    return {**own, "test": test}, f"{joined.summary()}; test: {test.joined.summary()}"


def _ridge_scores(splits: Mapping[str, Split], taps: tuple[str, str]) -> dict[str, np.ndarray]:
    """Test scores [n, C] of ridges on images alone, texts alone, and both side by side."""
    train, held, test = (splits[name] for name in ("train", "validation", "test"))
    features = {
        "image": [split.image(taps[0]) for split in (train, held, test)],
        "text": [split.text(taps[1]) for split in (train, held, test)],
        "concatenation (ridge)": [split.pair(*taps) for split in (train, held, test)],
    }
    return {name: fit_ridge(x, train.labels, v, held.labels).decision_function(y) for name, (x, v, y) in features.items()}


def _compared(labels: np.ndarray, scores: Mapping[str, np.ndarray], name: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The interval of each system, and of what `name` gains over image and text alone."""
    rng = np.random.Generator(np.random.PCG64(seed))
    intervals = {key: bootstrap_interval(labels, value, rng=rng).to_dict() for key, value in scores.items()}
    return intervals, {key: paired_bootstrap(labels, scores[name], scores[key], rng=rng).to_dict() for key in ("image", "text")}


def run_search(image_store: Path, text_store: Path, *, strategy: str, neighbourhood: int, seed: int, output: Path | None) -> dict[str, Any]:
    """Search the best pair of taps; everything is selected on a validation share of the joined rows."""
    out = _begin(output, f"search-{image_store.name}", seed)
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy must be local, grid or halving, got {strategy!r}")
    stores = _features(image_store), _features(text_store)
    joined = join(*stores)
    if joined.labels is None:
        raise ConfigError("neither store has labels, so nothing can be searched. Extract from a source that has them.")
    parts = split_rows(joined.labels, fractions=(0.7, 0.3, 0.0), seed=seed)
    train = Split(joined, parts["train"])
    evaluator = TapEvaluator(train, Split(joined, parts["validation"]))
    found = _search(strategy, evaluator, [Grid.of_taps(store.taps) for store in stores], neighbourhood, joined.labels.shape[1])
    result = {
        "schema": SCHEMA,
        "kind": "search",
        "seed": seed,
        "selected_on": "validation",
        "rows": {name: len(parts[name]) for name in ("train", "validation")},
        "left_out": dict(joined.dropped),
        "fingerprints": _fingerprints(train),
        "classes": list(joined.classes),
        **found.to_dict(),
        "provenance": provenance({"image": image_store, "text": text_store}),
    }
    metrics = write_metrics(out, result, "search.json")
    counts = ", ".join(f"{count} {kind}" for kind, count in found.counts.items())
    lines = [
        f"best pair: {found.image_tap} + {found.text_tap}, validation mAP {100 * found.value:.2f}",
        f"  {joined.summary()}",
        f"  strategy {strategy}; probes: {counts}",
        f"  {metrics}",
    ]
    return {**result, "metrics_file": str(metrics), "text": "\n".join(lines)}


def _search(strategy: str, evaluator: TapEvaluator, grids: list[Grid], neighbourhood: int, n_classes: int) -> SearchResult:
    options: dict[str, Any] = {"image_grid": grids[0], "text_grid": grids[1]}
    if strategy == "local":
        return local_search(evaluator.image, evaluator.text, evaluator.pair, block_radius=neighbourhood, t_radius=neighbourhood, **options)
    if strategy == "grid":
        return grid_search(evaluator.pair, **options)
    least = min(evaluator.rows, max(evaluator.rows // 9, 10 * n_classes))
    return halving(evaluator.pair_within, max_budget=evaluator.rows, min_budget=least, **options)


def _begin(output: Path | None, name: str, seed: int) -> Path:
    """Where the results go. Raises ConfigError before anything is trained for a folder that cannot be one, and for a seed that is none."""
    check_seed(seed)
    out = output or RESULTS / name
    check_folder(out)
    return out


def _features(path: Path) -> Store:
    """A store whose taps can be probed. Raises ConfigError for a latent cache."""
    store = Store.open(path)
    if store.recipe.graph.kind == "latents":
        raise ConfigError(f"{path} is a latent cache, not features. Make features of it first: difffeat extract ARTIFACT SOURCE --latents {path}")
    return store


def _taps(store: Store, asked: str | None) -> tuple[str, ...]:
    """The taps that are asked for, each once. Raises ConfigError where none is, or one that the store does not have."""
    if asked is None:
        return store.taps
    names = tuple(dict.fromkeys(part.strip() for part in asked.split(",") if part.strip()))
    if not names:
        raise ConfigError(f"--taps names no tap. {store.path} has {', '.join(store.taps)}; leave the option out for all of them.")
    return tuple(_known(store, name) for name in names)


def _known(store: Store, tap: str) -> str:
    parse_tap(tap)
    if tap not in store.taps:
        raise ConfigError(f"{store.path} has no tap {tap!r}; it has {', '.join(store.taps)}")
    return tap


def _fingerprints(split: Split) -> dict[str, str]:
    return {"image": split.joined.image_store.fingerprint, "text": split.joined.text_store.fingerprint}


def _single_label(metrics: Mapping[str, Any]) -> list[str]:
    """Top-1 and top-5 accuracy, where every sample has exactly one class."""
    found = [f"{name.replace('top', 'top-')} {100 * metrics['accuracy'][name]:.2f}" for name in metrics.get("accuracy", ())]
    return [f"  every sample has one class: {', '.join(found)}"] if found else []


def _one_tap(store: Store, tap: str | None, option: str) -> str:
    if tap is not None:
        return _known(store, tap)
    if len(store.taps) > 1:
        raise ConfigError(f"{store.path} has {len(store.taps)} taps; say which with {option}, one of: {', '.join(store.taps)}")
    return next(iter(store.taps))


def _interval(value: dict[str, Any], key: str = "value") -> str:
    return f"{100 * value[key]:.2f} [{100 * value['low']:.2f}, {100 * value['high']:.2f}]"
