"""Every command that takes a SOURCE takes every option of sources, and hands them on as they were given."""

from __future__ import annotations

import io
import tarfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from difffeat.cli import command
from difffeat.cli.source import OPTIONS
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.store import Store
from tests.artifacts import exported
from tests.runtime.fake import encoded

COMMANDS = {"extract": ("commands", "run_extract"), "quantize": ("quantizing", "run_quantize"), "verify": ("verifying", "run_verify")}


def run(*arguments: str) -> None:
    command().main(list(arguments), standalone_mode=False)


def test_every_field_has_its_option() -> None:
    assert list(OPTIONS) == [field.name for field in fields(SourceOptions)]


@pytest.mark.parametrize("verb", COMMANDS)
def test_options_reach_the_source_as_they_were_given(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function = COMMANDS[verb]
    seen: dict[str, Any] = {}
    monkeypatch.setattr(f"difffeat.workflows.{module}.{function}", lambda *_, **given: seen.update(given) or {"text": "", "exit_code": 0})
    run(verb, "artifact", "source")
    assert seen["source_options"] == SourceOptions()
    run(
        verb, "artifact", "source", "--images", "s3://b/x", "--coco-captions", "c.json", "--no-class-folders", "--image-column", "jpg",
        "--caption-column", "text", "--label-column", "a,b", "--id-column", "key", "--classes", "names.txt", "--multi-hot", "--dataset", "coco2014",
        "--split", "val", "--drop-unlabelled",
    )  # fmt: skip
    assert seen["source_options"] == SourceOptions(
        images="s3://b/x", coco_captions="c.json", class_folders=False, image_column="jpg", caption_column="text", label_column="a,b",
        id_column="key", classes=Path("names.txt"), multi_hot=True, dataset="coco2014", split="val", drop_unlabelled=True,
    )  # fmt: skip


def test_shards_are_extracted_by_their_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:03d}.tar", "w") as tar:
            for name, content in ((f"{number}.png", encoded(number)), (f"{number}.json", b'{"tags": ["x"]}')):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    monkeypatch.chdir(tmp_path)
    run("extract", str(exported("image").path), "{000..001}.tar", "--label-column", "tags", "--store-dtype", "fp32")
    (path,) = (tmp_path / "features").iterdir()
    store = Store.open(path)
    assert path.name.startswith("000..001-")
    assert (store.ids, store.classes, store.valid.tolist()) == (["0", "1"], ("x",), [True, True])
