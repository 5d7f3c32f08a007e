"""The settings of probes on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from difffeat.errors import ConfigError
from tests.cli.conftest import Run
from tests.workflows.test_probing import stored


def test_probe_takes_its_settings_and_says_what_was_chosen(run: Run, tmp_path: Path) -> None:
    store = stored(tmp_path / "store", prefix="train", taps=("b1/t30", "b2/t30"))
    ran = run("probe", store, "--lr", "0.003,0.03", "--epochs", 5, "--batch-size", 32, "--weight-decay", 0.01, "--loss", "bce", "-o", "out", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["chosen"]["candidates"] == [0.003, 0.03]
    settings = ran.json["settings"]
    assert [settings[name] for name in ("epochs", "batch_size", "weight_decay", "loss")] == [5, 32, 0.01, "bce"]
    assert "flatters" in ran.json["notes"][-1] or any("flatters" in note for note in ran.json["notes"])
    assert all({"chosen", "notes", "of"} <= value.keys() for value in ran.json["candidates"].values())
    text = run("probe", store, "--method", "ridge", "--alphas", "0.1", "-o", "again").out
    assert "method ridge, alpha 0.1 (given)" in text
    assert "of the mean over test sets of this size" in text
    ran = run("probe", store, "--method", "logistic", "--c", "0.25", "-o", "third")
    assert "b1/t30: training, tap 1 of 2" in ran.err
    assert "training for the number on test" in ran.err
    assert "training, tap" not in ran.out
    text = ran.out
    assert "method logistic, c 0.25 (given)" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--alphas", "1"), "--alphas is for --method ridge, and --method is adam"),
        (("--method", "ridge", "--lr", "1"), "--lr is for --method adam, and --method is ridge"),
        (("--method", "logistic", "--loss", "bce"), "--loss is for --method adam, and --method is logistic"),
        (("--method", "ridge", "--alphas", "some"), "--alphas takes a number, or several separated by commas, got 'some'"),
        (("--method", "logistic", "--c", "0"), "c must be above 0"),
        (("--lr", "-1"), "--lr takes numbers above 0, got '-1'"),
    ],
)
def test_wrong_combinations_are_told_by_name(options: tuple[str, ...], message: str, run: Run) -> None:
    ran = run("probe", "none", *options)
    assert ran.code == ConfigError.exit_code
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_a_batch_of_extraction_is_none_of_training(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(tmp_path / "store", prefix="train")
    monkeypatch.setenv("DIFFFEAT_BATCH_SIZE", "auto")
    ran = run("probe", store, "--method", "ridge", "-o", "out", "--json")
    assert ran.code == 0, ran.err
    monkeypatch.setenv("DIFFFEAT_PROBE_BATCH_SIZE", "16")
    assert run("probe", store, "--epochs", 2, "-o", "out", "--json").json["settings"]["batch_size"] == 16
