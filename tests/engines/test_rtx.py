"""TensorRT-RTX: the GPUs that it is for, plans built ahead of time for them, and what it does by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from difffeat.engines import Artifact, EngineOptions, open_engine, rtx_cards, tensorrt_build
from difffeat.engines.driver import Driver, Gpu
from difffeat.engines.tensorrt_build import build_plan, find_plan
from difffeat.engines.tensorrt_compile import make_logger
from difffeat.engines.tensorrt_plans import Profile
from difffeat.errors import ConfigError, ProviderMissing
from tests.artifacts import copy_of, feeds
from tests.engines.fake_gpu import TensorRt, install
from tests.engines.test_tensorrt_engine import SMALL, same


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch, graphs: None) -> TensorRt:
    """TensorRT-RTX with one of its GPUs."""
    return install(monkeypatch, (Gpu("NVIDIA RTX 4090", (8, 9), 24 << 30),), "rtx")[1]


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_rtx_compiles_kernels_before_it_runs_and_captures_graphs_itself(cuda_graphs: bool, tmp_path: Path, rtx: Any) -> None:
    artifact = Artifact.open(copy_of("image", tmp_path))
    with open_engine(artifact, threads=1) as ort, open_engine(artifact, "rtx", options=EngineOptions(batch=4, cuda_graphs=cuda_graphs)) as engine:
        for seed in range(4):
            given = feeds(artifact, batch=4, seed=seed)
            same(engine.run(given), ort.run(given))
    assert len(rtx.configs) == 2
    for config in rtx.configs:
        assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
        assert getattr(config, "cuda_graph_strategy", None) == (rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if cuda_graphs else None)
    assert "cudaStreamBeginCapture" not in rtx.cuda.log


def test_the_bindings_of_rtx_have_what_is_set_in_them() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'difffeat[rtx]'")
    assert {"dynamic_shapes_kernel_specialization_strategy", "cuda_graph_strategy"} <= set(dir(trt.IRuntimeConfig))
    assert trt.DynamicShapesKernelSpecializationStrategy.EAGER != trt.DynamicShapesKernelSpecializationStrategy.LAZY
    assert trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE != trt.CudaGraphStrategy.DISABLED
    assert "runtime_config" in trt.ICudaEngine.create_execution_context.__doc__
    log = make_logger(trt)
    builder = trt.Builder(log)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM75, 0)


@pytest.mark.parametrize(("capability", "taken"), [((8, 0), True), ((8, 9), True), ((12, 1), True), ((7, 5), False)])
def test_a_plan_built_ahead_of_time_runs_on_the_gpus_that_rtx_lists(
    capability: tuple[int, int], taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: None
) -> None:
    artifact = Artifact.open(copy_of("image", tmp_path))
    install(monkeypatch, (), "rtx")
    ahead = build_plan(artifact, "rtx", Profile(opt_batch=4, max_batch=4))
    assert ahead.sidecar["device"] == ["ahead of time", []]
    _, trt = install(monkeypatch, (Gpu("a card", capability, 24 << 30),), "rtx")
    with open_engine(artifact, "rtx", options=SMALL) as engine:
        assert (engine.identity["plan"] == ahead.identity) is taken
        assert engine.identity["gpu"].startswith("a card")
    assert trt.built == (0 if taken else 1)
    assert trt.capabilities == ([(75, 0, 1)] if capability == (7, 5) else [])
    own = build_plan(artifact, "rtx", Profile(opt_batch=2, max_batch=8))
    found = find_plan(artifact, "rtx", 4)
    assert found is not None
    assert (found.path == own.path) is taken


@pytest.mark.parametrize("capability", [(7, 0), (8, 7), (9, 0), (10, 0)])
def test_rtx_refuses_a_gpu_that_it_does_not_run_on_and_builds_nothing_for_it(
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: None
) -> None:
    folder, name = copy_of("image", tmp_path), f"{capability[0]}.{capability[1]}"
    _, trt = install(monkeypatch, (Gpu("NVIDIA H100 80GB HBM3", capability, 80 << 30),), "rtx")
    said = rf"TensorRT-RTX does not run on cuda:0 \(NVIDIA H100 80GB HBM3, compute capability {name}\): .* 7\.5, 8\.0, 8\.6, 8\.9, 12\.0 and 12\.1\. "
    with pytest.raises(ProviderMissing, match=said + r"Use --engine torch --device cuda:0, or --engine trt"):
        open_engine(folder, "rtx", device="cuda:0", options=SMALL)
    with pytest.raises(ProviderMissing, match=said):
        build_plan(folder, "rtx", Profile(opt_batch=2, max_batch=2), device=0)
    assert trt.built == 0
    ahead = build_plan(folder, "rtx", Profile(opt_batch=2, max_batch=2))
    assert ahead.sidecar["device"] == ["ahead of time", []]
    assert find_plan(Artifact.open(folder), "rtx", 2) is None


def test_a_plan_for_other_machines_is_built_on_one_whose_gpu_rtx_runs_on(tmp_path: Path, rtx: TensorRt) -> None:
    folder = copy_of("image", tmp_path)
    own = build_plan(folder, "rtx", Profile(opt_batch=2, max_batch=2))
    ahead = build_plan(folder, "rtx", Profile(opt_batch=2, max_batch=2), device="ahead")
    assert own.sidecar["device"] == ["NVIDIA RTX 4090", [8, 9]]
    assert ahead.sidecar["device"] == ["ahead of time", []]
    with pytest.raises(ConfigError, match=r"only TensorRT-RTX builds ahead of time: .* Name a GPU, or pass --engine rtx\."):
        tensorrt_build._target("trt", Driver((13, 0), (), None), "ahead")


def test_the_table_of_rtx_gpus_is_that_of_its_builder() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'difffeat[rtx]'")
    named = {name for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert named == {f"SM{major}{minor}" for major, minor in rtx_cards.CAPABILITIES}
