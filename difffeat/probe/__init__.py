"""Store -> numbers: metrics, linear probes, fusion, the search for taps, clusters and reports.

Everything here needs NumPy, SciPy and scikit-learn at most; torch is never imported. Names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Probe": "base",
    "bootstrap_interval": "bootstrap",
    "paired_bootstrap": "bootstrap",
    "evaluate_taps": "evaluate",
    "probe_store": "evaluate",
    "split_rows": "evaluate",
    "write_metrics": "evaluate",
    "load_probe": "factory",
    "make_probe": "factory",
    "FusionProbe": "fusion",
    "PairedFeatures": "fusion",
    "join": "fusion",
    "ridge_fusion": "fusion",
    "LinearProbe": "linear",
    "LogisticProbe": "logistic",
    "average_precision": "metrics",
    "mean_average_precision": "metrics",
    "multi_label_report": "metrics",
    "precision_recall": "metrics",
    "top_k_accuracy": "metrics",
    "Report": "report",
    "RidgeProbe": "ridge",
    "ridge_path": "ridge_solutions",
    "Grid": "search",
    "grid_search": "search",
    "halving": "search",
    "local_search": "search",
    "Standardizer": "standardize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
