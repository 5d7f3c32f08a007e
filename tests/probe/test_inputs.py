"""Features and labels in whatever form scikit-learn's and torch's users hold them are read rightly, or refused by an error that is a ValueError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sparse

from difffeat.errors import ProbeError
from difffeat.probe.fusion import PairedFeatures
from difffeat.probe.labels import read_labels
from difffeat.probe.linear import LinearProbe
from difffeat.probe.logistic import LogisticProbe
from difffeat.probe.ridge import RidgeProbe
from difffeat.probe.standardize import Standardizer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype(np.float16).astype(np.float64)
Y = (X[:, 0] + 0.3 * RNG.normal(size=60) > 0).astype(int)
HOT = (X[:, :3] + 0.3 * RNG.normal(size=(60, 3)) > 0).astype(int)
WORDS = np.array(["no", "yes"])


def torch() -> Any:
    return pytest.importorskip("torch")


def pandas() -> Any:
    return pytest.importorskip("pandas")


FEATURES: dict[str, Callable[[], Any]] = {
    "float16": lambda: X.astype(np.float16),
    "long double": lambda: X.astype(np.longdouble),
    "big-endian": lambda: X.astype(">f4"),
    "columns first": lambda: np.asfortranarray(X),
    "a view": lambda: np.repeat(np.repeat(X, 2, axis=0), 2, axis=1)[::2, ::2],
    "read-only": lambda: np.frombuffer(X.tobytes()).reshape(X.shape),
    "objects": lambda: X.astype(object),
    "lists": lambda: X.tolist(),
    "masked, nothing missing": lambda: np.ma.array(X, mask=np.zeros(X.shape, bool)),
    "sparse matrix": lambda: sparse.csr_matrix(X),
    "sparse array by columns": lambda: sparse.csc_array(X),
    "sparse by coordinates": lambda: sparse.coo_matrix(X),
    "tensor": lambda: torch().tensor(X),
    "tensor with gradients": lambda: torch().tensor(X, requires_grad=True),
    "half tensor": lambda: torch().tensor(X).half(),
    "parameter": lambda: torch().nn.Parameter(torch().tensor(X)),
    "transposed tensor": lambda: torch().tensor(X.T.copy()).T,
    "sparse tensor": lambda: torch().tensor(X).to_sparse(),
    "a list of tensors": lambda: [torch().tensor(row, requires_grad=True) for row in X],
    "data frame": lambda: pandas().DataFrame(X, columns=list("abcd")),
    "nullable data frame": lambda: pandas().DataFrame(X, columns=list("abcd")).convert_dtypes(),
    "numbers as text in a data frame": lambda: pandas().DataFrame(X).astype(str).astype(object),
}


@pytest.mark.parametrize("form", FEATURES)
def test_the_same_features_in_another_form_give_the_same_probe(form: str) -> None:
    given = FEATURES[form]()
    for probe in (RidgeProbe(alphas=[0.1]), LinearProbe(epochs=2, lr=0.1), LogisticProbe(c=1.0)):
        expected = probe.fit(X, Y).decision_function(X)
        np.testing.assert_allclose(probe.fit(given, Y).decision_function(given), expected, atol=1e-5)


def test_bfloat16_tensors_lose_their_own_precision_only() -> None:
    given = torch().tensor(X).bfloat16()
    probe = RidgeProbe(alphas=[0.1]).fit(given, torch().tensor(Y).bfloat16())
    np.testing.assert_allclose(probe.decision_function(given), RidgeProbe(alphas=[0.1]).fit(X, Y).decision_function(X), atol=0.02)


def test_a_memory_map_is_read_where_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    given = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(RidgeProbe(alphas=[1.0]).fit(given, Y).weights_, RidgeProbe(alphas=[1.0]).fit(X, Y).weights_)


@pytest.mark.parametrize("change", [lambda x: x * 1e39, lambda x: x * 1e-39, lambda x: x * 1e140, lambda x: x + 1e9, lambda x: 1.7e9 + x * 10])
def test_features_beyond_float32_are_standardised_in_their_own_type(change: Callable[[np.ndarray], np.ndarray]) -> None:
    x = change(X)
    np.testing.assert_allclose(
        RidgeProbe(alphas=[0.1]).fit(x, Y).decision_function(x), RidgeProbe(alphas=[0.1]).fit(X, Y).decision_function(X), atol=1e-4
    )


def test_float32_features_near_the_smallest_are_no_constants() -> None:
    x = (X * 1e-36).astype(np.float32)
    fitted = Standardizer.fit(x)
    np.testing.assert_allclose(fitted.transform(x), (X - X.mean(axis=0)) / X.std(axis=0), atol=1e-4)


HOLE = np.where(np.arange(240).reshape(60, 4) == 17, np.nan, X)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "NaN": (lambda: HOLE, "the features of row 4 hold NaN or infinity"),
    "infinity": (lambda: np.where(np.isnan(HOLE), np.inf, HOLE), "the features of row 4 hold NaN or infinity"),
    "sparse NaN": (lambda: sparse.csr_matrix(HOLE), "the features of row 4 hold NaN or infinity"),
    "a hole in a data frame": (lambda: pandas().DataFrame(HOLE).convert_dtypes(), "the features of row 4 hold NaN or infinity"),
    "None among objects": (lambda: [[None if v != v else v for v in row] for row in HOLE.tolist()], "the features of row 4 hold NaN or infinity"),
    "masked": (lambda: np.ma.array(X, mask=np.isnan(HOLE)), "1 values of the features are masked"),
    "one dimension": (lambda: X[:, 0], "Expected 2D array, got 1D array"),
    "a series": (lambda: pandas().Series(X[:, 0]), "Expected a 2-dimensional container"),
    "three dimensions": (lambda: X[:, :, None], r"a probe needs features \[n, D\], got shape \[60, 4, 1\]"),
    "complex": (lambda: X + 1j, "Complex data not supported"),
    "complex tensor": (lambda: torch().tensor(X + 1j), "Complex data not supported"),
    "words": (lambda: X.astype(str), "not compatible with arrays of bytes/strings"),
    "words in a data frame": (lambda: pandas().DataFrame({"a": WORDS[Y]}), "could not convert string"),
    "categories": (lambda: pandas().DataFrame({"a": pandas().Categorical(WORDS[Y]), "b": Y}), "could not convert string"),
    "times": (lambda: np.full((60, 4), "2020", "M8[Y]"), "features must be numbers, got datetime64"),
    "times in a data frame": (lambda: pandas().DataFrame({"a": pandas().date_range("2020", periods=60)}), "times are no numbers"),
    "fields": (lambda: np.zeros(60, [("a", float)]), "features must be numbers, got"),
    "no rows": (lambda: X[:0], r"0 sample\(s\)"),
    "no columns": (lambda: X[:, :0], r"0 feature\(s\)"),
    "lists of several lengths": (lambda: [[1, 2], [3]] * 30, "inhomogeneous"),
    "a generator": (lambda: (row for row in X), "got scalar array instead"),
    "nothing": (lambda: None, "got scalar array instead"),
    "1e300": (lambda: X * 1e300, "features of 1e150 and more cannot be standardised"),
    "a tensor without memory": (lambda: torch().empty(60, 4, device="meta"), "a tensor that cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
@pytest.mark.parametrize("probe", [RidgeProbe(alphas=[0.1]), LinearProbe(epochs=2, lr=0.1), LogisticProbe(c=1.0)], ids=["ridge", "adam", "logistic"])
def test_features_that_are_none_are_refused(form: str, probe: Any) -> None:
    make, message = REFUSED[form]
    given = make()
    with pytest.raises(ProbeError, match=message) as caught:
        probe.fit(given, Y)
    assert isinstance(caught.value, ValueError)


def test_what_is_too_large_for_a_fitted_probe_is_said() -> None:
    probe = RidgeProbe(alphas=[0.1]).fit(X.astype(np.float32), Y)
    with pytest.raises(ProbeError, match="a feature is too large to be read as float32"):
        probe.predict(X * 1e200)


SINGLE: dict[str, tuple[Callable[[], Any], list[Any]]] = {
    "numbers": (lambda: Y, [0, 1]),
    "truth values": (lambda: Y > 0, [False, True]),
    "minus one and one": (lambda: 2 * Y - 1, [-1, 1]),
    "gaps": (lambda: np.array([5, 10**9])[Y], [5, 10**9]),
    "negative": (lambda: np.array([-7, 3])[Y], [-7, 3]),
    "whole floats": (lambda: Y.astype(np.float16), [0.0, 1.0]),
    "words": (lambda: WORDS[Y], ["no", "yes"]),
    "objects": (lambda: WORDS[Y].astype(object), ["no", "yes"]),
    "a list of words": (lambda: WORDS[Y].tolist(), ["no", "yes"]),
    "numpy's text type": (lambda: WORDS[Y].astype(np.dtypes.StringDType()), ["no", "yes"]),
    "tensor": (lambda: torch().tensor(Y), [0, 1]),
    "bfloat16 tensor": (lambda: torch().tensor(Y).bfloat16(), [0.0, 1.0]),
    "a list of tensors": (lambda: list(torch().tensor(Y)), [0, 1]),
    "categories": (lambda: pandas().Series(WORDS[Y], dtype="category"), ["no", "yes"]),
    "text series": (lambda: pandas().Series(WORDS[Y], dtype="string"), ["no", "yes"]),
    "nullable integers": (lambda: pandas().Series(Y, dtype="Int64"), [0, 1]),
    "nullable truth values": (lambda: pandas().Series(Y > 0, dtype="boolean"), [False, True]),
    "a series in another order": (lambda: pandas().Series(Y, index=np.arange(60)[::-1]), [0, 1]),
    "big-endian": (lambda: Y.astype(">i4"), [0, 1]),
}


@pytest.mark.parametrize("form", SINGLE)
def test_single_labels_of_any_kind_are_answered_in_kind(form: str) -> None:
    make, classes = SINGLE[form]
    given = make()
    probe = RidgeProbe(alphas=[0.1]).fit(X, given)
    assert list(probe.classes_) == classes
    expected = RidgeProbe(alphas=[0.1]).fit(X, Y)
    assert probe.predict(X).tolist() == np.array(classes)[expected.predict(X)].tolist()
    assert probe.score(X, given) == expected.score(X, Y)


MULTI: dict[str, Callable[[], Any]] = {
    "truth values": lambda: HOT > 0,
    "floats": lambda: HOT.astype(float),
    "lists": lambda: HOT.tolist(),
    "objects": lambda: HOT.astype(object),
    "sparse": lambda: sparse.csr_matrix(HOT),
    "bfloat16 tensor": lambda: torch().tensor(HOT).bfloat16(),
    "data frame": lambda: pandas().DataFrame(HOT, columns=list("abc")),
    "nullable data frame": lambda: pandas().DataFrame(HOT > 0).astype("boolean"),
}


@pytest.mark.parametrize("form", MULTI)
def test_multi_hot_labels_are_read_in_any_form(form: str) -> None:
    given, expected = MULTI[form](), RidgeProbe(alphas=[0.1]).fit(X, HOT)
    probe = RidgeProbe(alphas=[0.1]).fit(X, given)
    np.testing.assert_array_equal(probe.weights_, expected.weights_)
    assert probe.score(X, given) == expected.score(X, HOT)


NO_LABELS: dict[str, tuple[Callable[[], Any], str]] = {
    "fractions": (lambda: X[:, 0], "Unknown label type: continuous"),
    "NaN": (lambda: np.where(Y, np.nan, 0), "Input y contains NaN or infinity"),
    "None": (lambda: [None, *WORDS[Y[1:]]], "the label of row 0 is missing"),
    "a hole in a series": (lambda: pandas().Series([None, *Y[1:]], dtype="Int64"), "NaN or infinity, first in row 0|row 0 is missing"),
    "masked": (lambda: np.ma.array(Y, mask=X[:, 0] > 0), "values of the labels are masked"),
    "one class": (lambda: np.zeros(60), "contains only one class: 0"),
    "complex": (lambda: Y + 1j, "Unknown label type: complex128"),
    "bytes": (lambda: np.array([b"a", b"b"])[Y], r"Unknown label type: \|S1"),
    "times": (lambda: np.array(["2020", "2021"], "M8[Y]")[Y], "Unknown label type: datetime64"),
    "words and numbers": (lambda: ["a", 1] * 30, "labels mix texts with other things"),
    "objects of two kinds": (lambda: np.array(["a", 1] * 30, object), "labels mix int, str"),
    "fields": (lambda: np.zeros(60, [("a", int)]), "labels have the fields a"),
    "too few": (lambda: Y[:-1], "60 rows of features but 59 of labels"),
    "none": (list, r"0 sample\(s\)"),
    "a mapping": (lambda: {0: 1}, "labels must be a list or an array, got dict"),
    "sets": (lambda: [{"a"}, {"b"}] * 30, "MultiLabelBinarizer"),
    "lists of several lengths": (lambda: [["a"], ["a", "b"]] * 30, "MultiLabelBinarizer"),
    "soft": (lambda: HOT * 0.7, "labels must be 0 or 1; found 0.7"),
    "multi-hot NaN": (lambda: np.where(HOT, np.nan, 0), "labels must be 0 or 1; found nan"),
    "multi-hot text": (lambda: HOT.astype(str), "labels must be 0 or 1"),
    "minus one for absent": (lambda: 2 * HOT - 1, "labels hold -1 and 1 but no 0. Here -1 means unknown, not absent: pass labels > 0"),
    "nothing known": (lambda: HOT * 0 - 1, "all labels are -1, unknown"),
    "nothing positive": (lambda: HOT * 0, "no label is positive: nothing can be learned"),
    "three dimensions": (lambda: HOT[:, :, None], r"multi-hot \[n, C\], got shape \[60, 3, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("form", NO_LABELS)
def test_labels_that_are_none_are_refused(form: str) -> None:
    make, message = NO_LABELS[form]
    given = make()
    for probe in (RidgeProbe(alphas=[0.1]), LinearProbe(epochs=2, lr=0.1)):
        with pytest.raises(ProbeError, match=message) as caught:
            probe.fit(X, given)
        assert isinstance(caught.value, ValueError)


def test_a_class_number_is_never_taken_for_a_number_of_classes() -> None:
    from difffeat.probe.data import one_hot

    numbers = np.array([3, 10**9])[Y]
    assert read_labels(numbers).positive.shape == (60, 1)
    with pytest.raises(ProbeError, match="label 1000000000 was found, but there are 3 classes"):
        RidgeProbe(alphas=[1.0]).fit(X, numbers, classes=("a", "b", "c"))
    with pytest.raises(ProbeError, match="label 1000000000 of 60 samples is no class number counted from 0"):
        one_hot(numbers)
    with pytest.raises(ProbeError, match="200000 classes for 200000 samples are too many to tell apart"):
        read_labels(np.arange(200_000) * 7)


def test_names_of_classes_are_texts_and_each_is_one_class() -> None:
    for classes, message in (
        (("a", "b", "a"), "two classes have the name 'a'"),
        ((1, 2, 3), "names of classes must be texts, got 1"),
        (("a", None, "c"), "names of classes must be texts, got None"),
        ("abc", "classes must be a list of names, got the single text 'abc'"),
        (("a", "b"), "there are 2 names for 3 classes"),
    ):
        with pytest.raises(ProbeError, match=message):
            RidgeProbe(alphas=[1.0]).fit(X, HOT, classes=classes)  # pyright: ignore[reportArgumentType]
    fitted = RidgeProbe(alphas=[1.0]).fit(X, HOT, classes=np.array(["a", "b", "c"]))  # pyright: ignore[reportArgumentType]
    assert fitted.classes_ == ("a", "b", "c")


def test_named_classes_take_their_numbers_or_their_names() -> None:
    numbers = np.digitize(X[:, 0], [-0.5, 0.5])
    by_number = RidgeProbe(alphas=[1.0]).fit(X, numbers, classes=("low", "mid", "high"))
    by_name = RidgeProbe(alphas=[1.0]).fit(X, np.array(["low", "mid", "high"])[numbers], classes=("low", "mid", "high"))
    np.testing.assert_array_equal(by_number.weights_, by_name.weights_)
    assert by_number.predict(X).shape == (60, 3)
    assert by_number.score(X, numbers) == by_number.score(X, np.eye(3)[numbers])
    with pytest.raises(ProbeError, match="label 'huge' was found, but it is not one of the 3 classes"):
        RidgeProbe(alphas=[1.0]).fit(X, ["huge"] * 60, classes=("low", "mid", "high"))


def test_halves_of_a_pair_are_read_in_any_form() -> None:
    image, text = X[:, :2], X[:, 2:]
    expected = PairedFeatures(image, text)[:]
    forms: list[Any] = [list, pandas().DataFrame, sparse.csr_matrix, torch().tensor]
    for make in forms:
        np.testing.assert_allclose(PairedFeatures(make(image), make(text))[np.arange(60)], expected)
    with pytest.raises(ProbeError, match="the features of texts are no array"):
        PairedFeatures(image, [[1.0], [1.0, 2.0]] * 30)  # pyright: ignore[reportArgumentType]


def test_scoring_with_labels_of_another_kind_or_number_is_refused() -> None:
    probe = RidgeProbe(alphas=[0.1]).fit(X, Y)
    assert probe.score(X, Y + 5) == 0
    for labels in (Y[:5], Y.astype(str)):
        with pytest.raises(ProbeError, match=r"another number of labels|give labels of the same kind"):
            probe.score(X, labels)
    with pytest.raises(ProbeError, match="another number of labels"):
        RidgeProbe(alphas=[0.1]).fit(X, HOT).score(X, HOT[:5])
    with pytest.raises(ProbeError, match="the 30 validation rows are all of one class"):
        RidgeProbe().fit(X, Y, validation=(X[:30], np.ones(30, int)))
