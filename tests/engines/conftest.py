"""A key of each test's own, and a fake GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.artifacts import exported
from tests.engines.fake_gpu import Runtime, TensorRt, install

GRAPHS = ["image", "latents", "from-latents", "from-latents-mean", "sweep", "text", "text-sweep"]


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFFEAT_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def graphs() -> None:
    """Exported before a module that only looks like tensorrt is there: torch asks for that package's version."""
    for name in GRAPHS:
        exported(name)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, graphs: None) -> tuple[Runtime, TensorRt]:
    return install(monkeypatch)
