"""The torch engine's way on a GPU, on a card that is not there: order of copies and work, shapes that are compiled once, graphs, memory errors."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from difffeat.engines import EngineOptions, open_engine, torch_engine
from difffeat.engines.driver import Driver
from difffeat.engines.parity import compare
from difffeat.engines.torch_cuda import GRAPH_BATCH, PlainAttention, choose_attention, suit_gpu
from difffeat.errors import ConfigError, EngineError, OutOfMemory, ProviderMissing
from tests.artifacts import exported, feeds
from tests.engines.fake_card import GPU, FakeCard, install

KINDS = ["image", "from-latents", "from-latents-mean", "sweep", "text", "text-sweep", "text-random"]
PLAIN = EngineOptions(compile=False, cuda_graphs=False)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[FakeCard]:
    return install(monkeypatch)


def graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_every_graph_gives_what_it_gives_on_the_cpu(name: str, precision: str, cards: list[FakeCard]) -> None:
    artifact = exported(name, precision)
    given = feeds(artifact)
    with open_engine(artifact, "torch") as engine:
        expected = engine.run(given)
    with open_engine(artifact, "torch", device="cuda", options=PLAIN) as engine:
        assert engine.device == "cuda:0"
        for tap, value in engine.run(given).items():
            assert compare(value, expected[tap]).relative_l2 < {"fp32": 1e-5, "fp16": 3e-3, "bf16": 2e-2}[precision]


def test_batches_under_way_keep_apart_whatever_the_order_in_which_they_are_asked_for(cards: list[FakeCard]) -> None:
    artifact = exported("from-latents")
    batches = [feeds(artifact, batch=1 + seed % 3, seed=seed) for seed in range(7)]
    with open_engine(artifact, "torch") as engine:
        expected = [engine.run(batch) for batch in batches]
    with open_engine(artifact, "torch", device="cuda", options=PLAIN) as engine:
        assert engine.depth == 2
        pending = [engine.submit(batch) for batch in batches]
        for index in (6, 0, 3, 5, 1, 2, 4):
            same(pending[index].result(), expected[index], 1e-5)


def test_a_slot_is_written_again_only_when_its_copies_are_done(cards: list[FakeCard]) -> None:
    artifact = exported("from-latents")
    given = feeds(artifact)
    with open_engine(artifact, "torch", device="cuda", options=PLAIN) as engine:
        for _ in range(3):
            engine.submit(given)
        assert cards[0].log == [
            "upload 0", "order 0", "download 1",
            "upload 2", "order 2", "download 3",
            "wait 1", "wait 0", "upload 4", "order 4", "download 5",
        ]  # fmt: skip


def test_many_threads_get_each_their_own_features(cards: list[FakeCard], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks may wake late: until its features are copied, the buffer that holds them is not filled again."""
    artifact, wait_as_usual = exported("from-latents"), FakeCard.wait

    def late(self: FakeCard, event: int) -> None:
        wait_as_usual(self, event)
        if not threading.current_thread().name.startswith("cuda"):
            time.sleep(0.005)

    monkeypatch.setattr(FakeCard, "wait", late)
    batches = [feeds(artifact, batch=2, seed=seed) for seed in range(24)]
    with open_engine(artifact, "torch") as engine:
        expected = [engine.run(batch) for batch in batches]
    with open_engine(artifact, "torch", device="cuda", options=PLAIN) as engine, ThreadPoolExecutor(6) as pool:
        for found, wanted in zip(pool.map(engine.run, batches), expected, strict=True):
            same(found, wanted, 1e-5)


def test_results_belong_to_the_caller(cards: list[FakeCard]) -> None:
    artifact = exported("from-latents")
    with open_engine(artifact, "torch", device="cuda", options=PLAIN) as engine:
        first = engine.run(feeds(artifact, seed=1))
        kept = {name: value.copy() for name, value in first.items()}
        for seed in range(2, 5):
            engine.run(feeds(artifact, seed=seed))
        same(first, kept)


def test_a_shape_is_compiled_once_and_said_so(cards: list[FakeCard]) -> None:
    artifact, said = exported("from-latents"), list[str]()
    with open_engine(artifact, "torch", device="cuda", options=EngineOptions(cuda_graphs=False), say=said.append) as engine:
        assert engine.static_shapes
        for batch in (9, 9, 12, 9, 12):
            engine.run(feeds(artifact, batch=batch))
    assert graphs_compiled() == 2
    assert len(said) == 2
    assert said[0].startswith("compiling for latents [9, 4, 8, 8], noise [9, 4, 8, 8], on the first batch")


def test_of_captions_one_block_is_compiled_for_each_length_however_many_there_are(cards: list[FakeCard]) -> None:
    """Dynamo gives up after eight shapes if it is not told, and computes the others uncompiled without a word."""
    artifact = exported("text")
    lengths = range(2, 24)
    with open_engine(artifact, "torch", device="cuda", options=EngineOptions(cuda_graphs=False)) as engine:
        for length in (*lengths, *lengths):
            engine.run(feeds(artifact, batch=2, length=length))
    assert graphs_compiled() == len(lengths)


def test_a_trial_compiles_and_captures_nothing(cards: list[FakeCard]) -> None:
    artifact, said = exported("image"), list[str]()
    with open_engine(artifact, "torch") as engine:
        expected = engine.run(feeds(artifact, batch=4))
    with open_engine(artifact, "torch", device="cuda", say=said.append) as engine:
        with engine.trial():
            for batch in (1, 2, 4):
                found = engine.run(feeds(artifact, batch=batch))
        same(found, expected, 1e-5)
        assert (graphs_compiled(), cards[0].captures, said) == (0, 0, [])
        engine.run(feeds(artifact, batch=4))
        assert (graphs_compiled(), cards[0].captures, len(said)) == (1, 1, 1)


def test_auto_finds_a_batch_size_uncompiled_and_compiles_that_size_alone(cards: list[FakeCard], tmp_path: Any) -> None:
    from difffeat.runtime.extract import extract
    from difffeat.runtime.sources import open_source
    from tests.runtime.fake import folder_of_images

    source = open_source(folder_of_images(tmp_path / "images", 20))
    with open_engine(exported("image"), "torch", device="cuda") as engine:
        summary = extract(engine, source, tmp_path / "store", batch_size=None, largest_batch=16)
    assert summary.samples == 20
    assert graphs_compiled() == 1


@pytest.mark.parametrize(("chosen", "batch", "captured"), [(None, GRAPH_BATCH, 1), (None, GRAPH_BATCH + 1, 0), (True, 12, 1), (False, 2, 0)])
def test_small_batches_are_replayed_from_a_graph(chosen: bool | None, batch: int, captured: int, cards: list[FakeCard]) -> None:
    artifact = exported("sweep")
    batches = [feeds(artifact, batch=batch, seed=seed, index=seed) for seed in range(3)]
    with open_engine(artifact, "torch") as engine:
        expected = [engine.run(given) for given in batches]
    with open_engine(artifact, "torch", device="cuda", options=EngineOptions(compile=False, cuda_graphs=chosen)) as engine:
        pending = [engine.submit(given) for given in batches]
        for mine, theirs in zip(pending, expected, strict=True):
            same(mine.result(), theirs, 1e-5)
    assert (cards[0].captures, cards[0].replays) == (captured, 3 * captured)


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    MemoryError(),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=str)
def test_memory_that_ran_out_is_told_as_such_and_given_back(error: Exception, cards: list[FakeCard]) -> None:
    artifact = exported("from-latents")
    given = feeds(artifact)
    with open_engine(artifact, "torch") as engine:
        expected = engine.run(given)
    with open_engine(artifact, "torch", device="cuda", options=PLAIN) as engine:
        first = engine.submit(given)
        cards[0].fail = error
        with pytest.raises(OutOfMemory, match=r"cuda:0 is out of memory \(.*\)\. Finished shards are kept; use a smaller --batch-size\."):
            engine.run(given)
        assert cards[0].log[-1] == "release"
        cards[0].fail = None
        same(first.result(), expected, 1e-5)
        same(engine.run(given), expected, 1e-5)


def test_after_a_batch_that_is_too_large_a_smaller_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = exported("from-latents")
    install(monkeypatch, memory=200_000)
    with open_engine(artifact, "torch", device="cuda", options=PLAIN) as engine:
        with pytest.raises(OutOfMemory):
            engine.run(feeds(artifact, batch=500))
        assert engine.run(feeds(artifact, batch=4))["b2"].shape == (4, 64)


def test_a_card_that_the_network_does_not_fit_is_out_of_memory(cards: list[FakeCard], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 26.00 MiB")

    artifact = exported("text")
    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(OutOfMemory, match=r"cuda:0 is out of memory \(CUDA out of memory"):
        open_engine(artifact, "torch", device="cuda")


def test_another_failure_of_the_device_is_an_engine_error(cards: list[FakeCard]) -> None:
    artifact = exported("from-latents")
    with open_engine(artifact, "torch", device="cuda", options=PLAIN) as engine:
        cards[0].fail = RuntimeError("CUDA error: an illegal memory access was encountered")
        with pytest.raises(EngineError, match="torch failed: CUDA error: an illegal memory access") as caught:
            engine.run(feeds(artifact))
        assert not isinstance(caught.value, OutOfMemory)


def test_a_compiler_that_fails_names_the_way_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise FileNotFoundError("gcc")

    install(monkeypatch, compiler=broken)
    artifact = exported("from-latents")
    with (
        open_engine(artifact, "torch", device="cuda") as engine,
        pytest.raises(EngineError, match=r"torch\.compile failed: (?s:.*)gcc(?s:.*)Pass --no-compile; on a GPU it needs triton and a C compiler\."),
    ):
        engine.run(feeds(artifact))


def test_what_shows_in_the_last_bits_is_part_of_the_identity(cards: list[FakeCard]) -> None:
    artifact = exported("from-latents", "fp16")
    plain = {"gpu": "Fake 9000, compute capability 9.0", "cuda": "13.0", "cudnn": "91900", "attention": "MATH"}
    for options, changes in (
        (EngineOptions(), {"compile": "true"}),
        (EngineOptions(compile=True), {"compile": "true"}),
        (EngineOptions(compile=False), {"compile": "false"}),
        (EngineOptions(tf32=True), {"compile": "true", "tf32": "true"}),
        (EngineOptions(cuda_graphs=False), {"compile": "true", "cuda_graphs": "false"}),
        (EngineOptions(channels_last=True), {"compile": "true", "channels_last": "true"}),
    ):
        with open_engine(artifact, "torch", device="cuda:1", options=options) as engine:
            assert engine.identity == plain | changes
        assert cards[-1].number == 1


@pytest.mark.parametrize(("options", "name"), [(EngineOptions(tf32=True), "tf32"), (EngineOptions(cuda_graphs=True), "cuda-graphs")])
def test_options_of_a_gpu_are_refused_on_a_cpu(options: EngineOptions, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{name} is for a GPU, and this engine runs on the CPU\. Pass --device cuda, or leave it out\."):
        open_engine(exported("text"), "torch", options=options)


def test_a_gpu_that_torch_does_not_see_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, cuda = exported("text"), torch.version.cuda
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for driver, version, said in (
        (Driver(None, (), "there is no NVIDIA driver"), cuda, r"cuda:1 was asked for, but there is no NVIDIA driver\. Run difffeat doctor"),
        (Driver((13, 0), (GPU,), None), None, r"torch 2\.\S+ is built without CUDA \(PyPI's wheels for Linux are built with it\)"),
        (Driver((13, 0), (GPU,), None), "13.0", r"torch 2\.\S+, built for CUDA 13\.0, sees \d GPUs"),
    ):
        monkeypatch.setattr(torch_engine, "probe_driver", lambda driver=driver: driver)
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(ProviderMissing, match=said):
            open_engine(artifact, "torch", device="cuda:1")


@pytest.mark.parametrize("device", ["cuda:", "cuda:²", "cuda:x", "CUDA", "cpu:0", "gpu", "", "cuda:-1", "cuda: 1"])
@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_what_names_no_device_is_refused(engine: str, device: str) -> None:
    with pytest.raises(ConfigError, match=r"--device must be cpu, cuda or cuda:<n>, got "):
        open_engine(exported("text"), engine, device=device)


def test_on_a_cpu_nothing_is_compiled_unless_it_is_asked_for() -> None:
    with open_engine(exported("text"), "torch") as engine:
        assert (dict(engine.identity), engine.depth, engine.static_shapes) == ({}, 1, False)
    with open_engine(exported("text"), "torch", options=EngineOptions(compile=False)) as engine:
        assert not engine.identity


@pytest.mark.parametrize(("given", "said"), [({"compile": "yes"}, "compile must be True or False"), ({"batch": 0}, "batch must be a whole number")])
def test_options_are_checked_when_they_are_made(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineOptions(**given)


def test_a_closed_engine_says_so(cards: list[FakeCard]) -> None:
    artifact = exported("from-latents")
    with open_engine(artifact, "torch", device="cuda", options=PLAIN) as engine:
        engine.submit(feeds(artifact))
    assert not cards[0].waiting
    for call in (engine.run, engine.submit):
        with pytest.raises(EngineError, match="this engine is closed"):
            call(feeds(artifact))


def test_the_extractor_pads_where_each_shape_is_compiled(cards: list[FakeCard], tmp_path: Any) -> None:
    from difffeat import Extractor
    from tests.runtime.fake import folder_of_images

    pictures = sorted(folder_of_images(tmp_path / "images", 5).glob("*.png"))
    with Extractor.from_artifact(exported("image").path, "torch", batch_size=4) as extractor:
        expected = extractor(pictures)
    with Extractor.from_artifact(exported("image").path, "torch", device="cuda", batch_size=4) as extractor:
        same(extractor(pictures), expected, 1e-5)
        extractor(pictures[:2])
    assert graphs_compiled() == 1


@pytest.mark.parametrize("name", ["from-latents", "text"])
def test_bias_and_gelu_go_along_with_the_product(name: str, cards: list[FakeCard]) -> None:
    """The CPU's own kernel for both takes the exact GELU instead of the tanh form."""
    artifact = exported(name, "fp16")
    given = feeds(artifact)
    with open_engine(artifact, "torch") as engine:
        expected = engine.run(given)
    with open_engine(artifact, "torch", device="cuda", options=PLAIN) as engine:
        for tap, value in engine.run(given).items():
            assert np.linalg.norm(value - expected[tap]) < 3e-3 * np.linalg.norm(expected[tap])


def test_they_go_along_in_compiled_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 takes each compilation for an export, so `torch.compiler.is_exporting` cannot tell them apart."""
    called: list[str] = []

    def recording(module: Any, _: Any) -> Any:
        called.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    install(monkeypatch, compiler=recording)
    artifact = exported("from-latents", "fp16")
    with open_engine(artifact, "torch", device="cuda", options=EngineOptions(cuda_graphs=False)) as engine:
        engine.run(feeds(artifact))
    blocks = max(artifact.recipe.blocks)
    counted = {word: sum(word in target for target in called) for word in ("_addmm_activation", "addmm", "gelu", "matmul")}
    assert counted == {"_addmm_activation": blocks, "addmm": 4 * blocks, "gelu": 0, "matmul": 0}


def asked_torch(**supported: bool) -> Any:
    """torch whose card supports these backends."""
    backends = SimpleNamespace(
        SDPAParams=lambda *given: given,
        can_use_cudnn_attention=lambda asked: supported["cudnn"] and asked[0].shape[-1] % 8 == 0,
        can_use_flash_attention=lambda asked: supported["flash"],
    )
    return SimpleNamespace(
        float32=torch.float32, empty=lambda *shape, dtype, device: torch.empty(*shape, dtype=dtype), backends=SimpleNamespace(cuda=backends)
    )


@pytest.mark.parametrize(
    ("tokens", "dtype", "supported", "expected"),
    [
        ((16, 256, 72), torch.float16, {"cudnn": True, "flash": True}, "CUDNN_ATTENTION"),
        ((16, 256, 71), torch.float16, {"cudnn": True, "flash": True}, "FLASH_ATTENTION"),
        ((16, 256, 72), torch.bfloat16, {"cudnn": False, "flash": False}, "EFFICIENT_ATTENTION"),
        ((16, 256, 72), torch.float32, {"cudnn": True, "flash": True}, "EFFICIENT_ATTENTION"),
        (None, torch.float16, {"cudnn": True, "flash": True}, "EFFICIENT_ATTENTION"),
    ],
)
def test_attention_is_chosen_by_what_the_card_supports(tokens: Any, dtype: Any, supported: dict[str, bool], expected: str) -> None:
    assert choose_attention(asked_torch(**supported), torch.device("cuda", 0), tokens, dtype) == expected


def test_the_autoencoders_attention_by_plain_products_is_the_same_and_stays_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """fullgraph refuses a break; Inductor must not make the two products into the attention that they stand for (see `PlainAttention`)."""
    from difffeat.export.assemble import build_module

    module: Any = build_module(exported("latents", "fp16").recipe)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(0.0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1, generator=generator)
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        (expected,) = module(pixels)
        suit_gpu(torch, module)
        processors = [layer.processor for layer in module.modules() if hasattr(layer, "set_processor")]
        assert processors
        assert all(isinstance(processor, PlainAttention) for processor in processors)
        (found,) = torch.compile(module, fullgraph=True, dynamic=False, backend="eager")(pixels)
    assert float((found - expected).norm() / expected.norm()) < 2e-3


def test_only_fp16_attends_by_plain_products() -> None:
    from difffeat.export.assemble import build_module

    for precision in ("fp32", "bf16"):
        module = build_module(exported("latents", precision).recipe)
        suit_gpu(torch, module)
        assert not [layer for layer in module.modules() if isinstance(getattr(layer, "processor", None), PlainAttention)]
