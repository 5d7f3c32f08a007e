"""A store reads back what was written, finds every spoiled byte, and never mixes two configurations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from difffeat.errors import ConfigError, DifffeatError, StoreCorrupt, StoreIncomplete, StoreMismatch, StoreNotFound
from difffeat.recipe import Recipe, RunRecipe
from difffeat.runtime import store as store_module
from difffeat.runtime.extract import extract
from difffeat.runtime.manifest import Manifest, Receipt, SamplesPart, read_receipt, signed
from difffeat.runtime.samples import Sample
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store, map_shard, verify
from difffeat.runtime.table import sample_columns, samples_digest
from difffeat.runtime.writer import StoreWriter
from tests.runtime.fake import RECIPE, tree
from tests.runtime.stores import Recall, make_source

SHARDS = (4, 4, 3)
SAMPLES = tuple(Sample(f"s{i}", captions=(f"caption {i}",), labels=("a",) if i % 2 else ("b", "a")) for i in range(11))
COLUMNS = sample_columns(SAMPLES)
MANIFEST = Manifest(
    recipe=Recipe(RECIPE, RunRecipe()),
    graph_digest="g" * 64,
    engine={"name": "fake", "precision": "fp32", "device": "cpu"},
    batch_size=2,
    rows=11,
    samples=(SamplesPart(rows=11, digest=samples_digest(COLUMNS)),),
    classes=("a", "b"),
    taps={"b1/t30": (3,), "b2/t30": (2, 2)},
    shards=SHARDS,
    shard_rows=4,
    versions={"numpy": "2"},
)
BAD = {"row": 5, "id": "s5", "stage": "decode", "error": "DecodeError", "message": "the file is empty."}
WHOLE = {"b1/t30": np.arange(33, dtype=np.float16).reshape(11, 3), "b2/t30": np.arange(44, dtype=np.float16).reshape(11, 2, 2)}


def write(path: Path, manifest: Manifest = MANIFEST, *, shards: int = 3, overwrite: bool = False) -> Path:
    with StoreWriter(path, manifest, COLUMNS, overwrite=overwrite) as writer:
        receipts = []
        for shard, first in list(enumerate(manifest.first_rows))[:shards]:
            rows = slice(first, first + manifest.shards[shard])
            valid = np.ones(manifest.shards[shard], bool)
            if shard == 1:
                valid[1] = False
            inputs = np.full((len(valid), 32), shard, np.uint8)
            arrays = {name: values[rows] for name, values in WHOLE.items()} | {"valid": valid, "inputs": inputs}
            receipts.append(writer.shards.write(shard, arrays, [BAD] if shard == 1 else []))
        if shards == 3:
            writer.finish(receipts)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture
def spoilt(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "spoilt"))


def test_everything_that_was_written_is_read(finished: Path) -> None:
    store = Store.open(finished)
    assert len(store) == 11
    assert store.taps == ("b1/t30", "b2/t30")
    assert store.ids == [sample.id for sample in SAMPLES]
    assert store.captions[3] == ["caption 3"]
    assert store.classes == ("a", "b")
    assert store.labels is not None
    assert store.labels.tolist() == [[1, 0] if i % 2 else [1, 1] for i in range(11)]
    assert np.flatnonzero(~store.valid).tolist() == [5]
    assert store.quarantined == [BAD]
    assert store.fingerprint == MANIFEST.recipe.fingerprint
    for tap, values in WHOLE.items():
        np.testing.assert_array_equal(np.asarray(store[tap]), values)
    assert verify(finished) == []


def test_one_tap_opens_no_other_and_reads_each_header_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, opened, headers = Store.open(finished), [], []
    maps, layouts = store_module.map_array, store_module.read_layout
    monkeypatch.setattr(store_module, "map_array", lambda *given: opened.append(given) or maps(*given))
    monkeypatch.setattr(store_module, "read_layout", lambda path, *given: headers.append(path) or layouts(path, *given))
    for _ in range(3):
        _ = store["b1/t30"]
    assert len(opened) == 3 * len(SHARDS)
    assert len(headers) == len(SHARDS)


def test_a_shard_that_goes_away_while_its_store_is_open_is_told(spoilt: Path) -> None:
    store = Store.open(spoilt)
    _ = store["b1/t30"]
    (spoilt / "shards/00001.safetensors").unlink()
    with pytest.raises(StoreCorrupt, match=r"00001.safetensors cannot be read any more .* it recomputes this shard only"):
        _ = store["b2/t30"]


def test_unknown_labels_are_told_from_none(tmp_path: Path) -> None:
    manifest = make_source(tmp_path / "source", 4)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[1]["labels"] = []
    del rows[2]["labels"]
    (tmp_path / "source/3.png").write_bytes(b"no image")
    manifest.write_text("\n".join(map(json.dumps, rows)))
    features = {"b1/t30": WHOLE["b1/t30"][:4]}
    extract(Recall(features), open_source(str(manifest)), tmp_path / "store", run=RunRecipe(), batch_size=4, num_workers=1)
    store = Store.open(tmp_path / "store")
    assert store.label_names[1:3] == [[], None]
    assert store.labelled.tolist() == [True, True, False, True]
    assert store.valid.tolist() == [True, True, True, False]
    assert store.usable.tolist() == [0, 1]


def test_an_unknown_tap_names_those_that_are_there(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tap 'b9/t30'; it has b1/t30, b2/t30"):
        _ = Store.open(finished)["b9/t30"]


def test_no_store_and_an_unfinished_one_are_told(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match=r"not a feature store.* Make one with: difffeat extract|A store is made with"):
        Store.open(tmp_path)
    write(tmp_path / "part", shards=2)
    with pytest.raises(StoreIncomplete, match=r"lacks 1 of 3 shards. Run the same difffeat extract command again: it computes only those."):
        Store.open(tmp_path / "part")
    partial = Store.open(tmp_path / "part", partial=True)
    assert partial.finished_shards == 2
    assert np.flatnonzero(~partial.valid).tolist() == [5, 8, 9, 10]
    assert len(partial["b1/t30"]) == 11
    np.testing.assert_array_equal(partial["b1/t30"][:8], WHOLE["b1/t30"][:8])
    assert not partial["b1/t30"][8:].any()


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a signed document as its writer might have: with the digest that belongs to it then."""
    document = json.loads(path.read_text())
    del document["digest"]
    path.write_text(json.dumps(signed(change(document))))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def swap(first: Path, second: Path) -> None:
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (lambda s: flip(s / "shards/00001.safetensors", -3), "00001.safetensors is corrupt: its SHA-256 is not the receipt's"),
    "a truncated shard": (
        lambda s: (s / "shards/00002.safetensors").write_bytes((s / "shards/00002.safetensors").read_bytes()[:-1]),
        "its receipt says",
    ),
    "a zeroed page": (
        lambda s: (s / "shards/00000.safetensors").write_bytes(bytes((s / "shards/00000.safetensors").stat().st_size)),
        "00000.safetensors is corrupt",
    ),
    "two swapped shards": (lambda s: swap(s / "shards/00000.safetensors", s / "shards/00001.safetensors"), "00001.safetensors is corrupt"),
    "two swapped receipts": (lambda s: swap(s / "receipts/00000.json", s / "receipts/00001.json"), "00001.json belongs to another shard or store"),
    "a missing shard": (lambda s: (s / "shards/00001.safetensors").unlink(), "00001.safetensors is missing"),
    "a missing receipt": (lambda s: (s / "receipts/00001.json").unlink(), "00001.safetensors has no receipt"),
    "a receipt of another configuration": (
        lambda s: edit(s / "receipts/00002.json", lambda r: {**r, "configuration": "0" * 64}),
        "belongs to another shard or store",
    ),
    "a receipt of another batch size": (
        lambda s: edit(s / "receipts/00002.json", lambda r: {**r, "batch_size": 3}),
        "belongs to another shard or store",
    ),
    "a receipt of other samples": (
        lambda s: edit(s / "receipts/00002.json", lambda r: {**r, "samples_digest": "0" * 64}),
        "00002.json was computed from other samples than the store lists for its rows",
    ),
    "a receipt that is no JSON": (lambda s: (s / "receipts/00002.json").write_text("{"), "00002.json is damaged: it is no receipt"),
    "a receipt without a field": (
        lambda s: edit(s / "receipts/00002.json", lambda r: {k: v for k, v in r.items() if k != "sha256"}),
        "00002.json is damaged",
    ),
    "altered samples": (lambda s: swap_samples(s), "samples.parquet is not the one the manifest was written with"),
    "garbage for samples": (lambda s: (s / "samples.parquet").write_bytes(b"PAR1"), "samples.parquet is damaged"),
}


def test_a_document_that_was_changed_by_hand_is_told_apart(spoilt: Path) -> None:
    for path in (spoilt / "receipts/00001.json", spoilt / "manifest.json"):
        path.write_text(path.read_text().replace("the file is empty", "the file is fine").replace('"a"', '"z"'))
    with pytest.raises(StoreCorrupt, match=r"manifest\.json was altered: it does not have the digest it states. Restore it, or"):
        Store.open(spoilt)
    with pytest.raises(StoreCorrupt, match=r"00001\.json was altered: it does not have the digest it states. Delete it and run the extraction again"):
        read_receipt(spoilt, MANIFEST, 1)


def swap_samples(store: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(store / "samples.parquet")
    pq.write_table(table.take([1, 0, *range(2, 11)]), store / "samples.parquet")


@pytest.mark.parametrize("kind", SPOILED)
def test_verify_names_what_was_spoiled(kind: str, spoilt: Path) -> None:
    spoil, message = SPOILED[kind]
    spoil(spoilt)
    problems = verify(spoilt)
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("kind", ["a truncated shard", "a missing shard", "two swapped receipts", "a receipt that is no JSON"])
def test_opening_notices_what_costs_nothing_to_notice(kind: str, spoilt: Path) -> None:
    SPOILED[kind][0](spoilt)
    with pytest.raises(StoreCorrupt, match=r"Run the extraction again|run the extraction again"):
        Store.open(spoilt)


def test_an_altered_manifest_is_noticed(spoilt: Path) -> None:
    edit(spoilt / "manifest.json", lambda m: {**m, "recipe": {**m["recipe"], "run": {**m["recipe"]["run"], "seed": 9}}})
    with pytest.raises(StoreCorrupt, match="was altered: its recipe does not have the fingerprint it states"):
        Store.open(spoilt)


CHANGES: dict[str, Callable[[Manifest], Manifest]] = {
    "recipe.run.seed: 0 -> 1": lambda m: replace(m, recipe=Recipe(RECIPE, RunRecipe(seed=1))),
    "recipe.run.preprocessing: 'center' -> 'squash'": lambda m: replace(m, recipe=Recipe(RECIPE, RunRecipe(preprocessing="squash"))),
    "recipe.run.store_dtype: 'fp16' -> 'fp32'": lambda m: replace(m, recipe=Recipe(RECIPE, RunRecipe(store_dtype="fp32"))),
    "recipe.graph.weights.backbone: '000": lambda m: replace(m, recipe=Recipe(replace(RECIPE, weights={"backbone": "1" * 64}), RunRecipe())),
    "recipe.graph.label: None -> 3": lambda m: replace(m, recipe=Recipe(replace(RECIPE, label=3), RunRecipe())),
    "graph_digest: 'ggg": lambda m: replace(m, graph_digest="h" * 64),
    "engine.device: 'cpu' -> 'cuda'": lambda m: replace(m, engine={**m.engine, "device": "cuda"}),
    "batch_size: 2 -> 3": lambda m: replace(m, batch_size=3),
    "versions.numpy: '2' -> '3'": lambda m: replace(m, versions={"numpy": "3"}),
    "shard_rows: 4 -> 11": lambda m: replace(m, shards=(11,), shard_rows=11),
    "classes: the store has no 'c'": lambda m: replace(m, classes=("a", "c")),
}


@pytest.mark.parametrize("difference", CHANGES)
def test_a_resume_with_another_configuration_is_refused_and_the_field_named(difference: str, spoilt: Path) -> None:
    before = tree(spoilt)
    with pytest.raises(StoreMismatch) as caught, StoreWriter(spoilt, CHANGES[difference](MANIFEST), COLUMNS):
        pass
    assert difference in str(caught.value)
    assert "choose another -o, or pass --overwrite to begin anew" in str(caught.value)
    assert tree(spoilt) == before


def test_overwriting_begins_anew(spoilt: Path) -> None:
    other = replace(MANIFEST, batch_size=3)
    write(spoilt, other, overwrite=True)
    assert Store.open(spoilt).manifest["batch_size"] == 3


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(ConfigError, match=r"holds files that are no store's \(thesis.tex\); choose another -o"),
        StoreWriter(tmp_path, MANIFEST, COLUMNS, overwrite=True),
    ):
        pass
    assert tree(tmp_path).keys() == {"thesis.tex"}


def header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_header(path: Path, made: Any) -> None:
    content = path.read_bytes()
    text = made if isinstance(made, bytes) else json.dumps(made).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :])


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [-8, 16]}, {"data_offsets": [0, 2**70]}, {"data_offsets": [10**6, 10**6 + 24]}, {"data_offsets": "0"},
        {"data_offsets": [0.0, 24.0]}, {"dtype": "F64"}, {"dtype": ["F16"]}, {"shape": [4, 4]}, {"shape": [2**62, 2**62]}, {"shape": None},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_headers_are_refused(change: dict[str, Any], spoilt: Path) -> None:
    path = spoilt / "shards/00000.safetensors"
    original = header(path)
    with_header(path, {**original, "b1/t30": {**original["b1/t30"], **change}})
    with pytest.raises(StoreCorrupt, match=r"00000\.safetensors"):
        map_shard(path, MANIFEST, 4)


def test_an_absurd_header_length_allocates_nothing(spoilt: Path) -> None:
    path = spoilt / "shards/00000.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(StoreCorrupt, match="has a damaged header"):
        map_shard(path, MANIFEST, 4)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5), lambda c: st.lists(c, max_size=3))


@settings(max_examples=120, deadline=None)
@given(key=st.sampled_from([*MANIFEST.to_dict()]), value=JSON)
def test_any_manifest_is_read_or_a_typed_error(key: str, value: Any) -> None:
    try:
        read = Manifest.from_dict({**MANIFEST.to_dict(), key: value}, "manifest.json")
    except DifffeatError:
        return
    assert read.to_dict()[key] == value


@settings(max_examples=120, deadline=None)
@given(data=st.one_of(JSON, st.dictionaries(st.sampled_from(["shard", "bytes", "sha256", "rows", "quarantined"]), JSON)))
def test_any_receipt_is_read_or_a_typed_error(data: Any) -> None:
    with pytest.raises(StoreCorrupt, match="is damaged"):
        Receipt.from_dict(data, "receipt")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), value=st.integers(0, 255))
def test_any_byte_of_a_shard_may_be_anything(place: int, value: int, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "shard"
    content = bytearray((finished / "shards/00000.safetensors").read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content)
    try:
        arrays = map_shard(path, MANIFEST, 4)
    except StoreCorrupt:
        return
    assert {name: array.shape for name, array in arrays.items()} == {"b1/t30": (4, 3), "b2/t30": (4, 2, 2), "valid": (4,), "inputs": (4, 32)}
