"""An export is checked against the unfolded network before it gets its name, and never costs the artifact it replaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from difffeat.engines import Artifact
from difffeat.errors import ConfigError, DifffeatError, ParityError
from difffeat.workflows.exporting import ExportOptions, dit_recipe, export_dit, plaid_recipe
from tests.artifacts import OPTIONS, dit_weights, export_named, exported, plaid_weights, vae_weights
from tests.runtime.fake import tree


def options(**changes: Any) -> ExportOptions:
    return ExportOptions(**{"kind": "from-latents", "blocks": (1,), "timesteps": (30.0,), "noising": "random", **changes})


@pytest.mark.parametrize("name", OPTIONS)
def test_parity_is_measured_at_every_tap_and_written_down(name: str) -> None:
    artifact = exported(name)
    stored = json.loads((artifact.path / "parity.json").read_text())
    expected = set(artifact.recipe.taps) | ({"latents"} if artifact.latents_graph is not None else set())
    assert set(stored["taps"]) == expected
    assert stored["passed"] is True
    assert stored["reference"] == "unfolded fp32 torch module"
    for tap in stored["taps"].values():
        assert 0 < tap["relative_l2"] <= stored["tolerance"] == 1e-5
        assert tap["nonfinite"] == 0


@pytest.fixture
def wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block's first gate is left out."""
    from difffeat.export import fold

    real = fold.dit_modulation

    def wrong(*arguments: Any, **named: Any) -> torch.Tensor:
        modulation = real(*arguments, **named).clone()
        modulation[1, 2] = 1.0
        return modulation

    monkeypatch.setattr(fold, "dit_modulation", wrong)


@pytest.mark.usefixtures("wrong_fold")
def test_a_graph_that_is_not_the_network_is_refused_and_kept_aside(tmp_path: Path) -> None:
    with pytest.raises(
        ParityError, match=r"beyond the tolerance 1e-05 against the unfolded fp32 torch module; the first is b2/t30: .* It was kept at"
    ):
        export_named("from-latents", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stored = json.loads((tmp_path / "out.failed" / "parity.json").read_text())
    assert stored["passed"] is False
    assert stored["taps"]["b0/t30"]["relative_l2"] < 1e-5 < stored["taps"]["b2/t30"]["relative_l2"]


def test_a_failed_export_leaves_the_old_artifact_alone(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    export_named("from-latents", tmp_path / "out")
    before = tree(tmp_path / "out")
    request.getfixturevalue("wrong_fold")
    with pytest.raises(ParityError):
        export_named("from-latents", tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == before


def test_an_export_that_is_cut_short_leaves_no_artifact_and_the_next_one_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from difffeat.export import graph

    with monkeypatch.context() as broken:
        broken.setattr(graph, "write_graph", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_named("text", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export_named("text", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_artifact_is_replaced_only_when_asked(tmp_path: Path) -> None:
    export_named("text", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"already holds an artifact. Pass --overwrite to replace it, or another -o."):
        export_named("text", tmp_path / "out")
    export_named("text", tmp_path / "out", overwrite=True, blocks=(1,))
    assert Artifact.open(tmp_path / "out").recipe.blocks == (1,)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is not an artifact of ours; choose another -o"):
        export_named("text", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kind": "image", "noising": "ddim"}, ConfigError, "export with --graph from-latents or sweep"),
        ({"noising": "ddim", "ddim_steps": 10**9}, ConfigError, "at most 1000 steps, timesteps or blocks, got 1000000000, 1 and 1."),
        ({"kind": "sweep", "timesteps": tuple(map(float, range(1001)))}, ConfigError, "at most 1000 steps, timesteps or blocks"),
        ({"noising": "ddim", "ddim_steps": 0}, ConfigError, "--ddim-steps must be at least 1, got 0"),
        ({"self_conditioning": True}, ConfigError, "--self-conditioning is Plaid's, with --noising mean or ddim"),
        ({"precision": "int8"}, ConfigError, "int8 is calibrated on real samples: export fp32, then run difffeat quantize"),
        ({"blocks": ()}, ConfigError, "no block was asked for. Pass --blocks"),
        ({"timesteps": (0.0, 30.0)}, ConfigError, "has one timestep baked in, got 2. For several, pass --graph sweep."),
        ({"kind": "sweep", "timesteps": (30.0, 30.0)}, ConfigError, "a sweep needs timesteps that differ"),
        ({"kind": "sweep", "noising": "constant"}, ConfigError, "a sweep graph has no noise baked in; use --noising random or mean."),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes: dict[str, Any], error: type[DifffeatError], message: str) -> None:
    with pytest.raises(error) as caught:
        options(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (1, 4)}, "blocks must lie in 0..3 (block k is the stream after k blocks, 0 the embedding), got [4]"),
        ({"label": 6}, "label must lie in 0..5 (5 is the null label), got 6"),
        ({"kind": "image"}, "this graph (image) starts at pixels and needs the autoencoder. Pass --vae PATH|HUB_ID, or --graph from-latents."),
        ({"kind": "sweep", "blocks": (0,)}, "a sweep over block 0 alone has no modulation to sweep"),
        ({"timesteps": (1000.0,)}, "999"),
        ({"timesteps": (0.5,)}, "999"),
    ],
)
def test_what_the_dit_lacks_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DifffeatError) as caught:
        dit_recipe(dit_weights(), None, options(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "text", "pooling": "grid"}, "text graphs pool with mean or max, got 'grid'"),
        ({"kind": "image"}, "image graphs are for images; Plaid has text and text-sweep (--graph sweep)."),
        ({"kind": "text", "label": 1}, "--label is a DiT's, and Plaid has no classes"),
        ({"kind": "text", "blocks": (3,)}, "blocks must lie in 0..2"),
        ({"kind": "text", "timesteps": (1.5,)}, "1.5"),
    ],
)
def test_what_plaid_lacks_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DifffeatError) as caught:
        plaid_recipe(plaid_weights(), "0" * 64, options(**{"timesteps": (0.0,), **changes}))
    assert message in str(caught.value)


def test_random_weights_are_marked_in_the_recipe() -> None:
    assert exported("image").recipe.origin == "random:1"


def test_the_recipe_names_the_digest_of_everything_that_decides_a_feature() -> None:
    assert set(exported("image").recipe.weights) == {"backbone", "vae"}
    assert exported("image").recipe.weights["vae"] == vae_weights().digest
    assert set(exported("latents").recipe.weights) == {"vae"}
    assert set(exported("text").recipe.weights) == {"backbone", "tokenizer"}


def test_what_a_family_takes_for_granted_stands_in_the_recipe_and_is_printed() -> None:
    from difffeat.workflows.assumptions import diffusion_lines

    image, alone, text = (exported(name).recipe for name in ("image", "from-latents-mean", "text"))
    assert image.diffusion["schedule"] == "linear beta 0.0001..0.02 in 1000 steps, variance preserving"
    assert (image.diffusion["prediction"], image.diffusion["null_label"]) == ("epsilon", 5)
    assert image.diffusion["latents"] == {"channels": 4, "side": 8, "factor": 2, "pixels": 16, "scaling_factor": 0.18215}
    assert "label 5 (the null label)" in diffusion_lines(image)
    assert "label 1 (a class; the null label is 5)" in diffusion_lines(alone)
    assert any("no autoencoder is given: Stable Diffusion's is assumed (64 pixels" in line for line in diffusion_lines(alone))
    assert diffusion_lines(text)[0].startswith("family Plaid: learned gamma(t) from -3 to 6")


def test_what_is_assumed_against_the_evidence_stands_in_the_recipe(tmp_path: Path) -> None:
    from dataclasses import replace

    from difffeat.workflows.assumptions import diffusion_lines

    knowing = replace(dit_weights(), assumed=("the name 'SiT' speaks of SiT",))
    recipe = dit_recipe(knowing, None, options())
    assert recipe.to_dict()["diffusion"]["assumed"] == ["the name 'SiT' speaks of SiT"]
    assert diffusion_lines(recipe)[-1] == "taken for DiT although the name 'SiT' speaks of SiT"
    assert recipe.fingerprint != dit_recipe(dit_weights(), None, options()).fingerprint


def test_recipes_of_older_exports_keep_their_digests_and_open() -> None:
    from dataclasses import replace

    from difffeat.recipe import GraphRecipe

    older = replace(exported("image").recipe, diffusion={})
    assert "diffusion" not in older.to_dict()
    assert GraphRecipe.from_json(older.to_json()) == older


@pytest.mark.parametrize("kind", ["image", "from-latents", "sweep", "latents"])
def test_latents_of_other_channels_are_refused_before_anything_is_built(kind: str) -> None:
    from dataclasses import replace

    from difffeat.errors import CheckpointMismatch

    other = replace(vae_weights(), config={**vae_weights().config, "latent_channels": 16})
    with pytest.raises(CheckpointMismatch, match="makes latents of 16 channels, as those of SD3 and FLUX, and the backbone takes 4"):
        dit_recipe(dit_weights(), other, options(kind=kind))


def test_a_network_with_embedders_of_each_block_is_folded_block_by_block(tmp_path: Path) -> None:
    from dataclasses import replace

    from difffeat.export.weights import random_dit

    config = replace(dit_weights().config, block_embedders=True, timestep_embedding="diffusers")
    for changes in ({}, {"kind": "sweep", "timesteps": (0.0, 500.0)}, {"noising": "ddim", "ddim_steps": 2}):
        report = export_dit(random_dit(config), None, options(blocks=(2, 3), **changes), tmp_path / "-".join(["each", *changes]), say=lambda _: None)
        assert report.parity.passed
    shared = random_dit(replace(config, block_embedders=False))
    assert random_dit(config).digest != shared.digest


def test_every_log_snr_stands_beside_its_timestep() -> None:
    recipe = exported("sweep").recipe
    assert list(recipe.log_snr) == sorted(recipe.log_snr, reverse=True)
    assert len(recipe.log_snr) == len(recipe.timesteps) == 3


def test_progress_is_told_step_by_step(tmp_path: Path) -> None:
    said: list[str] = []
    export_dit(dit_weights(), None, options(), tmp_path / "out", say=said.append)
    assert said == ["running the unfolded fp32 reference", "exporting model.onnx", "checking parity of the finished file"]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_noise_cannot_have_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=rf"--noise-seed must lie in 0\.\.2\^63-1, got {seed}"):
        ExportOptions(**{**OPTIONS["image-constant"], "noise_seed": seed})
