"""The short form of every campaign; `make faults` runs the long one. Each runs in a process of its own, because most of them fork."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts import lend
from tests.faults.__main__ import CAMPAIGNS

ROOT = Path(__file__).parents[2]


SHARING = ("parsers", "hostile")
"""Campaigns that share an exported artifact, and so a process."""


def short(*names: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.faults", "--short", "--json", *names]
    environment = lend("sweep") if names == SHARING else None
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=environment)
    assert finished.returncode in (0, 1), finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.parametrize("names", [SHARING, *((name,) for name in CAMPAIGNS if name not in SHARING)], ids="-".join)
def test_what_is_promised_holds(names: tuple[str, ...]) -> None:
    outcomes = short(*names)
    assert outcomes
    for found in outcomes:
        assert found["differences"] == [], found["promise"]
        assert found["reached"] == found["points"] > 0, found["promise"]
