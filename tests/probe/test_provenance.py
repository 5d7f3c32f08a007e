"""What a result's file says of where it comes from."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import difffeat
from difffeat.errors import ProbeError
from difffeat.probe import write_metrics
from difffeat.probe.provenance import provenance, typed
from difffeat.probe.sameness import require_same_recipe


def test_a_result_names_the_command_the_stores_and_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with typed(["difffeat", "probe", "my store", "--taps", "b1/t0"]):
        found = provenance({"train": Path("my store"), "test": None})
    assert found == {
        "command": "difffeat probe 'my store' --taps b1/t0",
        "folder": str(tmp_path),
        "stores": {"train": str(tmp_path / "my store")},
        "difffeat": difffeat.__version__,
    }
    assert shlex.split(found["command"])[2] == "my store"


def test_passwords_are_not_written_down() -> None:
    with typed(["difffeat", "extract", "a", "https://me:secret@host.org/x.csv"]):
        assert provenance()["command"] == "difffeat extract a https://me:PASSWORD@host.org/x.csv"


def test_outside_of_a_command_there_is_none(tmp_path: Path) -> None:
    with typed(["difffeat"]):
        pass
    assert provenance()["command"] is None
    assert json.loads(write_metrics(tmp_path, {"mAP": 1.0}).read_text())["provenance"]["difffeat"] == difffeat.__version__


def test_a_result_that_says_it_itself_keeps_it(tmp_path: Path) -> None:
    own = provenance({"train": tmp_path})
    assert json.loads(write_metrics(tmp_path, {"provenance": own}).read_text())["provenance"] == own


def _recorded(fingerprint: str, **changed: Any) -> Any:
    """What `require_same_recipe` asks of a store."""
    graph = {"weights": {"backbone": "0" * 64}, "log_snr": [3.0], "diffusion": changed.get("diffusion")}
    return SimpleNamespace(fingerprint=fingerprint, manifest={"recipe": {"graph": graph, "run": {"seed": 0, "pixels": changed.get("pixels")}}})


def test_a_store_of_before_meets_one_that_describes_its_diffusion() -> None:
    old, new = _recorded("a"), _recorded("b", diffusion={"schedule": "linear"}, pixels="strict")
    require_same_recipe(old, new, "test")
    require_same_recipe(new, old, "test")
    with pytest.raises(ProbeError, match=r"run\.pixels"):
        require_same_recipe(old, _recorded("c", diffusion={"schedule": "linear"}, pixels="shown"), "test")
    with pytest.raises(ProbeError, match=r"graph\.diffusion"):
        require_same_recipe(new, _recorded("d", diffusion={"schedule": "cosine"}, pixels="strict"), "test")
