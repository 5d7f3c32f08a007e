"""difffeat: features from diffusion transformers.

Importing this package loads neither torch, onnx, onnxruntime, diffusers nor tensorrt; each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difffeat.engines import Artifact, open_engine
    from difffeat.probe.factory import load_probe
    from difffeat.probe.fusion import FusionProbe, PairedFeatures
    from difffeat.probe.linear import LinearProbe
    from difffeat.probe.logistic import LogisticProbe
    from difffeat.probe.ridge import RidgeProbe
    from difffeat.recipe import GraphRecipe, Recipe, RunRecipe
    from difffeat.runtime.extract import extract
    from difffeat.runtime.extractor import Extractor
    from difffeat.runtime.sources import open_source
    from difffeat.runtime.sources_options import SourceOptions
    from difffeat.runtime.store import Store

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "Extractor",
    "FusionProbe",
    "GraphRecipe",
    "LinearProbe",
    "LogisticProbe",
    "PairedFeatures",
    "Recipe",
    "RidgeProbe",
    "RunRecipe",
    "SourceOptions",
    "Store",
    "extract",
    "load_probe",
    "open_engine",
    "open_source",
]

_HOMES = {
    "Artifact": "difffeat.engines",
    "Extractor": "difffeat.runtime.extractor",
    "FusionProbe": "difffeat.probe.fusion",
    "GraphRecipe": "difffeat.recipe",
    "LinearProbe": "difffeat.probe.linear",
    "LogisticProbe": "difffeat.probe.logistic",
    "PairedFeatures": "difffeat.probe.fusion",
    "Recipe": "difffeat.recipe",
    "RidgeProbe": "difffeat.probe.ridge",
    "RunRecipe": "difffeat.recipe",
    "SourceOptions": "difffeat.runtime.sources_options",
    "Store": "difffeat.runtime.store",
    "extract": "difffeat.runtime.extract",
    "load_probe": "difffeat.probe.factory",
    "open_engine": "difffeat.engines",
    "open_source": "difffeat.runtime.sources",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'difffeat' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
