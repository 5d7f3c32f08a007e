"""Results are whole files, never over older ones, and what the system refuses is told with the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from difffeat.errors import ConfigError, OutputError
from difffeat.probe.output import check_folder, replace_bytes, write_fresh


def test_files_that_belong_together_have_one_number(tmp_path: Path) -> None:
    (tmp_path / "probe-2.bin").write_bytes(b"old")
    names = [write_fresh(tmp_path / "metrics.json", b"new", ["probe.bin"]).name for _ in range(3)]
    assert names == ["metrics.json", "metrics-3.json", "metrics-4.json"]


def test_a_file_that_is_refused_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(OutputError, match=r"file/metrics\.json could not be written: .*/file: File exists"):
        write_fresh(tmp_path / "file/metrics.json", b"new")
    with pytest.raises(OutputError, match=r"file/probe could not be written: .*/file: File exists"):
        replace_bytes(tmp_path / "file/probe", b"new")
    with pytest.raises(ConfigError, match="is a folder; name a file in it"):
        replace_bytes(tmp_path, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    for folder in (tmp_path, tmp_path / "new/newer"):
        check_folder(folder)
    with pytest.raises(ConfigError, match="file is a file, so results cannot be written into"):
        check_folder(tmp_path / "file/new")
