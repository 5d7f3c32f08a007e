"""A store grows, or goes on after losses, while everything else keeps its bytes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.errors import ConfigError, StoreCorrupt, StoreIncomplete, StoreMismatch, StoreNotFound
from difffeat.runtime.blobs import FileBlob
from difffeat.runtime.extract import extract
from difffeat.runtime.matching import Mode, one_mode
from difffeat.runtime.progress import Summary
from difffeat.runtime.samples import Sample, Source, multi_hot_classes
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store, verify
from tests.runtime.fake import CountedFiles, FakeEngine, encoded, folder_of_images, tree


def run(source: Path | Source, out: Path, mode: Mode = Mode.RESUME, **options: Any) -> Summary:
    listed = source if isinstance(source, Source) else open_source(source)
    settings = {"batch_size": 2, "shard_size": 4, "max_bad_fraction": 0.9, **options}
    return extract(options.pop("engine", None) or FakeEngine(), listed, out, mode=mode, **{k: v for k, v in settings.items() if k != "engine"})


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


def test_folders_that_were_deleted_come_back(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    before = tree(out)
    for folder in ("shards", "receipts"):
        shutil.rmtree(out / folder)
        run(source, out)
        assert tree(out) == before


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
    with pytest.raises(StoreNotFound, match="not a feature store"):
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
