"""Graphs compile; plans are reused only when they are this user's, whole and fresh."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from difffeat.engines import Artifact, tensorrt_build, tensorrt_compile
from difffeat.engines import seal as seal_module
from difffeat.engines.driver import Driver, probe_driver
from difffeat.engines.seal import is_sealed, key_path, seal
from difffeat.engines.tensorrt_build import build_plan
from difffeat.engines.tensorrt_plans import Profile, read_sidecar
from difffeat.errors import ConfigError, EngineError, MissingExtra, ProviderMissing, UntrustedFile
from tests.artifacts import OPTIONS, copy_of, exported

SMALL = Profile(opt_batch=2, max_batch=4)


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFFEAT_DATA", str(tmp_path / "data"))


def rtx() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", reason="pip install 'difffeat[rtx]'")


@pytest.mark.parametrize("name", ["image", "latents", "sweep", "text", "text-sweep"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_small_graphs_compile_without_a_gpu(name: str, precision: str, tmp_path: Path) -> None:
    rtx()
    folder = copy_of(name, tmp_path, precision)
    plan = build_plan(folder, "rtx", SMALL)
    assert plan.seconds is not None
    assert plan.path.stat().st_size == plan.size > 100_000
    assert plan.sidecar["precision"] == precision


@pytest.mark.parametrize("name", [pytest.param("sweep-ddim", marks=pytest.mark.slow), "text-sweep-ddim"])
@pytest.mark.parametrize("graph", ["model", "denoiser"])
def test_the_denoisers_and_what_they_feed_compile_in_fp16(name: str, graph: str, tmp_path: Path) -> None:
    rtx()
    assert build_plan(copy_of(name, tmp_path, "fp16"), "rtx", SMALL, graph=graph).sidecar["graph"] == graph


def test_every_kind_is_covered_by_a_name() -> None:
    assert {"image", "latents", "sweep", "text", "text-sweep"} <= set(OPTIONS)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    rtx()
    folder = copy_of("text", tmp_path)
    build_plan(folder, "rtx", SMALL)
    return folder


def only(folder: Path, suffix: str) -> Path:
    (found,) = (folder / "engines").glob(f"*{suffix}")
    return found


def test_a_fresh_plan_is_not_built_again(built: Path) -> None:
    before = only(built, ".plan").stat().st_mtime_ns
    again = build_plan(built, "rtx", SMALL)
    assert again.seconds is None
    assert only(built, ".plan").stat().st_mtime_ns == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def alter(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit in the plan": (lambda f: flip(only(f, ".plan")), "is not the file that was sealed"),
    "an altered sidecar": (lambda f: alter(only(f, ".json"), bytes=1), "does not carry this user's seal"),
    "a forged seal": (lambda f: alter(only(f, ".json"), seal="0" * 64), "does not carry this user's seal"),
    "a seal that is no text": (lambda f: alter(only(f, ".json"), seal=[1]), "does not carry this user's seal"),
    "no sidecar": (lambda f: only(f, ".json").unlink(), "which says what it was built from, is missing"),
    "garbage for a sidecar": (lambda f: only(f, ".json").write_bytes(b"\xff["), "is damaged"),
    "a list for a sidecar": (lambda f: only(f, ".json").write_text("[1]"), "is damaged"),
    "a sidecar that is not JSON's own": (lambda f: alter(only(f, ".json"), bytes=float("nan")), "is damaged"),
    "another user's key": (lambda f: key_path().unlink(), "does not carry this user's seal"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_plan_that_cannot_be_trusted_is_built_anew_and_the_reason_told(kind: str, built: Path) -> None:
    spoil, reason = SPOILED[kind]
    spoil(built)
    said: list[str] = []
    plan = build_plan(built, "rtx", SMALL, say=said.append)
    assert plan.seconds is not None
    assert reason in plan.reason
    assert reason in said[0]
    assert build_plan(built, "rtx", SMALL).seconds is None


def test_another_profile_is_another_plan(built: Path) -> None:
    again = build_plan(built, "rtx", Profile(opt_batch=3, max_batch=4))
    assert again.seconds is not None
    assert again.reason.endswith(".plan has opt batch 2 in place of 3")
    assert len(list((built / "engines").glob("*.plan"))) == 2


def test_the_folder_and_the_key_are_the_users_alone(built: Path) -> None:
    assert (built / "engines").stat().st_mode & 0o077 == 0
    assert key_path().stat().st_mode & 0o777 == 0o600


def test_a_key_that_others_can_read_is_refused(built: Path) -> None:
    os.chmod(key_path(), 0o644)
    with pytest.raises(UntrustedFile, match=r"can be read by others, so its seals prove nothing. Delete it"):
        build_plan(built, "rtx", SMALL)


def test_a_key_of_another_length_is_refused() -> None:
    seal({})
    key_path().write_bytes(b"short")
    with pytest.raises(UntrustedFile, match=r"is no key \(5 bytes\)"):
        seal({})


def test_a_seal_is_of_its_content_and_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = seal({"a": 1, "b": 2})
    assert is_sealed({"b": 2, "a": 1}, mark)
    assert not is_sealed({"a": 1, "b": 3}, mark)
    monkeypatch.setenv("DIFFFEAT_DATA", str(tmp_path / "other"))
    assert not is_sealed({"a": 1, "b": 2}, mark)


def test_the_key_lies_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DIFFFEAT_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert seal_module.key_path() == tmp_path / "difffeat" / "engine.key"


def test_a_graph_that_the_builder_refuses_is_an_error_with_its_words(tmp_path: Path) -> None:
    rtx()
    import onnx

    folder = copy_of("text", tmp_path)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperation"
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(EngineError, match=r"TensorRT cannot read .*model\.onnx: .*NoSuchOperation"):
        build_plan(folder, "rtx", SMALL)


def test_native_tensorrt_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("tensorrt")
    fake.__version__ = "11.0.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(tensorrt_build, "probe_driver", lambda: Driver(None, (), "there is no NVIDIA driver"))
    with pytest.raises(ProviderMissing, match=r"TensorRT tunes a plan on the GPU it is for, and there is no NVIDIA driver. Build on the machine"):
        build_plan(exported("text"), "trt", SMALL)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtra, match=r"The engine 'trt' needs tensorrt, which is not installed. Run: pip install 'difffeat\[tensorrt\]'"):
        build_plan(exported("text"), "trt", SMALL)


@pytest.mark.parametrize(("text", "said"), [
    ("import library_of_it", r"tensorrt is installed, and lacks library_of_it\. Run: pip install --force-reinstall 'difffeat\[tensorrt\]'"),
    ("raise ImportError('libnvinfer.so.11: no such file')", r"tensorrt is installed, and cannot be loaded: libnvinfer\.so\.11: no such file\. "),
    ("raise OSError('libcudart.so.13: no such file')", r"tensorrt is installed, and cannot be loaded: libcudart\.so\.13: no such file\. "),
])  # fmt: skip
def test_a_package_that_cannot_be_loaded_is_not_said_to_be_missing(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EngineError, match=said):
        tensorrt_build.import_builder("trt")


@pytest.mark.parametrize("changes", [{"min_batch": 0}, {"opt_batch": 100}, {"max_length": 0}])
def test_a_profile_out_of_order_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"a profile needs 1 <= min <= opt <= max for its (batch|length), got"):
        Profile(**changes)


@pytest.mark.parametrize(("change", "said"), [
    ({"version": "1.6.0.1"}, "version '1.6.0.1' in place of '"),
    ({"device": ["NVIDIA RTX 4090", [8, 9]]}, "device 'NVIDIA RTX 4090' in place of 'ahead of time'"),
    ({"graph_digest": "f" * 64}, "graph digest 'fffffffffffff...' in place of '"),
    ({"level": 4}, "level 4 in place of None"),
])  # fmt: skip
def test_what_makes_a_plan_stale_is_named(change: dict[str, Any], said: str, built: Path) -> None:
    stored = json.loads(only(built, ".json").read_text()) | change
    del stored["seal"]
    for suffix in (".plan", ".json"):
        only(built, suffix).rename(built / "engines" / f"other{suffix}")
    only(built, ".json").write_text(json.dumps({**stored, "seal": seal(stored)}))
    reason = build_plan(built, "rtx", SMALL).reason
    assert reason.startswith(f"other.plan has {said}")
    assert ";" not in reason


def test_of_several_stale_plans_the_nearest_is_compared_and_anothers_seal_is_told(built: Path) -> None:
    build_plan(built, "rtx", Profile(opt_batch=3, max_batch=9))
    key_path().unlink()
    reason = build_plan(built, "rtx", Profile(opt_batch=2, max_batch=5)).reason
    assert reason.startswith("of 2 plans there the nearest, ")
    assert reason.endswith(".plan, has max batch 4 in place of 5; not this user's seal")


def test_the_first_plan_of_a_graph_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    rtx()
    folder = copy_of("from-latents", tmp_path)
    build_plan(folder, "rtx", SMALL, graph="latents")
    assert build_plan(folder, "rtx", SMALL).reason == "there is none yet of rtx for the model graph"


@pytest.mark.parametrize("spoil", [lambda data: data.write_bytes(b""), lambda data: data.symlink_to(data)])
def test_a_key_folder_that_cannot_be_used_is_told_before_anything_is_compiled(
    spoil: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx()
    monkeypatch.setattr(tensorrt_build, "compile_graph", lambda *_, **__: pytest.fail("compiled"))
    spoil(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"the key that seals engines can be neither made nor read: .*engine\.key.*Set DIFFFEAT_DATA to a folder"):
        build_plan(copy_of("text", tmp_path), "rtx", SMALL)


def test_a_key_that_cannot_be_read_is_no_damage_of_a_sidecar(built: Path) -> None:
    key_path().unlink()
    key_path().parent.rmdir()
    key_path().parent.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"the key that seals engines"):
        read_sidecar(only(built, ".plan"))


def test_an_int8_artifact_has_no_plans(tmp_path: Path) -> None:
    artifact = Artifact.open(copy_of("text", tmp_path))
    low = Artifact(artifact.path, replace(artifact.recipe, precision="int8"))
    with pytest.raises(ConfigError, match=r"is int8, which is for ONNX Runtime on CPUs\. Pass --engine ort"):
        build_plan(low, "rtx", SMALL)


@pytest.mark.parametrize("level", [-1, 6])
def test_a_level_that_there_is_not_is_refused(level: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"the builder's level lies in 0\.\.5, got {level}"):
        build_plan(copy_of("text", tmp_path), "rtx", SMALL, level=level)


def test_a_gpu_that_is_not_there_is_not_built_for(tmp_path: Path) -> None:
    rtx()
    if probe_driver().problem is None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(ProviderMissing, match=r"cuda:1 was asked for, but the driver lists 0 GPUs"):
        build_plan(copy_of("text", tmp_path), "rtx", SMALL, device=1)


def test_a_plan_takes_captions_as_long_as_the_model_does(built: Path) -> None:
    profile = json.loads(only(built, ".json").read_text())["profile"]
    assert (profile["min_length"], profile["opt_length"], profile["max_length"]) == (1, 32, 32)


def test_a_build_tells_how_far_it_is_and_how_long_the_last_one_took(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_compile, "REPORT_SECONDS", 0.02)
    said: list[str] = []
    build_plan(built, "rtx", Profile(opt_batch=3, max_batch=3), say=said.append)
    assert said[0].startswith("building ")
    assert all(re.fullmatch(r"  \d+ s: .+ \(the last build of this graph took \d+ s\)", line) for line in said[1:])
    assert any(re.search(r": .+, step \d+ of \d+ ", line) for line in said[1:])


def test_ctrl_c_ends_a_build_and_leaves_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx()
    monkeypatch.setattr(tensorrt_compile, "REPORT_SECONDS", 0.02)
    folder = copy_of("text", tmp_path)

    def stop(line: str) -> None:
        if line.startswith("  "):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_plan(folder, "rtx", SMALL, say=stop)
    assert list((folder / "engines").glob("*.plan")) == []


def test_a_plan_that_is_there_is_found_where_nothing_may_be_written(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_build, "one_build", lambda *_: pytest.fail("a lock was written"))
    assert build_plan(built, "rtx", SMALL).seconds is None


def test_two_builds_of_one_plan_are_one(tmp_path: Path) -> None:
    rtx()
    folder, said = copy_of("text", tmp_path), list[str]()
    with ThreadPoolExecutor(2) as pool:
        plans = list(pool.map(lambda _: build_plan(folder, "rtx", SMALL, say=said.append), range(2)))
    assert sorted(plan.seconds is None for plan in plans) == [False, True]
    assert plans[0].identity == plans[1].identity


def test_other_engines_have_no_plans() -> None:
    with pytest.raises(ConfigError, match="plans are built for trt or rtx, got 'ort'"):
        build_plan(exported("text"), "ort")


def test_a_machine_without_a_driver_is_told_not_crashed() -> None:
    driver = probe_driver("libnothing.so.9")
    assert driver.problem == "there is no NVIDIA driver (libnothing.so.9 cannot be loaded)"
    assert (driver.gpus, driver.version) == ((), None)


@pytest.mark.parametrize("content", ['{"seal": "µ"}', '{"engine": "\\ud800", "seal": "0"}', '{"seal": 3}', "[]", "{"])
def test_a_sidecar_of_whatever_content_carries_no_seal(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.plan").write_bytes(b"x")
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    stored, reason = read_sidecar(tmp_path / "a.plan")
    assert stored is None
    assert "seal" in reason or "is damaged" in reason
