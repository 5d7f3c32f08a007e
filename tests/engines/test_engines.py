"""Both engines keep one protocol: the same inputs, the same errors, the same features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from difffeat.engines import Artifact, Engine, EngineOptions, open_engine
from difffeat.engines.onnxruntime_engine import OrtEngine
from difffeat.engines.parity import compare
from difffeat.errors import BadFeed, ConfigError, EngineError, ForeignGraph, OutOfMemory
from tests.artifacts import OPTIONS, WITH_LATENTS, exported, feeds

GRAPHS = [(name, "model") for name in OPTIONS] + [(name, "latents") for name in WITH_LATENTS]
RUNNABLE = ("ort", "torch")


def exports_denoiser(name: str) -> bool:
    """Whether its samples are noised outside of the graph, which then takes latents in place of tokens."""
    return OPTIONS[name]["noising"] == "ddim" or bool(OPTIONS[name].get("self_conditioning"))


TEXT = [name for name in OPTIONS if name.startswith("text") and not exports_denoiser(name)]


def opened(name: str, engine: str = "ort", graph: str = "model", **options: Any) -> Engine:
    return open_engine(exported(name), engine, graph=graph, threads=1, **options)


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert list(found) == list(expected)
    for name in found:
        assert compare(found[name], expected[name]).within(tolerance), (name, compare(found[name], expected[name]))


@pytest.mark.parametrize("engine", RUNNABLE)
def test_an_engine_says_what_it_is(engine: str) -> None:
    artifact = exported("image")
    with opened("image", engine) as running:
        assert isinstance(running, Engine)
        assert (running.name, running.device, running.precision) == (engine, "cpu", "fp32")
        assert running.recipe == artifact.recipe
        assert running.digest == artifact.digest


@pytest.mark.parametrize(("name", "graph"), GRAPHS)
def test_the_engines_agree(name: str, graph: str) -> None:
    given = feeds(exported(name), graph=graph)
    with opened(name, "ort", graph) as ort, opened(name, "torch", graph) as torch:
        assert ort.inputs == torch.inputs
        assert ort.outputs == torch.outputs
        assert_close(ort.run(given), torch.run(given))


@pytest.mark.parametrize("engine", RUNNABLE)
@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_are_as_declared_and_belong_to_the_caller(name: str, engine: str) -> None:
    given = feeds(exported(name))
    with opened(name, engine) as running:
        first = running.run(given)
        kept = {key: value.copy() for key, value in first.items()}
        running.run(feeds(exported(name), seed=1))
        for key, value in first.items():
            assert value.dtype == np.float32
            assert value.shape == (3, *running.outputs[key].shape[1:])
            np.testing.assert_array_equal(value, kept[key])


@pytest.mark.parametrize("engine", RUNNABLE)
@pytest.mark.parametrize("name", ["image", "from-latents-mean", "sweep", "text", "text-random", "text-sweep"])
def test_a_sample_does_not_see_the_others_of_its_batch(name: str, engine: str) -> None:
    given = feeds(exported(name), batch=5)
    per_sample = {"pixels", "latents", "noise", "tokens", "lengths"}
    order = np.array([3, 0, 4, 1, 2])

    def rows(chosen: Any) -> dict[str, np.ndarray]:
        return {key: value[chosen] if key in per_sample else value for key, value in given.items()}

    with opened(name, engine) as running:
        together = running.run(given)
        permuted = running.run(rows(order))
        for key, value in together.items():
            np.testing.assert_array_equal(permuted[key], value[order])
        for index in range(5):
            alone = running.run(rows(slice(index, index + 1)))
            assert_close(alone, {key: value[index : index + 1] for key, value in together.items()})


@pytest.mark.parametrize("engine", RUNNABLE)
@pytest.mark.parametrize("name", TEXT)
def test_padding_changes_nothing(name: str, engine: str) -> None:
    given = feeds(exported(name), length=6)
    given["lengths"] = np.array([6, 3, 1])
    rng = np.random.default_rng(5)
    padded = dict(given)
    padded["tokens"] = np.concatenate([given["tokens"], rng.integers(0, 50, (3, 5))], axis=1)
    if "noise" in given:
        padded["noise"] = np.concatenate([given["noise"], 9 * rng.standard_normal((3, 5, 16), dtype=np.float32)], axis=1)
    with opened(name, engine) as running:
        assert_close(running.run(padded), running.run(given))


def without(given: dict[str, Any]) -> None:
    del given["noise"]


def surplus(given: dict[str, Any]) -> None:
    given["label"] = np.zeros(3)


def other_type(given: dict[str, Any]) -> None:
    given["pixels"] = given["pixels"].astype(np.float32)


def other_order_of_bytes(given: dict[str, Any]) -> None:
    given["noise"] = given["noise"].astype(">f4")


def no_array(given: dict[str, Any]) -> None:
    given["noise"] = given["noise"].tolist()


def other_shape(given: dict[str, Any]) -> None:
    given["pixels"] = given["pixels"][:, :8]


def fewer_axes(given: dict[str, Any]) -> None:
    given["pixels"] = given["pixels"][0]


def other_batch(given: dict[str, Any]) -> None:
    given["noise"] = given["noise"][:2]


def empty(given: dict[str, Any]) -> None:
    given["pixels"], given["noise"] = given["pixels"][:0], given["noise"][:0]


@pytest.mark.parametrize("engine", RUNNABLE)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without, "the graph needs input noise; it was given pixels"),
        (dict.clear, "the graph needs input noise, pixels; it was given nothing"),
        (surplus, "the graph has no input label; its inputs are pixels, noise"),
        (other_type, "pixels must be a NumPy array of uint8, got float32"),
        (other_order_of_bytes, "noise must be a NumPy array of float32, got >f4"),
        (no_array, "noise must be a NumPy array of float32, got list"),
        (other_shape, "pixels must have shape [batch, 16, 16, 3] (here batch = 3), got [3, 8, 16, 3]"),
        (fewer_axes, "pixels must have shape [batch, 16, 16, 3], got [16, 16, 3]"),
        (other_batch, "noise must have shape [batch, 4, 8, 8] (here batch = 3), got [2, 4, 8, 8]"),
        (empty, "pixels must have shape [batch, 16, 16, 3] (here batch = 0), got [0, 16, 16, 3]"),
    ],
)
def test_bad_feeds_are_told(engine: str, spoil: Any, message: str) -> None:
    given = feeds(exported("image"))
    spoil(given)
    with opened("image", engine) as running, pytest.raises(BadFeed) as caught:
        running.run(given)
    assert str(caught.value) == message


@pytest.mark.parametrize("engine", RUNNABLE)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lengths", [6, 0, 1], "lengths must lie in 1..6, got 0..6; padded rows are one token long"),
        ("lengths", [7, 2, 1], "lengths must lie in 1..6, got 1..7; padded rows are one token long"),
        ("lengths", [6, 2], "lengths must have shape [batch] (here batch = 3) (here length = 6), got [2]"),
        ("tokens", [[-1] * 6] * 3, "tokens must not be negative, got -1"),
    ],
)
def test_text_that_would_give_wrong_features_is_told(engine: str, name: str, value: Any, message: str) -> None:
    given = feeds(exported("text")) | {name: np.array(value)}
    with opened("text", engine) as running, pytest.raises(BadFeed) as caught:
        running.run(given)
    assert str(caught.value) == message


@pytest.mark.parametrize(("engine", "words"), [("ort", "ONNX Runtime failed: "), ("torch", "torch failed: ")])
@pytest.mark.parametrize("spoil", ["unknown token", "too long"])
def test_what_only_the_runtime_can_find_is_a_typed_error(engine: str, words: str, spoil: str) -> None:
    given = feeds(exported("text"), length=6 if spoil == "unknown token" else 33)
    if spoil == "unknown token":
        given["tokens"][0, 0] = 10_000
    with opened("text", engine) as running, pytest.raises(EngineError, match=words):
        running.run(given)


@pytest.mark.parametrize("engine", RUNNABLE)
def test_a_closed_engine_that_overlaps_says_so_too(engine: str) -> None:
    with opened("text", engine) as running:
        running.overlap()  # type: ignore[attr-defined]
        running.submit(feeds(exported("text"))).result()
    with pytest.raises(EngineError, match=r"this engine is closed\. Open it again with open_engine"):
        running.submit(feeds(exported("text"))).result()


def test_memory_that_the_network_does_not_fit_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 2048 bytes.")

    exported("text")
    monkeypatch.setattr("difffeat.export.assemble.build_module", full)
    with pytest.raises(OutOfMemory, match=r"cpu is out of memory \(.*can't allocate memory"):
        opened("text", "torch")


@pytest.mark.parametrize("engine", RUNNABLE)
def test_a_closed_engine_says_so(engine: str) -> None:
    with opened("text", engine) as running:
        pass
    with pytest.raises(EngineError, match=r"this engine is closed\. Open it again with open_engine"):
        running.run(feeds(exported("text")))


@pytest.mark.parametrize("engine", RUNNABLE)
@pytest.mark.parametrize("device", ["tpu", "cpu:1", "cuda:x", "cuda:-1", ""])
def test_an_unknown_device_is_told(engine: str, device: str) -> None:
    with pytest.raises(ConfigError, match=rf"device must be cpu, cuda or cuda:<n>, got '{device}'"):
        opened("text", engine, device=device)


def test_an_unknown_engine_is_told() -> None:
    with pytest.raises(ConfigError, match="engine must be one of ort, torch, trt, rtx; got 'tf'"):
        opened("text", "tf")


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_threads_are_counted_from_one_and_bounded(threads: int) -> None:
    with pytest.raises(ConfigError, match=rf"--threads must lie in 1\.\.1024, got {threads}"):
        open_engine(exported("text"), threads=threads)


def test_threads_of_torch_are_given_back() -> None:
    import torch

    before = torch.get_num_threads()
    with open_engine(exported("text"), "torch", threads=before + 1) as running:
        running.run(feeds(exported("text")))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("graph", ["latents", "decoder"])
def test_a_graph_that_is_not_there_is_told(graph: str) -> None:
    with pytest.raises(ConfigError, match=rf"has no '{graph}' graph; it was exported without a VAE\. Pass --vae to difffeat export"):
        open_engine(exported("image"), graph=graph)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer"), RuntimeError("CUDA out of memory"), MemoryError()],
)
def test_running_out_of_memory_is_resumable(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Full:
        def run(self, *_: object) -> None:
            raise error

    with opened("text") as running:
        monkeypatch.setattr(running, "_session", Full())
        with pytest.raises(
            OutOfMemory, match=r"ONNX Runtime failed: out of memory\. Finished shards are kept; run again with a smaller --batch-size"
        ) as caught:
            running.run(feeds(exported("text")))
    assert caught.value.exit_code == 4
    assert caught.value.__cause__ is error


def test_running_out_of_memory_is_resumable_in_torch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ):

        def full(error: Exception = error, **_: object) -> None:
            raise error

        with opened("text", "torch") as running:
            monkeypatch.setattr(running, "_call", full)
            with pytest.raises(OutOfMemory, match=r"cpu is out of memory .*Finished shards are kept; use a smaller --batch-size"):
                running.run(feeds(exported("text")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 96}, r"the recipe wants .* of shape .*, the graph has \[.*Export it again"),
        ({"width": "wide"}, "its recipe describes no network"),
        ({"width": None}, "its recipe describes no network|the recipe wants"),
    ],
)
def test_a_recipe_that_does_not_fit_its_graph_is_told_by_torch(changes: dict[str, Any], message: str) -> None:
    from dataclasses import replace

    artifact = exported("from-latents-mean")
    forged = Artifact(artifact.path, replace(artifact.recipe, architecture={**artifact.recipe.architecture, **changes}))
    with pytest.raises(ForeignGraph, match=message):
        open_engine(forged, "torch")


@pytest.mark.parametrize("options", [{"channels_last": True}, {"compile": True, "channels_last": True}])
@pytest.mark.parametrize("name", ["image", "text"])
def test_torch_compiled_and_channels_last_give_the_same_features(name: str, options: dict[str, Any]) -> None:
    given = feeds(exported(name))
    with opened(name, "torch") as plain, opened(name, "torch", options=EngineOptions(**options)) as chosen:
        assert_close(chosen.run(given), plain.run(given))


def test_an_engine_that_overlaps_gives_results_in_order() -> None:
    batches = [feeds(exported("text"), seed=seed) for seed in range(5)]
    with opened("text") as running:
        assert isinstance(running, OrtEngine)
        assert running.depth == 1
        alone = [running.run(given) for given in batches]
        running.overlap()
        assert running.depth == 2
        for pending, expected in zip([running.submit(given) for given in batches], alone, strict=True):
            assert_close(pending.result(), expected, tolerance=0.0)
