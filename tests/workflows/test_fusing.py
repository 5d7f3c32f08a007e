"""A fusion is held against what the same method makes of each modality alone, never against another method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.errors import ConfigError
from difffeat.probe.factory import load_probe
from difffeat.probe.metrics import mean_average_precision
from difffeat.workflows.fusing import run_fuse
from difffeat.workflows.probe_options import ProbeOptions
from tests.workflows.test_probing import given, stored


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return stored(folder / "image", prefix="train"), stored(folder / "text", prefix="train", kind="text")


def fuse(pair: tuple[Path, Path], output: Path, **options: Any) -> dict[str, Any]:
    known = {"image_tap": None, "text_tap": None, "fusion": None, "width": 4, "seed": 0}
    return run_fuse(given(*pair, options), output=output, **{**known, **options})


@pytest.fixture(scope="module")
def fused(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fuse(pair, tmp_path_factory.mktemp("out"))


def test_both_methods_rows_are_shown_and_named(fused: dict[str, Any]) -> None:
    names = [
        "image (Adam)", "text (Adam)", "fusion by add (Adam)", "fusion by concat (Adam)",
        "image (ridge)", "text (ridge)", "fusion by concat (ridge)",
    ]  # fmt: skip
    assert list(fused["mAP"]) == list(fused["chosen"]) == names
    assert all(name in fused["text"] for name in names)
    assert fused["saved"] == "fusion by add (Adam)"


def test_differences_are_of_two_by_one_method(fused: dict[str, Any]) -> None:
    found = [(value["method"], value["of"], value["less"]) for value in fused["differences"]]
    add, concat = "fusion by add", "fusion by concat"
    assert found == [
        ("adam", add, "image"), ("adam", add, "text"), ("adam", concat, "image"), ("adam", concat, "text"), ("adam", concat, add),
        ("ridge", concat, "image"), ("ridge", concat, "text"),
    ]  # fmt: skip
    named = {"adam": "Adam", "ridge": "ridge"}
    for value in fused["differences"]:
        first, second = (fused["mAP"][f"{value[key]} ({named[value['method']]})"]["value"] for key in ("of", "less"))
        assert value["difference"] == pytest.approx(first - second)
        assert (value["first"], value["second"]) == pytest.approx((first, second))
    assert "fusion by concat less fusion by add (Adam): " in fused["text"]


def test_every_system_says_what_it_chose_on_what(fused: dict[str, Any]) -> None:
    stored_result = json.loads(Path(fused["metrics_file"]).read_text())
    for name, choice in stored_result["chosen"].items():
        assert choice["on"] == "validation", name
        assert choice["name"] == ("lr" if "Adam" in name else "alpha")
        assert choice["value"] in choice["candidates"]
    assert stored_result["provenance"]["stores"].keys() == {"image", "text"}


def test_other_methods_can_be_asked_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = fuse(pair, tmp_path, method="logistic, ridge", options=ProbeOptions(c=0.5, alphas="0.1,1"))
    assert result["saved"] == "fusion by concat (logistic)"
    assert {choice["method"] for choice in result["chosen"].values()} == {"logistic", "ridge"}
    assert result["chosen"]["image (logistic)"]["value"] == 0.5
    assert result["chosen"]["image (ridge)"]["candidates"] == [0.1, 1.0]
    saved = load_probe(result["classifier"])
    assert (saved.kind, saved.settings()["c"]) == ("logistic", 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ridge", "fusion": "add"}, "--fusion add is trained by adam; --method ridge begins with ridge"),
        ({"method": "ridge", "options": ProbeOptions(lr="1")}, "--lr is for --method adam, and --method is ridge"),
        ({"options": ProbeOptions(c=1.0)}, "--c is for --method logistic, and --method is adam,ridge"),
        ({"method": "sgd"}, "--method takes adam, ridge, logistic; got 'sgd'"),
        ({"options": ProbeOptions(epochs=0)}, "epochs and batch_size must be whole numbers of at least 1"),
        ({"options": ProbeOptions(loss="hinge")}, "loss must be one of"),
        ({"fusion": "sum"}, "fusion must be one of add, concat"),
    ],
)
def test_what_makes_no_sense_is_told_before_a_store_is_opened(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        fuse((tmp_path / "no", tmp_path / "none"), tmp_path / "out", **options)


def test_a_fit_that_ended_too_soon_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = fuse(pair, tmp_path, method="adam", options=ProbeOptions(lr="1e-4", epochs=8))
    assert any("still falling" in note and note.endswith("(all)") for note in result["notes"])
    assert "note: the loss is still falling" in result["text"]
    assert result["chosen"]["image (Adam)"]["on"] == "nothing: lr was given"
    assert "lr 0.0001 (given)" in result["text"]


def test_the_saved_fusion_gives_the_printed_number(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    from difffeat.workflows import fusing

    def watched(systems: Any, labels: np.ndarray, *rest: Any) -> Any:
        seen.append((labels, systems["fusion by concat (Adam)"].scores))
        return whole(systems, labels, *rest)

    whole = fusing.compared
    monkeypatch.setattr(fusing, "compared", watched)
    result = fuse(pair, tmp_path, fusion="concat", method="adam")
    assert result["saved"] == "fusion by concat (Adam)"
    assert load_probe(result["classifier"]).settings()["kind"] == "concat"
    assert result["mAP"][result["saved"]]["value"] == pytest.approx(mean_average_precision(*seen[0]).value)
