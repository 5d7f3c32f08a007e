"""Arguments that are wrong are told from one another before any work, with the command that was meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.artifacts import exported
from tests.cli.conftest import Ran, Run
from tests.runtime.fake import tree


def wrong(ran: Ran, words: str) -> None:
    assert ran.code in (1, 2), ran.out
    assert words in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("verb", ["extract", "plan", "quantize", "verify"])
def test_artifact_and_source_the_wrong_way_round(verb: str, run: Run, images: Path) -> None:
    art = exported("image").path
    wrong(run(verb, images, art), f"Type: difffeat {verb} {art} {images}\n")


def test_probing_photos_names_the_command_and_writes_nothing(run: Run, images: Path) -> None:
    before = tree(images)
    for words in (("probe",), ("store", "info"), ("store", "verify"), ("store", "repair"), ("search", images), ("fuse", images)):
        wrong(run(*words, images), f"{images} is not a feature store: it is a folder of images. Extract its features first: difffeat extract ")
    assert tree(images) == before


@pytest.mark.parametrize("model", ["weights/last.pt", "facebook/DiT-XL-2-256", "last.safetensors"])
def test_a_place_where_a_name_is_wanted(model: str, run: Run) -> None:
    wrong(run("export", "--model", model), f"Type: difffeat export --model dit --weights {model}\n")


def test_a_misspelt_network(run: Run) -> None:
    wrong(run("export", "--model", "dit-digit"), "is it dit-digits?")


def test_an_artifact_is_no_weights(run: Run) -> None:
    art = exported("image").path
    wrong(run("export", "--model", "dit", "--weights", art), f"It can be used as it is: difffeat extract {art} SOURCE")


def test_a_forgotten_images_option(run: Run, images: Path, tmp_path: Path) -> None:
    listed = sorted(path.name for path in images.glob("*.png"))
    rows = [{"id": number, "file_name": name} for number, name in enumerate(listed)]
    captions = [{"image_id": number, "caption": "a"} for number, _ in enumerate(listed)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": rows, "annotations": captions}))
    wrong(run("extract", exported("image").path, tmp_path / "captions.json", "-o", "out"), "none is there; the first is ")
    assert not Path("out").exists()
    wrong(run("extract", exported("image").path, tmp_path / "captions.json", "--images", tmp_path / "no", "-o", "out"), "correct --images.")
    assert run("extract", exported("image").path, tmp_path / "captions.json", "--images", images, "-o", "out").code == 0


def test_a_store_has_a_folder_of_its_own(run: Run, images: Path, tmp_path: Path) -> None:
    art = exported("image").path
    (tmp_path / "file").write_text("x")
    for out, words in (
        (images, "a feature store needs a folder of its own"),
        (images / "features", "lies in"),
        (art, "a feature store needs a folder of its own"),
        (art / "store", "lies within"),
        (tmp_path / "file", "a feature store needs a folder of its own"),
        (tmp_path / "file" / "store", "is a file"),
    ):
        wrong(run("extract", art, images, "-o", out), words)


def test_results_do_not_lie_in_a_store(run: Run, images: Path) -> None:
    assert run("extract", exported("image").path, images, "-o", "store").code == 0
    wrong(run("probe", "store", "-o", "store"), "store is a feature store, whose files must stay as they are")
