"""Patterns name exactly the files that they seem to name, and those that are missing are listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from difffeat.errors import SourceError
from difffeat.runtime.blobs import FileBlob, UrlBlob
from difffeat.runtime.places import blob_at, expand, is_pattern, parent, path_of, suffix_of


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{000..002}", ["000", "001", "002"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("x{,y}", ["x", "xy"]),
    ],
)
def test_braces_name_files_in_the_order_they_are_written(pattern: str, names: list[str]) -> None:
    assert expand(f"s3://bucket/{pattern}.tar") == [f"s3://bucket/{name}.tar" for name in names]


def test_missing_members_are_named(tmp_path: Path) -> None:
    for number in (0, 2, 3):
        (tmp_path / f"{number:02d}.tar").touch()
    with pytest.raises(SourceError, match=r"2 of the 5 files of .* do not exist: .*01.tar, .*04.tar. Get them, or narrow the pattern."):
        expand(f"{tmp_path}/{{00..04}}.tar")


def test_stars_are_sorted_and_must_match(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    with pytest.raises(SourceError, match=r"no file matches .*\*.csv"):
        expand(f"{tmp_path}/*.csv")


def test_a_file_of_that_very_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "{a,b}.csv").touch()
    assert not is_pattern(f"{tmp_path}/{{a,b}}.csv")
    assert is_pattern(f"{tmp_path}/{{a,c}}.csv")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{5..3}.tar", "runs backwards"),
        ("{0..9999999999}.tar", "names more than 1000000 files"),
        ("{0..999}{0..999}{0..9}.tar", "names 10000000 files, more than 1000000"),
    ],
)
def test_absurd_patterns_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        expand(pattern)


def test_below_a_url_no_name_is_a_path_of_this_machine() -> None:
    assert blob_at("s3://b/data", "/etc/a.png") == UrlBlob("s3://b/data/etc/a.png")
    assert blob_at("s3://b/data", "https://h/a.png") == UrlBlob("https://h/a.png")
    assert blob_at("data", "a.png") == FileBlob("data", "a.png")
    assert blob_at("data", "s3://b/a.png") == UrlBlob("s3://b/a.png")


def test_a_urls_query_belongs_to_no_name() -> None:
    assert suffix_of("https://h/a.CSV?download=1") == ".csv"
    assert path_of("https://h/x/a.tar?x=b.c") == "/x/a.tar"
    assert (parent("s3://b/x/a.csv"), parent("a.csv"), parent("/x/a.csv")) == ("s3://b/x", ".", "/x")
