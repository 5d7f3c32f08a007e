"""Probing, fusing and searching stores: what does not belong together never meets, and every result says what it is of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from difffeat.errors import ConfigError, ProbeError
from difffeat.probe.factory import load_probe
from difffeat.probe.fusion import FusionProbe, PairedFeatures, join
from difffeat.probe.split_files import read_splits
from difffeat.probe.splits import ids_digest, split_rows
from difffeat.recipe import RunRecipe
from difffeat.runtime.extract import extract
from difffeat.runtime.sources import open_source
from difffeat.runtime.sources_options import SourceOptions
from difffeat.runtime.store import Store
from difffeat.workflows.fusing import run_fuse
from difffeat.workflows.pair_stores import PairStores
from difffeat.workflows.pairs import Held, Split, TapEvaluator
from difffeat.workflows.probing import run_probe
from difffeat.workflows.searching import run_search
from tests.runtime.fake import SIDE
from tests.runtime.stores import Recall, RecallText, make_source, row_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::difffeat.errors.ProbeWarning")

ROWS = 80
ONE, TWO = ("b1/t30",), ("b1/t30", "b2/t30")
Change = Callable[[list[dict[str, Any]]], Any]


def stored(
    path: Path,
    *,
    prefix: str,
    taps: tuple[str, ...] = ONE,
    change: Change | None = None,
    classes: str | None = None,
    seed: int = 0,
    kind: str = "image",
    pictures: str | None = None,
) -> Path:
    """A store of images, or for the kind `text` of captions, of samples `prefix0` ... with labels a and b that its features nearly tell; `change` its
    manifest before it is extracted. Its images are those of `pictures`, by default of the prefix.
    """
    rng = np.random.default_rng(len(prefix))
    source = make_source(path.with_name(f"{path.name}-source"), ROWS, ids=[f"{prefix}{row}" for row in range(ROWS)])
    for row in range(ROWS):
        blue = sum(map(ord, pictures or prefix)) % 256
        Image.new("RGB", (SIDE, SIDE), (row % 256, row // 256, blue)).save(source.parent / f"{row}.png")
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    labels = np.arange(ROWS) % 3
    for row, entry in enumerate(rows):
        entry["labels"], entry["captions"] = [["a"], ["b"], ["a", "b"]][labels[row]], [str(row)]
    if change is not None:
        change(rows)
    source.write_text("\n".join(map(json.dumps, rows)))
    options = SourceOptions()
    if classes is not None:
        (path.parent / "classes.txt").write_text(classes)
        options = SourceOptions(classes=path.parent / "classes.txt")
    features = {tap: (np.eye(3)[labels] @ rng.normal(size=(3, 5)) + rng.normal(size=(ROWS, 5))).astype(np.float16) for tap in taps}
    known: dict[str, Any] = {"run": RunRecipe(seed=seed), "batch_size": 16, "shard_size": 48, "num_workers": 1}
    if kind == "text":
        known["tokenizer"] = row_tokenizer(source.parent / "tokenizer.json", ROWS)
    extract(RecallText(features) if kind == "text" else Recall(features), open_source(str(source), options), path, **known)
    return path


def given(image: Path, text: Path, options: dict[str, Any]) -> PairStores:
    """The stores among options, which are taken out of them."""
    own = {field.name for field in dataclasses.fields(PairStores)} & options.keys()
    return PairStores(image, text, **{name: options.pop(name) for name in own})


def fuse(image: Path, text: Path, output: Path, **options: Any) -> dict[str, Any]:
    known = {"image_tap": None, "text_tap": None, "fusion": "add", "width": 4, "seed": 0}
    return run_fuse(given(image, text, options), output=output, **{**known, **options})


def probe(store: Path, output: Path, **options: Any) -> dict[str, Any]:
    known = {"validation": None, "test": None, "taps": None, "method": "ridge", "seed": 0}
    return run_probe(store, output=output, **{**known, **options})


def search(image: Path, text: Path, output: Path, **options: Any) -> dict[str, Any]:
    return run_search(given(image, text, options), output=output, **{"strategy": "local", "neighbourhood": 1, "seed": 0, **options})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Image and text features of the same samples."""
    folder = tmp_path_factory.mktemp("pair")
    return stored(folder / "image", prefix="train", taps=TWO), stored(folder / "text", prefix="train", kind="text")


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be fitted."""

    def fitted(*_: Any, **__: Any) -> None:
        raise AssertionError("a fusion was trained on stores that should have been refused")

    monkeypatch.setattr(FusionProbe, "fit", fitted)


def unlabelled(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        del row["labels"]


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "test", "classes": "b\na\n"}, r"the test store has other classes .* in another order, from class 0 on: 'a' there, 'b' here"),
        ({"prefix": "test", "classes": "a\nb\nc\n"}, r"the test store has other classes .* \(3 against 2\): it alone has 'c'\. .* --classes FILE"),
        (
            {"prefix": "test", "seed": 7},
            r"(?s)the test image store was made by another recipe .* with the same artifact and options\. They differ in:\n  run\.seed: 0 -> 7$",
        ),
        ({"prefix": "test", "change": unlabelled}, "neither of the test stores has labels, so nothing can be scored"),
        ({"prefix": "train"}, r"80 samples of the test split are in the train split as well, for example 'train0' \(same id, same content\)"),
    ],
    ids=["reordered", "more classes", "seed", "unlabelled", "the same samples"],
)
def test_test_stores_that_do_not_fit_are_refused_before_anything_is_trained(
    options: dict[str, Any], message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    tests = stored(tmp_path / "a", taps=TWO, **options), stored(tmp_path / "b", kind="text", **{**options, "seed": 0})
    with pytest.raises(ProbeError, match=message):
        fuse(*pair, tmp_path / "out", image_tap="b1/t30", test_image=tests[0], test_text=tests[1])
    assert not (tmp_path / "out").exists()


def test_a_fusion_on_stores_of_their_own_says_of_what_it_is(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def some(rows: list[dict[str, Any]]) -> None:
        del rows[5]["labels"]

    tests = stored(tmp_path / "a", prefix="test", taps=TWO, change=some), stored(tmp_path / "b", prefix="test", change=unlabelled, kind="text")
    result = fuse(*pair, tmp_path / "out", image_tap="b1/t30", test_image=tests[0], test_text=tests[1], seed=3)
    assert result["rows"]["train"] + result["rows"]["validation"] == ROWS
    assert result["rows"]["test"] == 79
    assert result["left_out"]["test"]["whose labels are unknown"] == 1
    assert "79 samples joined by id; left out: 1 whose labels are unknown" in result["text"]
    fingerprints = {"image": Store.open(pair[0]).fingerprint, "text": Store.open(pair[1]).fingerprint}
    assert result["fingerprints"] == dict.fromkeys(("train", "validation", "test"), fingerprints)
    assert (result["classes"], result["seed"]) == (["a", "b"], 3)
    assert load_probe(result["classifier"]).metadata_ == {"taps": "b1/t30,b1/t30", "fingerprints": fingerprints}


def test_a_search_says_of_what_it_is(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = search(*pair, tmp_path / "out", seed=2)
    assert (result["seed"], result["classes"], sum(result["rows"].values())) == (2, ["a", "b"], ROWS)
    assert result["test"]["low"] <= result["test"]["value"] <= result["test"]["high"]
    assert f"on {result['rows']['test']} rows that no selection saw" in result["text"]
    assert result["fingerprints"]["image"] == Store.open(pair[0]).fingerprint
    assert json.loads(Path(result["metrics_file"]).read_text())["left_out"]["whose labels are unknown"] == 0


def ids_of(result: dict[str, Any]) -> dict[str, set[str]]:
    """What a result says of its splits, read from the file beside it."""
    by_id = read_splits(result["splits_file"])
    return {name: {id_ for id_, part in by_id.items() if part == name} for name in ("train", "validation", "test")}


def test_every_verb_holds_out_the_same_samples(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def fewer(rows: list[dict[str, Any]]) -> None:
        rows.reverse()
        del rows[40:50]

    text = stored(tmp_path / "fewer", prefix="train", kind="text", change=fewer)
    whole = ids_of(probe(pair[0], tmp_path / "probe", seed=2))
    fused = fuse(pair[0], text, tmp_path / "fuse", image_tap="b1/t30", seed=2)
    searched = search(pair[0], text, tmp_path / "search", seed=2)
    joined = set(Store.open(text).ids)
    assert ids_of(fused) == ids_of(searched) == {name: ids & joined for name, ids in whole.items()}
    assert sum(map(len, ids_of(fused).values())) == ROWS - 10
    for result in (fused, searched):
        assert result["split"]["parts"]["test"]["ids_sha256"] == ids_digest(sorted(whole["test"] & joined))
        assert result["split"]["version"] == "difffeat-split/1"


def test_the_splits_of_one_result_can_be_given_to_every_verb(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first = probe(pair[0], tmp_path / "probe", seed=5)
    file = Path(first["splits_file"])
    verbs: list[tuple[Callable[..., Any], tuple[Path, ...], dict[str, Any]]]
    verbs = [(probe, pair[:1], {}), (fuse, pair, {"image_tap": "b1/t30"}), (search, pair, {})]
    for verb, stores, options in verbs:
        again = verb(*stores, tmp_path / verb.__name__, seed=0, splits=file, **options)
        assert ids_of(again) == ids_of(first)
        assert again["split"]["rule"] == "the splits that were given"


def test_fusion_and_search_take_validation_and_test_stores(pair: tuple[Path, Path], tmp_path: Path) -> None:
    given = {}
    for part in ("validation", "test"):
        given |= {f"{part}_image": stored(tmp_path / f"{part}-a", prefix=part, taps=TWO)}
        given |= {f"{part}_text": stored(tmp_path / f"{part}-b", prefix=part, kind="text")}
    for verb, options in ((fuse, {"image_tap": "b1/t30"}), (search, {})):
        result = verb(*pair, tmp_path / verb.__name__, **given, **options)
        assert result["rows"] == {"train": ROWS, "validation": ROWS, "test": ROWS}
        assert ids_of(result)["test"] == {f"test{row}" for row in range(ROWS)}
    with pytest.raises(ConfigError, match="give both --validation-image and --validation-text, or neither"):
        fuse(*pair, tmp_path / "x", image_tap="b1/t30", validation_image=given["validation_image"])
    with pytest.raises(ConfigError, match="validation-a was given as --validation-image and as --test-image"):
        search(*pair, tmp_path / "x", **{**given, "test_image": given["validation_image"]})


def test_the_same_images_under_other_ids_are_refused_unless_allowed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tests = {"test_image": stored(tmp_path / "a", prefix="val2014-", taps=TWO, pictures="train")}
    tests["test_text"] = stored(tmp_path / "b", prefix="val2014-", kind="text")
    message = "80 samples of the test split are in the train split as well, for example 'val2014-0', which is 'train0' in train"
    for verb, options in ((fuse, {"image_tap": "b1/t30"}), (search, {})):
        with pytest.raises(ProbeError, match=message):
            verb(*pair, tmp_path / "out", **tests, **options)
        result = verb(*pair, tmp_path / "out", allow_shared=True, **tests, **options)
        assert result["split"]["allow_shared"]
        assert any(message[:40] in note for note in result["split"]["shared"])
        assert "were allowed" in result["text"]
    with pytest.raises(ProbeError, match=message):
        probe(pair[0], tmp_path / "out", test=tests["test_image"])


def test_stores_the_wrong_way_round_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    image, text = pair
    for stores, message in (
        ((text, image), "the stores are the wrong way round: .*text holds features of captions and .*image features of images"),
        ((image, image), "the image store and as the text store"),
        ((text, text), "the image store and as the text store"),
        ((image, stored(tmp_path / "copy", prefix="train")), "copy was given as the text store, but it holds features of images, as .*image does"),
        ((stored(tmp_path / "words", prefix="train", kind="text"), text), "words was given as the image store, but it holds features of captions"),
    ):
        for verb, options in ((fuse, {"image_tap": "b1/t30", "text_tap": "b1/t30"}), (search, {})):
            with pytest.raises((ProbeError, ConfigError), match=message):
                verb(*stores, tmp_path / "out", **options)


@pytest.mark.parametrize("verb", [probe, fuse, search])
def test_what_makes_no_sense_is_told_before_a_store_is_opened(verb: Callable[..., Any], tmp_path: Path) -> None:
    stores = [tmp_path / "none"] * (1 if verb is probe else 2)
    with pytest.raises(ConfigError, match=r"seed must lie in 0\.\.2\^63-1, got -1"):
        verb(*stores, tmp_path / "out", seed=-1)
    (tmp_path / "file").write_text("years of work")
    for output in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match=r"file is a file, so results cannot be written into .* Choose another -o"):
            verb(*stores, output)
    assert (tmp_path / "file").read_text() == "years of work"


def test_a_probe_counts_what_it_leaves_out(tmp_path: Path) -> None:
    def some(rows: list[dict[str, Any]]) -> None:
        for row in rows[:4]:
            row["labels"] = None

    result = probe(stored(tmp_path / "store", prefix="train", change=some), tmp_path / "out")
    assert result["left_out"] == {"train": {"in quarantine": 0, "whose labels are unknown": 4}}
    assert "left out of the train store: 4 whose labels are unknown" in result["text"]
    assert sum(split["rows"] for split in result["splits"].values()) == ROWS - 4
    assert "every sample has one class" not in result["text"]


def test_one_class_a_sample_gets_an_accuracy(tmp_path: Path) -> None:
    def single(rows: list[dict[str, Any]]) -> None:
        for number, row in enumerate(rows):
            row["labels"] = [f"class {number % 3}"]

    result = probe(stored(tmp_path / "store", prefix="train", change=single), tmp_path / "out")
    assert set(result["metrics"]["accuracy"]) == {"top1"}
    assert f"every sample has one class: top-1 {100 * result['metrics']['accuracy']['top1']:.2f}" in result["text"]


def test_no_result_writes_over_another(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "probe.safetensors").write_bytes(b"somebody's")
    (out / "metrics-2.json").write_text("somebody's")
    result = probe(pair[1], out)
    assert (Path(result["metrics_file"]).name, Path(result["classifier"]).name) == ("metrics-3.json", "probe-3.safetensors")
    assert (out / "probe.safetensors").read_bytes() == b"somebody's"


@pytest.mark.parametrize(
    ("taps", "message"), [("", "--taps names no tap. "), (" , ", "--taps names no tap. "), ("b9/t30", "has no tap 'b9/t30'; it has b1/t30, b2/t30")]
)
def test_taps_that_are_not_there_are_told_with_those_that_are(taps: str, message: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        probe(pair[0], tmp_path / "out", taps=taps)
    with pytest.raises(ConfigError, match="has no tap 'b9/t30'"):
        fuse(*pair, tmp_path / "out", image_tap="b9/t30")


def test_a_search_gives_the_same_with_little_memory(pair: tuple[Path, Path]) -> None:
    whole = Split.whole(*map(Store.open, pair))
    train, held = Split(whole.joined, whole.rows[:50]), Split(whole.joined, whole.rows[50:])
    found = []
    for limit in (0, 4 * 50 * 5, 2**30):
        evaluator = TapEvaluator(train, held, held_bytes=limit)
        pairs = [evaluator.pair(tap, "b1/t30") for tap in ("b1/t30", "b2/t30")]
        found.append((evaluator.image(1, 30), evaluator.image(2, 30), evaluator.text(1, 30), *pairs))
    assert found[0] == found[1] == found[2]
    with pytest.raises(ProbeError, match="50 samples of the validation split are in the train split as well"):
        TapEvaluator(train, whole)


def test_what_was_used_longest_ago_leaves_memory_first() -> None:
    held = Held(limit=3 * 40)
    parts = {name: np.full((2, 5), number, np.float16) for number, name in enumerate("abcd")}
    for name in "abca":
        held.get(name, parts[name])
    held.get("d", parts["d"])
    changed = np.full((2, 5), -1, np.float16)
    assert {name: bool((np.asarray(held.get(name, changed)) >= 0).all()) for name in "acd"} == {"a": True, "c": True, "d": True}
    assert (np.asarray(held.get("b", changed)) == -1).all()


def test_a_saved_fusion_is_applied_to_the_features_that_it_was_fitted_on(pair: tuple[Path, Path], tmp_path: Path) -> None:
    image, text = map(Store.open, pair)
    fitted = load_probe(fuse(*pair, tmp_path / "out", image_tap="b2/t30")["classifier"])
    joined = join(image, text)
    scores = fitted.decision_function(joined.features("b2/t30", "b1/t30"))
    with pytest.raises(ProbeError, match="this probe was fitted on other image features: these are of tap b1/t30, not b2/t30"):
        fitted.decision_function(joined.features("b1/t30", "b1/t30"))
    other = Store.open(stored(tmp_path / "other", prefix="train", taps=TWO, seed=9))
    with pytest.raises(ProbeError, match=r"these are of a store of recipe [0-9a-f]{12}, not [0-9a-f]{12}\. Give it the tap and recipe"):
        fitted.decision_function(join(other, text).features("b2/t30", "b1/t30"))
    with pytest.raises(ProbeError, match="the halves are the wrong way round: the first holds features of captions"):
        PairedFeatures(text["b1/t30"], image["b2/t30"])
    with pytest.raises(ProbeError, match="the second half holds features of images"):
        PairedFeatures(image["b1/t30"], image["b2/t30"])
    arrays = [
        np.asarray(store[tap], np.float32)[rows] for store, tap, rows in ((image, "b2/t30", joined.image_rows), (text, "b1/t30", joined.text_rows))
    ]
    np.testing.assert_array_equal(fitted.decision_function(PairedFeatures(*arrays)), scores)


def test_a_saved_probe_is_applied_to_the_features_that_it_was_fitted_on(pair: tuple[Path, Path], tmp_path: Path) -> None:
    fitted = load_probe(probe(pair[0], tmp_path / "out", taps="b2/t30")["classifier"])
    store = Store.open(pair[0])
    fitted.decision_function(store["b2/t30"])
    with pytest.raises(ProbeError, match="this probe was fitted on other features: these are of tap b1/t30, not b2/t30"):
        fitted.decision_function(store["b1/t30"])
    with pytest.raises(ProbeError, match="and of a store of recipe"):
        fitted.predict(Store.open(pair[1])["b1/t30"])


def one_class(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["labels"] = ["a"]


def none_positive(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["labels"] = []


@pytest.mark.parametrize(
    ("change", "message"),
    [(one_class, "rows have the same labels \\('a'\\), so nothing tells them apart"), (none_positive, "no class has a positive among the")],
)
def test_labels_that_tell_nothing_apart_are_refused(change: Change, message: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    store = stored(tmp_path / "store", prefix="train", change=change, classes="a\nb\n")
    text = stored(tmp_path / "words", prefix="train", change=change, classes="a\nb\n", kind="text")
    for work in (lambda: probe(store, tmp_path / "o"), lambda: fuse(store, text, tmp_path / "o"), lambda: search(store, text, tmp_path / "o")):
        with pytest.raises(ProbeError, match=message):
            work()


def test_ap_by_class_stands_in_text_in_json_and_in_csv(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def rare(rows: list[dict[str, Any]]) -> None:
        rows[0]["labels"] = ["a", "c"]

    store = stored(tmp_path / "store", prefix="train", change=rare, classes="a\nb\nc\n")
    text = stored(tmp_path / "words", prefix="train", change=rare, classes="a\nb\nc\n", kind="text")
    seed = next(seed for seed in range(9) if split_rows(np.ones((ROWS, 1)), ids=Store.open(store).ids, seed=seed)["train"][0] == 0)
    for result in (probe(store, tmp_path / "probe", seed=seed), fuse(store, text, tmp_path / "fuse", seed=seed)):
        assert "mAP is over 2 of 3 classes; none positive in test: 'c'" in result["text"]
        assert "by class (positives in test), over 2 of 3 classes: " in result["text"]
        assert [entry["class"] for entry in result["per_class"]] == ["a", "b", "c"]
        assert result["per_class"][2]["positives"] == 0
        assert set(result["per_class"][2]["AP"].values()) == {None}
        table = Path(result["per_class_file"]).read_text().splitlines()
        assert table[0].startswith("class,positives,rows,share,AP ")
        assert [line.split(",")[0] for line in table[1:]] == ["a", "b", "c"]
