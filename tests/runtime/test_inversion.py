"""Deterministic inversion and self-conditioning: the path is the formula's, the denoiser is the published network, and engines agree."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from difffeat.engines import Artifact, open_engine
from difffeat.errors import ConfigError, ForeignGraph, RecipeMismatch
from difffeat.export.reference import unfolded_dit, unfolded_plaid
from difffeat.export.schedule import dit_noise_level
from difffeat.recipe import RunRecipe, ddim_path
from difffeat.runtime.extract import extract
from difffeat.runtime.inversion import Inversion, open_inversion
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store
from tests.artifacts import copy_of, dit_weights, exported, plaid_weights
from tests.runtime.fake import folder_of_images

RNG = np.random.default_rng(11)
LATENTS = RNG.standard_normal((3, 4, 8, 8), dtype=np.float32)
TOKENS, LENGTHS = RNG.integers(0, 40, (3, 6)), np.array([6, 1, 4])


def inversion(name: str, denoise: Any) -> Inversion:
    artifact = exported(name)
    return Inversion(artifact.recipe, artifact.denoiser_table(), denoise)


@pytest.mark.parametrize(
    ("family", "t", "steps", "path"),
    [
        ("dit", 30.0, 3, (0.0, 10.0, 20.0, 30.0)),
        ("dit", 2.0, 5, (0.0, 1.0, 2.0)),
        ("dit", 0.0, 5, (0.0, 0.0)),
        ("plaid", 0.5, 2, (0.0, 0.25, 0.5)),
        ("plaid", 0.0, 2, (0.0,)),
    ],
)
def test_the_path_runs_from_clean_to_the_asked_timestep(family: str, t: float, steps: int, path: tuple[float, ...]) -> None:
    assert ddim_path(family, t, steps) == pytest.approx(path)


def test_with_a_denoiser_that_always_sees_the_same_noise_the_sample_is_noised_with_it() -> None:
    epsilon = RNG.standard_normal(LATENTS.shape, dtype=np.float32)
    found = inversion("from-latents-ddim", lambda _: {"epsilon": epsilon})({"latents": LATENTS}, 60.0)["latents"]
    level = dit_noise_level(60)
    np.testing.assert_allclose(found, level.alpha * LATENTS + level.sigma * epsilon, rtol=0, atol=1e-5)


def test_with_a_denoiser_that_finds_the_clean_text_the_sample_is_its_scaled_mean() -> None:
    table = exported("text-ddim").denoiser_table()
    clean = table["embeddings"][TOKENS]
    found = inversion("text-ddim", lambda _: {"denoised": clean})({"tokens": TOKENS, "lengths": LENGTHS}, 0.3)["latents"]
    alpha = table["alpha"][table["timesteps"].tolist().index(0.3)]
    np.testing.assert_allclose(found, alpha * clean, rtol=0, atol=1e-6)


def test_the_denoiser_graph_of_a_dit_predicts_the_noise_of_the_published_network() -> None:
    artifact = exported("sweep-ddim")
    table, model = artifact.denoiser_table(), unfolded_dit(dit_weights())
    with open_engine(artifact, threads=1, graph="denoiser") as engine:
        for row, t in enumerate(table["timesteps"]):
            given = {"latents": LATENTS, "modulation": table["modulation"][row], "final_modulation": table["final_modulation"][row]}
            with torch.inference_mode():
                whole = model(torch.tensor(LATENTS), torch.full((3,), int(t)), torch.full((3,), 1)).numpy()
            np.testing.assert_allclose(engine.run(given)["epsilon"], whole[:, :4], rtol=0, atol=2e-5)


def test_the_denoiser_graph_of_plaid_expects_the_embedding_of_the_published_network() -> None:
    artifact, weights = exported("text-sweep-ddim"), plaid_weights()
    table, model = artifact.denoiser_table(), unfolded_plaid(weights)
    embeddings = torch.tensor(table["embeddings"])
    z = RNG.standard_normal((3, 6, 16), dtype=np.float32)
    mask = torch.arange(6)[None] < torch.tensor(LENGTHS)[:, None]
    with open_engine(artifact, threads=1, graph="denoiser") as engine:
        for row in range(len(table["timesteps"])):
            gamma = float(np.log(table["sigma"][row] ** 2 / table["alpha"][row] ** 2))
            per_timestep = {name: table[name][row] for name in ("input_scale", "gamma_embedding", "prior")}
            found = engine.run({"latents": z, "lengths": LENGTHS, "selfcond": np.zeros_like(z), **per_timestep})["denoised"]
            with torch.inference_mode():
                logits = model(torch.tensor(z), torch.full((3,), gamma, dtype=torch.float64), embeddings, mask)
            expected = (logits.softmax(-1) @ embeddings).numpy()
            np.testing.assert_allclose(found[mask.numpy()], expected[mask.numpy()], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["from-latents-ddim", "sweep-ddim", "text-ddim", "text-sweep-ddim"])
def test_both_engines_invert_alike(name: str) -> None:
    artifact = exported(name)
    clean = {"latents": LATENTS} if artifact.recipe.family == "dit" else {"tokens": TOKENS, "lengths": LENGTHS}
    found = []
    for engine in ("ort", "torch"):
        with ExitStack() as stack:
            invert = open_inversion(artifact, stack, engine, threads=1)
            assert invert is not None
            found.append(invert(clean, artifact.recipe.timesteps[-1]))
    for key, value in found[0].items():
        np.testing.assert_allclose(value, found[1][key], rtol=0, atol=5e-5)


def test_a_graph_without_a_denoiser_needs_no_inversion() -> None:
    with ExitStack() as stack:
        assert open_inversion(exported("sweep"), stack, "ort") is None


def store_of(name: str, source: Path, out: Path, batch_size: int) -> Store:
    artifact = exported(name)
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(artifact, threads=1))
        vae = stack.enter_context(open_engine(artifact, threads=1, graph="latents")) if artifact.latents_graph is not None else None
        invert = open_inversion(artifact, stack, "ort", threads=1)
        extract(
            engine, open_source(source), out, run=RunRecipe(store_dtype="fp32"), latents_engine=vae, table=artifact.sweep_table(),
            tokenizer=artifact.tokenizer, invert=invert, batch_size=batch_size,
        )  # fmt: skip
    return Store.open(out)


@pytest.mark.parametrize("name", ["sweep-ddim", "text-sweep-ddim", "text-conditioned"])
def test_extraction_goes_through_the_denoiser_whatever_the_batch(name: str, tmp_path: Path) -> None:
    source = folder_of_images(tmp_path / "images", 5)
    large, small = store_of(name, source, tmp_path / "large", 4), store_of(name, source, tmp_path / "small", 2)
    assert large.taps == exported(name).recipe.taps
    for tap in large.taps:
        np.testing.assert_allclose(np.asarray(large[tap]), np.asarray(small[tap]), rtol=2e-4, atol=2e-4)
        assert np.asarray(large[tap]).std(0).max() > 0


def test_an_extraction_without_the_inversion_is_refused(tmp_path: Path) -> None:
    artifact = exported("from-latents-ddim")
    source = open_source(folder_of_images(tmp_path / "images", 2))
    with open_engine(artifact, threads=1) as engine, pytest.raises(ConfigError, match="samples of this graph go through its denoiser first"):
        extract(engine, source, tmp_path / "store")


def test_an_artifact_that_lost_its_denoiser_is_refused(tmp_path: Path) -> None:
    path = copy_of("text-ddim", tmp_path)
    (path / "denoiser.onnx").unlink()
    with pytest.raises(ForeignGraph, match=r"denoiser\.onnx is missing, and samples of this graph go through it first"):
        Artifact.open(path)


def test_a_table_of_another_export_is_refused() -> None:
    with pytest.raises(RecipeMismatch, match=r"the denoiser's table has no timestep 0\.7"):
        inversion("text-conditioned", lambda _: {})({"tokens": TOKENS, "lengths": LENGTHS}, 0.7)
