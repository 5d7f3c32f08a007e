"""The benchmarks run, compare like with like, and their figures follow from the seconds they keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from difffeat.benchmarks import asking, throughput
from difffeat.benchmarks.baselines import CHANNELS_LAST, COMPILED, HOOK, NAIVE, TRUNCATED, eager_candidates, naive_candidate
from difffeat.benchmarks.ceiling import int8_rate, matrix_rate
from difffeat.benchmarks.extraction import run_extraction
from difffeat.benchmarks.grid import run_grid
from difffeat.benchmarks.precision import run_precision
from difffeat.benchmarks.storing import run_storing
from difffeat.benchmarks.text import run_text
from difffeat.benchmarks.throughput import INT8, ORT, TORCH, TORCH_COMPILED, random_feeds, run_throughput
from difffeat.benchmarks.timing import Timing
from difffeat.engines import Artifact, open_engine
from difffeat.engines.driver import Driver
from difffeat.engines.parity import compare as parity
from difffeat.errors import ConfigError, EngineError, ProviderMissing
from difffeat.workflows.loading import Backbone
from tests.artifacts import dit_weights, export_named, plaid_weights, vae_weights


def quiet(*_: object, **__: object) -> None:
    """Says nothing."""


@pytest.mark.parametrize(
    ("model", "start"),
    [
        pytest.param("dit-digits", "pixels", marks=pytest.mark.slow),
        ("dit-digits", "latents"),
        pytest.param("plaid-digits", "pixels", marks=pytest.mark.slow),
    ],
)
def test_throughput_compares_side_by_side_at_equal_threads(model: str, start: str, tmp_path: Path) -> None:
    said: list[str] = []
    file = tmp_path / "results" / "throughput.json"
    result = run_throughput(
        model, None, vae=None, block=1, start=start, batch_size=2, repeats=2, threads=1, engines=("torch", "int8", "naive"), output=file,
        say=lambda text, **_: said.append(text),
    )  # fmt: skip
    wanted = {HOOK, TRUNCATED, TORCH, ORT, INT8} | ({NAIVE} if model == "dit-digits" else set())
    assert set(result["seconds"]) == wanted | ({CHANNELS_LAST} if model == "dit-digits" and start == "pixels" else set())
    assert all(len(seconds) == 2 for seconds in result["seconds"].values())
    for name, faster in result["ours_is_faster_by"].items():
        assert faster == pytest.approx(np.median(np.array(result["seconds"][name]) / np.array(result["seconds"][ORT])))
    for name, share in result["share_of_matrix_rate"].items():
        assert share == pytest.approx(result["flops_per_sample"] * 2 / np.median(result["seconds"][name]) / result["matrix_rate"])
    assert (result["threads"], result["batch_size"], result["blocks"]) == (1, 2, [1])
    assert json.loads(file.read_text())["seconds"] == result["seconds"]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert any("1 threads" in line for line in said)


def test_the_matrix_rates_are_those_of_products() -> None:
    assert 1e8 < matrix_rate(1) < 1e14
    assert 1e8 < int8_rate(1, size=256) < 1e14


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param("image", marks=pytest.mark.slow), "text"])
def test_the_eager_candidates_compute_the_same_features_as_ours(name: str, compiled: bool, tmp_path: Path) -> None:
    if name == "image":
        backbone = Backbone("dit", dit_weights(), vae_weights())
        artifact = export_named(name, tmp_path / "one", blocks=(2,)).artifact
    else:
        backbone = Backbone("plaid", plaid_weights(), tokenizer=b"")
        artifact = export_named(name, tmp_path / "one", blocks=(2,), timesteps=(0.0,)).artifact
    feeds = random_feeds(artifact, 3)
    if "lengths" in feeds:
        feeds["tokens"], feeds["lengths"] = feeds["tokens"][:, :20], np.full(3, 20)
    with open_engine(artifact, "ort", threads=1) as engine:
        ours = engine.run(feeds)["b2"]
    candidates = eager_candidates(backbone, artifact, feeds, compiled=compiled) | naive_candidate(backbone, artifact, feeds, tmp_path, 1)
    assert {HOOK, TRUNCATED} | ({COMPILED} if compiled else set()) <= set(candidates)
    for candidate in candidates.values():
        assert parity(np.asarray(candidate()), ours).within(1e-5)


@pytest.mark.parametrize("name", ["from-latents", "text"])
def test_the_hook_of_block_0_sees_the_embedding(name: str, tmp_path: Path) -> None:
    if name == "text":
        backbone, t = Backbone("plaid", plaid_weights(), tokenizer=b""), 0.0
    else:
        backbone, t = Backbone("dit", dit_weights(), vae_weights()), 30.0
    artifact = export_named(name, tmp_path / "one", blocks=(0,), timesteps=(t,)).artifact
    feeds = random_feeds(artifact, 3)
    with open_engine(artifact, "ort", threads=1) as engine:
        ours = engine.run(feeds)["b0"]
    for candidate in eager_candidates(backbone, artifact, feeds).values():
        assert parity(np.asarray(candidate()), ours).within(1e-5)


def asked(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "vae": None, "block": 1, "start": "latents", "batch_size": 2, "repeats": 1, "threads": 1, "output": None, "say": quiet, **changes,
    }  # fmt: skip
    return run_throughput(given.pop("model", "dit-digits"), None, **given)


@pytest.mark.parametrize(("changes", "said"), [
    ({"batch_size": 0}, r"--batch-size must be at least 1, got 0\."),
    ({"repeats": 0}, r"--repeats must be at least 1, got 0\."),
    ({"threads": -1}, r"--threads must be at least 1, got -1\."),
    ({"start": "foo"}, r"--start takes pixels, latents; got 'foo'\."),
    ({"dtype": "fp8"}, r"--dtype takes fp32, fp16, bf16; got 'fp8'\."),
    ({"engines": ("torch", "tensorrt")}, r"--engines takes int8, torch, naive, trt, rtx; got 'tensorrt'\."),
    ({"engines": ("int8",), "dtype": "bf16"}, r"int8 is made from an fp32 graph: leave int8 out of --engines, or --dtype bf16\."),
    ({"engines": ("int8",), "dtype": "fp16"}, r"int8 is made from an fp32 graph"),
    ({"device": "foo"}, r"--device must be cpu, cuda or cuda:<n>, got 'foo'\."),
    ({"device": "cuda:"}, r"--device must be cpu, cuda or cuda:<n>, got 'cuda:'\."),
])  # fmt: skip
def test_what_cannot_be_timed_is_refused_before_anything_is_loaded(changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "load_backbone", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=said):
        asked(**changes)


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(asking, "probe_driver", lambda: Driver(None, (), "there is no NVIDIA driver"))
    with pytest.raises(ProviderMissing, match=r"cuda was asked for, but there is no NVIDIA driver\. Pass --device cpu"):
        asked(device="cuda")


@pytest.mark.parametrize(("call", "said"), [
    (lambda: run_grid("plaid-digits", None, vae=None, blocks=1, batch_size=1, repeats=1, threads=1, output=None, say=quiet),
     r"bench grid is for models of images, and plaid-digits is none\. Its figures come from bench throughput or text\."),
    (lambda: run_grid("dit-digits", None, vae=None, blocks=0, batch_size=1, repeats=1, threads=1, output=None, say=quiet), r"--blocks must be"),
    (lambda: run_text("dit-digits", None, tokenizer=None, block=1, captions=9, batch_size=1, repeats=1, threads=1, int8=False, output=None,
                      say=quiet), r"bench text is for models of captions, and dit-digits is none"),
    (lambda: run_text("plaid-digits", None, tokenizer=None, block=1, captions=0, batch_size=1, repeats=1, threads=1, int8=False, output=None,
                      say=quiet), r"--captions must be at least 1, got 0"),
    (lambda: run_extraction("plaid-digits", None, vae=None, block=1, images=1, batch_size=1, repeats=1, threads=1, num_workers=1, output=None,
                            say=quiet), r"bench extract is for models of images"),
    (lambda: run_precision(train=9, test=9, precisions=("fp8",), models=("dit-digits",), output=None, say=quiet),
     r"--precisions takes fp16, bf16, int8; got 'fp8'"),
    (lambda: run_precision(train=9, test=9, models=(), output=None, say=quiet), r"--models takes dit-digits, plaid-digits; got nothing"),
    (lambda: run_storing(rows=0, width=1, shard_rows=1, repeats=1, folder=None, output=None, say=quiet), r"--rows must be at least 1, got 0"),
])  # fmt: skip
def test_the_other_benchmarks_refuse_what_is_not_for_them(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        call()


@pytest.mark.parametrize("where", [run_grid, run_text, run_extraction])
def test_an_engine_that_cannot_be_is_refused_before_anything_is_loaded(where: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{where.__module__}.load_backbone", lambda *_, **__: pytest.fail("loaded"))
    own: dict[Any, dict[str, Any]] = {
        run_grid: {"model": "dit-digits", "vae": None, "blocks": 1},
        run_text: {"model": "plaid-digits", "tokenizer": None, "block": 1, "captions": 3, "int8": False},
        run_extraction: {"model": "dit-digits", "vae": None, "block": 1, "images": 3, "num_workers": 1},
    }
    given = {"weights": None, "batch_size": 1, "repeats": 1, "threads": 1, "output": None, "say": quiet, **own[where]}
    with pytest.raises(ConfigError, match=r"--engine rtx runs on GPUs only"):
        where(**given, engine="rtx", device="cpu")
    with pytest.raises(ConfigError, match=r"--dtype takes fp32, fp16, bf16; got 'int8'"):
        where(**given, dtype="int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProviderMissing, match=r"cuda:3 was asked for, but"):
        where(**given, engine="torch", device="cuda:3")


def test_names_may_have_blanks_around_their_commas() -> None:
    assert asking.names("torch, trt ,,rtx ") == ("torch", "trt", "rtx")


@pytest.fixture(scope="module")
def one_tap(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A graph from latents with one tap, as the benchmark exports it."""
    return export_named("from-latents", tmp_path_factory.mktemp("timed") / "one", blocks=(2,), timesteps=(30.0,)).artifact


def test_every_engine_is_opened_on_the_card_that_was_asked_for(one_tap: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, str] = {}

    def refuse(_: Any, engine: str, *, device: str, **__: Any) -> Any:
        opened[engine] = device
        raise EngineError("not here")

    monkeypatch.setattr(throughput, "open_engine", refuse)
    on_gpu = dict.fromkeys(("ort", "torch", "trt", "rtx"), "cuda:1")
    for device, expected in (("cuda:1", on_gpu), ("cpu", {"ort": "cpu", "torch": "cpu", "trt": "cuda", "rtx": "cuda"})):
        how: dict[str, Any] = {"device": device, "threads": 1, "engines": ("torch", "trt", "rtx"), "compiled": False, "say": quiet}
        with ExitStack() as stack:
            throughput.ours(one_tap, random_feeds(one_tap, 2), tmp_path, stack, **how)
        assert opened == expected


@pytest.mark.parametrize(("device", "compiled", "expected"), [
    ("cpu", False, {TORCH: False}),
    ("cpu", True, {TORCH: False, TORCH_COMPILED: True}),
    ("cuda", False, {TORCH: False, TORCH_COMPILED: True}),
])  # fmt: skip
def test_ours_in_torch_is_eager_and_on_a_card_compiled_beside_it(
    device: str, compiled: bool, expected: dict[str, bool], one_tap: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself the engine compiles on a card and not on a CPU: a row must say which it is."""
    asked: list[Any] = []

    class Engine(ExitStack):
        def run(self, _: Any) -> dict[str, None]:
            return {"b2": None}

    def opened(_: Any, engine: str, *, options: Any, **__: Any) -> Any:
        asked.append((engine, options))
        return Engine()

    monkeypatch.setattr(throughput, "open_engine", opened)
    with ExitStack() as stack:
        found, _ = throughput.ours(
            one_tap, {}, tmp_path, stack, device=device, threads=1, engines=("torch",), compiled=compiled, say=quiet
        )  # fmt: skip
    assert [options.compile for engine, options in asked if engine == "torch"] == list(expected.values())
    assert [name for name in found if name in (TORCH, TORCH_COMPILED)] == list(expected)


def test_a_card_is_timed_as_a_card_and_said_in_microseconds(one_tap: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def compare(candidates: dict[str, Any], repeats: int, *, device: str) -> list[Timing]:
        asked.append(device)
        return [Timing(name, (0.002,) * repeats) for name in candidates]

    eager, opened = throughput.eager_candidates, throughput.open_engine  # what stands for the card is this CPU
    monkeypatch.setattr(throughput, "eager_candidates", lambda *given, **how: eager(*given, **{**how, "device": "cpu"}))
    monkeypatch.setattr(throughput, "open_engine", lambda *given, **how: opened(*given, **{**how, "device": "cpu"}))
    monkeypatch.setattr(throughput, "compare", compare)
    monkeypatch.setattr(throughput, "matrix_rate", lambda threads, device, precision: asked.append(device) or 1e12)
    result = throughput.time_artifact(Backbone("dit", dit_weights()), one_tap, batch_size=2, repeats=1, threads=1, device="cuda:1")
    assert asked == ["cuda:1", "cuda:1"]
    title, header, row, *_ = result["text"].splitlines()
    assert "fp32 on cuda:1: microseconds per image from latents" in title
    assert header.split()[0] == "µs/image"
    assert row.split()[-6:] == ["1000.0", "[1000.0,", "1000.0]", "1000.0", "1.00", "x"]


@pytest.fixture
def tf32() -> Iterator[list[Any]]:
    """Switched on, as torch has it for convolutions; the switches, as they are now."""
    backends: Any = torch.backends
    switches: tuple[Any, ...] = (backends.cudnn.conv, backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32"
    yield [*switches]
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


def test_the_fp32_reference_is_computed_without_tf32(tf32: list[Any], one_tap: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []

    def reference(*_: Any, **__: Any) -> Any:
        found.extend(switch.fp32_precision for switch in tf32)
        raise EngineError("enough")

    monkeypatch.setattr(throughput, "eager_candidates", reference)
    with pytest.raises(EngineError, match="enough"):
        throughput.time_artifact(Backbone("dit", dit_weights()), one_tap, batch_size=2, repeats=1, threads=1)
    assert found == ["ieee", "ieee"]
    assert [switch.fp32_precision for switch in tf32] == ["tf32", "tf32"]
