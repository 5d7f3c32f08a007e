"""What a user sees when something goes wrong in the middle: what happened, what is kept, and what to type next. The real command throughout."""

from __future__ import annotations

import importlib.metadata
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from difffeat.cli import main
from difffeat.runtime.store import Store, verify
from tests.artifacts import exported
from tests.runtime.fake import encoded, folder_of_images, tree

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_images(tmp_path_factory.mktemp("source") / "images", 60)


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    return ["extract", str(exported("image").path), str(images), "-o", str(out), "--batch-size", "2", "--shard-size", "4", "--threads", "1", *more]


def command(images: Path, out: Path) -> list[str]:
    """Each image many times over, so that a stop after the first shards falls into the middle however late it comes."""
    return [sys.executable, "-m", "difffeat.cli", *arguments(images, out, "--draws", "96")]


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(command(images, out), check=True, capture_output=True, cwd=ROOT)
    return tree(out)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert path.exists()


def goes_on(images: Path, out: Path, whole: dict[str, str]) -> None:
    """The same command again ends in the same bytes, from what was kept."""
    kept = Store.open(out, partial=True).finished_shards if (out / "manifest.json").exists() else 0
    again = subprocess.run(command(images, out), check=True, capture_output=True, text=True, cwd=ROOT)
    assert f"60 rows in 15 shards ({kept} were there already)" in again.stdout
    assert tree(out) == whole


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(stop: int, images: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(command(images, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for(out / "receipts" / "00001.json")
    process.send_signal(stop)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (4, "")
    assert "Traceback" not in errors
    assert "difffeat: Interrupted: stopped after " in errors
    assert f"of 60 samples; finished shards are kept in {out}. Run the same command again to go on." in errors
    assert not (out / "lock").exists()
    goes_on(images, out, whole)


def test_a_closed_terminal_is_a_stop_like_any_other(images: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    out = tmp_path / "out"
    terminal, side = pty.openpty()
    process = subprocess.Popen(command(images, out), stdin=side, stdout=side, stderr=side, start_new_session=True, preexec_fn=_control, cwd=ROOT)
    os.close(side)
    wait_for(out / "receipts" / "00001.json")
    os.close(terminal)
    assert process.wait(timeout=60) == 4
    assert not (out / "lock").exists()
    assert list(out.rglob("*.tmp")) == []
    goes_on(images, out, whole)


def _control() -> None:
    """Make the terminal on standard input the process's own, so that closing it hangs up."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_full_disk_says_so_and_the_run_goes_on_when_there_is_room(images: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    out = tmp_path / "out"

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200))  # larger files are refused, as by a disk with no more room

    full = subprocess.run(command(images, out), capture_output=True, text=True, preexec_fn=small, cwd=ROOT)
    assert full.returncode == 4, full.stderr
    assert "Traceback" not in full.stderr
    assert (
        f"difffeat: StoreWriteError: writing to {out} failed: File too large. Finished shards are kept; free space or mend the disk, " in full.stderr
    )
    assert "then run the same command again." in full.stderr
    goes_on(images, out, whole)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process: exit code, output, errors."""

    def go(*given: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["difffeat", *given])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return go


def difffeat(*given: object, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "difffeat.cli", *map(str, given)], stderr=subprocess.PIPE, text=True, cwd=ROOT, **how)


def test_an_export_that_the_disk_has_no_room_for_says_so_and_goes_well_once_it_has(tmp_path: Path, run: Run) -> None:
    export = ("export", "--model", "dit-digits", "--blocks", "1", "-o", str(tmp_path / "artifact"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # larger files are refused, as by a disk with no more room
    try:
        code, _, errors = run(*export)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 4, errors
    assert f"difffeat: OutputError: writing {tmp_path / 'artifact'} failed: " in errors
    assert ": File too large. Nothing was left half-written; free space, or mend the path or its permissions, then run the same command" in errors
    assert not (tmp_path / "artifact").exists()
    assert run(*export)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"artifact"}


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").touch()
    code, _, errors = run("export", "--model", "dit-digits", "--blocks", "1", "-o", str(tmp_path / "file/artifact"))
    assert code == 2
    assert f"{tmp_path}/file" in errors
    assert "loading" not in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_cannot_be_printed_says_so() -> None:
    with Path("/dev/full").open("w") as full:
        unprinted = difffeat("inspect", exported("image").path, stdout=full)
    assert unprinted.returncode == 4
    assert unprinted.stderr == (
        "difffeat: OutputError: the work is done, but its result could not be printed: No space left on device. "
        "The same command prints it when there is room.\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_help_that_cannot_be_printed_says_so_too() -> None:
    with Path("/dev/full").open("w") as full:
        unprinted = difffeat("--help", stdout=full)
    assert unprinted.returncode == 4
    assert "difffeat: OutputError: a file was refused: No space left on device" in unprinted.stderr
    assert "Traceback" not in unprinted.stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        assert difffeat("inspect", exported("image").path, stdout=pipe).stderr == ""


@pytest.fixture
def finished(run: Run, tmp_path: Path) -> tuple[Path, Path]:
    """Six images and their store of two shards."""
    source = folder_of_images(tmp_path / "images", 6)
    assert run(*arguments(source, tmp_path / "out"))[0] == 0
    return source, tmp_path / "out"


def test_a_deleted_shard_is_named_and_the_same_command_brings_it_back(finished: tuple[Path, Path], run: Run) -> None:
    source, out = finished
    before = tree(out)
    (out / "shards" / "00001.safetensors").unlink()
    code, printed, _ = run("store", "verify", str(out))
    assert code == 5
    assert f"00001.safetensors is missing although its receipt is there. Next: difffeat store repair {out}" in printed
    code, _, errors = run("probe", str(out))
    assert (code, "00001.safetensors is missing. Run the extraction again: it recomputes this shard only." in errors) == (5, True)
    code, printed, _ = run(*arguments(source, out))
    assert (code, "6 rows in 2 shards (1 were there already)" in printed) == (0, True)
    assert tree(out) == before
    assert verify(out) == []


def test_another_version_of_a_library_is_named_with_the_command_that_brings_the_first_back(
    finished: tuple[Path, Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    mine = real("pillow")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == "pillow" else real(name))
    code, _, errors = run(*arguments(*finished))
    assert code == 1
    assert f"versions.pillow: '{mine}' -> '99.0'" in errors
    assert f"pip install 'pillow=={mine}'" in errors


def test_a_changed_option_is_named_with_its_old_value(finished: tuple[Path, Path], run: Run) -> None:
    code, _, errors = run(*arguments(*finished, "--seed", "9", "--store-dtype", "fp32"))
    assert code == 1
    assert "recipe.run.seed: 0 -> 9" in errors
    assert "fingerprint" not in errors
    assert "recipe.run.store_dtype: 'fp16' -> 'fp32'" in errors
    assert "Repeat the first configuration to go on, choose another -o, or pass --overwrite to begin anew." in errors


def test_a_store_of_something_else_is_not_written_into(finished: tuple[Path, Path], run: Run) -> None:
    source, out = finished
    (out / "notes.txt").write_text("mine")
    code, _, errors = run(*arguments(source, out, "--overwrite"))
    assert (code, "holds files that are no store's (notes.txt); choose another -o." in errors) == (2, True)


def test_too_many_bad_samples_stop_the_run_and_it_goes_on_with_a_higher_limit(run: Run, tmp_path: Path) -> None:
    source, out = folder_of_images(tmp_path / "images", 6), tmp_path / "out"
    (source / "01.png").write_bytes(b"")
    code, _, errors = run(*arguments(source, out, "--max-bad-fraction", "0"))
    assert code == 4
    assert "TooManyBadSamples: 1 of 6 samples are in quarantine, more than --max-bad-fraction 0 allows." in errors
    assert "or raise the limit and run again to go on." in errors
    code, printed, _ = run(*arguments(source, out))
    assert (code, "1 samples are in quarantine; the reasons stand in" in printed) == (3, True)
    (source / "01.png").write_bytes(encoded(1))
    code, printed, _ = run(*arguments(source, out, "--retry-quarantined"))
    assert (code, "1 quarantined samples are good now" in printed) == (0, True)
