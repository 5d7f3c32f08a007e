"""`make gpu`: rehearsed on the CPU from end to end, within its budget; a step that dies costs its own rows; no installer; diffusers where needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from difffeat.benchmarks.gpu import __main__ as gpu
from difffeat.benchmarks.gpu.journal import Journal, line
from difffeat.benchmarks.gpu.sizes import CARD
from difffeat.benchmarks.gpu.steps import STEPS, Step, runnable_engines
from difffeat.benchmarks.timing import Timing
from difffeat.engines.driver import Driver, Gpu

ROOT = Path(__file__).parents[2]
NONE = Driver(None, (), "there is no NVIDIA driver")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "gpu.jsonl").read_text().splitlines()]


def run(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "difffeat.benchmarks.gpu", "--output", str(folder), "--threads", "1", "--compiler", "eager", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}, timeout=280)


def test_a_rehearsal_ends_with_every_steps_table(tmp_path: Path) -> None:
    done = run(tmp_path, "--rehearse", "--budget", "270", "--prepare", str(tmp_path / "prepared"), DIFFFEAT_COMMIT="abc")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.jsonl", "gpu.txt", "tests-gpu.txt", "prepared"}
    found = rows(tmp_path)
    begins, ends = found[0], found[-1]
    assert begins["name"] == "begins"
    assert begins["commit"] == "abc"
    assert begins["command"].startswith("python -m difffeat.benchmarks.gpu --output")
    assert ends["failed"] == 0
    assert ends["seconds"] < 270
    assert {row["step"] for row in found} == {"run", *STEPS}
    assert not [row for row in found if isinstance(row.get("skipped"), str)]
    printed = (tmp_path / "gpu.txt").read_text()
    assert all(line(row) in printed and line(row) in done.stdout for row in found)
    by_name = {row["name"]: row for row in found}
    assert by_name["tests/gpu"]["exit_code"] == 0
    assert by_name["tests/gpu"]["passed"] >= 5
    assert by_name["killed and resumed"]["same_bytes"]
    assert by_name["JPEGs to a store"]["stages"]
    for name in ("fp16 ours, compiled", "fp16 compiled, NCHW", "from pixels, submit", "8 tokens, ours, torch", "bf16 ours, compiled"):
        assert by_name[name]["us_a_sample"] > 0
        assert by_name[name].get("relative_l2", 0) < 2e-2


def test_a_step_that_does_not_fit_into_the_budget_is_not_begun(tmp_path: Path) -> None:
    done = run(tmp_path, "--rehearse", "--budget", "1", "--only", "doctor,ceilings")
    assert done.returncode == 0
    assert [row["name"] for row in rows(tmp_path) if "skipped" in row] == ["doctor", "ceilings"]
    assert {row["step"] for row in rows(tmp_path)} == {"run"}


def test_a_step_that_dies_costs_its_own_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {"ceilings": "import sys; sys.exit(9)", "fp8": "import time; time.sleep(60)", "trunk": "pass"}
    monkeypatch.setattr(gpu, "_command", lambda given, flag, name: [sys.executable, "-c", commands[name]])
    monkeypatch.setattr(gpu, "REHEARSAL_SECONDS", 0.0)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--rehearse", "--output", str(tmp_path), "--only", "ceilings,trunk,fp8", "--budget", "3"])
    assert ended.value.code == 1
    told = {row["name"]: row.get("failed") for row in rows(tmp_path)}
    assert told["ceilings"] == "exit code 9; its messages stand above"
    assert told["trunk"] is None
    assert str(told["fp8"]).startswith("stopped after")
    assert told["ends"] == 2


def test_without_a_gpu_it_says_so_and_names_the_rehearsal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "probe_driver", lambda: NONE)
    with pytest.raises(SystemExit, match=r"ProviderMissing: the GPU tables need an NVIDIA GPU, and there is no NVIDIA driver\. Pass --rehearse"):
        gpu.main(["--output", str(tmp_path)])


def test_a_rehearsals_artifacts_are_never_taken_for_a_cards(tmp_path: Path) -> None:
    parser = gpu._parser()
    small, full = (gpu._prepared(parser.parse_args(["--output", str(tmp_path), *more])) for more in (["--rehearse"], []))
    assert small != full
    assert not small.is_relative_to(full)
    assert not full.is_relative_to(small)


def test_artifacts_that_cannot_be_made_cost_their_steps_only(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = run(tmp_path / "out", "--rehearse", "--only", "ceilings,plaid", "--prepare", str(blocked))
    assert done.returncode == 1
    found = {row["name"]: row for row in rows(tmp_path / "out")}
    assert "failed" in found["preparing plaid"]
    assert found["plaid"]["skipped"] == "the artifacts of plaid are missing"
    assert found["ends"]["failed"] >= 1


def test_a_stop_from_outside_ends_the_running_step_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "difffeat.benchmarks.gpu", "--output", str(tmp_path), "--rehearse", "--only", "trunk", "--threads", "1"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    step = None
    deadline = time.monotonic() + 60
    while step is None and time.monotonic() < deadline:
        step = next(iter(psutil.Process(running.pid).children()), None)
        time.sleep(0.05)
    assert step is not None
    running.terminate()
    assert running.wait(60) == 128 + signal.SIGTERM
    assert not psutil.pid_exists(step.pid)
    assert rows(tmp_path)[-1]["stopped"] == "SystemExit"


def test_a_torch_that_does_not_see_the_card_is_told_before_any_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(gpu, "probe_driver", lambda: Driver((13, 0), (Gpu("a card", (9, 0), 80 << 30),), None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"ProviderMissing: .* torch 2\.\S+ sees none \(built for CUDA .*\)\. Run difffeat doctor\."):
        gpu.main(["--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "ConfigError: --budget must be a number of seconds above 0, got 0;"),
        (["--budget", "nan"], "ConfigError: --budget must be a number of seconds above 0, got nan;"),
        (["--threads", "0"], "ConfigError: --threads must be at least 1, got 0"),
        (["--output", __file__], "FileExistsError: "),
    ],
)
def test_what_cannot_be_is_refused_at_once(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        gpu.main(["--rehearse", "--only", "fp8", "--output", str(tmp_path), *options])


def test_an_unknown_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--only", "trunk,trank"])
    assert "no step is called trank; there are doctor, tests, ceilings, trunk" in capsys.readouterr().err


@pytest.mark.parametrize("absent", ["diffusers"])
def test_what_needs_no_autoencoder_runs_where_diffusers_is_not_installed(absent: str, tmp_path: Path) -> None:
    blocked = tmp_path / "path" / "sitecustomize.py"
    blocked.parent.mkdir()
    blocked.write_text(
        "import sys\n"
        "class Absent:\n"
        f"    def find_spec(self, name, path=None, target=None):\n        if name.split('.')[0] == {absent!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    done = run(tmp_path / "out", "--rehearse", "--only", "ceilings,trunk,plaid", PYTHONPATH=os.pathsep.join([str(blocked.parent), str(ROOT)]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert {row["step"] for row in rows(tmp_path / "out") if "us_a_sample" in row} == {"trunk", "plaid"}


def planned(binaries: str, *options: str) -> str:
    """What `make gpu` would run; the suite itself runs under make, whose flags are not for this one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "gpu", f"BIN={binaries}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def test_make_gpu_calls_no_installer() -> None:
    assert planned("nowhere", "GPU=--budget 300") == "python3 -m difffeat.benchmarks.gpu --output gpu-out --budget 300"
    own = str(Path(sys.executable).parent)
    assert planned(own) == f"{own}/python -m difffeat.benchmarks.gpu --output gpu-out"


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((9, 0), {"tensorrt", "tensorrt_rtx"}, ("torch", "trt")),
        ((8, 9), {"tensorrt_rtx"}, ("torch", "rtx")),
        ((12, 0), set(), ("torch",)),
    ],
)
def test_engines_are_left_out_by_what_is_installed_and_by_the_card(
    capability: tuple[int, int], installed: set[str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from difffeat.benchmarks.gpu import steps

    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: object() if name in installed else None)
    engines, left_out = runnable_engines(Driver((13, 0), (Gpu("a card", capability, 80 << 30),), None))
    assert engines == expected
    assert {*engines, *left_out} == {"torch", "trt", "rtx"}
    if capability == (9, 0):
        assert left_out["rtx"] == "TensorRT-RTX does not run on a card, compute capability 9.0"


def test_a_figure_far_from_its_prediction_is_marked(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "trunk")
    journal.rate("near", Timing("", (0.0110, 0.0120, 0.0130)), 64, gflop=101.5, ceiling=790e12, predicted_us=200.0)
    journal.rate("far", Timing("", (0.0210, 0.0220, 0.0230)), 64, predicted_us=200.0, relative_l2=1e-3)
    near, far = (line(row) for row in rows(tmp_path))
    assert "187.5 µs [179.7, 195.3] n 3" in near
    assert "541.3 TFLOP/s  68.5% of the ceiling" in near
    assert near.endswith("predicted 200 (-6%)")
    assert far.endswith("L2 1.0e-03  predicted 200 (+72%, a miss)")


def test_the_work_is_counted_as_the_graphs_own() -> None:
    assert CARD.trunk_gflop == pytest.approx(101.5, rel=1e-3)
    assert CARD.tokens == 256
    assert all(isinstance(step, Step) and step.seconds > 0 for step in STEPS.values())
