"""Ctrl-C ends a command that waits for another machine, whatever it waits for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.artifacts import exported
from tests.runtime.web import Web, web

SECONDS = 60
"""Longer than any of these takes, and much shorter than what they would wait."""
PATIENT = ["--timeout", "3000", "--total-timeout", "9000"]


def extraction(source: str, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "difffeat.cli", "extract", str(exported("image").path), source, "-o", str(out), "--threads", "1"]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def asked(server: Web, word: str, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not any(word in target for target in server.asked):
        time.sleep(0.02)


@pytest.mark.parametrize("silent", ["silent", "drip"])
def test_ctrl_c_ends_an_extraction_that_waits_for_a_silent_server(silent: str, tmp_path: Path) -> None:
    with web() as server:
        manifest = tmp_path / "m.csv"
        names = [f"{number}.png" for number in range(4)] + [f"{silent}-{number}.png" for number in range(36)]
        manifest.write_text("image\n" + "".join(f"{server.base}/{name}\n" for name in names))
        process = extraction(str(manifest), tmp_path / "out", *PATIENT)
        asked(server, silent, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 4, said
    assert "difffeat: Interrupted: stopped after" in said


def test_ctrl_c_ends_the_listing_of_a_silent_source(tmp_path: Path) -> None:
    with web() as server:
        process = extraction(f"{server.base}/silent.csv", tmp_path / "out", *PATIENT)
        asked(server, "silent", process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode not in (0, None)
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_many_silent_addresses_cost_one_wait_and_every_verb_takes_the_deadline(tmp_path: Path) -> None:
    with web() as server:
        manifest = tmp_path / "m.csv"
        names = [f"{number}.png" if number % 3 else f"silent-{number}.png" for number in range(30)]
        manifest.write_text("image\n" + "".join(f"{server.base}/{name}\n" for name in names))
        process = extraction(str(manifest), tmp_path / "out", "--timeout", "2", "--retries", "0", "--num-workers", "1")
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 3, said
    bad = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert len(bad) == 10
    assert all("no answer, or too little of it, within" in entry["message"] for entry in bad)


def test_a_deadline_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    process = extraction("m.csv", tmp_path / "out", "--timeout", "0")
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert "--timeout must be a number of seconds above 0" in said
