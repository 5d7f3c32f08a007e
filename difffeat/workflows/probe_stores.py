"""What `probe`, `fuse` and `search` share: the stores and taps that are asked for, where results go, and intervals in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from difffeat.errors import ConfigError
from difffeat.probe.base import Probe
from difffeat.probe.bootstrap import OF
from difffeat.probe.evaluate import write_metrics
from difffeat.probe.optim import check_seed
from difffeat.probe.output import check_folder
from difffeat.probe.split_files import read_splits, write_splits
from difffeat.recipe import parse_tap
from difffeat.recognise import quoted
from difffeat.runtime.store import Store
from difffeat.workflows.pairs import Split
from difffeat.workflows.per_class import PerClass

RESULTS = Path("results")
BRACKETS = f"  in brackets: 95 % bootstrap intervals over samples, of {OF}"


def results_folder(output: Path | None, name: str, seed: int) -> Path:
    """Where the results go. Raises ConfigError before anything is trained for a folder that cannot be one, and for a seed that is none."""
    check_seed(seed)
    out = output or RESULTS / name
    check_folder(out)
    return out


def features_of(path: Path) -> Store:
    """A store whose taps can be probed. Raises ConfigError for a latent cache."""
    store = Store.open(path)
    if store.recipe.graph.kind == "latents":
        raise ConfigError(
            f"{path} is a latent cache, not features. Make features of it first: difffeat extract ARTIFACT SOURCE --latents {quoted(path)}"
        )
    return store


def require_distinct(stores: Mapping[str, Path | None]) -> None:
    """Raises ConfigError where one folder was given for two purposes. `stores`: purpose -> path."""
    seen: dict[Path, str] = {}
    for purpose, path in stores.items():
        if path is not None and (other := seen.setdefault(path.resolve(), purpose)) != purpose:
            features_of(path)  # which says first that it is something else
            raise ConfigError(f"{path} was given as {other} and as {purpose}: give two different stores.")


def splits_of(path: Path | None) -> dict[str, str] | None:
    """The splits that a file names, by id; None without a file."""
    return None if path is None else read_splits(path)


def beside(metrics: Path, stem: str, suffix: str) -> Path:
    """The place of a file that belongs to a result, under its number: `per-class-2.csv` of `metrics-2.json`."""
    return metrics.with_name(f"{metrics.stem.replace('metrics', stem)}{suffix}")


def write_trained(
    out: Path, result: Mapping[str, Any], stem: str, probe: Probe, about: Mapping[str, Any], ids: Mapping[str, Sequence[str]], classes: PerClass
) -> dict[str, str]:
    """Writes metrics.json and, under its number, the classifier `stem`.safetensors with its metadata `about`, the ids of each split, and the AP of
    each class. Returns where each lies, as a result names it.
    """
    metrics = write_metrics(out, result, beside=[f"{stem}.safetensors", "splits.json", "per-class.csv"])
    return {
        "metrics_file": str(metrics),
        "classifier": str(probe.save(beside(metrics, stem, ".safetensors"), about)),
        "splits_file": str(write_splits(beside(metrics, "splits", ".json"), ids, result["split"])),
        "per_class_file": str(classes.write(beside(metrics, "per-class", ".csv"))),
    }


def notes_text(notes: Any) -> list[str]:
    """Notes as indented lines."""
    return [f"  note: {note}" for note in notes]


def taps_asked(store: Store, asked: str | None) -> tuple[str, ...]:
    """The taps that are asked for, each once. Raises ConfigError where none is, or one that the store does not have."""
    if asked is None:
        return store.taps
    names = tuple(dict.fromkeys(part.strip() for part in asked.split(",") if part.strip()))
    if not names:
        raise ConfigError(f"--taps names no tap. {store.path} has {', '.join(store.taps)}; leave the option out for all of them.")
    return tuple(known_tap(store, name) for name in names)


def known_tap(store: Store, tap: str) -> str:
    """The tap itself. Raises ConfigError where it is no tap, or one that the store does not have."""
    parse_tap(tap)
    if tap not in store.taps:
        raise ConfigError(f"{store.path} has no tap {tap!r}; it has {', '.join(store.taps)}")
    return tap


def one_tap(store: Store, tap: str | None, option: str) -> str:
    """The tap that is asked for, or the store's only one. Raises ConfigError, naming `option`, where there are several."""
    if tap is not None:
        return known_tap(store, tap)
    if len(store.taps) > 1:
        raise ConfigError(f"{store.path} has {len(store.taps)} taps; say which with {option}, one of: {', '.join(store.taps)}")
    return next(iter(store.taps))


def fingerprints_of(split: Split) -> dict[str, str]:
    """The fingerprints of both stores of a split."""
    return {"image": split.joined.image_store.fingerprint, "text": split.joined.text_store.fingerprint}


def interval_text(value: dict[str, Any], key: str = "value") -> str:
    """`value[key]` and its interval in percent, as in `52.31 [50.70, 53.52]`."""
    return f"{100 * value[key]:.2f} [{100 * value['low']:.2f}, {100 * value['high']:.2f}]"
