"""Quarantined rows are mended, while everything else keeps its bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.errors import StoreMismatch
from difffeat.recipe import RunRecipe
from difffeat.runtime.blobs import FileBlob
from difffeat.runtime.extract import extract
from difffeat.runtime.matching import Mode
from difffeat.runtime.samples import Sample, Source
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store, verify
from difffeat.runtime.summary import summary_text
from tests.runtime.fake import CountedFiles, encoded, folder_of_images, tree
from tests.runtime.test_growth import features, run


def spoil(folder: Path, *rows: int) -> None:
    for row in rows:
        (folder / f"{row:02d}.png").write_bytes(b"")


def mend(folder: Path, *rows: int) -> None:
    for row in rows:
        (folder / f"{row:02d}.png").write_bytes(encoded(row))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return folder_of_images(tmp_path / "images", 10)


def test_healed_rows_are_those_of_a_store_that_was_never_bad(source: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(source, whole)
    spoil(source, 1, 2, 9)
    run(source, out)
    before = tree(out)
    mend(source, 1, 2, 9)
    summary = run(source, out, Mode.RETRY)
    assert (summary.healed, summary.quarantined, summary.computed, summary.skipped, summary.exit_code) == (3, 0, 2, 1, 0)
    after, expected = tree(out), tree(whole)
    assert after["shards/00000.1.safetensors"] == expected["shards/00000.safetensors"]
    assert after["shards/00002.1.safetensors"] == expected["shards/00002.safetensors"]
    assert after["samples.parquet"] == expected["samples.parquet"]
    assert after["manifest.json"] == expected["manifest.json"]
    assert not after.keys() & {"shards/00000.safetensors", "shards/00002.safetensors", "quarantine.jsonl"}
    untouched = {"shards/00001.safetensors", "receipts/00001.json"}
    assert {name: after[name] for name in untouched} == {name: before[name] for name in untouched}
    store = Store.open(out)
    assert store.valid.all()
    assert verify(out) == []
    assert run(source, out).computed == 0


def test_what_is_still_bad_stays_in_quarantine_with_its_new_reason_and_good_rows_keep_their_bytes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spoil(source, 1, 2, 9)
    run(source, out)
    before = Store.open(out)
    rows = {tap: np.array(before[tap]) for tap in before.taps}
    mend(source, 2)
    (source / "01.png").write_bytes(b"a note")
    shard = out / "shards" / "00002.safetensors"
    touched = shard.stat().st_mtime_ns, shard.stat().st_ino
    summary = run(source, out, Mode.RETRY)
    assert (summary.healed, summary.quarantined, summary.exit_code) == (1, 2, 3)
    store = Store.open(out)
    assert {e["id"]: e["message"][:22] for e in store.quarantined} == {"01": "this is no image in a ", "09": "the file is empty. Get"}
    assert np.flatnonzero(~store.valid).tolist() == [1, 9]
    for tap, values in rows.items():
        kept = [row for row in range(10) if row != 2]
        np.testing.assert_array_equal(store[tap][kept], values[kept])
    assert (shard.stat().st_mtime_ns, shard.stat().st_ino) == touched
    assert [json.loads(line)["id"] for line in (out / "quarantine.jsonl").read_text().splitlines()] == ["01", "09"]
    assert verify(out) == []
    again = tree(out)
    run(source, out, Mode.RETRY)
    assert tree(out) == again


def test_a_mended_sample_needs_the_option_that_says_so(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spoil(source, 1)
    run(source, out)
    before = tree(out)
    mend(source, 1)
    with pytest.raises(StoreMismatch, match=r"row 1 \('01'\): bytes 0 -> \d+\n.*retried with --retry-quarantined"):
        run(source, out)
    assert tree(out) == before


def test_a_sample_that_is_not_in_quarantine_may_not_change(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spoil(source, 1)
    run(source, out)
    before = tree(out)
    mend(source, 1)
    (source / "03.png").write_bytes(encoded(77, "BMP"))
    with pytest.raises(StoreMismatch, match=r"a sample that is not in quarantine has changed: row 3 \('03'\): bytes \d+ -> \d+"):
        run(source, out, Mode.RETRY)
    assert tree(out) == before


def test_the_mended_files_alone_are_enough_to_retry(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spoil(source, 1, 9)
    run(source, out)
    mend(source, 1)
    assert run(Source("mended", open_source(source).samples[1:2]), out, Mode.RETRY).healed == 1
    assert [entry["id"] for entry in Store.open(out).quarantined] == ["09"]
    with pytest.raises(StoreMismatch, match=r"has none of these samples \('x' \.\.\.\), so there is nothing to retry. Add them with --append"):
        run(Source("other", (Sample("x", FileBlob(str(source), "01.png"), "01.png"),)), out, Mode.RETRY)


def test_a_source_with_mended_and_new_samples_is_retried_first_and_then_appended(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spoil(source, 1)
    run(source, out)
    mend(source, 1)
    (source / "new.png").write_bytes(encoded(40))
    with pytest.raises(StoreMismatch, match=r"bytes 0 -> \d+.*mend quarantined ones with --retry-quarantined"):
        run(source, out, Mode.APPEND)
    assert run(source, out, Mode.RETRY).healed == 1
    assert run(source, out, Mode.APPEND).added == 1
    assert Store.open(out).ids[-1] == "new"
    assert verify(out) == []


def test_a_shard_lost_after_a_retry_is_computed_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spoil(source, 1)
    run(source, out)
    mend(source, 1)
    run(source, out, Mode.RETRY)
    whole = features(Store.open(out))
    (out / "receipts" / "00000.json").unlink()
    assert run(source, out).computed == 1
    assert sorted(path.name for path in (out / "shards").iterdir()) == [f"0000{n}.safetensors" for n in range(3)]
    assert features(Store.open(out)) == whole
    assert verify(out) == []


def test_a_retry_that_was_killed_and_then_taken_back_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    spoil(source, 1, 5)
    run(source, tmp_path / "first")
    before = tree(tmp_path / "first")
    stop, reached = 0, False
    while not reached:
        out = Path(shutil.copytree(tmp_path / "first", tmp_path / f"stopped{stop}"))
        mend(source, 1, 5)

        def at(number: int, name: str, stop: int = stop) -> None:
            if number == stop:
                raise Killed

        try:
            run(source, out, Mode.RETRY, files=CountedFiles(at))
            reached = True
        except Killed:
            spoil(source, 1, 5)
            finished = Store.open(out, partial=True).manifest["samples"] != Store.open(tmp_path / "first").manifest["samples"]
            if not finished:  # else the mended samples are the store's
                run(source, out)
                assert tree(out) == before, stop
                assert verify(out) == []
        stop += 1
    assert stop > 30


def test_the_end_of_a_retry_that_matched_nothing_says_so(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spoil(source, 1)
    run(source, out)
    summary = run(Source("others", open_source(source).samples[4:]), out, Mode.RETRY)
    assert (summary.healed, summary.retried, summary.quarantined) == (0, 0, 1)
    assert "nothing was retried: the source holds none of the samples in quarantine, by their ids" in summary_text(summary)


def test_captions_are_mended_too(tmp_path: Path) -> None:
    from difffeat.engines import open_engine
    from tests.artifacts import exported

    artifact, manifest = exported("text"), tmp_path / "captions.jsonl"

    def extracted(captions: list[str], out: Path, mode: Mode = Mode.RESUME) -> Store:
        manifest.write_text("".join(json.dumps({"id": str(i), "caption": text}) + "\n" for i, text in enumerate(captions)))
        with open_engine(artifact, "ort", threads=1) as engine:
            options: dict[str, Any] = {"run": RunRecipe(store_dtype="fp32"), "batch_size": 2, "shard_size": 3, "tokenizer": artifact.tokenizer}
            extract(engine, open_source(manifest), out, mode=mode, **options)
        return Store.open(out)

    extracted(["the two", "", "two", "the two two"], tmp_path / "out")
    healed = extracted(["the two", "two the two", "two", "the two two"], tmp_path / "out", Mode.RETRY)
    whole = extracted(["the two", "two the two", "two", "the two two"], tmp_path / "whole")
    assert healed.captions == whole.captions
    for tap in whole.taps:
        np.testing.assert_allclose(np.asarray(healed[tap]), np.asarray(whole[tap]), rtol=1e-5, atol=1e-6)
