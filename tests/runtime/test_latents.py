"""The latent cache: one pass through the autoencoder, the same features, and never another one's latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from difffeat.errors import DifffeatError, RecipeMismatch, StoreIncomplete, StoreMismatch
from difffeat.recipe import RunRecipe
from difffeat.runtime.extract import extract
from difffeat.runtime.samples import Source
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store
from tests.artifacts import VAE, dit_weights, exported
from tests.runtime.fake import encoded, folder_of_images
from tests.runtime.test_extract import FP32, extracted, opened


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_images(tmp_path_factory.mktemp("source") / "images", 9)


@pytest.fixture(scope="module")
def cache(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extracted("latents", images, tmp_path_factory.mktemp("cache") / "latents").path


@pytest.mark.parametrize("name", ["from-latents", "sweep"])
def test_features_from_the_cache_are_those_from_pixels(name: str, images: Path, cache: Path, tmp_path: Path) -> None:
    cached = extracted(name, images, tmp_path / "cached", latent_cache=cache)
    direct = extracted(name, images, tmp_path / "direct")
    for tap in cached.taps:
        np.testing.assert_array_equal(np.asarray(cached[tap]), np.asarray(direct[tap]))


def test_the_order_of_the_cache_does_not_matter(images: Path, cache: Path, tmp_path: Path) -> None:
    listed = open_source(images)
    backwards = Source("backwards", listed.samples[::-1])
    forth = extracted("from-latents", images, tmp_path / "forth", latent_cache=cache)
    back = extracted("from-latents", backwards, tmp_path / "back", latent_cache=cache)
    for tap in forth.taps:
        np.testing.assert_array_equal(np.asarray(back[tap])[::-1], np.asarray(forth[tap]))


def test_a_sample_that_the_cache_lacks_is_set_aside_with_the_reason(images: Path, tmp_path: Path) -> None:
    listed = open_source(images)
    part = extracted("latents", Source("part", listed.samples[:7]), tmp_path / "part").path
    store = extracted("from-latents", images, tmp_path / "out", latent_cache=part)
    assert [entry["id"] for entry in store.quarantined] == ["07", "08"]
    assert store.quarantined[0]["stage"] == "latents"
    assert store.quarantined[0]["message"] == "the latent cache does not hold this sample. Make the cache from the same source."


def test_a_sample_that_was_bad_for_the_cache_stays_set_aside(images: Path, tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "images", 4)
    (folder / "02.png").write_bytes(b"no picture")
    cache = extracted("latents", folder, tmp_path / "cache").path
    store = extracted("from-latents", folder, tmp_path / "out", latent_cache=cache)
    assert store.valid.tolist() == [True, True, False, True]
    assert "quarantined when the latent cache was made" in store.quarantined[0]["message"]


def test_a_store_without_latents_is_no_cache(images: Path, tmp_path: Path) -> None:
    features = extracted("image", images, tmp_path / "features").path
    with pytest.raises(RecipeMismatch, match=r"holds b0/t30, .* no latents. Make a cache with an artifact of --graph latents."):
        extracted("from-latents", images, tmp_path / "out", latent_cache=features)


def test_another_preprocessing_is_refused(images: Path, cache: Path, tmp_path: Path) -> None:
    run = RunRecipe(preprocessing="squash", store_dtype="fp32")
    with pytest.raises(RecipeMismatch, match="was made with preprocessing = 'center', this extraction needs 'squash'"):
        extracted("from-latents", images, tmp_path / "out", latent_cache=cache, run=run)


def test_another_autoencoder_is_refused(images: Path, tmp_path: Path) -> None:
    from difffeat.export.weights import random_vae
    from difffeat.workflows.exporting import ExportOptions, export_dit

    options = ExportOptions(kind="latents", blocks=(0,), timesteps=(30.0,), noising="random")
    other = export_dit(dit_weights(), random_vae(VAE, seed=99), options, tmp_path / "other", say=lambda _: None).artifact
    from difffeat.engines import open_engine

    with open_engine(other, "ort", threads=1) as engine:
        extract(engine, open_source(images), tmp_path / "cache", run=FP32)
    with pytest.raises(RecipeMismatch, match=r"was made with weights\.vae = "):
        extracted("from-latents", images, tmp_path / "out", latent_cache=tmp_path / "cache")


def test_other_images_of_the_same_names_are_refused(images: Path, cache: Path, tmp_path: Path) -> None:
    other = folder_of_images(tmp_path / "other", 9)
    (other / "04.png").write_bytes(encoded(99))
    with pytest.raises(StoreMismatch, match=r"was made from another image than '04' \(04\.png\): .* Make a cache from this source\."):
        extracted("from-latents", other, tmp_path / "out", latent_cache=cache)
    same_size = bytearray((images / "04.png").read_bytes())
    same_size[-1] ^= 1
    (other / "04.png").write_bytes(same_size)
    with pytest.raises(StoreMismatch, match="its bytes are others now"):
        extracted("from-latents", other, tmp_path / "out", latent_cache=cache)
    assert not (tmp_path / "out").exists()


def test_images_that_are_not_there_any_more_are_no_reason_to_refuse_their_latents(cache: Path, images: Path, tmp_path: Path) -> None:
    gone = folder_of_images(tmp_path / "gone", 9)
    listed = open_source(gone)
    for path in gone.glob("*.png"):
        path.unlink()
    store = extracted("from-latents", listed, tmp_path / "out", latent_cache=cache)
    assert store.valid.all()
    np.testing.assert_array_equal(np.asarray(store.inputs), np.asarray(extracted("from-latents", images, tmp_path / "direct").inputs))


def test_an_unfinished_cache_is_refused(images: Path, cache: Path, tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(cache, tmp_path / "broken"))
    next(iter(sorted((broken / "receipts").iterdir()))).unlink()
    with pytest.raises(StoreIncomplete, match="lacks 1 of 2 shards"):
        extracted("from-latents", images, tmp_path / "out", latent_cache=broken)


def test_a_graph_that_takes_latents_needs_a_cache_or_its_autoencoder(images: Path, tmp_path: Path) -> None:
    with (
        opened("from-latents") as engine,
        pytest.raises(DifffeatError, match="this graph takes latents, and its artifact holds no VAE: pass --latents CACHE"),
    ):
        extract(engine, open_source(images), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_caches_fingerprint_is_part_of_the_stores_identity(images: Path, cache: Path, tmp_path: Path) -> None:
    store = extracted("from-latents", images, tmp_path / "out", latent_cache=cache)
    assert store.manifest["options"]["latent_cache"] == Store.open(cache).fingerprint
    assert exported("from-latents").recipe == store.recipe.graph
