"""Several engines write one store: the same bytes as one engine, whatever dies; and workers that are not alike are refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.errors import ClusterError, ConfigError, MissingExtra, NonFiniteFeature, OutOfMemory, StoreWriteError
from difffeat.recipe import RunRecipe
from difffeat.runtime.cluster import Cluster, Crew, extract_on_ray
from difffeat.runtime.configuration import Configuration
from difffeat.runtime.feeding import Opening
from difffeat.runtime.job import Piece
from difffeat.runtime.sources import open_source
from difffeat.runtime.table import sample_columns
from difffeat.runtime.worker import Answer, Order, Worker, raised, told
from tests.artifacts import exported
from tests.runtime.fake import FakeEngine, folder_of_images

ROOT = Path(__file__).parents[2]


def test_two_workers_of_which_one_is_killed_write_the_bytes_of_one_engine(tmp_path: Path) -> None:
    source = folder_of_images(tmp_path / "images", 600)  # so many that each worker has shards when one is killed
    (source / "07.png").write_bytes(b"")
    command = [sys.executable, "-m", "tests.runtime.ray_driver", str(exported("image").path), str(source), str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    assert result["same"]
    assert result["problems"] == []
    assert result["killed"] == 1
    assert any("the shard is handed out again" in line for line in result["said"]), result["said"]
    assert (result["samples"], result["told"], result["executor"]) == (600, 600, "ray, 2 workers")
    assert result["stages"]["engine"] > 0
    assert "was handed out 1 times, and each time its worker died" in result["given_up"]
    assert 1 <= result["kept"] < 150
    assert not result["lock"]
    assert result["left"] == []


KNOWN = Configuration.of(FakeEngine())


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (replace(KNOWN, engine={**KNOWN.engine, "device": "cuda"}), "engine device 'cpu' and 'cuda'"),
        (replace(KNOWN, engine={**KNOWN.engine, "precision": "fp16"}), "engine precision 'fp32' and 'fp16'"),
        (replace(KNOWN, versions={**KNOWN.versions, "numpy": "1"}), "version of numpy '2"),
        (replace(KNOWN, versions={}), "version of difffeat "),
        (replace(KNOWN, graph_digest="e" * 64), "graph digest 'fff"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_workers_that_are_not_alike_are_refused_and_the_difference_named(other: Configuration, difference: str) -> None:
    ray = Stub([KNOWN, other])
    crew = Crew(ray, Opening(artifact=Path("artifact")), Cluster(workers=2), None, lambda _: None)
    with pytest.raises(ClusterError, match=f"two workers are not alike: {difference}"):
        crew.hire(Worker, ())


def test_cores_are_shared_out_so_that_every_worker_finds_a_machine() -> None:
    def crew(workers: int | None, *machines: dict[str, float], device: str | None = None) -> Crew:
        return Crew(Stub([], machines), Opening(artifact=Path("a"), device=device), Cluster(workers=workers), None, lambda _: None)

    assert crew(None, {"CPU": 8}, {"CPU": 4}).opening.threads == 4
    assert crew(3, {"CPU": 8}, {"CPU": 4}).opening.threads == 4
    assert (crew(2, {"CPU": 8}).opening.threads, crew(2, {"CPU": 8}).decoders) == (4, 4)
    two = crew(None, {"CPU": 8, "GPU": 2}, device="cuda")
    assert (two.size, two.opening.device, two.opening.threads, two.decoders) == (2, "cuda", None, 4)
    with pytest.raises(ClusterError, match=r"3 workers with a GPU each were asked for, and the cluster has 2 GPUs"):
        crew(3, {"CPU": 8, "GPU": 2}, device="cuda")
    with pytest.raises(ClusterError, match=r"3 workers were asked for, and the cluster has 2 cores. Ask for fewer --workers"):
        crew(3, {"CPU": 2})


@pytest.mark.parametrize(
    "error", [OutOfMemory("no room"), NonFiniteFeature("b1/t30 is not"), StoreWriteError("full"), MissingExtra("x", "cpu", "It")]
)
def test_an_error_of_ours_comes_back_from_a_worker_as_what_it_was(error: Any) -> None:
    with pytest.raises(type(error)) as caught:
        raised(told(error))
    assert str(caught.value) == str(error)
    assert caught.value.exit_code == error.exit_code


def test_a_worker_that_does_not_see_the_store_says_so(tmp_path: Path) -> None:
    artifact = exported("image")
    worker = Worker(Opening(artifact=artifact.path, threads=1), RunRecipe(), tmp_path / "elsewhere", 8, 1)
    known = worker.describe()
    assert isinstance(known, Configuration)
    listed = open_source(folder_of_images(tmp_path / "images", 2))
    manifest = known.manifest(listed, sample_columns(listed.samples), RunRecipe(), batch_size=2, shard_size=2, options={})
    answer = worker.compute(Order(Piece(0, 0, np.arange(2), listed.samples), "", ""), manifest)
    assert (answer.error, "does not find the store at" in answer.message) == ("ClusterError", True)


def test_without_ray_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else real(name, *rest))
    listed = open_source(folder_of_images(tmp_path / "images", 2))
    with pytest.raises(MissingExtra, match=r"--executor ray needs ray, which is not installed. Run: pip install 'difffeat\[ray\]'"):
        extract_on_ray(Opening(artifact=exported("image").path), listed, tmp_path / "out", Cluster())


def test_fewer_than_one_worker_makes_no_sense() -> None:
    with pytest.raises(ConfigError, match="--workers must be at least 1, got 0"):
        Cluster(workers=0)


class Stub:
    """Of Ray what a crew asks before there is work: machines, and actors whose answers are known."""

    class exceptions:
        RayError = RayTaskError = RuntimeError

    def __init__(self, answers: list[Any], machines: Any = ({"CPU": 4},)) -> None:
        self._answers, self._machines = iter(answers), machines

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": machine} for machine in self._machines]

    def remote(self, kind: type) -> Any:
        return self

    def options(self, **_: Any) -> Any:
        stub = self

        class Remote:
            def remote(self, *_: Any) -> Any:
                return Actor(next(stub._answers))

        return Remote()

    def get(self, reference: Reference) -> Any:
        return reference.answer


class Reference:
    """To an answer that is there."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


class Actor:
    """Has one answer."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.describe = self

    def remote(self) -> Reference:
        return Reference(self._answer)


def test_an_answer_that_tells_of_no_error_is_itself() -> None:
    answer = Answer()
    assert raised(answer) is answer
    assert raised(3) == 3
