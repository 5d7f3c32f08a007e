"""The script for whoever has a GPU: every table in a process of its own, on a CPU a clear refusal, and the step itself tried on a small model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from difffeat.benchmarks import gpu
from difffeat.engines.driver import Driver, Gpu

CARD = Driver((13, 0), (Gpu("a card", (9, 0), 80 << 30),), None)


def test_without_a_gpu_it_says_so_and_names_the_cpus_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "probe_driver", lambda: Driver(None, (), "there is no NVIDIA driver"))
    with pytest.raises(SystemExit, match=r"ProviderMissing: the GPU tables need an NVIDIA GPU, and there is no NVIDIA driver\. .* make full-size"):
        gpu.main(["--output", str(tmp_path)])


def test_a_step_that_fails_costs_its_own_table_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "probe_driver", lambda: CARD)
    real = gpu._process

    def process(command: list[str]) -> dict[str, str]:
        code = "import sys; sys.exit(9)" if "dit-latents-fp16" in command else "print('a table')"
        return real([sys.executable, "-c", code])

    monkeypatch.setattr(gpu, "_process", process)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--only", "dit-latents-fp16,plaid-fp16", "--output", str(tmp_path)])
    assert ended.value.code == 1
    assert capsys.readouterr().out == "dit-latents-fp16: failed: exit code 9; its messages stand above\na table\n\n"
    stored = json.loads((tmp_path / "gpu-summary.json").read_text())
    assert stored["steps"]["plaid-fp16"] == {"text": "a table\n"}
    assert stored["gpus"][0]["name"] == "a card"


def test_a_step_writes_its_table_and_lists_what_cannot_run_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(gpu.STEPS, "small", {"model": "dit-digits", "block": 1, "start": "latents", "dtype": "fp16", "batch_size": 2})
    monkeypatch.setattr(gpu, "REPEATS", 1)
    monkeypatch.setattr(gpu, "ENGINES", ("torch", "rtx"))
    result = gpu.run_step("small", "cpu", 1, tmp_path)
    assert set(result["not_run"]) == {"difffeat, rtx"}
    assert "NVIDIA" in result["not_run"]["difffeat, rtx"] or "tensorrt_rtx" in result["not_run"]["difffeat, rtx"]
    assert set(result["parity_with_unfolded_fp32"]) == set(result["seconds"])
    assert all(0 < row["relative_l2"] < 1e-2 for row in result["parity_with_unfolded_fp32"].values())
    assert json.loads((tmp_path / "gpu-small.json").read_text())["precision"] == "fp16"
