"""No test reaches the network, but for servers of its own on loopback; one thread a process, since processes run side by side."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.shared import shared_folder

shared_folder()  # ahead of the workers, so that they have one folder
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, by sub-processes too

LONGEST = (
    "workflows/test_quickstart.py",
    "faults/test_campaigns.py",
    "export/test_graph.py",
    "runtime/test_extract.py",
    "engines/test_engines.py",
    "benchmarks/test_throughput.py",
    "cli/test_cli.py",
    "benchmarks/test_gpu.py",
    "gpu/test_extraction.py",
)
"""Files that take minutes, longest first: begun last, one of them would keep one process busy while the others had nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; `--no-loadscope-reorder` makes pytest-xdist keep this order."""
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def on_loopback(own: socket.socket, address: Any) -> None:
        if own.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            raise AssertionError("a test tried to open a network connection")
        connect(own, address)

    monkeypatch.setattr(socket.socket, "connect", on_loopback)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
