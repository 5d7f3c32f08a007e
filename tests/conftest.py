"""No test reaches the network; one thread a process, since small tensors gain nothing from more and processes run side by side."""

from __future__ import annotations

import os
import socket

import pytest

from tests.shared import shared_folder

shared_folder()  # ahead of the workers, so that they have one folder
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, by sub-processes too


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a test tried to open a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
