"""The drawing in the docstring of `difffeat.errors` is the truth that users read; the classes must be what it shows."""

from __future__ import annotations

import inspect
import re

import pytest

from difffeat import errors

LINE = re.compile(r"^    (?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+) +(?:exit code )?(?P<code>\d?)(?P<words>.*)$")


def drawn() -> dict[str, tuple[str | None, int]]:
    """Class name -> (parent's name, exit code), read off the drawing."""
    tree: dict[str, tuple[str | None, int]] = {}
    path: list[str] = []
    assert errors.__doc__
    for line in errors.__doc__.splitlines():
        if (match := LINE.match(line)) is None:
            continue
        depth = len(match["branch"]) // 4
        path = [*path[:depth], match["name"]]
        tree[match["name"]] = (path[depth - 1] if depth else None, int(match["code"] or 1))
    return tree


def classes() -> dict[str, type[errors.DifffeatError]]:
    return {name: member for name, member in vars(errors).items() if inspect.isclass(member) and issubclass(member, errors.DifffeatError)}


def test_the_drawing_holds_exactly_the_classes() -> None:
    assert sorted(drawn()) == sorted(classes())
    assert len(drawn()) > 30


@pytest.mark.parametrize("name", sorted(classes()))
def test_parent_and_exit_code_are_as_drawn(name: str) -> None:
    found, (parent, code) = classes()[name], drawn()[name]
    assert found.__bases__[0].__name__ == (parent or "Exception")
    assert found.exit_code == code


def test_errors_that_python_programs_expect_are_what_they_expect() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.MissingExtra, ImportError)
    assert issubclass(errors.StoreWriteError, OSError)
    assert issubclass(errors.OutputError, OSError)


def test_codes_of_success_are_not_those_of_an_error() -> None:
    assert {errors.EXIT_OK, errors.EXIT_QUARANTINE} == {0, 3}
    assert {0, 3}.isdisjoint(error.exit_code for error in classes().values())


def test_a_missing_extra_prints_the_command_that_mends_it() -> None:
    error = errors.MissingExtra("onnxruntime", "cpu", "The engine 'ort'")
    assert str(error) == "The engine 'ort' needs onnxruntime, which is not installed. Run: pip install 'difffeat[cpu]' -c constraints.txt"
    assert (error.library, error.extra) == ("onnxruntime", "cpu")
