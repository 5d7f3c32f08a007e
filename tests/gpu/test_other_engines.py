"""ONNX Runtime and TensorRT on a card, where they are installed and can run there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from difffeat.engines import EngineOptions, open_engine
from difffeat.engines.parity import compare
from difffeat.errors import MissingExtra, ProviderMissing
from difffeat.workflows.checking import TOLERANCES
from tests.artifacts import OPTIONS, copy_of, exported, feeds
from tests.gpu.needs import require_autoencoder

PACKAGES = {"ort": "onnxruntime", "trt": "tensorrt", "rtx": "tensorrt_rtx"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("engine", PACKAGES)
def test_every_graph_agrees_with_fp32_on_the_cpu(engine: str, name: str, precision: str, card: None, tmp_path: Path) -> None:
    if importlib.util.find_spec(PACKAGES[engine]) is None:
        pytest.skip(f"needs {PACKAGES[engine]}")
    require_autoencoder(name)
    exact = exported(name)
    given = feeds(exact, batch=4)
    with open_engine(exact, "torch") as reference:
        expected = reference.run(given)
    try:
        opened = open_engine(copy_of(name, tmp_path, precision), engine, device="cuda", options=EngineOptions(batch=4))
    except (ProviderMissing, MissingExtra) as error:
        pytest.skip(str(error))
    with opened as running:
        found, again = running.run(given), running.run(given)
    for tap, value in found.items():
        assert compare(value, expected[tap]).relative_l2 <= TOLERANCES[precision], tap
        assert np.array_equal(value, again[tap]), tap
