"""What is converted is read back, bit for bit and in order, by the library it is meant for."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difffeat.errors import ConfigError, NonFiniteFeature, StoreCorrupt, StoreIncomplete, StoreLocked, StoreWriteError
from difffeat.runtime import convert as module
from difffeat.runtime.convert import convert
from difffeat.runtime.files import Lock
from difffeat.runtime.layouts import LAYOUTS, safe_key, safe_tap, sample_id
from difffeat.runtime.store import Store
from tests.runtime.fake import CountedFiles, tree
from tests.runtime.stores import make_store

IDS = ["a/b.c", "a", "é x", "50%", "..", "a.b", "__x__", "A", "日本", "a/b", "a_b"]
BAD = [3, 8]
GOOD = [row for row in range(11) if row not in BAD]
RNG = np.random.default_rng(0)
FEATURES = {
    "b2/t0.05": RNG.standard_normal((11, 5)).astype(np.float16),
    "b1/t0.05": RNG.standard_normal((11, 2, 3)).astype(np.float16),
}


pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
"""webdataset leaves tars to be closed by the garbage collector."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("stores") / "store", FEATURES, ids=IDS, bad=BAD)


def read_npy(folder: Path, kind: str = "img_emb") -> tuple[np.ndarray, Any]:
    """All rows through embedding_reader, with their metadata."""
    from embedding_reader import EmbeddingReader

    columns = ["id", "caption", "image_path"]
    reader = EmbeddingReader(str(folder / kind), file_format="parquet_npy", metadata_folder=str(folder / "metadata"), meta_columns=columns)
    batches = list(reader(batch_size=4, show_progress=False))
    meta = [row for _, frame in batches for row in frame[columns].to_numpy().tolist()]
    return np.concatenate([values for values, _ in batches]), meta


@pytest.mark.parametrize("rows_per_file", [2, 3, 1, 100])
def test_npy_is_what_embedding_reader_reads(rows_per_file: int, store: Store, tmp_path: Path) -> None:
    convert(store.path, tmp_path / "out", "npy", taps=["b2/t0.05"], rows_per_file=rows_per_file)
    values, meta = read_npy(tmp_path / "out")
    np.testing.assert_array_equal(values, FEATURES["b2/t0.05"][GOOD].astype(np.float32))
    assert meta == [[IDS[row], f"caption of {IDS[row]} second", f"{row}.png"] for row in GOOD]
    stored = np.concatenate([np.load(path) for path in sorted((tmp_path / "out/img_emb").iterdir())])
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, FEATURES["b2/t0.05"][GOOD])


def test_parts_are_numbered_as_clip_retrieval_numbers_them(store: Store, tmp_path: Path) -> None:
    assert list(convert(store.path, tmp_path / "one", "npy", taps=["b2/t0.05"]).files) == ["img_emb/img_emb_0.npy", "metadata/metadata_0.parquet"]
    many = convert(store.path, tmp_path / "many", "npy", taps=["b2/t0.05"], rows_per_file=1, keep_quarantined=True).files
    assert [path for path in many if path.endswith("npy")] == [f"img_emb/img_emb_{number:02d}.npy" for number in range(11)]


def test_several_taps_are_a_folder_each_and_further_axes_are_flattened(store: Store, tmp_path: Path) -> None:
    convert(store.path, tmp_path / "out", "npy")
    for tap, values in FEATURES.items():
        read, meta = read_npy(tmp_path / "out" / safe_tap(tap))
        np.testing.assert_array_equal(read, values[GOOD].reshape(9, -1).astype(np.float32))
        assert [row[0] for row in meta] == [IDS[row] for row in GOOD]


def test_text_features_are_called_text(tmp_path: Path) -> None:
    text = make_store(tmp_path / "text", {"b1/t30": FEATURES["b2/t0.05"]}, family="plaid")
    convert(text.path, tmp_path / "out", "npy")
    assert len(read_npy(tmp_path / "out", "text_emb")[0]) == 11


@pytest.mark.parametrize("rows_per_file", [4, 100])
def test_parquet_is_what_datasets_reads(rows_per_file: int, store: Store, tmp_path: Path) -> None:
    import datasets

    convert(store.path, tmp_path / "out", "parquet", rows_per_file=rows_per_file)
    read = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(read, datasets.Dataset)
    assert read["id"][:] == [IDS[row] for row in GOOD]
    assert read["captions"][:] == [[f"caption of {IDS[row]}", "second"] for row in GOOD]
    assert read["labels"][:] == [["a"] if row % 2 else ["b", "a"] for row in GOOD]
    assert read["valid"][:] == [True] * len(GOOD)
    assert read.features["b2_t0p05"] == datasets.List(datasets.Value("float16"), length=5)
    for tap, values in FEATURES.items():
        column = np.array(read.with_format("arrow")[:][safe_tap(tap)].to_pylist(), np.float16)
        assert column.tobytes() == values[GOOD].tobytes()


def test_parquet_is_what_the_parquet_builder_reads(store: Store, tmp_path: Path) -> None:
    import datasets

    convert(store.path, tmp_path / "out", "parquet", dtype="fp32", taps=["b2/t0.05"])
    files = str(tmp_path / "out/data/*.parquet")
    read = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")).with_format("numpy")
    np.testing.assert_array_equal(read[:]["b2_t0p05"], FEATURES["b2/t0.05"][GOOD].astype(np.float32))


def test_parquet_carries_the_recipe(store: Store, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    convert(store.path, tmp_path / "out", "parquet")
    described = json.loads(pq.read_schema(tmp_path / "out/data/train-00000-of-00001.parquet").metadata[b"difffeat"])
    assert described["fingerprint"] == store.fingerprint
    assert described["recipe"] == store.recipe.to_dict()


def read_tars(folder: Path) -> list[dict[str, Any]]:
    """All samples through webdataset, decoded."""
    import webdataset

    library: Any = webdataset  # its names are looked up lazily
    return list(library.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False, empty_check=False).decode())


@pytest.mark.parametrize("rows_per_file", [4, 100])
def test_tars_are_what_webdataset_reads(rows_per_file: int, store: Store, tmp_path: Path) -> None:
    convert(store.path, tmp_path / "out", "webdataset", rows_per_file=rows_per_file)
    read = read_tars(tmp_path / "out")
    assert [sample_id(sample["__key__"]) for sample in read] == [IDS[row] for row in GOOD]
    for sample, row in zip(read, GOOD, strict=True):
        labels = ["a"] if row % 2 else ["b", "a"]
        expected = {"id": IDS[row], "captions": [f"caption of {IDS[row]}", "second"], "labels": labels, "image": f"{row}.png"}
        assert sample["json"] == expected
        for tap, values in FEATURES.items():
            found = sample[f"{safe_tap(tap)}.npy"]
            assert (found.dtype, found.shape, found.tobytes()) == (np.float16, values.shape[1:], values[row].tobytes())


@pytest.mark.parametrize("name", IDS)
def test_keys_are_reversible_and_have_neither_dots_nor_folders(name: str) -> None:
    key = safe_key(name)
    assert sample_id(key) == name
    assert key.isascii()
    assert not set(key) & {".", "/"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quarantined_rows_are_left_out_unless_asked_for_and_then_marked(layout: str, store: Store, tmp_path: Path) -> None:
    usual = convert(store.path, tmp_path / "usual", layout)
    assert (usual.rows, usual.left_out) == (9, 2)
    kept = convert(store.path, tmp_path / "kept", layout, keep_quarantined=True, taps=["b2/t0.05"])
    assert (kept.rows, kept.left_out) == (11, 0)
    assert valid_of(tmp_path / "kept", layout) == [row not in BAD for row in range(11)]


def valid_of(folder: Path, layout: str) -> list[bool]:
    import pyarrow.parquet as pq

    if layout == "webdataset":
        return [sample["json"]["valid"] for sample in read_tars(folder)]
    return [value for path in sorted(folder.rglob("*.parquet")) for value in pq.read_table(path)["valid"].to_pylist()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_store_gives_the_same_bytes_and_says_their_digests(
    layout: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = convert(store.path, tmp_path / "first", layout, rows_per_file=4)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    convert(store.path, tmp_path / "second", layout, rows_per_file=4)
    found = tree(tmp_path / "first")
    assert found == tree(tmp_path / "second")
    assert {path: entry["sha256"] for path, entry in first.files.items()} == {path: sha for path, sha in found.items() if path != "difffeat.json"}
    assert json.loads((tmp_path / "first/difffeat.json").read_text())["files"] == first.files


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A store of 3 and one of 24 shards of half a megabyte."""
    folder, rng = tmp_path_factory.mktemp("growing"), np.random.default_rng(1)
    rows = [rng.standard_normal((32 * shards, 4096), dtype=np.float32) for shards in (3, 24)]
    return [make_store(folder / f"{len(wide)}", {"b1/t30": wide}, shard=32).path for wide in rows]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_stays_flat_however_large_the_store(
    layout: str, growing: list[Path], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(store.path, tmp_path / "warm", layout)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 18)
    peaks = []
    for path in growing:
        gc.collect()
        tracemalloc.start()
        written = convert(path, tmp_path / path.name, layout).bytes
        peaks.append((tracemalloc.get_traced_memory()[1], written))
        tracemalloc.stop()
    (small, few), (large, many) = peaks
    # an allocation of the interpreter's own (a table that it doubles) may fall into either run: a megabyte is let pass, ten would not be
    assert large - small < (many - few) / 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_anywhere_nothing_has_the_outputs_name_and_the_next_run_ends_with_the_same_bytes(layout: str, store: Store, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def at(stop: int) -> CountedFiles:
        def check(number: int, name: str) -> None:
            if number >= stop:
                raise Killed

        return CountedFiles(check)

    counting = CountedFiles(lambda number, name: None)
    convert(store.path, tmp_path / "whole", layout, taps=["b2/t0.05"], rows_per_file=5, files=counting)
    for stop in range(counting.count - 1):
        with pytest.raises(Killed):
            convert(store.path, tmp_path / "out", layout, taps=["b2/t0.05"], rows_per_file=5, files=at(stop))
        assert not (tmp_path / "out").exists()
    convert(store.path, tmp_path / "out", layout, taps=["b2/t0.05"], rows_per_file=5)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk_is_told_and_leaves_nothing_under_the_name(store: Store, tmp_path: Path) -> None:
    def full(number: int, name: str) -> None:
        if name == "write" and number > 20:
            raise OSError(28, "No space left on device")

    with pytest.raises(StoreWriteError, match=r"out failed: No space left on device. Nothing has that name yet; free space"):
        convert(store.path, tmp_path / "out", "npy", files=CountedFiles(full))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_a_folder_of_something_else_is_never_touched(name: str, store: Store, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"(is not an empty folder|holds something else); choose another -o"):
        convert(store.path, tmp_path / "out", "npy")
    assert tree(tmp_path / name).keys() == {"thesis.tex"}


def test_two_conversions_do_not_write_into_one_folder(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with Lock(tmp_path / "out.partial"), pytest.raises(StoreLocked, match=r"out\.partial is being written by process"):
        convert(store.path, tmp_path / "out", "npy")


def test_damage_is_not_passed_on(tmp_path: Path) -> None:
    damaged = make_store(tmp_path / "store", FEATURES)
    path = tmp_path / "store/shards/00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x09")
    with pytest.raises(StoreCorrupt, match=r"is damaged and was not converted:\n.*00001\.safetensors"):
        convert(damaged.path, tmp_path / "out", "npy")
    assert not (tmp_path / "out").exists()


def test_what_lies_beside_the_features_does_not_stop_a_conversion(tmp_path: Path) -> None:
    make_store(tmp_path / "store", FEATURES)
    (tmp_path / "store/notes.txt").write_text("mine")
    assert convert(tmp_path / "store", tmp_path / "out", "npy").rows == 11


def test_an_unfinished_store_is_told(tmp_path: Path) -> None:
    make_store(tmp_path / "store", FEATURES)
    (tmp_path / "store/receipts/00001.json").unlink()
    with pytest.raises(StoreIncomplete, match="lacks 1 of 3 shards"):
        convert(tmp_path / "store", tmp_path / "out", "parquet")


def test_a_value_beyond_fp16_is_an_error_that_names_the_sample_and_the_way_out(tmp_path: Path) -> None:
    values = np.ones((3, 2), np.float32)
    values[1, 1] = 70000
    large = make_store(tmp_path / "store", {"b1/t30": values})
    with pytest.raises(NonFiniteFeature, match=r"b1/t30 of sample 's1' does not fit float16. Convert with --dtype fp32."):
        convert(large.path, tmp_path / "out", "npy", dtype="fp16")
    assert convert(large.path, tmp_path / "out", "npy").dtype == "fp32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "hdf5"}, "--to takes npy, parquet, webdataset"),
        ({"layout": "npy", "dtype": "int8"}, "--dtype fp16 or fp32"),
        ({"layout": "npy", "rows_per_file": 0}, "--rows-per-file at least 1"),
        ({"layout": "npy", "taps": ["b9/t30"]}, "has no tap 'b9/t30'; it has b1/t0.05, b2/t0.05"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], message: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(store.path, tmp_path / "out", **options)


def test_a_store_of_nothing_but_quarantine_is_told(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "valid", property(lambda self: np.zeros(len(self), bool)))
    with pytest.raises(ConfigError, match=r"every row of .* is in quarantine: there is nothing to convert"):
        convert(store.path, tmp_path / "out", "npy")


@pytest.mark.parametrize("place", ["within", "itself", "above", "a link within"])
def test_a_conversion_into_the_store_itself_is_refused_before_anything_is_written(place: str, tmp_path: Path) -> None:
    own = make_store(tmp_path / "folder/store", {"b1/t30": FEATURES["b2/t0.05"]})
    (tmp_path / "link").symlink_to(own.path)
    out = {"within": own.path / "npy", "itself": own.path, "above": tmp_path / "folder", "a link within": tmp_path / "link/new/npy"}[place]
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"is within .*store, or holds it: its own files must stay as they are\. Choose another -o"):
        convert(own.path, out, "npy")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("out", [".", "..", "../here", ""])
def test_the_current_folder_is_never_replaced(out: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="is the current folder, or one above it, and cannot be replaced"):
        convert(store.path, out, "npy")
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]
    assert convert(store.path, "new", "npy").path == Path("new")
