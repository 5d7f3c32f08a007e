"""`difffeat store repair`: what is damaged comes back to the bytes it had, whatever way the store was made; other samples touch nothing."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.artifacts import exported
from tests.cli.conftest import Run
from tests.runtime.fake import folder_of_images, picture, tree


def spoil(store: Path) -> None:
    """One shard with a flipped bit, another's receipt no JSON."""
    shard = store / "shards/00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (store / "receipts/00002.json").write_text("{")


def test_repair_says_what_it_would_do_then_how_to_and_the_command_restores_every_byte(run: Run, images: Path) -> None:
    run("extract", exported("image").path, images, "-o", "out", "--shard-size", "2", "--batch-size", "2", "--seed", "3")
    store, before = Path("out"), tree(Path("out"))
    assert "there is nothing to repair" in run("store", "repair", "out").out
    spoil(store)
    damaged = tree(store)
    dry = run("store", "repair", "out", "--dry-run")
    assert (dry.code, tree(store)) == (0, damaged)
    assert "would set aside, with their receipts: shards 0, 2" in dry.out
    told = run("store", "repair", "out", "--json")
    assert told.code == 4
    assert told.json["removed"] == [f"{name}/0000{n}.{end}" for n in (0, 2) for name, end in (("receipts", "json"), ("shards", "safetensors"))]
    command = shlex.split(told.json["next"])
    assert command[:6] == ["difffeat", "extract", str(exported("image").path), str(images), "-o", "out"]
    assert run(*command[1:]).code == 0
    assert tree(store) == before


def test_repair_with_artifact_and_source_restores_every_byte(run: Run, images: Path) -> None:
    run("extract", exported("image").path, images, "-o", "out", "--shard-size", "2", "--batch-size", "2", "--seed", "3")
    store, before = Path("out"), tree(Path("out"))
    spoil(store)
    result = run("store", "repair", "out", exported("image").path, images)
    assert (result.code, tree(store)) == (0, before), result.err
    assert "computed again: shards 0, 2; 1 of them have the bytes that their receipts stated before" in result.out
    assert "out: every file is what its receipt says" in result.out


def test_repair_with_another_artifact_or_source_touches_nothing(run: Run, images: Path, tmp_path: Path) -> None:
    run("extract", exported("image").path, images, "-o", "out", "--shard-size", "2")
    spoil(Path("out"))
    damaged = tree(Path("out"))
    other = run("store", "repair", "out", exported("image-constant").path, images)
    assert other.code == 1
    assert "was not made with" in other.err
    assert "noising: 'random' -> 'constant'" in other.err
    fewer = run("store", "repair", "out", exported("image").path, folder_of_images(tmp_path / "fewer", 5))
    assert fewer.code == 1
    assert "lists other samples than out was made from: 5 now, 6 then" in fewer.err
    half = run("store", "repair", "out", exported("image").path)
    assert half.code == 2
    assert "give both, the artifact and the source" in half.err
    assert tree(Path("out")) == damaged


@pytest.fixture
def grown(run: Run, images: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A store of `images`, to which `more` was added; both its first and its last shard are damaged."""
    more = tmp_path / "more"
    more.mkdir()
    for index in range(3):
        picture(50 + index).save(more / f"more{index}.png")
    artifact = exported("image").path
    assert run("extract", artifact, images, "-o", "out", "--shard-size", "2", "--batch-size", "2").code == 0
    assert run("extract", artifact, more, "-o", "out", "--shard-size", "2", "--batch-size", "2", "--append").code == 0
    shutil.copytree("out", "whole")
    spoil(Path("out"))
    shutil.copy("out/receipts/00002.json", "out/receipts/00004.json")
    return images, more


def test_a_store_that_grew_is_repaired_from_each_of_its_sources(run: Run, grown: tuple[Path, Path]) -> None:
    images, more = grown
    artifact, store = exported("image").path, Path("out")
    first = run("store", "repair", "out", artifact, images)
    assert first.code == 5
    assert "computed again: shards 0, 2;" in first.out
    assert "1 problems in out:" in first.out
    kept = tree(store)
    nothing = run("store", "repair", "out", artifact, images)
    assert nothing.code == 1
    assert f"{images} does not hold the samples that out lacks (shards: 4). Nothing was touched" in nothing.err
    assert tree(store) == kept
    assert run("store", "repair", "out", artifact, more).code == 0
    assert tree(store) == tree(Path("whole"))


def test_a_store_that_grew_remembers_every_source_and_says_which_commands_bring_it_back(run: Run, grown: tuple[Path, Path]) -> None:
    images, more = grown
    told = run("store", "repair", "out", "--json").json["next"]
    commands = [shlex.split(command) for command in told.split("; ")]
    assert [command[3] for command in commands] == [str(images), str(more)]
    assert all("--append" in command for command in commands)
    unfinished = run("store", "verify", "out")
    assert unfinished.code == 4
    assert f"{more} -o out" in unfinished.out
    partly = run(*commands[0][1:])
    assert partly.code == 4
    assert "StoreIncomplete: out lacks shard 4, and the source does not hold all of its samples; what it holds is done. Next: " in partly.err
    assert f"{more} -o out" in partly.err
    assert run(*commands[1][1:]).code == 0
    assert tree(Path("out")) == tree(Path("whole"))


def test_a_damaged_samples_table_of_a_store_that_grew_comes_back_from_the_source_of_its_part(run: Run, grown: tuple[Path, Path]) -> None:
    images, more = grown
    artifact = exported("image").path
    Path("out/samples-00001.parquet").write_bytes(b"nothing")
    refused = run("store", "repair", "out", artifact, images)
    assert refused.code == 1
    assert "does not restore the samples table of out: " in refused.err
    assert run("store", "repair", "out", artifact, more).code == 5
    assert run("store", "repair", "out", artifact, images).code == 0
    assert tree(Path("out")) == tree(Path("whole"))


def test_commands_can_be_typed_anywhere(run: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(exported("image").path, "artifact")
    shutil.copytree(images, "photos")
    run("extract", "artifact", "photos", "-o", "out", "--shard-size", "2", "--batch-size", "2")
    before, store = tree(Path("out")), Path("out").absolute()
    spoil(store)
    monkeypatch.chdir(tmp_path)
    command = shlex.split(run("store", "repair", store, "--json").json["next"])
    assert run(*command[1:]).code == 0
    assert tree(store) == before


def test_other_images_of_the_same_names_and_sizes_are_noticed(run: Run, tmp_path: Path) -> None:
    source, artifact = tmp_path / "bitmaps", exported("image").path
    source.mkdir()
    for index in range(6):
        picture(index).save(source / f"{index}.bmp")
    run("extract", artifact, source, "-o", "out", "--shard-size", "3", "--batch-size", "2")
    run("extract", artifact, source, "-o", "single", "--batch-size", "2")
    for index in range(6):
        picture(70 + index).save(source / f"{index}.bmp")
    again = run("extract", artifact, source, "-o", "out", "--shard-size", "3", "--batch-size", "2")
    assert again.code == 1
    assert "out: the image of '0' (0.bmp) is another one than its features were computed from, although name and size are the same." in again.err
    spoil_first(Path("out"))
    damaged = tree(Path("out"))
    assert run("store", "repair", "out", artifact, source).code == 1
    assert tree(Path("out")) == damaged
    spoil_first(Path("single"))
    late = run("store", "repair", "single", artifact, source)
    assert late.code == 5
    assert "6 of their rows, the first is row 0, were computed from other images than before" in late.out


def spoil_first(store: Path) -> None:
    shard = store / "shards/00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def test_appending_what_is_there_with_other_images_is_refused(run: Run, images: Path) -> None:
    artifact = exported("image").path
    for path in images.glob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    run("extract", artifact, images, "-o", "out", "--batch-size", "2")
    for index, path in enumerate(sorted(images.glob("*.bmp"))):
        picture(70 + index).save(path)
    picture(99).save(images / "new.bmp")
    before = tree(Path("out"))
    assert run("extract", artifact, images, "-o", "out", "--batch-size", "2", "--append").code == 1
    assert tree(Path("out")) == before


def test_a_repair_of_a_store_that_grew_adds_nothing(run: Run, grown: tuple[Path, Path]) -> None:
    images, more = grown
    picture(60).save(more / "another.png")
    assert run("store", "repair", "out", exported("image").path, more).code == 5
    assert run("store", "repair", "out", exported("image").path, images).code == 0
    assert tree(Path("out")) == tree(Path("whole"))


def test_a_folder_that_was_added_to_restores_each_part_of_the_samples_table(run: Run, images: Path) -> None:
    artifact = exported("image").path
    run("extract", artifact, images, "-o", "out", "--shard-size", "2", "--batch-size", "2")
    for name in ("00a", "zz"):
        picture(len(name)).save(images / f"{name}.png")
    run("extract", artifact, images, "-o", "out", "--shard-size", "2", "--batch-size", "2", "--append")
    before = tree(Path("out"))
    for parts in (["samples.parquet"], ["samples-00001.parquet"], ["samples.parquet", "samples-00001.parquet"]):
        for part in parts:
            Path("out", part).write_bytes(b"nothing")
        result = run("store", "repair", "out", artifact, images)
        assert (result.code, tree(Path("out")) == before) == ((0, True) if len(parts) == 1 else (1, False)), result.err
    assert "does not restore the samples table" in result.err


def test_a_repair_from_latents_touches_nothing_where_the_images_are_others(run: Run, images: Path) -> None:
    latents, features = exported("latents").path, exported("from-latents").path
    run("extract", latents, images, "-o", "cache", "--batch-size", "2")
    assert run("extract", features, images, "-o", "out", "--latents", "cache", "--shard-size", "2", "--batch-size", "2").code == 0
    spoil(Path("out"))
    damaged = tree(Path("out"))
    content = bytearray((images / "01.png").read_bytes())
    (images / "01.png").write_bytes(content[:-1] + b"x")
    refused = run("store", "repair", "out", features, images, "--latents", "cache")
    assert refused.code == 1
    assert "was made from another image than '01' (01.png)" in refused.err
    assert tree(Path("out")) == damaged
