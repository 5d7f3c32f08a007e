"""An artifact's place: what may be written there, one writer at a time, nothing left by an error, files that the umask lets others read."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from difffeat.errors import ConfigError, OutputError, ParityError, StoreLocked
from difffeat.workflows.staging import check_place, install, replace_folder, staging_folder
from tests.artifacts import export_named

PASSED = SimpleNamespace(passed=True, require=lambda: None)


def make(out: Path, content: str = "new", overwrite: bool = False, parity: SimpleNamespace = PASSED) -> None:
    with staging_folder(out, overwrite) as staging:
        (staging / "model.onnx").write_text(content)
        install(staging, out, parity)


def fail(out: Path, error: BaseException) -> None:
    with staging_folder(out, True) as staging:
        (staging / "model.onnx").write_text("half")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_made_gets_its_name_and_leaves_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "out")
    make(tmp_path / "out", "newer", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["model.onnx"]
    assert (tmp_path / "out" / "model.onnx").read_text() == "newer"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError, SystemExit])
def test_an_error_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with pytest.raises(error):
        fail(tmp_path / "out", error())
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.onnx").read_text() == "old"


def test_two_at_once_do_not_destroy_each_others_work(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "out", True) as staging:
        (staging / "model.onnx").write_text("first")
        with pytest.raises(StoreLocked, match=r"another process makes .*out: .*out\.partial is being written by process"):
            make(tmp_path / "out", "second", overwrite=True)
        assert (staging / "model.onnx").read_text() == "first"
        install(staging, tmp_path / "out", PASSED)
        make(tmp_path / "out", "third", overwrite=True)  # the name is free again
    assert (tmp_path / "out" / "model.onnx").read_text() == "third"
    assert names(tmp_path) == ["out"]


def test_a_killed_run_does_not_block_the_next(tmp_path: Path) -> None:
    code = "import os, sys, pathlib\nfrom difffeat.workflows.staging import staging_folder\n"
    code += "with staging_folder(pathlib.Path(sys.argv[1]), False) as s:\n    (s / 'model.onnx').write_text('half')\n    os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert names(tmp_path / "out.partial") == ["lock", "model.onnx"]
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("taken", ["out.partial", "out.replaced"])
def test_a_users_folder_of_such_a_name_is_not_touched(taken: str, tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / taken).mkdir()
    (tmp_path / taken / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=f"{taken}.*holds something else"):
        make(tmp_path / "out", overwrite=True)
    assert (tmp_path / taken / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("before", [True, False])
def test_a_link_stays_a_link(before: bool, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    if before:
        make(tmp_path / "disk" / "art")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "art")
    for content in ("one", "two"):
        make(tmp_path / "out", content, overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "art" / "model.onnx").read_text() == "two"
    assert names(tmp_path) == ["disk", "out"]
    assert names(tmp_path / "disk") == ["art"]


def test_places_that_cannot_be_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    make(tmp_path / "art")
    for out, words in (
        (tmp_path / "file", "file is a file, and an artifact is a folder"),
        (tmp_path / "file" / "deep" / "out", "file, where -o .*deep/out would lie, is a file"),
        (tmp_path / "art" / "sub", "which this command reads, or lies within it"),
        (tmp_path / "art", "which this command reads"),
        (tmp_path, "which this command reads"),
        (Path(".."), "has no name of its own"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_place(out, True, tmp_path / "art")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_a_full_disk_names_the_place(number: int, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=rf"writing .*out failed: /x/model\.onnx: {os.strerror(number)}\. .*free space"):
        fail(tmp_path / "out", OSError(number, os.strerror(number), "/x/model.onnx"))
    assert not names(tmp_path)


def test_what_fails_parity_is_kept_under_another_name(tmp_path: Path) -> None:
    def require() -> None:
        raise ParityError("features differ.")

    with pytest.raises(ParityError, match=r"kept at .*out\.failed"):
        make(tmp_path / "out", parity=SimpleNamespace(passed=False, require=require))
    assert names(tmp_path) == ["out.failed"]
    with staging_folder(tmp_path / "out", False) as staging:
        replace_folder(staging, tmp_path / "out.failed")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_every_file_of_an_artifact_has_the_rights_that_the_umask_gives(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        export_named("sweep", tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {mode}
