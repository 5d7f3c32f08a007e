"""Options from the environment, and which of two that say different things counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from difffeat.cli.environment import OTHERS, name_options, set_variables, unknown_variables
from difffeat.cli.verbs import app
from tests.cli.conftest import Run


def known() -> dict[str, str]:
    return name_options(typer.main.get_command(app))


def chosen(run: Run, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The type that `difffeat store convert` gets."""
    seen: dict[str, object] = {}
    monkeypatch.setattr("difffeat.workflows.storing.run_convert", lambda *_, **given: seen.update(given) or {"text": ""})
    ran = run(*arguments)
    assert ran.code == 0, ran.err
    return str(seen["dtype"])


def test_the_command_line_counts_before_the_verbs_variable_before_the_short_one_before_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.toml").write_text('[store.convert]\ndtype = "file"\n')
    words = ("--config", "c.toml", "store", "convert", "s", "--to", "npy")
    assert chosen(run, monkeypatch, *words) == "file"
    assert chosen(run, monkeypatch, *words[2:]) == "None"
    monkeypatch.setenv("DIFFFEAT_DTYPE", "short")
    assert chosen(run, monkeypatch, *words) == "short"
    monkeypatch.setenv("DIFFFEAT_STORE_CONVERT_DTYPE", "verb")
    assert chosen(run, monkeypatch, *words) == "verb"
    monkeypatch.setenv("DIFFFEAT_EXPORT_DTYPE", "another verb's")
    assert chosen(run, monkeypatch, *words, "--dtype", "line") == "line"
    monkeypatch.delenv("DIFFFEAT_STORE_CONVERT_DTYPE")
    monkeypatch.delenv("DIFFFEAT_DTYPE")
    assert chosen(run, monkeypatch, *words) == "file"


def test_every_verb_has_variables_of_its_own() -> None:
    names = known()
    assert names["DIFFFEAT_EXTRACT_BATCH_SIZE"] == "extract --batch-size"
    assert names["DIFFFEAT_BENCH_THROUGHPUT_DEVICE"] == "bench throughput --device"
    assert names["DIFFFEAT_STORE_VERIFY_JSON"] == "store verify --json"
    assert {"DIFFFEAT_BATCH_SIZE", "DIFFFEAT_CONFIG"} <= set(names)


def test_no_variable_ends_every_command() -> None:
    assert not {"DIFFFEAT_VERSION", "DIFFFEAT_HELP", "DIFFFEAT_SHOW_COMPLETION", "DIFFFEAT_INSTALL_COMPLETION"} & set(known())


def test_no_verbs_variable_is_another_ones_short_form() -> None:
    """One that is would set both."""
    short = {"DIFFFEAT_" + option.rpartition("--")[2].replace("-", "_").upper() for option in known().values()}
    assert not [name for name, option in known().items() if name in short and option.rpartition("--")[2].replace("-", "_").upper() != name[9:]]


def test_an_unknown_variable_is_named_and_the_work_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFFEAT_EXTRACT_BATCHSIZE", "4")
    ran = run("--version")
    assert ran.code == 0
    assert "DIFFFEAT_EXTRACT_BATCHSIZE sets no option of difffeat. Is it DIFFFEAT_EXTRACT_BATCH_SIZE?" in ran.err
    assert unknown_variables(known(), dict.fromkeys(OTHERS, "x") | {"DIFFFEAT_SEED": "1", "PATH": "/"}) == []


@pytest.mark.parametrize("variable, value", [("DIFFFEAT_SEED", "four"), ("DIFFFEAT_EXTRACT_EXECUTOR", "slurm")])
def test_where_a_command_is_wrong_the_variables_are_named(variable: str, value: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    ran = run("extract", "a", "b")
    assert ran.code == 2
    assert f"the environment sets options too: {variable}\n" in ran.err
    assert set_variables(known(), {variable: value}) == [variable]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {key: value for key, value in os.environ.items() if not key.startswith("DIFFFEAT_")} | environment
    return subprocess.run([sys.executable, "-m", "difffeat", *arguments], capture_output=True, text=True, env=given, check=False)


def test_the_package_runs_as_a_module_with_short_help() -> None:
    ran = python("-h")
    assert ran.returncode == 0
    assert ran.stdout.startswith("Usage: difffeat [OPTIONS]")
    assert "--install-completion" in ran.stdout


def test_a_shell_completes_verbs() -> None:
    assert "complete -o default -F _difffeat_completion difffeat" in python(_DIFFFEAT_COMPLETE="source_bash").stdout
    assert python(_DIFFFEAT_COMPLETE="complete_bash", COMP_WORDS="difffeat ex", COMP_CWORD="1").stdout.split() == ["export", "extract"]


def test_every_verb_takes_the_short_help(run: Run) -> None:
    for words in (("extract",), ("store", "repair"), ("bench", "grid"), ("store",)):
        assert run(*words, "-h").code == 0
