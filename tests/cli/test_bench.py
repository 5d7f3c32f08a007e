"""The benchmarks that run our graph take its engine, device and precision, and refuse what cannot be with what to do instead."""

from __future__ import annotations

import pytest

from difffeat.errors import ConfigError
from tests.cli.conftest import Run


@pytest.mark.parametrize("benchmark", ["extract", "text", "grid"])
def test_a_combination_that_cannot_be_is_refused(benchmark: str, run: Run) -> None:
    for options, said in (
        (("--engine", "trt", "--device", "cpu"), "--engine trt runs on GPUs only. Pass --device cuda, or --engine ort or torch for the CPU."),
        (("--engine", "ort", "--device", "cpu", "--dtype", "bf16"), "ONNX Runtime has no bf16 on CPUs."),
        (("--engine", "torch", "--device", "gpu"), "--device must be cpu, cuda or cuda:<n>, got 'gpu'."),
    ):
        ran = run("bench", benchmark, *options)
        assert ran.code == ConfigError.exit_code
        assert said in ran.err


def test_a_benchmark_runs_in_the_engine_and_precision_that_were_asked_for(run: Run) -> None:
    ran = run(
        "bench", "text", "--engine", "torch", "--device", "cpu", "--dtype", "fp16", "--block", 1, "--captions", 3, "--batch-size", 2, "--repeats", 1,
        "--threads", 1, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert (ran.json["engine"], ran.json["device"], ran.json["precision"]) == ("torch", "cpu", "fp16")
    assert "difffeat, torch, buckets of like length" in ran.json["seconds"]
