"""What needs a CUDA device; skipped without one. `DIFFFEAT_GPU_TESTS=rehearse` runs it on the CPU, with a stand-in where a card would be."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

REHEARSING = os.environ.get("DIFFFEAT_GPU_TESTS") == "rehearse"
HERE = Path(__file__).parent


def has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if HERE in item.path.parents]
    for item in own:
        item.add_marker(pytest.mark.gpu)
    if not own or REHEARSING or has_cuda():
        return
    for item in own:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    if REHEARSING:
        from tests.engines.fake_card import install

        install(monkeypatch)


@pytest.fixture
def card() -> None:
    """Asked for by what no stand-in can do."""
    if not has_cuda():
        pytest.skip("needs a CUDA device; a rehearsal has none")
