"""The quickstart from its first scene to its report, on a grid small enough for a test."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from difffeat.errors import ConfigError, MissingExtra
from difffeat.runtime.store import Store, verify
from difffeat.workflows import quickstart
from difffeat.workflows.expectations import EXPECTATIONS
from tests.runtime.fake import tree

SIZES = {"train": 120, "validation": 60, "test": 80}
SMALL = quickstart.Plan(
    image_timesteps=(0, 50), text_timesteps=(0, 0.3), text_blocks=(0, 2), random_timesteps=(10,), grid_seeds=(0,), final_seeds=(0, 1)
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, list[str]]:
    said: list[str] = []
    out = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "SPLIT_SIZES", SIZES)
        patch.setattr(quickstart, "Plan", lambda: SMALL)
        result = quickstart.run_quickstart(out, full=False, say=lambda text, **_: said.append(text))
    return result, out, said


Finished = tuple[dict[str, Any], Path, list[str]]


def test_every_control_stands_beside_the_method(finished: Finished) -> None:
    rows = {row["name"]: row for row in finished[0]["rows"]}
    assert list(rows) == [
        "image", "text", "fused", "raw pixels", "latents", "block 0", "random backbone, its best tap", "bag of words",
        "raw latents + bag of words, fused", "fused, captions shuffled",
    ]  # fmt: skip
    for row in rows.values():
        assert 0 < row["low"] <= row["high"] <= 100
    assert len(rows["image"]["seeds"]) == 2


def test_every_expectation_is_printed_with_what_came(finished: Finished) -> None:
    text = finished[0]["text"]
    for expected in EXPECTATIONS.values():
        assert re.search(rf"(kept  |BROKEN)  {re.escape(expected)} \(.+\)", text)


def test_the_test_split_is_not_read_before_the_taps_are_chosen(finished: Finished) -> None:
    said = finished[2]
    chosen = next(i for i, line in enumerate(said) if "chosen on validation" in line)
    reading = next(i for i, line in enumerate(said) if "reading the test split once" in line)
    assert chosen < reading
    grids = [path.name for path in (finished[1] / "features").iterdir() if "grid" in path.name]
    assert grids
    assert not [name for name in grids if name.startswith("test")]


def test_all_stores_are_whole_and_hold_every_scene(finished: Finished) -> None:
    for path in (finished[1] / "features").iterdir():
        assert verify(path) == []
        assert len(Store.open(path)) == SIZES[path.name.partition("-")[0]]


def test_the_report_stands_alone_and_shows_its_pictures(finished: Finished) -> None:
    html = Path(finished[0]["report"]).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert html.count("data:image/") > 5
    for words in ("What was expected, and what came", "The search", "Regret", "Training attempts", "autoencoder"):
        assert words in html


def test_the_numbers_are_kept_with_their_regret(finished: Finished) -> None:
    stored = json.loads(Path(finished[0]["metrics_file"]).read_text())
    assert stored["chosen"] == finished[0]["chosen"]
    assert stored["search"]["regret"] >= 0
    assert stored["exhaustive"]["pairs"] == 9 * 2 * 2 * 2


def test_another_grid_is_refused_before_anything_in_the_folder_is_replaced(finished: Finished) -> None:
    out = finished[1]
    before = tree(out)
    with pytest.raises(ConfigError, match=r"holds a quickstart of another grid \(18 taps of image features\).* Choose another folder with -o"):
        quickstart.run_quickstart(out, full=True, say=lambda *_, **__: None)
    assert tree(out) == before


def test_the_whole_grid_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def stopped(run: quickstart.Run) -> None:
        asked.append(run.out)
        raise ConfigError("far enough")

    monkeypatch.setattr(quickstart, "_require_same_grid", stopped)
    for full in (False, True):
        with pytest.raises(ConfigError, match="far enough"):
            quickstart.run_quickstart(None, full=full, say=lambda *_, **__: None)
    assert len({*asked}) == 2


@pytest.mark.slow
def test_run_again_it_computes_no_feature_twice(finished: Finished) -> None:
    result, out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("features/*/shards/*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "SPLIT_SIZES", SIZES)
        patch.setattr(quickstart, "Plan", lambda: SMALL)
        again = quickstart.run_quickstart(out, full=False, say=lambda *_, **__: None)
    assert again["rows"] == result["rows"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda name: None if name in ("matplotlib", "onnxruntime") else object())
    with pytest.raises(MissingExtra, match=r"needs onnxruntime and matplotlib, .*pip install 'difffeat\[cpu,report\]' -c constraints\.txt"):
        quickstart.run_quickstart(tmp_path / "out", full=False, say=lambda *_, **__: None)
    assert not (tmp_path / "out").exists()


def test_a_library_that_is_broken_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("no libfreetype.so.6")))
    with pytest.raises(ConfigError, match=r"which is installed and cannot be imported: ImportError: no libfreetype\.so\.6"):
        quickstart.require_libraries(lambda *_, **__: None)


@pytest.mark.parametrize("name", ["report.html", "data/thesis.tex", "features/x", "manifest.json", "model.onnx"])
def test_a_folder_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("years of work")
    with pytest.raises(ConfigError, match="a quickstart needs a folder of its own"):
        quickstart.require_own_folder(tmp_path)
    with pytest.raises(ConfigError, match="a quickstart needs a folder of its own"):
        quickstart.require_own_folder(tmp_path / name if (tmp_path / name).parent == tmp_path else tmp_path)


def test_a_picture_that_fails_costs_no_numbers(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder again, whose features are there: only the report fails."""
    said: list[str] = []
    monkeypatch.setattr(quickstart, "SPLIT_SIZES", SIZES)
    monkeypatch.setattr(quickstart, "Plan", lambda: SMALL)
    monkeypatch.setattr("difffeat.workflows.quickstart_report.write_report", lambda *_: (_ for _ in ()).throw(RuntimeError("no font")))
    with pytest.raises(RuntimeError, match="no font"):
        quickstart.run_quickstart(finished[1], full=False, say=lambda text, **_: said.append(text))
    assert "the report could not be written; all numbers: " in said[-1]
    path = Path(said[-1].rpartition("all numbers: ")[2])
    assert [row["value"] for row in json.loads(path.read_text())["rows"]] == [row["value"] for row in finished[0]["rows"]]


def test_every_step_says_how_long_it_took(finished: Finished) -> None:
    assert sum("took" in line for line in finished[2]) == len(finished[0]["seconds"]) + 1  # the report's, which comes after the numbers
    assert finished[0]["provenance"]["difffeat"]
