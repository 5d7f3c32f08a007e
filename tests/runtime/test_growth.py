"""A store grows, and quarantined rows are mended, while everything else keeps its bytes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.errors import ConfigError, StoreCorrupt, StoreIncomplete, StoreMismatch, StoreNotFound
from difffeat.recipe import RunRecipe
from difffeat.runtime.blobs import FileBlob
from difffeat.runtime.extract import extract
from difffeat.runtime.matching import Mode, one_mode
from difffeat.runtime.progress import Summary
from difffeat.runtime.samples import Sample, Source, multi_hot_classes
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store, verify
from difffeat.runtime.summary import summary_text
from tests.runtime.fake import CountedFiles, FakeEngine, encoded, folder_of_images, tree


def run(source: Path | Source, out: Path, mode: Mode = Mode.RESUME, **options: Any) -> Summary:
    listed = source if isinstance(source, Source) else open_source(source)
    settings = {"batch_size": 2, "shard_size": 4, "max_bad_fraction": 0.9, **options}
    return extract(options.pop("engine", None) or FakeEngine(), listed, out, mode=mode, **{k: v for k, v in settings.items() if k != "engine"})


def spoil(folder: Path, *rows: int) -> None:
    for row in rows:
        (folder / f"{row:02d}.png").write_bytes(b"")


def mend(folder: Path, *rows: int) -> None:
    for row in rows:
        (folder / f"{row:02d}.png").write_bytes(encoded(row))


def features(store: Store) -> dict[str, dict[str, list[float]]]:
    return {tap: {name: row.tolist() for name, row in zip(store.ids, np.asarray(store[tap]), strict=True)} for tap in store.taps}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return folder_of_images(tmp_path / "images", 10)


def test_appended_samples_follow_in_shards_of_their_own_and_nothing_else_is_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = tree(out)
    for index in range(5):
        (source / f"{index:02d}-more.png").write_bytes(encoded(30 + index))
    summary = run(source, out, Mode.APPEND)
    assert (summary.rows, summary.added, summary.computed, summary.skipped) == (15, 5, 2, 3)
    after = tree(out)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    added = {
        "samples-00001.parquet",
        *(f"{kind}/0000{n}.{ending}" for n in (3, 4) for kind, ending in [("shards", "safetensors"), ("receipts", "json")]),
    }
    assert after.keys() - before.keys() == added
    store = Store.open(out)
    assert store.ids == [*(f"{i:02d}" for i in range(10)), *(f"{i:02d}-more" for i in range(5))]
    run(source, tmp_path / "anew")
    assert features(store).keys() == features(Store.open(tmp_path / "anew")).keys()
    for tap, rows in features(Store.open(tmp_path / "anew")).items():
        assert features(store)[tap] == rows
    assert verify(out) == []


def test_a_source_of_the_new_samples_alone_is_enough(source: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    listed = open_source(source)
    run(Source("first", listed.samples[:6]), parts)
    run(Source("more", listed.samples[6:]), parts, Mode.APPEND)
    run(Source("first", listed.samples[:6]), whole)
    run(listed, whole, Mode.APPEND)
    assert tree(parts) == tree(whole)
    assert run(listed, parts, Mode.APPEND).added == 0
    assert tree(parts) == tree(whole)


def test_a_grown_store_is_gone_on_with_by_the_same_command(source: Path, tmp_path: Path) -> None:
    out, listed = tmp_path / "out", open_source(source)
    run(Source("first", listed.samples[:6]), out)
    run(listed, out, Mode.APPEND)
    whole = tree(out)
    for lost in ("shards/00000.safetensors", "receipts/00002.json"):
        (out / lost).unlink()
    assert run(listed, out, Mode.APPEND).computed == 2
    assert tree(out) == whole
    (out / "receipts" / "00000.json").unlink()
    assert run(listed, out).computed == 1
    assert tree(out) == whole
    (out / "receipts" / "00000.json").unlink()
    with pytest.raises(
        StoreIncomplete, match=r"lacks shard 0, and the source does not hold all of its samples; what it holds is done. Next: difffeat extract "
    ):
        run(Source("more", listed.samples[6:]), out, Mode.APPEND)


def test_until_an_append_is_finished_the_store_is_the_old_one(source: Path, tmp_path: Path) -> None:
    out, listed = tmp_path / "out", open_source(source)
    run(Source("first", listed.samples[:5]), out)

    def stop(runs: int) -> None:
        if runs == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(listed, out, Mode.APPEND, engine=FakeEngine(stop))
    assert (out / "receipts" / "00002.json").exists()
    assert len(Store.open(out)) == 5
    assert verify(out) == []
    assert run(listed, out, Mode.APPEND).computed == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": ("another",)}, r"row 2 \('02'\): captions \[.*\] -> \['another'\]"),
        ({"labels": ("z",)}, r"row 2 \('02'\): labels None -> \['z'\]"),
        ({"locator": "else.png"}, r"row 2 \('02'\): image '02.png' -> 'else.png'"),
    ],
)
def test_a_sample_that_is_there_already_must_be_the_same(change: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    out, listed = tmp_path / "out", open_source(source)
    run(listed, out)
    before = tree(out)
    samples = list(listed.samples)
    samples[2] = replace(samples[2], **change)
    more = Sample("new", FileBlob(str(source), "00.png"), "00.png")
    with pytest.raises(StoreMismatch, match=f"a sample that is already there is another one in the source: {message}"):
        run(Source("changed", (*samples, more)), out, Mode.APPEND)
    assert tree(out) == before


def test_new_classes_come_after_those_that_are_there(source: Path, tmp_path: Path) -> None:
    def labelled(rows: range, *labels: str) -> Source:
        samples = tuple(Sample(f"{i:02d}", FileBlob(str(source), f"{i:02d}.png"), f"{i:02d}.png", labels=labels) for i in rows)
        return Source("labelled", samples, multi_hot_classes(samples))

    run(labelled(range(3), "m"), tmp_path / "out")
    run(labelled(range(3, 5), "a", "m"), tmp_path / "out", Mode.APPEND)
    store = Store.open(tmp_path / "out")
    assert store.classes == ("m", "a")
    assert store.labels is not None
    assert store.labels.tolist() == [[1, 0], [1, 0], [1, 0], [1, 1], [1, 1]]


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


def test_folders_that_were_deleted_come_back(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = tree(out)
    for folder in ("shards", "receipts"):
        shutil.rmtree(out / folder)
        run(source, out)
        assert tree(out) == before


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


def test_another_batch_size_goes_on_when_it_is_allowed_and_is_recorded(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(runs: int) -> None:
        if runs == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(source, out, engine=FakeEngine(stop))
    with pytest.raises(StoreMismatch, match=r"batch_size: 2 -> 1\nRepeat .*, pass --allow-rebatch to go on with the new one"):
        run(source, out, batch_size=1)
    assert run(source, out, batch_size=1, rebatch=True).computed == 2
    manifest = Store.open(out).manifest
    assert (manifest["batch_size"], manifest["earlier_batch_sizes"]) == (1, [2])
    assert [json.loads(path.read_text())["batch_size"] for path in sorted((out / "receipts").iterdir())] == [2, 1, 1]
    run(source, tmp_path / "whole")
    assert features(Store.open(out)) == features(Store.open(tmp_path / "whole"))
    assert verify(out) == []


@pytest.mark.parametrize("mode", [Mode.APPEND, Mode.RETRY])
def test_growing_and_mending_need_a_store(mode: Mode, source: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="is no feature store"):
        run(source, tmp_path / "out", mode)
    assert not (tmp_path / "out").exists()


def test_both_at_once_are_two_runs() -> None:
    assert (one_mode(True, False), one_mode(False, True), one_mode(False, False)) == (Mode.APPEND, Mode.RETRY, Mode.RESUME)
    with pytest.raises(ConfigError, match="--append and --retry-quarantined are two runs: mend what is there first, then add"):
        one_mode(True, True)


def test_a_damaged_samples_table_is_written_again_from_the_same_source_only(source: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    run(source, out)
    whole = tree(out)
    (out / "samples.parquet").write_bytes(b"PAR1")
    shutil.copytree(out, other)
    run(source, out)
    assert tree(out) == whole
    with pytest.raises(StoreCorrupt, match=r"samples.parquet is damaged"):
        run(Source("part", open_source(source).samples[:9]), other)


def test_samples_that_are_there_under_other_ids_are_not_added_again(tmp_path: Path) -> None:
    manifest, out = folder_of_images(tmp_path / "images", 4).parent / "images.jsonl", tmp_path / "out"

    def listed(*ids: str) -> Source:
        manifest.write_text("".join(json.dumps({"id": name, "image": f"images/0{n}.png"}) + "\n" for n, name in enumerate(ids)))
        return open_source(manifest)

    run(listed("a", "b"), out)
    before = tree(out)
    with pytest.raises(StoreMismatch, match=r"2 images are already there under other ids: 'a' is now 'x'\. Adding them"):
        run(listed("x", "y", "z"), out, Mode.APPEND)
    assert tree(out) == before
    for index in range(2):  # other pictures of those names, as the other split of a data set has them
        (tmp_path / f"images/0{index}.png").write_bytes((tmp_path / f"images/0{index}.png").read_bytes()[:-1] + b"x")
    assert run(listed("x", "y", "z"), out, Mode.APPEND).added == 3


def test_a_repair_adds_nothing(source: Path, tmp_path: Path) -> None:
    out, listed = tmp_path / "out", open_source(source)
    run(Source("first", listed.samples[:4]), out)
    run(Source("more", listed.samples[4:8]), out, Mode.APPEND)
    before = tree(out)
    (out / "receipts" / "00001.json").unlink()
    summary = run(Source("more and others", listed.samples[4:]), out, Mode.REPAIR)
    assert (summary.rows, summary.added, summary.computed) == (8, 0, 1)
    assert tree(out) == before


def test_a_receipt_of_other_samples_is_gone_before_their_shard_is_written(source: Path, tmp_path: Path) -> None:
    """Two appends of like size, both killed: the first one's receipt must not vouch for the second one's shard."""

    class Killed(BaseException):
        pass

    listed = open_source(source)
    first, some, others = (Source(name, listed.samples[rows]) for name, rows in (("a", slice(4)), ("b", slice(4, 7)), ("c", slice(7, 10))))
    run(first, tmp_path / "base")
    run(some, Path(shutil.copytree(tmp_path / "base", tmp_path / "whole")), Mode.APPEND)
    whole = tree(tmp_path / "whole")

    def killed(more: Source, out: Path, stop: int) -> bool:
        def at(number: int, name: str) -> None:
            if number == stop:
                raise Killed

        try:
            run(more, out, Mode.APPEND, files=CountedFiles(at))
        except Killed:
            return True
        return False

    counting = CountedFiles(lambda number, name: None)
    run(some, Path(shutil.copytree(tmp_path / "base", tmp_path / "counted")), Mode.APPEND, files=counting)
    before_manifest = next(stop for stop in reversed(range(counting.count)) if _receipted_not_listed(tmp_path, some, stop, killed))
    stop = 0
    while True:
        out = Path(shutil.copytree(tmp_path / "base", tmp_path / f"out{stop}"))
        assert killed(some, out, before_manifest)
        if not killed(others, out, stop):
            break
        if len(Store.open(out).ids) == 4:  # else the others are there
            run(some, out, Mode.APPEND)
            assert tree(out) == whole, stop
        stop += 1
    assert stop > 20


def _receipted_not_listed(tmp_path: Path, more: Source, stop: int, killed: Any) -> bool:
    """Whether a kill there leaves the new shard with its receipt, in a store that does not list it yet."""
    out = Path(shutil.copytree(tmp_path / "base", tmp_path / f"looking{stop}"))
    killed(more, out, stop)
    return (out / "receipts" / "00001.json").exists() and len(Store.open(out).ids) == 4
