"""From samples to batches: a bad sample keeps its place, and nothing of its bytes."""

from __future__ import annotations

from PIL import Image

from difffeat.runtime.batches import ImageFeeder
from difffeat.runtime.blobs import BytesBlob, FileBlob
from difffeat.runtime.decoding import DecodePool
from difffeat.runtime.samples import Sample
from tests.runtime.fake import FakeEngine
from tests.runtime.test_preprocess import saved


def test_what_is_wrong_with_a_sample_does_not_hold_what_was_read_of_it() -> None:
    samples = [Sample("a", BytesBlob(b"no image")), Sample("b", FileBlob("", "/nowhere.png")), Sample("c")]
    feeder = ImageFeeder(FakeEngine(), 4, "center", "shown")
    (batch,), _ = feeder.plan(samples)
    with DecodePool(1) as pool:
        feeder.start(batch, pool)
        prepared = feeder.finish(batch)
    assert [failure.id for failure in prepared.failures] == ["a", "b", "c"]
    for failure in prepared.failures:
        assert (failure.error.__traceback__, failure.error.__cause__, failure.error.__context__) == (None, None, None)


def test_what_is_not_plain_is_told_with_its_sample() -> None:
    plain, cmyk = (BytesBlob(saved(Image.new(mode, (8, 8)), "JPEG")) for mode in ("RGB", "CMYK"))
    feeder = ImageFeeder(FakeEngine(), 4, "center", "shown")
    (batch,), _ = feeder.plan([Sample("a", plain), Sample("b", cmyk)])
    with DecodePool(1) as pool:
        feeder.start(batch, pool)
        assert feeder.finish(batch).remarks == [("b", "CMYK colours: converted without a profile")]
