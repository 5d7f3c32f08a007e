"""The torch engine on a card: every graph in every precision, the same bytes whatever lies beside a sample, memory that runs out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from difffeat.engines import Artifact, EngineOptions, open_engine
from difffeat.engines.parity import compare
from difffeat.errors import OutOfMemory
from difffeat.workflows.checking import TOLERANCES
from tests.artifacts import OPTIONS, exported, feeds
from tests.gpu.needs import require_autoencoder

PLAIN = EngineOptions(compile=False, cuda_graphs=False)
COMPILED = ["image", "from-latents", "sweep", "text", "text-sweep"]
"""Compiled too: one graph of each form. The others share their modules."""
WAYS = {
    "uncompiled": PLAIN,
    "compiled": EngineOptions(cuda_graphs=False),
    "replayed": EngineOptions(compile=False, cuda_graphs=True),
    "compiled and replayed": EngineOptions(cuda_graphs=True),
}
Feeds = dict[str, np.ndarray]


def parts(artifact: Artifact) -> list[str]:
    return list(artifact.graphs)


def run(artifact: Artifact, given: Feeds, device: str = "cuda", options: EngineOptions = PLAIN, graph: str = "model") -> Feeds:
    with open_engine(artifact, "torch", device=device, graph=graph, options=None if device == "cpu" else options) as engine:
        return engine.run(given)


def near(found: Feeds, expected: Feeds, tolerance: float) -> None:
    for name, value in found.items():
        measured = compare(value, expected[name])
        assert measured.nonfinite == 0, name
        assert measured.relative_l2 <= tolerance, (name, measured.relative_l2)


def table_feeds(artifact: Artifact, graph: str, batch: int = 3) -> Feeds:
    """Inputs of a graph; those of a denoiser that belong to a timestep come from its table."""
    given = feeds(artifact, batch=batch, graph=graph)
    if graph == "denoiser":
        table = artifact.denoiser_table()
        given |= {name: table[name][1] for name in given if name in table and table[name][1].shape == given[name].shape}
    return given


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_graph_agrees_with_fp32_on_the_cpu(name: str, precision: str) -> None:
    require_autoencoder(name)
    low, exact = exported(name, precision), exported(name)
    for graph in parts(exact):
        given = table_feeds(exact, graph)
        near(run(low, given, graph=graph), run(exact, given, "cpu", graph=graph), TOLERANCES[precision])


@pytest.mark.parametrize("way", [way for way in WAYS if way != "uncompiled"])
@pytest.mark.parametrize("name", COMPILED)
def test_every_way_agrees_with_fp32_on_the_cpu(name: str, way: str) -> None:
    require_autoencoder(name)
    given = feeds(exported(name), batch=4, length=8)
    near(run(exported(name, "fp16"), given, options=WAYS[way]), run(exported(name), given, "cpu"), TOLERANCES["fp16"])


@pytest.mark.parametrize("name", ["image", "text"])
def test_tf32_is_off_unless_it_is_asked_for(name: str, card: None) -> None:
    require_autoencoder(name)
    given = feeds(exported(name), batch=16)
    expected = run(exported(name), given, "cpu")
    near(run(exported(name), given), expected, 1e-5)
    rounded = run(exported(name), given, options=EngineOptions(compile=False, cuda_graphs=False, tf32=True))
    near(rounded, expected, TOLERANCES["fp16"])
    assert any(compare(value, expected[tap]).relative_l2 > 1e-5 for tap, value in rounded.items())


def permuted(given: Feeds, order: Any) -> Feeds:
    return {name: value[order] if len(value) == len(order) else value for name, value in given.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "precision"), [("image", "fp16"), ("from-latents", "fp32"), ("from-latents", "bf16"), ("text", "fp16")])
def test_a_sample_has_the_same_bytes_again_with_other_neighbours_and_in_another_place(name: str, precision: str, way: str) -> None:
    require_autoencoder(name)
    artifact, batch = exported(name, precision), 12
    given, others = feeds(artifact, batch=batch, length=8, seed=1), feeds(artifact, batch=batch, length=8, seed=2)
    mixed = {name: np.concatenate([value[:4], others[name][4:]]) for name, value in given.items()}
    order = np.random.default_rng(3).permutation(batch)
    with open_engine(artifact, "torch", device="cuda", options=WAYS[way]) as engine:
        first = engine.run(given)
        for other in (engine.run(given), engine.run(given)):
            assert all(np.array_equal(other[tap], first[tap]) for tap in first)
        beside, moved = engine.run(mixed), engine.run(permuted(given, order))
    with open_engine(artifact, "torch", device="cuda", options=WAYS[way]) as engine:
        opened_again = engine.run(given)
    for tap, value in first.items():
        assert np.array_equal(opened_again[tap], value), tap
        assert np.array_equal(beside[tap][:4], value[:4]), tap
        assert np.array_equal(moved[tap], value[order]), tap


@pytest.mark.parametrize("way", ["uncompiled", "replayed"])
def test_what_is_submitted_comes_back_in_order_whatever_is_asked_for_first(way: str) -> None:
    artifact = exported("from-latents", "fp16")
    batches = [feeds(artifact, batch=1 + seed % 4, seed=seed) for seed in range(32)]
    with open_engine(artifact, "torch", device="cuda", options=WAYS[way]) as engine:
        expected = [engine.run(given) for given in batches]
        pending = [engine.submit(given) for given in batches]
        for index in np.random.default_rng(0).permutation(len(batches)):
            for tap, value in pending[index].result().items():
                assert np.array_equal(value, expected[index][tap]), (index, tap)


def test_memory_that_runs_out_is_told_and_a_smaller_batch_runs(card: None) -> None:
    import torch

    artifact = exported("from-latents", "fp16")
    with open_engine(artifact, "torch", device="cuda", options=PLAIN) as engine:
        expected = engine.run(feeds(artifact, batch=2))
        torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.get_device_properties(0).total_memory)  # and not the card's all: others test too
        try:
            with pytest.raises(OutOfMemory, match="out of memory"):
                engine.run(feeds(artifact, batch=40_000))
            found = engine.run(feeds(artifact, batch=2))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(np.array_equal(found[tap], expected[tap]) for tap in expected)


def test_the_identity_names_what_computes(card: None) -> None:
    import torch

    with open_engine(exported("from-latents", "fp16"), "torch", device="cuda") as engine:
        identity = dict(engine.identity)
    assert identity["gpu"].startswith(torch.cuda.get_device_name(0))
    assert identity["cuda"] == torch.version.cuda
    assert identity["cudnn"] == str(torch.backends.cudnn.version())
    assert identity["compile"] == "true"
    assert identity["attention"].endswith("_ATTENTION")
    assert "triton" in identity


def test_the_switches_of_the_process_are_as_they_were(card: None) -> None:
    import torch

    def switches() -> tuple[Any, ...]:
        products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
        return products.allow_fp16_reduced_precision_reduction, convolutions.benchmark, convolutions.deterministic, products.fp32_precision

    before = switches()
    run(exported("from-latents", "fp16"), feeds(exported("from-latents")))
    assert switches() == before
