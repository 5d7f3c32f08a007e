"""A store remembers where it came from, so that the command that goes on with it can be typed again."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from difffeat.errors import StoreCorrupt
from difffeat.recipe import Recipe, RunRecipe
from difffeat.runtime.manifest import MANIFEST as MANIFEST_FILE
from difffeat.runtime.origin import ORIGIN, Origin, extract_command, read_origin
from difffeat.runtime.writer import StoreWriter
from tests.runtime.fake import RECIPE, tree
from tests.runtime.test_store import COLUMNS, MANIFEST

GIVEN = Origin("artifacts/dit", "my photos/", {"images": "coco/val", "compile": True, "class-folders": False})


def begun(path: Path, origin: Origin | None) -> Path:
    with StoreWriter(path, MANIFEST, COLUMNS, origin=origin):
        return path


def test_an_origin_is_kept_beside_the_manifest_and_read_back(tmp_path: Path) -> None:
    assert read_origin(begun(tmp_path / "store", GIVEN)) == GIVEN


def test_only_what_was_chosen_is_kept_and_in_plain_types() -> None:
    given = {"images": Path("coco/val"), "class_folders": False, "split": None, "compile": True}
    made = Origin.of("artifacts/dit", "my photos/", given, defaults={"images": None, "class_folders": None, "split": None})
    here = str(Path.cwd())
    assert made == Origin(f"{here}/artifacts/dit", f"{here}/my photos/".rstrip("/"), {**GIVEN.options, "images": f"{here}/coco/val"})


def test_a_store_made_from_python_has_none(tmp_path: Path) -> None:
    store = begun(tmp_path / "store", None)
    assert read_origin(store) is None
    assert not (store / ORIGIN).exists()


@pytest.mark.parametrize(
    "given, kept",
    [
        ("s3://bucket/photos", "s3://bucket/photos"),
        ("https://ann:s3cret@host.example/photos.csv", "https://ann:PASSWORD@host.example/photos.csv"),
        ("simplecache::ftp://:s3cret@host:21/a/{0..9}.tar", "simplecache::ftp://:PASSWORD@host:21/a/{0..9}.tar"),
        ("https://host.example:8080/a@b:c@d", "https://host.example:8080/a@b:c@d"),
        ("/photos:a@b/c", "/photos:a@b/c"),
    ],
)
def test_passwords_of_urls_are_not_written_down(given: str, kept: str) -> None:
    origin = Origin.of("artifact", given, {"images": given}, {})
    assert (origin.source, origin.options["images"]) == (kept, kept)


def test_the_origin_is_in_no_digest_and_a_resume_keeps_the_first(tmp_path: Path) -> None:
    store, bare = begun(tmp_path / "store", GIVEN), begun(tmp_path / "bare", None)
    assert tree(store)[MANIFEST_FILE] == tree(bare)[MANIFEST_FILE]
    before = tree(store)
    begun(store, Origin("moved/dit", "elsewhere/"))
    assert tree(store) == before


def test_overwriting_takes_the_old_origin_away(tmp_path: Path) -> None:
    store = begun(tmp_path / "store", GIVEN)
    with StoreWriter(store, MANIFEST, COLUMNS, overwrite=True):
        assert read_origin(store) is None


def test_the_command_holds_everything_that_decides_a_byte(tmp_path: Path) -> None:
    run = RunRecipe(seed=7, draws=2, preprocessing="squash", captions="first", truncate=True, store_dtype="fp32")
    manifest = replace(MANIFEST, recipe=Recipe(RECIPE, run), engine={**MANIFEST.engine, "name": "torch", "device": "cuda"})
    words = shlex.split(extract_command(tmp_path, manifest, GIVEN))
    assert words[:6] == ["difffeat", "extract", "artifacts/dit", "my photos/", "-o", str(tmp_path)]
    expected = (
        "--engine torch --batch-size 2 --shard-size 4 --seed 7 --draws 2 --preprocess squash --captions first --store-dtype fp32 --truncate "
        "--device cuda --images coco/val --compile --no-class-folders"
    )
    assert words[6:] == expected.split()


def test_without_an_origin_the_command_has_places_to_fill_in(tmp_path: Path) -> None:
    assert extract_command(tmp_path, MANIFEST, None).startswith(f"difffeat extract ARTIFACT SOURCE -o {tmp_path} --engine fake --batch-size 2")


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"format": "other"}', '{"format": "difffeat-origin/1", "artifact": 1, "source": "s"}'])
def test_a_damaged_origin_is_a_typed_error(content: str, tmp_path: Path) -> None:
    (tmp_path / ORIGIN).write_text(content)
    with pytest.raises(StoreCorrupt, match=r"origin\.json is damaged"):
        read_origin(tmp_path)


def test_unusual_options_are_refused_as_damage(tmp_path: Path) -> None:
    (tmp_path / ORIGIN).write_text(json.dumps({"format": "difffeat-origin/1", "artifact": "a", "source": "s", "options": 3}))
    with pytest.raises(StoreCorrupt, match="It is only informational: delete it"):
        read_origin(tmp_path)


def test_a_store_made_from_python_with_a_switch_names_it_in_its_command(tmp_path: Path) -> None:
    engine = {**MANIFEST.engine, "name": "torch", "device": "cpu", "channels_last": "true", "compile": "false"}
    command = extract_command(tmp_path, replace(MANIFEST, engine=engine), None)
    assert "--channels-last" in command
    assert "--no-compile" in command
