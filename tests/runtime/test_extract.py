"""What an extraction promises: features that depend on nothing but sample and recipe, rows that are never lost, reasons for what is set aside."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from difffeat.engines import Engine, open_engine
from difffeat.engines.parity import compare
from difffeat.errors import ConfigError, NonFiniteFeature, SourceFormatError, StoreMismatch, TooManyBadSamples
from difffeat.recipe import RunRecipe
from difffeat.runtime.blobs import FileBlob
from difffeat.runtime.extract import Progress, Summary, extract
from difffeat.runtime.noise import noise
from difffeat.runtime.preprocess import decode
from difffeat.runtime.samples import Sample, Source
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store
from difffeat.runtime.summary import summary_text
from tests.artifacts import exported
from tests.runtime.fake import FakeEngine, encoded, folder_of_images, picture, tree

FP32 = RunRecipe(seed=5, store_dtype="fp32")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_images(tmp_path_factory.mktemp("source") / "images", 11)


def opened(name: str, graph: str = "model") -> Engine:
    return open_engine(exported(name), "ort", threads=1, graph=graph)


def extracted(name: str, source: Source | Path, out: Path, **options: Any) -> Store:
    """Extract with an artifact of the tests; fp32 unless told otherwise."""
    artifact = exported(name)
    settings: dict[str, Any] = {"run": FP32, "batch_size": 4, "shard_size": 6, "table": artifact.sweep_table(), "tokenizer": artifact.tokenizer}
    listed = source if isinstance(source, Source) else open_source(source)
    with opened(name) as engine:
        if "latents" in engine.inputs and artifact.latents_graph is not None and "latent_cache" not in options:
            with opened(name, "latents") as vae:
                settings["latents_engine"] = vae
                extract(engine, listed, out, **(settings | options))
        else:
            extract(engine, listed, out, **(settings | options))
    return Store.open(out)


def by_id(store: Store) -> dict[str, dict[str, np.ndarray]]:
    return {tap: dict(zip(store.ids, np.asarray(store[tap]), strict=True)) for tap in store.taps}


def assert_same_features(found: Store, expected: Store, tolerance: float = 1e-5) -> None:
    left, right = by_id(found), by_id(expected)
    assert list(left) == list(right)
    for tap, rows in right.items():
        assert left[tap].keys() == rows.keys()
        for name, row in rows.items():
            assert compare(left[tap][name][None], row[None]).within(tolerance), (tap, name)


def test_a_row_is_the_graph_on_its_own_pixels_and_its_own_noise(images: Path, tmp_path: Path) -> None:
    store = extracted("image", images, tmp_path / "out")
    with opened("image") as engine:
        shape = engine.inputs["noise"].shape[1:]
        for row, name in enumerate(store.ids):
            pixels = decode((images / f"{name}.png").read_bytes(), 16, "center")[None]
            drawn = noise(5, name, 30.0, 0, tuple(int(n) for n in shape))[None]
            for output, value in engine.run({"pixels": pixels, "noise": drawn}).items():
                assert compare(np.asarray(store[f"{output}/t30"][row])[None], value).within(1e-5)


@pytest.mark.parametrize("name", ["image", "image-constant", "sweep", "text", "text-random", "text-sweep"])
def test_batch_shard_workers_and_order_change_nothing(name: str, images: Path, tmp_path: Path) -> None:
    usual = extracted(name, images, tmp_path / "usual")
    listed = open_source(images)
    shuffled = Source(listed.name, tuple(listed.samples[i] for i in np.random.default_rng(0).permutation(len(listed))), listed.classes)
    assert_same_features(extracted(name, shuffled, tmp_path / "shuffled"), usual)
    assert_same_features(extracted(name, images, tmp_path / "batch", batch_size=1, shard_size=100), usual)
    assert_same_features(extracted(name, Source("part", listed.samples[3:5]), tmp_path / "part"), _only(usual, listed.samples[3:5], name, tmp_path))


def _only(usual: Store, samples: Sequence[Sample], name: str, tmp_path: Path) -> Any:
    """The part of a store that holds these samples."""

    class Part:
        taps, ids = usual.taps, [sample.id for sample in samples]

        def __getitem__(self, tap: str) -> np.ndarray:
            return np.stack([usual[tap][usual.ids.index(sample.id)] for sample in samples])

    return Part()


@pytest.mark.parametrize("name", ["image", "sweep", "text-random"])
def test_the_number_of_workers_does_not_change_a_byte(name: str, images: Path, tmp_path: Path) -> None:
    extracted(name, images, tmp_path / "one", num_workers=1)
    extracted(name, images, tmp_path / "five", num_workers=5)
    assert tree(tmp_path / "one") == tree(tmp_path / "five")


@pytest.mark.parametrize("name", ["image", "sweep"])
def test_at_one_batch_shape_the_neighbours_do_not_change_a_bit(name: str, images: Path, tmp_path: Path) -> None:
    whole = extracted(name, images, tmp_path / "whole")
    alone = extracted(name, Source("alone", open_source(images).samples[7:8]), tmp_path / "alone")
    for tap in whole.taps:
        np.testing.assert_array_equal(np.asarray(alone[tap])[0], whole[tap][7])


def test_the_sweep_store_equals_a_store_of_each_timestep(images: Path, tmp_path: Path) -> None:
    from tests.artifacts import export_named

    sweep = extracted("sweep", images, tmp_path / "sweep")
    for t in (0.0, 30.0, 500.0):
        report = export_named("image", tmp_path / f"t{t:g}", timesteps=(t,))
        with open_engine(report.artifact, "ort", threads=1) as engine:
            extract(engine, open_source(images), tmp_path / f"store{t:g}", run=FP32, batch_size=4, shard_size=6)
        fixed = Store.open(tmp_path / f"store{t:g}")
        for tap in fixed.taps:
            assert compare(np.asarray(sweep[tap]), np.asarray(fixed[tap])).within(1e-5), tap


def test_captions_of_any_length_come_back_in_the_sources_order(images: Path, tmp_path: Path) -> None:
    store = extracted("text", images, tmp_path / "out", batch_size=3)
    listed = open_source(images)
    assert store.ids == [sample.id for sample in listed.samples]
    single = extracted("text", images, tmp_path / "single", batch_size=1, length_multiple=1)
    assert_same_features(store, single)
    assert len({len(caption[0].split()) for caption in store.captions}) > 3


def test_padding_to_a_longer_multiple_changes_nothing(images: Path, tmp_path: Path) -> None:
    short = extracted("text-random", images, tmp_path / "short", length_multiple=1)
    assert_same_features(extracted("text-random", images, tmp_path / "long", length_multiple=32), short)


def test_draws_are_averaged_and_the_seed_matters(images: Path, tmp_path: Path) -> None:
    two = extracted("image", images, tmp_path / "two", run=RunRecipe(seed=5, draws=2, store_dtype="fp32"))
    with opened("image") as engine:
        pixels = decode((images / "04.png").read_bytes(), 16, "center")[None]
        runs = [engine.run({"pixels": pixels, "noise": noise(5, "04", 30.0, draw, (4, 8, 8))[None]}) for draw in (0, 1)]
    expected = (runs[0]["b2"] + runs[1]["b2"]) / 2
    assert compare(two["b2/t30"][4][None], expected).within(1e-5)
    other = extracted("image", images, tmp_path / "other", run=RunRecipe(seed=6, store_dtype="fp32"))
    assert not np.allclose(np.asarray(other["b2/t30"]), np.asarray(two["b2/t30"]), rtol=1e-3)


def bad_folder(folder: Path) -> Path:
    """Good images at 0 and 6, one of each kind of bad ones between."""
    folder.mkdir()
    good = encoded(0)
    cmyk, sixteen, truncated = io.BytesIO(), io.BytesIO(), io.BytesIO()
    picture(1, side=128).save(truncated, "JPEG")
    picture(1).convert("CMYK").save(cmyk, "JPEG")
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(sixteen, "PNG")
    files = {
        "0.png": good,
        "1-truncated.jpg": truncated.getvalue()[: truncated.tell() // 2],
        "2-cmyk.jpg": cmyk.getvalue(),
        "3-sixteen.png": sixteen.getvalue(),
        "4-text.jpg": b"this is a note, no picture",
        "5-empty.png": b"",
        "6.png": encoded(6),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


QUARANTINED = {
    "1-truncated": "the image is damaged or truncated",
    "2-cmyk": "the image has mode CMYK: CMYK colours cannot be converted without their profile; convert it with: magick",
    "3-sixteen": "16 or 32 bits per channel have no agreed range; convert it to 8 bits, for example: magick in.png -depth 8 out.png",
    "4-text": "this is no image in a format we accept (JPEG, PNG, WEBP, BMP, GIF, TIFF), whatever its name says. Convert or remove it.",
    "5-empty": "the file is empty. Get it again, or remove it from the source.",
}


def test_bad_images_keep_their_rows_and_are_named_with_their_reason(tmp_path: Path) -> None:
    source = bad_folder(tmp_path / "bad")
    store = extracted("image", source, tmp_path / "out", max_bad_fraction=0.9, run=replace(FP32, pixels="strict"))
    assert {entry["id"]: entry["row"] for entry in store.quarantined} == {name: index for index, name in enumerate(QUARANTINED, 1)}
    for entry in store.quarantined:
        assert QUARANTINED[entry["id"]] in entry["message"]
        assert (entry["stage"], entry["error"]) == ("decode", "DecodeError")
    assert store.valid.tolist() == [True, *[False] * 5, True]
    assert not np.asarray(store["b2/t30"])[1:6].any()
    lines = [json.loads(line) for line in (store.path / "quarantine.jsonl").read_text().splitlines()]
    assert lines == store.quarantined


def test_bad_neighbours_do_not_change_the_good(tmp_path: Path) -> None:
    source = bad_folder(tmp_path / "bad")
    mixed = extracted("image", source, tmp_path / "mixed", max_bad_fraction=0.9)
    listed = open_source(source)
    good = extracted("image", Source("good", (listed.samples[0], listed.samples[6])), tmp_path / "good")
    np.testing.assert_array_equal(np.asarray(mixed["b3/t30"])[[0, 6]], np.asarray(good["b3/t30"]))


def test_bad_captions_are_set_aside_with_their_reason(tmp_path: Path) -> None:
    manifest = tmp_path / "captions.jsonl"
    captions = ["the two", "two " * 40, "", "the two"]
    manifest.write_text("".join(json.dumps({"id": str(i), "caption": text}) + "\n" for i, text in enumerate(captions)))
    store = extracted("text", manifest, tmp_path / "out")
    messages = {entry["id"]: entry["message"] for entry in store.quarantined}
    assert messages == {
        "1": "the caption has 40 tokens, the model takes 32. Shorten it, or pass --truncate or --captions first.",
        "2": "the sample has no caption. Add one, or leave it out of the text store.",
    }
    assert store.valid.tolist() == [True, False, False, True]
    cut = extracted("text", manifest, tmp_path / "cut", run=RunRecipe(truncate=True, store_dtype="fp32"))
    assert [entry["id"] for entry in cut.quarantined] == ["2"]
    np.testing.assert_array_equal(store["b2/t0.05"][0], store["b2/t0.05"][3])


def test_too_many_bad_samples_stop_the_run_and_a_higher_limit_goes_on(tmp_path: Path) -> None:
    source = bad_folder(tmp_path / "bad")
    message = r"5 of 7 samples are in quarantine, more than --max-bad-fraction 0.5 allows. The receipts in .* say why each; mend the source"
    how: dict[str, Any] = {"batch_size": 4, "shard_size": 10, "run": RunRecipe(pixels="strict")}
    with pytest.raises(TooManyBadSamples, match=message):
        extract(FakeEngine(), open_source(source), tmp_path / "out", **how)
    summary = extract(FakeEngine(), open_source(source), tmp_path / "out", max_bad_fraction=0.9, **how)
    assert (summary.skipped, summary.quarantined, summary.exit_code) == (1, 5, 3)


def test_nothing_but_bad_samples_is_never_a_success(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"x")
    with pytest.raises(TooManyBadSamples, match="1 of 1 samples are in quarantine"):
        extract(FakeEngine(), open_source(folder), tmp_path / "out", max_bad_fraction=1.0)


def test_an_image_that_disappears_is_set_aside(images: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    listed = open_source(folder)
    (folder / "03.png").unlink()
    extract(FakeEngine(), listed, tmp_path / "out")
    entries = Store.open(tmp_path / "out").quarantined
    assert [(entry["id"], entry["error"]) for entry in entries] == [("03", "DecodeError")]


def test_a_feature_beyond_fp16_is_an_error_that_names_the_way_out(images: Path, tmp_path: Path) -> None:
    engine = FakeEngine(scale=1e6)
    with pytest.raises(NonFiniteFeature, match=r"b1/t30 of sample '\d\d' reaches .*, beyond fp16's 65504. Extract with --store-dtype fp32."):
        extract(engine, open_source(images), tmp_path / "out")
    assert not list((tmp_path / "out" / "shards").iterdir())
    extract(engine, open_source(images), tmp_path / "wide", run=FP32)
    assert np.abs(np.asarray(Store.open(tmp_path / "wide")["b1/t30"])).max() > 65504


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_no_number_is_never_stored(images: Path, tmp_path: Path, value: float) -> None:
    with pytest.raises(NonFiniteFeature, match=r"is not finite in engine fake \(fp32\). Check the artifact's parity.json"):
        extract(FakeEngine(scale=value), open_source(images), tmp_path / "out", run=FP32)
    assert not list((tmp_path / "out" / "receipts").iterdir())


def test_fp16_is_the_rounded_fp32(images: Path, tmp_path: Path) -> None:
    wide = extracted("image", images, tmp_path / "wide")
    half = extracted("image", images, tmp_path / "half", run=RunRecipe(seed=5))
    for tap in wide.taps:
        assert half[tap].dtype == np.float16
        np.testing.assert_array_equal(np.asarray(half[tap]), np.asarray(wide[tap]).astype(np.float16))


def test_progress_counts_every_sample_and_ends_at_the_total(images: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    summary: Summary = extract(FakeEngine(), open_source(images), tmp_path / "out", batch_size=3, shard_size=5, progress=seen.append)
    done = [state.done for state in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total == summary.rows == summary.samples == 11
    assert set(summary.stages) == {"decode", "noise", "engine", "write"}


def test_what_the_graph_needs_and_the_source_lacks_is_said_before_anything_is_written(images: Path, tmp_path: Path) -> None:
    captions = Source("notes.csv", (Sample("a", captions=("two",)),))
    pictures = Source("photos", (Sample("a", image=FileBlob(str(images), "00.png")),))
    with pytest.raises(SourceFormatError, match=r"notes.csv has no images, and this is an image graph. Use a folder of images"):
        extracted("image", captions, tmp_path / "out")
    with pytest.raises(SourceFormatError, match=r"photos has no captions, and this is a text graph. Put NAME.txt beside NAME.jpg"):
        extracted("text", pictures, tmp_path / "out")
    with pytest.raises(ConfigError, match="batch size and shard size must be at least 1, got 0 and 6"):
        extracted("image", pictures, tmp_path / "out", batch_size=0)
    with pytest.raises(ConfigError, match="--batch-size 1000000000000 is more than an engine holds"):
        extracted("image", pictures, tmp_path / "out", batch_size=10**12)
    assert not (tmp_path / "out").exists()


def test_a_store_of_the_time_when_all_pixels_were_strict_goes_on_as_it_was_and_no_other_way(images: Path, tmp_path: Path) -> None:
    strict = replace(FP32, pixels="strict")
    store = extracted("image", images, tmp_path / "out", run=strict)
    assert "pixels" not in json.loads((store.path / "manifest.json").read_text())["recipe"]["run"]
    assert store.recipe.run.pixels == "strict"
    extracted("image", images, tmp_path / "out", run=strict)
    with pytest.raises(
        StoreMismatch, match=r"recipe\.run\.pixels: None -> 'shown'\nRepeat the first configuration to go on \(with --pixels strict\)"
    ):
        extracted("image", images, tmp_path / "out")
    text = extracted("text", images, tmp_path / "text", run=strict)
    assert extracted("text", images, tmp_path / "text").fingerprint == text.fingerprint


def test_what_was_not_plain_is_in_the_summary(tmp_path: Path) -> None:
    source = bad_folder(tmp_path / "bad")
    summary = extract(FakeEngine(), open_source(source), tmp_path / "out", max_bad_fraction=0.9)
    assert summary.remarks == {
        "CMYK colours: converted without a profile": {"samples": 1, "first_ids": ["2-cmyk"]},
        "16 bits: their high byte is taken": {"samples": 1, "first_ids": ["3-sixteen"]},
    }
    assert "1 sample computed now: CMYK colours: converted without a profile (2-cmyk)" in summary_text(summary)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["remarks"] == summary.remarks
