"""Settings of probes reach the method that takes them, and no other."""

from __future__ import annotations

import pytest

from difffeat.errors import ConfigError
from difffeat.workflows.probe_options import ProbeOptions, methods_asked


def test_each_method_gets_its_own() -> None:
    options = ProbeOptions(lr="1e-3, 1e-2", epochs=3, alphas="0.5", c=2.0)
    assert options.settings("adam") == {"lr": (1e-3, 1e-2), "epochs": 3}
    assert options.settings("ridge") == {"alphas": (0.5,)}
    assert options.settings("logistic") == {"c": 2.0}
    assert ProbeOptions(lr="0.01").settings("adam") == {"lr": 0.01}


@pytest.mark.parametrize(
    ("options", "methods", "message"),
    [
        ({"alphas": "1"}, ("adam",), "--alphas is for --method ridge, and --method is adam: adam takes --lr, --epochs, --batch-size"),
        ({"lr": "1"}, ("ridge",), "--lr is for --method adam, and --method is ridge: ridge takes --alphas"),
        ({"c": 1.0}, ("adam", "ridge"), "--c is for --method logistic, and --method is adam,ridge"),
        ({"weight_decay": 0.0}, ("logistic",), "--weight-decay is for --method adam"),
        ({"loss": "bce"}, ("ridge", "logistic"), "--loss is for --method adam"),
    ],
)
def test_what_no_method_takes_is_refused_by_name(options: dict[str, object], methods: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProbeOptions(**options).require(methods)  # type: ignore[arg-type]
    ProbeOptions(**options).require(("adam", "ridge", "logistic"))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "fast", "1e-3,", "0", "-1", "nan", "1,inf"])
def test_numbers_are_numbers_above_0(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--lr takes (a number|numbers above 0)"):
        ProbeOptions(lr=text).settings("adam")
    with pytest.raises(ConfigError, match=r"--alphas takes (a number|numbers above 0)"):
        ProbeOptions(alphas=text).settings("ridge")


def test_methods_are_known_and_stand_once() -> None:
    assert methods_asked("ridge, adam,ridge") == ("ridge", "adam")
    for text in ("", " , ", "sgd", "adam,Ridge"):
        with pytest.raises(ConfigError, match=r"--method takes adam, ridge, logistic; got"):
            methods_asked(text)
