"""Running plans: on a fake device whose streams are lazy, compared with ONNX Runtime; and every error of a machine without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.engines import Artifact, Engine, EngineOptions, open_engine, tensorrt_compile, tensorrt_engine
from difffeat.engines.cuda import Cuda
from difffeat.engines.driver import Gpu, probe_driver
from difffeat.engines.seal import seal
from difffeat.engines.tensorrt_build import build_plan, find_plan
from difffeat.engines.tensorrt_engine import TensorRtEngine
from difffeat.engines.tensorrt_plans import Profile, read_plan
from difffeat.errors import BadFeed, ConfigError, EngineError, MissingExtra, OutOfMemory, ProviderMissing, UntrustedFile
from tests.artifacts import copy_of, feeds
from tests.engines.conftest import GRAPHS
from tests.engines.fake_gpu import Runtime, Status, TensorRt, install

SMALL = EngineOptions(batch=4)


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_plans_give_the_graphs_features_batch_after_batch(name: str, cuda_graphs: bool, tmp_path: Path, device: Any) -> None:
    artifact = Artifact.open(copy_of(name, tmp_path))
    batches = [
        feeds(artifact, batch=size, length=length, seed=seed) for seed, (size, length) in enumerate([(4, 6), (4, 6), (4, 6), (2, 3), (2, 3), (4, 6)])
    ]
    with open_engine(artifact, threads=1) as ort, open_engine(artifact, "trt", options=EngineOptions(batch=4, cuda_graphs=cuda_graphs)) as trt:
        assert isinstance(trt, Engine)
        assert (trt.name, trt.device, trt.depth) == ("trt", "cuda:0", 2)
        for given in batches:
            same(trt.run(given), ort.run(given))


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_batches_under_way_do_not_disturb_each_other(cuda_graphs: bool, tmp_path: Path, device: Any) -> None:
    artifact = Artifact.open(copy_of("image", tmp_path))
    batches = [feeds(artifact, batch=4, seed=seed) for seed in range(7)]
    with open_engine(artifact, threads=1) as ort, open_engine(artifact, "trt", options=EngineOptions(batch=4, cuda_graphs=cuda_graphs)) as trt:
        pending = [trt.submit(given) for given in batches]  # more than are under way at once: the oldest is finished for the next
        for given in batches:
            given["pixels"] += 1  # what was submitted is no longer the caller's to spoil
        found = [one.result() for one in pending]
        for given in batches:
            given["pixels"] -= 1
        for values, given in zip(found, batches, strict=True):
            same(values, ort.run(given))
        assert pending[0].result() is found[0]


def test_a_shape_that_comes_again_is_replayed(tmp_path: Path, device: tuple[Runtime, TensorRt]) -> None:
    cuda, _ = device
    artifact = Artifact.open(copy_of("image", tmp_path))
    with open_engine(artifact, "trt", options=EngineOptions(batch=4, cuda_graphs=True)) as trt:
        for _ in range(8):
            trt.run(feeds(artifact, batch=4))
        assert cuda.log.count("cudaGraphInstantiate") == 2
        assert cuda.log.count("cudaGraphLaunch") == 4
    assert cuda.graphs == {}


def test_closing_gives_everything_back(tmp_path: Path, device: tuple[Runtime, TensorRt]) -> None:
    cuda, _ = device
    before = cuda.memory
    artifact = Artifact.open(copy_of("text", tmp_path))
    with open_engine(artifact, "trt", options=SMALL) as trt:
        trt.submit(feeds(artifact))
        assert cuda.memory < before
    assert cuda.memory == before
    assert cuda.blocks == {}
    with pytest.raises(EngineError, match=r"this engine is closed"):
        trt.run(feeds(artifact))


def test_the_first_use_compiles_and_says_so_the_second_does_not(tmp_path: Path, device: tuple[Runtime, TensorRt]) -> None:
    _, trt = device
    folder, said = copy_of("image", tmp_path), list[str]()
    open_engine(folder, "trt", options=SMALL, say=said.append).__exit__(None, None, None)
    assert said[0].startswith("no plan serves batches of 4 on this device yet: compiling one")
    assert said[1].startswith("building ")
    said.clear()
    open_engine(folder, "trt", options=EngineOptions(batch=3), say=said.append).__exit__(None, None, None)
    assert (said, trt.built) == ([], 1)


def test_the_plan_tuned_nearest_is_taken(tmp_path: Path, device: Any) -> None:
    artifact = Artifact.open(copy_of("image", tmp_path))
    for opt, most in ((8, 8), (2, 64), (2, 32)):
        build_plan(artifact, "trt", Profile(opt_batch=opt, max_batch=most))
    chosen = find_plan(artifact, "trt", 3)
    assert chosen is not None
    assert chosen.sidecar["profile"]["max_batch"] == 32
    assert find_plan(artifact, "trt", 65) is None
    assert find_plan(artifact, "trt", 3, device=1) is not None
    assert find_plan(artifact, "trt", 3, graph="latents") is None


def test_kernel_timings_are_kept_sealed_and_used_again(tmp_path: Path, device: tuple[Runtime, TensorRt]) -> None:
    _, trt = device
    artifact = Artifact.open(copy_of("image", tmp_path))
    for most in (2, 3):
        build_plan(artifact, "trt", Profile(opt_batch=2, max_batch=most))
    assert trt.timings == [b"", b"measured "]
    (artifact.path / "engines" / "timing.cache").write_bytes(b"from elsewhere")
    build_plan(artifact, "trt", Profile(opt_batch=2, max_batch=4))
    assert trt.timings[-1] == b""


def test_another_gpu_wants_its_own_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: None) -> None:
    artifact = Artifact.open(copy_of("image", tmp_path))
    install(monkeypatch)
    build_plan(artifact, "trt", Profile(opt_batch=2, max_batch=2))
    install(monkeypatch, (Gpu("Fake 10", (10, 0), 1 << 30),))
    assert find_plan(artifact, "trt", 2) is None


def test_a_plan_changed_after_it_was_chosen_is_not_loaded(tmp_path: Path, device: Any) -> None:
    artifact = Artifact.open(copy_of("image", tmp_path))
    plan = build_plan(artifact, "trt", Profile(opt_batch=2, max_batch=2))
    plan.path.write_bytes(b"\x7fELF" + plan.path.read_bytes())
    with pytest.raises(UntrustedFile, match=r"is not the plan that this user sealed \(its bytes differ\). Delete it"):
        read_plan(plan)
    assert find_plan(artifact, "trt", 2) is None


def test_shapes_out_of_the_profile_are_refused(tmp_path: Path, device: Any) -> None:
    artifact = Artifact.open(copy_of("text", tmp_path))
    with (
        open_engine(artifact, "trt", options=SMALL) as trt,
        pytest.raises(BadFeed, match=r"tokens has shape \[5, 6\]; this plan was built for \[1, 1\] to \[4, 32\]"),
    ):
        trt.run(feeds(artifact, batch=5))


def test_a_device_without_room_is_out_of_memory_and_nothing_is_left(tmp_path: Path, device: tuple[Runtime, TensorRt]) -> None:
    cuda, trt = device
    artifact = Artifact.open(copy_of("image", tmp_path))
    cuda.memory = before = 100
    with pytest.raises(OutOfMemory, match=r"cudaMalloc failed on cuda:0: cudaErrorMemoryAllocation. .*smaller --max-batch"):
        open_engine(artifact, "trt", options=SMALL)
    assert cuda.memory == before
    cuda.memory, trt.contexts = 1 << 30, 1
    with pytest.raises(OutOfMemory, match=r"no room for another execution context"):
        open_engine(artifact, "trt", options=SMALL)
    assert cuda.memory == 1 << 30


def test_a_device_that_no_longer_answers_keeps_the_first_error_and_is_given_up(tmp_path: Path, device: tuple[Runtime, TensorRt]) -> None:
    cuda, _ = device
    artifact = Artifact.open(copy_of("image", tmp_path))
    engine = open_engine(artifact, "trt", options=SMALL)
    for name in ("cudaMemcpyAsync", "cudaStreamSynchronize", "cudaStreamDestroy", "cudaFree", "cudaFreeHost"):
        cuda.fail[name] = Status.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match=r"^cudaMemcpyAsync failed") as told, engine:
        engine.run(feeds(artifact))
    assert [note.partition(" ")[0] for note in told.value.__notes__] == ["cudaFreeHost"]
    assert cuda.blocks == {}
    with pytest.raises(EngineError, match="this engine is closed"):
        engine.run(feeds(artifact))


def test_a_closing_that_fails_is_told_and_frees_the_rest(tmp_path: Path, device: tuple[Runtime, TensorRt]) -> None:
    cuda, _ = device
    with (
        pytest.raises(EngineError, match=r"cudaFreeHost failed on cuda:0: cudaErrorIllegalAddress"),
        open_engine(copy_of("image", tmp_path), "trt", options=SMALL),
    ):
        cuda.fail["cudaFreeHost"] = Status.cudaErrorIllegalAddress
    assert cuda.blocks == {}


def test_what_spoils_a_recording_is_told_and_not_the_recording(tmp_path: Path, device: tuple[Runtime, TensorRt]) -> None:
    cuda, _ = device
    driver = Cuda(0, "tensorrt")
    stream = driver.stream()

    def refused() -> None:
        cuda.fail["cudaStreamEndCapture"] = Status.cudaErrorStreamCaptureInvalidated
        raise EngineError("TensorRT refused the batch")

    with pytest.raises(EngineError, match=r"^TensorRT refused the batch") as told:
        driver.capture(stream, refused)
    assert told.value.__notes__ == ["cudaStreamEndCapture failed on cuda:0: cudaErrorStreamCaptureInvalidated. Run difffeat doctor."]
    cuda.fail.clear()
    with pytest.raises(KeyError):
        driver.capture(stream, lambda: dict[str, None]()["x"])
    assert cuda.log.count("cudaGraphDestroy") == 1
    assert cuda.capturing == {}
    driver.close()


def test_a_failing_copy_is_an_engine_error(tmp_path: Path, device: tuple[Runtime, TensorRt]) -> None:
    cuda, _ = device
    artifact = Artifact.open(copy_of("image", tmp_path))
    with open_engine(artifact, "trt", options=SMALL) as trt:
        cuda.fail["cudaMemcpyAsync"] = Status.cudaErrorIllegalAddress
        with pytest.raises(EngineError, match=r"cudaMemcpyAsync failed on cuda:0: cudaErrorIllegalAddress"):
            trt.run(feeds(artifact))
        cuda.fail.clear()


@pytest.mark.parametrize(("asked", "error", "said"), [
    ("cpu", ConfigError, r"--engine trt runs on a GPU: --device cuda or cuda:<n>, got 'cpu'"),
    ("cuda:x", ConfigError, r"got 'cuda:x'"),
    ("cuda:7", ProviderMissing, r"cuda:7 was asked for, but the driver lists 2 GPUs"),
])  # fmt: skip
def test_a_device_that_is_not_there_is_named(asked: str, error: type[Exception], said: str, tmp_path: Path, device: Any) -> None:
    with pytest.raises(error, match=said):
        open_engine(copy_of("image", tmp_path), "trt", device=asked)


@pytest.mark.skipif(probe_driver().problem is None, reason="this machine has a GPU")
def test_without_a_gpu_a_real_plan_is_refused_before_the_library_is_touched(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'difffeat[rtx]'")
    folder = copy_of("text", tmp_path)
    build_plan(folder, "rtx", Profile(opt_batch=2, max_batch=4))
    with pytest.raises(ProviderMissing, match=r"engine rtx needs an NVIDIA GPU, and there is no NVIDIA driver .*Use --engine ort"):
        open_engine(folder, "rtx", options=SMALL)


def test_without_the_package_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtra, match=r"pip install 'difffeat\[tensorrt\]'"):
        open_engine(copy_of("text", tmp_path), "trt")


def test_without_the_cuda_bindings_their_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    artifact = Artifact.open(copy_of("text", tmp_path))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingExtra, match=r"Running a plan needs cuda-bindings, .*'difffeat\[tensorrt\]'"):
        open_engine(artifact, "trt", options=SMALL)


@pytest.mark.parametrize(("engine", "options", "said"), [
    ("ort", {"compile": True}, r"--compile is for --engine torch; this is ort"),
    ("ort", {"cuda_graphs": True}, r"--cuda-graphs is for --engine torch, trt, rtx; this is ort"),
    ("trt", {"tensorrt_provider": True}, r"--tensorrt-provider is for --engine ort; this is trt"),
])  # fmt: skip
def test_an_option_of_another_engine_is_refused(engine: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        open_engine(copy_of("text", tmp_path), engine, options=EngineOptions(**options))


def test_extraction_overlaps_and_gives_the_same_store(tmp_path: Path, device: Any) -> None:
    from difffeat.runtime.extract import extract
    from difffeat.runtime.sources import open_source
    from difffeat.runtime.store import Store
    from tests.runtime.fake import folder_of_images

    source = open_source(str(folder_of_images(tmp_path / "pictures", 11)))
    artifact = Artifact.open(copy_of("image", tmp_path))
    for engine in ("ort", "trt"):
        with open_engine(artifact, engine, options=EngineOptions(batch=2)) as running:
            extract(running, source, tmp_path / engine, batch_size=2, shard_size=5)
    ort, trt = Store.open(tmp_path / "ort"), Store.open(tmp_path / "trt")
    assert list(ort.taps) == list(trt.taps)
    for tap in ort.taps:
        np.testing.assert_allclose(np.asarray(trt[tap], np.float32), np.asarray(ort[tap], np.float32), rtol=2e-3, atol=1e-3)


def test_native_plans_built_elsewhere_are_not_taken(tmp_path: Path, device: Any) -> None:
    folder = copy_of("image", tmp_path)
    plan = build_plan(folder, "trt", Profile(opt_batch=4, max_batch=4))
    stored = {**plan.sidecar, "device": ["ahead of time", []]}
    plan.path.with_suffix(".json").write_text(json.dumps({**stored, "seal": seal(stored)}))
    assert find_plan(Artifact.open(folder), "trt", 4) is None


def test_captions_as_long_as_the_model_takes_have_a_plan_even_beside_a_shorter_one(tmp_path: Path, device: Any) -> None:
    artifact = Artifact.open(copy_of("text", tmp_path))
    build_plan(artifact, "trt", Profile(opt_batch=4, max_batch=4, opt_length=8, max_length=8))
    given, said = feeds(artifact, batch=4, length=32), list[str]()
    with open_engine(artifact, threads=1) as ort, open_engine(artifact, "trt", options=SMALL, say=said.append) as trt:
        same(trt.run(given), ort.run(given))
    assert said[0].startswith("no plan serves batches of 4 and captions of up to 32 tokens on this device yet")


def test_batches_smaller_than_the_plans_are_refused_with_the_option_that_helps(tmp_path: Path, device: Any) -> None:
    artifact = Artifact.open(copy_of("image", tmp_path))
    plan = build_plan(artifact, "trt", Profile(min_batch=4, opt_batch=4, max_batch=4))
    with TensorRtEngine(artifact, "model", plan, engine="trt") as trt, pytest.raises(BadFeed, match=r"difffeat build with a smaller --min-batch\."):
        trt.run(feeds(artifact, batch=2))


def test_a_plan_that_does_not_fit_the_device_is_out_of_memory_and_a_broken_one_is_not(tmp_path: Path, device: tuple[Runtime, TensorRt]) -> None:
    cuda, trt = device
    artifact, before = Artifact.open(copy_of("image", tmp_path)), cuda.memory
    trt.complaint = "Error Code 2: OutOfMemory (Requested size was 4000000000 bytes.)"
    with pytest.raises(OutOfMemory, match=r"trt cannot load .*\.plan: the device is out of memory \(Error Code 2: OutOfMemory"):
        open_engine(artifact, "trt", options=SMALL)
    trt.complaint = "Error Code 6: serialized with another version"
    with pytest.raises(EngineError, match=r"another version\. Delete it; it is then built anew"):
        open_engine(artifact, "trt", options=SMALL)
    assert cuda.memory == before


@pytest.mark.parametrize("part", ["Builder", "Runtime"])
def test_a_tensorrt_that_does_not_start_is_told_in_its_words(
    part: str, tmp_path: Path, device: tuple[Runtime, TensorRt], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, trt = device
    before = cuda.memory

    def refuse(log: Any) -> None:
        log.log(trt.ILogger.Severity.WARNING, "CUDA initialization failure with error: 35.")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, part, refuse)
    with pytest.raises(
        EngineError, match=r"TensorRT does not start here \(pybind11.*\): CUDA initialization failure with error: 35\..* NVIDIA driver"
    ):
        open_engine(copy_of("image", tmp_path), "trt", options=SMALL)
    assert cuda.memory == before


def test_a_batch_that_is_refused_is_told_in_tensorrts_words(
    tmp_path: Path, device: tuple[Runtime, TensorRt], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact.open(copy_of("image", tmp_path))
    with open_engine(artifact, "trt", options=SMALL) as engine:
        monkeypatch.setattr("tests.engines.fake_gpu.Context.execute_async_v3", lambda *_: False)
        log: Any = engine._log  # type: ignore[attr-defined]
        for word, error in (("a kernel failed", EngineError), ("CUDA out of memory", OutOfMemory)):
            log.log(device[1].ILogger.Severity.ERROR, word)
            with pytest.raises(error, match=rf"TensorRT refused the batch: .*{word}"):
                engine.run(feeds(artifact, batch=4))


def test_shapes_that_take_turns_have_a_graph_each_up_to_a_number(
    tmp_path: Path, device: tuple[Runtime, TensorRt], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, _ = device
    monkeypatch.setattr(tensorrt_engine, "KEPT_GRAPHS", 2)
    artifact = Artifact.open(copy_of("text", tmp_path))
    plan = build_plan(artifact, "trt", Profile(opt_batch=4, max_batch=4))
    with open_engine(artifact, threads=1) as ort, TensorRtEngine(artifact, "model", plan, engine="trt", cuda_graphs=True, slots=1) as trt:
        for length in (4, 8, 12) * 5:
            given = feeds(artifact, batch=4, length=length, seed=length)
            same(trt.run(given), ort.run(given))
        assert (cuda.log.count("cudaGraphInstantiate"), cuda.log.count("cudaGraphLaunch"), len(cuda.graphs)) == (2, 6, 2)
    assert (cuda.graphs, cuda.blocks) == ({}, {})


def test_a_build_that_is_stopped_ends_at_its_next_step(tmp_path: Path, device: tuple[Runtime, TensorRt], monkeypatch: pytest.MonkeyPatch) -> None:
    _, trt = device
    monkeypatch.setattr(tensorrt_compile, "REPORT_SECONDS", 0.01)
    trt.endless, said = True, list[str]()

    def say(line: str) -> None:
        said.append(line)
        if line == "  0 s: Tactics, step 5 of 9":
            raise KeyboardInterrupt

    folder = copy_of("image", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        build_plan(folder, "trt", Profile(opt_batch=2, max_batch=2), say=say)
    assert list((folder / "engines").glob("*.plan")) == []
