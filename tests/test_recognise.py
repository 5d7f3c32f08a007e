"""What a path is, in words; and what is said where a verb is given something else than it wants."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from difffeat.recognise import not_a_source, not_a_store, not_an_artifact, quoted, recognise

RECIPE = json.dumps({"kind": "sweep", "backbone": "dit-digits"})


def touch(*names: str, content: str = "x") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            path = folder / name
            if name.endswith("/"):
                path.mkdir(parents=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return make


def store(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "s" / "shards").mkdir(parents=True)
        (folder / "s" / "manifest.json").write_text(json.dumps({"recipe": {"graph": {"kind": kind}}}))

    return make


CASES = [
    ("nothing", touch(), "s", "does not exist"),
    ("empty", touch("s/"), "s", "is an empty folder"),
    ("artifact", touch("s/model.onnx", "s/recipe.json", content=RECIPE), "s", "is an artifact (sweep graph of dit-digits)"),
    ("artifact", touch("s/model.onnx", "s/recipe.json", content="{"), "s", "is an artifact (a graph, as export writes it)"),
    ("store", store("image"), "s", "is a feature store"),
    ("latent cache", store("latents"), "s", "is a latent cache"),
    ("images", touch("s/a.JPG"), "s", "is a folder of images"),
    ("images", touch("s/cats/a.webp", "s/dogs/b.png"), "s", "is a folder of images"),
    ("tars", touch("s/000.tar"), "s", "is a folder of tar shards"),
    ("weights", touch("s/config.json", "s/diffusion_pytorch_model.safetensors"), "s", "is a folder of weights"),
    ("weights", touch("s/model_index.json"), "s", "is a pipeline's folder of weights"),
    ("results", touch("s/metrics.json"), "s", "is a folder of results"),
    ("artifacts", touch("s/one/model.onnx"), "s", "is a folder of artifacts"),
    ("stores", touch("s/one/manifest.json"), "s", "is a folder of feature stores"),
    ("quickstart", touch("s/features/", "s/artifacts/"), "s", "is a quickstart's folder"),
    ("data set", touch("s/dataset_info.json"), "s", "is a saved data set"),
    ("folder", touch("s/thesis.tex"), "s", "is a folder with thesis.tex in it"),
    ("table", touch("s.parquet"), "s.parquet", "is a table of samples"),
    ("tar", touch("s.tar"), "s.tar", "is a tar of samples"),
    ("probe", touch("p.safetensors", content="{difffeat.probe"), "p.safetensors", "is a trained probe"),
    ("checkpoint", touch("p.safetensors"), "p.safetensors", "is a file of weights"),
    ("checkpoint", touch("last.ckpt"), "last.ckpt", "is a file of weights"),
    ("plan", touch("a.plan"), "a.plan", "is a TensorRT plan"),
    ("graph", touch("s/model.onnx"), "s/model.onnx", "is a graph's file"),
    ("captions", touch("c.json", content='{"annotations": [{"caption": "a"}]}'), "c.json", "is a file of COCO captions"),
    ("coco", touch("c.json", content='{"annotations": [{"bbox": 1}]}'), "c.json", "is a file of COCO annotations"),
    ("json", touch("c.json", content="[" * 9000), "c.json", "is a JSON file"),
    ("image", touch("a.png"), "a.png", "is one image"),
    ("report", touch("report.html"), "report.html", "is a report"),
    ("file", touch("notes.docx"), "notes.docx", "is a file of type .docx that no command here reads"),
]


@pytest.mark.parametrize("kind, make, name, words", CASES)
def test_what_a_path_is(kind: str, make: Callable[[Path], None], name: str, words: str, tmp_path: Path) -> None:
    make(tmp_path)
    thing = recognise(tmp_path / name)
    assert (thing.kind, thing.words) == (kind, words)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.json")
    assert recognise(tmp_path / "p.json").kind == "special"


@pytest.mark.parametrize("make, name", [(make, name) for kind, make, name, _ in CASES if kind not in ("nothing", "empty")])
def test_no_message_proposes_to_write_where_something_lies(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    make(tmp_path)
    for said in (not_a_store(tmp_path / name), not_an_artifact(tmp_path / name)):
        assert f"-o {tmp_path}" not in said
        assert "repair" not in said


def test_a_store_is_wanted(tmp_path: Path) -> None:
    touch("my photos/a.jpg", "features/one/manifest.json")(tmp_path)
    photos = tmp_path / "my photos"
    assert not_a_store(photos) == (
        f"{photos} is not a feature store: it is a folder of images. Extract its features first: difffeat extract ARTIFACT '{photos}' "
        "-o features/my-photos, then give features/my-photos."
    )
    assert not_a_store(tmp_path / "features").endswith(f"it is a folder of feature stores ({tmp_path}/features/one; give one of them).")
    assert f"(is it {tmp_path}/features?). Make one with" in not_a_store(tmp_path / "feature")


def test_an_artifact_is_wanted(tmp_path: Path) -> None:
    touch("w.pt", "art/model.onnx")(tmp_path)
    assert f"difffeat export --model dit --weights {tmp_path}/w.pt" in not_an_artifact(tmp_path / "w.pt")
    assert not_an_artifact(tmp_path / "art" / "model.onnx").endswith(f"it is a graph's file (is it {tmp_path}/art?).")


def test_a_source_is_wanted(tmp_path: Path) -> None:
    touch("a.csv", "b.pt", "c.png", "photos/a.png")(tmp_path)
    assert not_a_source(tmp_path / "a.csv") is None
    assert not_a_source(tmp_path / "photos") is None
    assert not_a_source(tmp_path / "nothing") is None, "the source says itself what is missing"
    assert "it is a file of weights" in str(not_a_source(tmp_path / "b.pt"))
    assert not_a_source(tmp_path / "c.png") is None, "one image is a source"


@pytest.mark.parametrize("path, typed", [("a", "a"), ("my photos", "'my photos'"), ("-weird", "./-weird"), ("it's $HOME", "'it'\"'\"'s $HOME'"),
                                         ("a\nb", "'a\nb'"), ("-a b", "'./-a b'")])  # fmt: skip
def test_a_path_as_it_is_typed(path: str, typed: str) -> None:
    assert quoted(path) == typed
