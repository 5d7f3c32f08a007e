"""Numbers and indices that a file states are bounded before anything is built of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from difffeat.errors import CheckpointMismatch, ConfigError, UntrustedFile
from difffeat.export import weights as w
from difffeat.export.model_folders import STEM
from tests.export.checkpoints import CONFIG, load, saved, state

HUGE = [0, -4, "4", True, 1e3, float("nan"), 10**9, 10**30, [4], {}]


@pytest.mark.parametrize("number", ["1000000000", "3", "-1", "9" * 5000, "x", "²", ""])
def test_blocks_are_numbered_from_0_without_a_gap(tmp_path: Path, number: str) -> None:
    with pytest.raises(CheckpointMismatch, match=r"blocks\."):
        load(saved(tmp_path, {**state(), f"blocks.{number}.x": torch.zeros(1)}))
    drawn = w.random_plaid(w.PlaidConfig(name="p", depth=1, width=64, vocab=9))
    save_file({**drawn.tensors, f"model.blocks.{number}.x": torch.zeros(1)}, tmp_path / "p.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"model\.blocks\."):
        w.load_plaid(tmp_path / "p.safetensors")


def test_very_many_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="has 1500 blocks; at most 1024 are read"):
        load(saved(tmp_path, {**state(), **{f"blocks.{index}.x": torch.zeros(1) for index in range(1500)}}))


def folder(place: Path, **changes: Any) -> Path:
    w.save_dit_diffusers(w.random_dit(CONFIG), place)
    config = json.loads((place / "config.json").read_text()) | changes
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("key", ["num_attention_heads", "attention_head_dim", "sample_size", "patch_size", "num_layers", "in_channels"])
def test_numbers_of_a_config_are_whole_and_bounded(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(CheckpointMismatch, match=rf"config\.json says {key} = .*a whole number in 1\.\."):
        w.load_dit(folder(tmp_path / "w", **{key: value}))


@pytest.mark.parametrize("size", [4000, 1024 + 2])
def test_a_side_of_latents_that_no_network_has_is_refused_before_positions_are_made(tmp_path: Path, size: int) -> None:
    with pytest.raises(CheckpointMismatch, match="sample_size"):
        w.load_dit(folder(tmp_path / "w", sample_size=size))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "", "\x00", '{"a": ' + "9" * 5000 + "}"])
def test_a_config_that_is_no_object_is_a_typed_error(tmp_path: Path, text: str) -> None:
    (folder(tmp_path / "w") / "config.json").write_text(text)
    with pytest.raises(CheckpointMismatch, match=r"config\.json"):
        w.load_dit(tmp_path / "w")


@pytest.mark.parametrize("heads", [0, -4, 5, True, 10**9])
def test_heads_that_a_width_cannot_have_are_an_error_of_the_option(tmp_path: Path, heads: int) -> None:
    with pytest.raises(ConfigError, match=rf"--heads must be a whole number that divides the width 32, got {heads}"):
        w.load_dit(saved(tmp_path, state()), heads=heads)


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("depth", "heads", "patch", "width") for value in (0, -4, "4", True, 10**9)),
        {"input_size": 40_000},
        {"width": 30},
        {"patch": 5},
    ],
)
def test_a_geometry_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    from dataclasses import replace

    with pytest.raises(ConfigError):
        replace(CONFIG, **change)


def in_parts(place: Path, suffix: str = "safetensors", variant: str = "") -> Path:
    """Divide a folder's weights into two parts with an index."""
    file = place / f"{STEM}.safetensors"
    tensors = load_file(file)
    file.unlink()
    names, mapping = sorted(tensors), {}
    for number, own in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        part = f"{STEM}{variant}-0000{number}-of-00002.{suffix}"
        some = {name: tensors[name].clone() for name in own}
        torch.save(some, place / part) if suffix == "bin" else save_file(some, place / part)
        mapping |= dict.fromkeys(own, part)
    (place / f"{STEM}.{suffix}.index{variant}.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return place


@pytest.mark.parametrize(("suffix", "variant"), [("safetensors", ""), ("bin", ""), ("safetensors", ".fp16")])
def test_weights_in_parts_are_the_same_weights(tmp_path: Path, suffix: str, variant: str) -> None:
    whole = w.load_dit(folder(tmp_path / "a"), heads=4)
    assert w.load_dit(in_parts(folder(tmp_path / "b"), suffix, variant), heads=4).digest == whole.digest


@pytest.mark.parametrize("name", [f"{STEM}.fp16.safetensors", f"{STEM}.bin"])
def test_a_variant_alone_is_read(tmp_path: Path, name: str) -> None:
    place = folder(tmp_path / "w")
    tensors = load_file(place / f"{STEM}.safetensors")
    (place / f"{STEM}.safetensors").unlink()
    torch.save(tensors, place / name) if name.endswith(".bin") else save_file(tensors, place / name)
    assert w.load_dit(place, heads=4).digest == w.random_dit(CONFIG).digest


INDICES: dict[str, Callable[[dict[str, str]], Any]] = {
    "a list": lambda _: [],
    "null": lambda _: None,
    "a number": lambda _: 3,
    "a text": lambda _: "x",
    "empty": lambda _: {},
    "numbers inside": lambda mapping: {**mapping, "x": 3},
    "nested": lambda mapping: {"a": mapping},
    "outside": lambda mapping: {**mapping, "x": "../secret.safetensors"},
    "outside by a backslash": lambda mapping: {**mapping, "x": "..\\secret.safetensors"},
    "absolute": lambda mapping: {**mapping, "x": "/etc/passwd"},
    "dots": lambda mapping: {**mapping, "x": ".."},
    "no name": lambda mapping: {**mapping, "x": ""},
    "a missing part": lambda mapping: {**mapping, "x": "gone.safetensors"},
    "swapped": lambda mapping: dict(zip(mapping, reversed(list(mapping.values())), strict=True)),
    "one too few": lambda mapping: dict(list(mapping.items())[1:]),
    "very many parts": lambda mapping: {**mapping, **{str(number): f"{number}.safetensors" for number in range(5000)}},
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_of_any_other_shape_is_a_typed_error(tmp_path: Path, name: str) -> None:
    place = in_parts(folder(tmp_path / "w"))
    index = place / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": INDICES[name](json.loads(index.read_text())["weight_map"])}))
    with pytest.raises(CheckpointMismatch, match=STEM):
        w.load_dit(place)


def test_one_digest_pins_weights_in_parts(tmp_path: Path) -> None:
    place = in_parts(folder(tmp_path / "w"))
    printed = "".join(f"{hashlib.sha256(part.read_bytes()).hexdigest()}  {part.name}\n" for part in sorted(place.glob("*.safetensors")))
    digest = hashlib.sha256(printed.encode()).hexdigest()
    assert w.load_dit(place, heads=4, sha256=digest.upper()).config.depth == 2
    with pytest.raises(UntrustedFile, match=rf"in 2 files of the common digest {digest}, but 00 was pinned.*sha256sum {STEM}"):
        w.load_dit(place, heads=4, sha256="00")


def test_one_digest_pins_all_files_of_a_plaid(tmp_path: Path) -> None:
    w.save_plaid(w.random_plaid(w.PlaidConfig(name="p", depth=1, width=64, vocab=9)), tmp_path / "p")
    files = sorted((tmp_path / "p").iterdir())
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    common = hashlib.sha256("".join(f"{value}  {name}\n" for name, value in digests.items()).encode()).hexdigest()
    assert w.load_plaid(tmp_path / "p", sha256=common).config.depth == 1
    with pytest.raises(UntrustedFile, match=r"in 4 files of the common digest"):
        w.load_plaid(tmp_path / "p", sha256=digests["model.pt"])


@pytest.mark.parametrize("name", ["blocks.0.\x1b[31mevil\x07", "x" * 1_000_000, "a\nb"])
def test_names_out_of_a_file_reach_no_terminal_as_they_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointMismatch) as caught:
        load(saved(tmp_path, {**state(), name: torch.zeros(1)}))
    assert "surplus" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "\x07" not in str(caught.value)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(
    ("content", "words"),
    [("version https://git-lfs.github.com/spec/v1\n", "config.json is a Git LFS pointer"), ("<!doctype html>", "is an HTML page")],
)
def test_a_config_that_is_something_else_is_named(tmp_path: Path, content: str, words: str) -> None:
    (folder(tmp_path / "w") / "config.json").write_text(content)
    with pytest.raises(CheckpointMismatch, match=words):
        w.load_dit(tmp_path / "w")
