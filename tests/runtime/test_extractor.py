"""Features in memory are the store's features, whatever form the inputs take."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import difffeat
from difffeat.errors import CaptionError, ConfigError, DecodeError, DifffeatError
from difffeat.runtime.sources import open_source
from tests.artifacts import copy_of, exported
from tests.runtime.fake import folder_of_images
from tests.runtime.test_extract import extracted

SEED = 5


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_images(tmp_path_factory.mktemp("source") / "images", 5)


def extractor(name: str, **options: object) -> difffeat.Extractor:
    return difffeat.Extractor.from_artifact(exported(name).path, threads=1, seed=SEED, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["image", "from-latents", "sweep", "text", "text-random", "text-sweep"])
def test_with_the_stores_ids_come_the_stores_features(name: str, images: Path, tmp_path: Path) -> None:
    store = extracted(name, images, tmp_path / "out")
    samples = open_source(images).samples
    inputs = [sample.captions[0] if name.startswith("text") else sample.image for sample in samples]
    with extractor(name, batch_size=2) as extract:
        assert extract.taps == store.taps
        found = extract(inputs, ids=store.ids)
    assert tuple(found) == store.taps
    for tap in store.taps:
        np.testing.assert_allclose(found[tap], np.asarray(store[tap]), rtol=1e-4, atol=1e-5)


def test_paths_bytes_pictures_and_arrays_are_the_same(images: Path) -> None:
    path = images / "02.png"
    picture = Image.open(path)
    with extractor("image") as extract:
        found = extract([path, str(path), path.read_bytes(), picture, np.asarray(picture)], ids=["a"] * 5)["b2/t30"]
    assert np.ptp(found, axis=0).max() < 1e-5 * np.abs(found).max()


def test_an_array_of_another_size_is_preprocessed(images: Path) -> None:
    large = Image.open(images / "02.png").resize((64, 64), Image.Resampling.NEAREST)
    with extractor("image") as extract:
        found = extract([large, np.asarray(large)], ids=["a", "a"])["b2/t30"]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_an_id_keys_the_noise_and_without_one_the_picture_does(images: Path) -> None:
    path, other = images / "00.png", images / "01.png"
    with extractor("image") as extract:
        named = extract([path, path], ids=["a", "b"])["b2/t30"]
        assert not np.allclose(named[0], named[1])
        alone = extract([path])["b2/t30"][0]
        found = extract([other, path, path])["b2/t30"]
    np.testing.assert_allclose(found[1:], [alone, alone], rtol=1e-5, atol=1e-6)
    assert not np.allclose(found[0], alone)


def test_every_form_of_a_picture_has_the_same_noise(images: Path) -> None:
    path = images / "02.png"
    picture = Image.open(path)
    address = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    inputs = [path, str(path), path.read_bytes(), open_source(images).samples[2].image, picture, np.asarray(picture), address]
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 1
    picture.save(turned, "PNG", exif=exif.tobytes())
    with extractor("image") as extract:
        found = extract([*inputs, turned.getvalue(), f"file://{path}"])["b2/t30"]
    assert np.ptp(found, axis=0).max() < 1e-5 * np.abs(found).max()


@pytest.mark.parametrize("name", ["image", "from-latents", "sweep", "text-random", "text-sweep"])
def test_order_number_and_batch_size_change_nothing(name: str, images: Path) -> None:
    samples = open_source(images).samples
    inputs = [sample.captions[0] if name.startswith("text") else sample.image for sample in samples]
    with extractor(name, batch_size=2) as small, extractor(name, batch_size=7) as large:
        whole, turned, one = large(inputs), small(inputs[::-1]), small([inputs[3]])
    for tap, values in whole.items():
        np.testing.assert_allclose(turned[tap][::-1], values, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one[tap][0], values[3], rtol=1e-4, atol=1e-5)


def test_captions_that_are_mostly_unknown_are_warned_of() -> None:
    with extractor("text") as extract:
        extract(["the two digits"])
        with pytest.warns(UserWarning, match="3 of 5 tokens are unknown to this artifact's tokenizer") as caught:
            extract(["the bicycle against some wall"])
    assert caught[0].filename == __file__


def test_pixels_are_read_as_it_is_told() -> None:
    cmyk = io.BytesIO()
    Image.new("CMYK", (20, 20), (10, 60, 90, 3)).save(cmyk, "JPEG")
    with extractor("image") as shown, extractor("image", pixels="strict") as strict:
        assert np.isfinite(shown([cmyk.getvalue()])["b2/t30"]).all()
        with pytest.raises(DecodeError, match="the image has mode CMYK"):
            strict([cmyk.getvalue()])


def test_bad_inputs_are_errors(images: Path) -> None:
    with extractor("image") as extract:
        with pytest.raises(DecodeError, match="this is no image in a format we accept"):
            extract([b"no image"])
        with pytest.raises(ConfigError, match=r"an image array must be uint8 \[H, W, 3\], got float32 \[4, 4, 3\]"):
            extract([np.zeros((4, 4, 3), np.float32)])
        with pytest.raises(ConfigError, match="1 inputs but 2 ids"):
            extract([images / "00.png"], ids=["a", "b"])
    with extractor("text") as extract, pytest.raises(CaptionError, match="the caption has 99 tokens, the model takes 32"):
        extract(["two " * 99])


def test_nothing_in_gives_nothing_out_but_every_tap() -> None:
    with extractor("image") as extract:
        found = extract([])
    assert {tap: value.shape for tap, value in found.items()} == {"b0/t30": (0, 64), "b2/t30": (0, 64), "b3/t30": (0, 64)}


def test_a_text_artifact_without_its_tokenizer_says_so(tmp_path: Path) -> None:
    folder = copy_of("text", tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DifffeatError, match="tokenizer"):
        difffeat.Extractor.from_artifact(folder)(["two"])


def test_latents_without_an_autoencoder_cannot_start_from_images(images: Path) -> None:
    with extractor("sweep-mean") as extract, pytest.raises(ConfigError, match="takes latents and holds no VAE, so it cannot start from images"):
        extract([images / "00.png"])


def test_several_captions_of_a_sample_are_taken_as_the_recipe_says() -> None:
    several = [["two", "the three"], ("three",), np.array(["the two", "the"])]
    for protocol, joined in (("joined", ["two the three", "three", "the two the"]), ("first", ["two", "three", "the two"])):
        with extractor("text", captions=protocol) as extract:
            found, expected = extract(several), extract(joined)
        for tap in expected:
            np.testing.assert_array_equal(found[tap], expected[tap])
    with extractor("text", truncate=True) as extract:
        np.testing.assert_allclose(extract(["two " * 99])["b2/t0.05"], extract(["two " * 32])["b2/t0.05"], rtol=1e-5)


@pytest.mark.parametrize("caption", [None, 5, b"two", ["two", None], [["two"]], {"two": 1}], ids=str)
def test_what_is_no_caption_is_refused(caption: object) -> None:
    with extractor("text") as extract, pytest.raises(ConfigError, match=r"input 1 is no caption: a string is needed, or a list of strings, got"):
        extract(["two", caption])


def test_no_captions_and_a_single_input_are_told() -> None:
    with extractor("text") as extract:
        with pytest.raises(CaptionError, match="the sample has no caption"):
            extract([[]])
        with pytest.raises(ConfigError, match="inputs must be a list, one entry a sample; got a single str"):
            extract("two")
        with pytest.raises(ConfigError, match="inputs must be a list, one entry a sample; got a single generator"):
            extract(text for text in ["two"])  # pyright: ignore[reportArgumentType]
        for ids in ("a", [5]):
            with pytest.raises(ConfigError, match="ids must be a list of strings"):
                extract(["two"], ids=ids)  # pyright: ignore[reportArgumentType]


def test_bytes_of_every_kind_are_read_and_what_is_no_image_is_refused(images: Path) -> None:
    content = (images / "02.png").read_bytes()
    with extractor("image") as extract:
        found = extract([content, bytearray(content), memoryview(content)], ids=["a"] * 3)["b2/t30"]
        assert np.ptp(found, axis=0).max() < 1e-5 * np.abs(found).max()
        for image in (None, 5, [1, 2]):
            with pytest.raises(ConfigError, match=f"an image must be a path, bytes, a PIL image or an array, got {type(image).__name__}"):
                extract([image])
        with pytest.raises(DecodeError, match=r"the image has no pixels: its shape is \[0, 4, 3\]"):
            extract([np.zeros((0, 4, 3), np.uint8)])
        with pytest.raises(DecodeError, match="the image has no pixels"):
            extract([Image.new("RGB", (0, 4))])
        with pytest.raises(DecodeError, match="the image is damaged or truncated"):
            extract([Image.open(io.BytesIO(content[: len(content) // 2]))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be a whole number of at least 1, got -1"),
        ({"batch_size": 1.5}, r"batch_size must be a whole number of at least 1, got 1\.5"),
        ({"preprocessing": "stretch"}, "preprocessing must be one of center, squash; got 'stretch'"),
        ({"captions": "last"}, "captions must be one of joined, first; got 'last'"),
        ({"seed": -1}, r"seed must lie in 0\.\.2\^63-1, got -1"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        difffeat.Extractor.from_artifact(exported("image").path, **options)  # type: ignore[arg-type]
