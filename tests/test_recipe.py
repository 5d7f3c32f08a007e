"""The fingerprint says whether two features may be compared: it never moves by itself, and every field moves it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difffeat.errors import ConfigError, DifffeatError, ForeignGraph
from difffeat.recipe import FORMAT, GraphRecipe, Recipe, RunRecipe, canonical_json, digest, format_timestep, parse_tap, tap_name

GRAPH = GraphRecipe(
    backbone="dit-xl-2-256",
    family="dit",
    architecture={"depth": 28, "width": 1152, "vae": {"block_out_channels": [128, 256], "act_fn": "silu"}, "shift_factor": None},
    weights={"backbone": "ab" * 32, "vae": "cd" * 32},
    kind="image",
    blocks=(4, 12),
    timesteps=(30.0,),
    log_snr=(4.375,),
    noising="random",
    label=1000,
)
RUN = RunRecipe(seed=3, pixels="strict")

OTHER_GRAPH: dict[str, Any] = {
    "backbone": "dit-b-4-256",
    "family": "plaid",
    "architecture": {"depth": 12},
    "weights": {"backbone": "ff" * 32},
    "kind": "from-latents",
    "blocks": (4,),
    "timesteps": (31.0,),
    "log_snr": (4.0,),
    "noising": "mean",
    "pooling": "max",
    "origin": "random:0",
    "noise_seed": 0,
    "label": 7,
    "precision": "fp16",
    "calibration": "ee" * 32,
    "options": {"x": 1},
    "diffusion": {"prediction": "epsilon"},
}
OTHER_RUN: dict[str, Any] = {
    "seed": 4,
    "draws": 2,
    "preprocessing": "squash",
    "captions": "first",
    "truncate": True,
    "store_dtype": "fp32",
    "pixels": "shown",
}


def test_canonical_json_is_sorted_dense_and_ascii() -> None:
    assert canonical_json({"b": [1, 0.1, None], "a": "ä"}) == '{"a":"\\u00e4","b":[1,0.1,null]}'


@given(st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()))
def test_canonical_json_does_not_depend_on_the_order_of_keys_and_keeps_every_value(value: dict[str, Any]) -> None:
    text = canonical_json(value)
    assert text == canonical_json(dict(reversed(value.items())))
    assert json.loads(text) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {(1, 2): 3}, b"bytes"])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="this cannot be part of a recipe: "):
        canonical_json(value)


def test_fingerprints_hold_from_release_to_release() -> None:
    """Every store in the world carries one: these may change only together with the recipe's format. The first three are older than `pixels`."""
    assert GRAPH.fingerprint == "9d979b82a34e9ad75f1bc0ce70659d2e42077ca9a35337ee03e0a601af7c3a89"
    assert digest(RUN.to_dict()) == "ac304878305a185c1ded050bcfd61064d066369dd08ff3b36f2455ca61d0714f"
    assert Recipe(GRAPH, RUN).fingerprint == "9f71b1b32cdcaf42fa5e6e499662d4e11b1ae2dbfac6bf879601f35dd1b52f89"
    assert digest(RunRecipe(seed=3).to_dict()) == "230c702a9ad457c5fe79f7bb0f686438985ce2267f23874ae3231eaaf7daca26"


@pytest.mark.parametrize("name", [f.name for f in fields(GraphRecipe)])
def test_every_field_of_the_graph_recipe_changes_the_fingerprint(name: str) -> None:
    changed = replace(GRAPH, **{name: OTHER_GRAPH[name]})
    assert changed.fingerprint != GRAPH.fingerprint
    assert Recipe(changed, RUN).fingerprint != Recipe(GRAPH, RUN).fingerprint


@pytest.mark.parametrize("name", [f.name for f in fields(RunRecipe)])
def test_every_field_of_the_run_recipe_changes_the_fingerprint(name: str) -> None:
    assert Recipe(GRAPH, replace(RUN, **{name: OTHER_RUN[name]})).fingerprint != Recipe(GRAPH, RUN).fingerprint


def test_a_recipe_that_does_not_state_pixels_was_strict_and_text_has_none() -> None:
    assert RunRecipe.from_dict({"format": FORMAT, "seed": 3}) == RUN
    text = replace(GRAPH, kind="text")
    assert Recipe(text, RUN).fingerprint == Recipe(text, replace(RUN, pixels="shown")).fingerprint
    for pixels in ("shown", "pillow", "strict"):
        assert RunRecipe.from_dict(replace(RUN, pixels=pixels).to_dict()).pixels == pixels


def test_a_value_deep_in_the_architecture_changes_the_fingerprint() -> None:
    vae = {**GRAPH.architecture["vae"], "act_fn": "gelu"}
    assert replace(GRAPH, architecture={**GRAPH.architecture, "vae": vae}).fingerprint != GRAPH.fingerprint


def test_recipes_survive_the_way_to_json_and_back() -> None:
    again = GraphRecipe.from_json(GRAPH.to_json())
    assert again.fingerprint == GRAPH.fingerprint
    assert (again.blocks, again.timesteps, again.log_snr) == (GRAPH.blocks, GRAPH.timesteps, GRAPH.log_snr)
    assert again.to_json() == GRAPH.to_json()
    assert RunRecipe.from_dict(RUN.to_dict()) == RUN
    assert json.loads(GRAPH.to_json())["format"] == FORMAT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "denoiser"}, "kind must be one of image, latents, from-latents, sweep, text, text-sweep; got 'denoiser'"),
        ({"noising": "none"}, "noising must be one of random, constant, mean, ddim; got 'none'"),
        ({"pooling": "cls"}, "pooling must be one of mean, max, grid, tokens; got 'cls'"),
        ({"precision": "fp8"}, "precision must be one of fp32, fp16, bf16, int8; got 'fp8'"),
        ({"options": ["ddim_steps"]}, "options must be a mapping, got list"),
        ({"blocks": (12, 4)}, r"blocks must be ascending and distinct, got \[12, 4\]"),
        ({"blocks": (4, 4)}, r"blocks must be ascending and distinct, got \[4, 4\]"),
        ({"timesteps": (0.0, 30.0)}, "every timestep needs its log-SNR"),
    ],
)
def test_a_graph_recipe_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(GRAPH, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, r"seed must lie in 0\.\.2\^63-1, got -1"),
        ({"seed": 2**63}, r"seed must lie in 0\.\.2\^63-1"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"preprocessing": "pad"}, "preprocessing must be one of center, squash; got 'pad'"),
        ({"captions": "all"}, "captions must be one of joined, first; got 'all'"),
        ({"store_dtype": "fp8"}, "store_dtype must be one of fp16, fp32; got 'fp8'"),
        ({"pixels": "raw"}, "pixels must be one of shown, pillow, strict; got 'raw'"),
    ],
)
def test_a_run_recipe_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunRecipe(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the recipe is not JSON .*Export the graph again with difffeat export"),
        ("[]", "expected a recipe of format difffeat-recipe/1, found 'list'"),
        ("{}", "expected a recipe of format difffeat-recipe/1, found None"),
        ('{"format": "difffeat-recipe/2"}', "expected a recipe of format difffeat-recipe/1, found 'difffeat-recipe/2'"),
        (json.dumps({**GRAPH.to_dict(), "colour": 1, "bright": 2}), "fields this version does not know: bright, colour"),
        (json.dumps({"format": FORMAT, "backbone": "x"}), "the recipe is incomplete or ill-formed: .*missing"),
        (json.dumps({**GRAPH.to_dict(), "kind": "video"}), "incomplete or ill-formed: kind must be one of"),
        (json.dumps({**GRAPH.to_dict(), "blocks": 3}), "incomplete or ill-formed"),
        ("[" * 100_000, "the recipe is not JSON"),
        ("9" * 10_000, "the recipe is not JSON"),
    ],
)
def test_what_is_no_recipe_is_told(text: str, message: str) -> None:
    with pytest.raises(ForeignGraph, match=message):
        GraphRecipe.from_json(text)


def test_a_recipe_nested_too_deep_to_copy_is_told() -> None:
    text = json.dumps({**GRAPH.to_dict(), "options": "deep"}).replace('"deep"', "[" * 600 + "]" * 600)
    with pytest.raises(ForeignGraph, match="incomplete or ill-formed"):
        GraphRecipe.from_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.text() | JSON.map(json.dumps))
def test_reading_any_text_raises_nothing_but_our_errors(text: str) -> None:
    with pytest.raises(DifffeatError):
        GraphRecipe.from_json(text)


@given(st.sampled_from([f.name for f in fields(GraphRecipe)]), JSON, st.sampled_from([f.name for f in fields(RunRecipe)]))
def test_any_value_in_any_field_gives_a_recipe_or_one_of_our_errors(name: str, value: Any, run_name: str) -> None:
    try:
        recipe = GraphRecipe.from_json(json.dumps({**GRAPH.to_dict(), name: value}))
    except DifffeatError:
        pass
    else:
        assert GraphRecipe.from_json(recipe.to_json()).fingerprint == recipe.fingerprint
    with contextlib.suppress(DifffeatError):
        RunRecipe.from_dict({**RUN.to_dict(), run_name: value})


@pytest.mark.parametrize(("t", "text"), [(30, "30"), (30.0, "30"), (0.0, "0"), (0.05, "0.05"), (1e-07, "1e-07"), (0.1 + 0.2, "0.30000000000000004")])
def test_timesteps_in_taps_lose_nothing(t: float, text: str) -> None:
    assert format_timestep(t) == text
    assert tap_name(12, t) == f"b12/t{text}"
    assert parse_tap(f"b12/t{text}") == (12, t)


@given(st.integers(0, 10**6), st.floats(0, 1e6, allow_nan=False))
def test_every_tap_can_be_read_back(block: int, t: float) -> None:
    assert parse_tap(tap_name(block, t)) == (block, t)


@pytest.mark.parametrize("name", ["", "b12", "12/30", "b12/30", "t30/b12", "b-1/t0", "bx/t0", "b1/tx", "b1/tnan", "b1/tinf", "b1.5/t0", "b1/t0/x"])
def test_what_is_no_tap_is_told_with_an_example(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is no tap: write b<block>/t<timestep>, for example b12/t30 or b20/t0\.05"):
        parse_tap(name)


def test_taps_run_over_blocks_within_timesteps() -> None:
    sweep = replace(GRAPH, kind="sweep", timesteps=(0.0, 30.0), log_snr=(9.2, 4.375))
    assert sweep.taps == ("b4/t0", "b12/t0", "b4/t30", "b12/t30")
    assert replace(GRAPH, kind="latents", blocks=(), timesteps=(), log_snr=()).taps == ("latents",)
