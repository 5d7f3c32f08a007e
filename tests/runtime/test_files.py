"""A file is whole or not there, and one process writes at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from difffeat.errors import StoreLocked
from difffeat.runtime import files as module
from difffeat.runtime.files import Files, Lock, hash_file, iter_chunks, sweep_temporaries
from tests.runtime.fake import CountedFiles

OLD, NEW = b"old content", b"new content " * 1000


def commit(files: Files, path: Path) -> module.Written:
    return files.commit(path, iter_chunks(NEW, 4000), len(NEW))


def test_a_commit_says_what_lies_on_the_disk(tmp_path: Path) -> None:
    written = commit(Files(), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == NEW
    assert written == hash_file(tmp_path / "a")
    assert written.sha256 == hashlib.sha256(NEW).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_large_commit_is_hashed_beside_writing_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [bytes([number]) * (number * 1000) for number in range(5)]
    plain = Files().commit(tmp_path / "plain", chunks, 10_000)
    monkeypatch.setattr("difffeat.runtime.files._HASH_BESIDE", 10_000)
    assert Files().commit(tmp_path / "beside", chunks, 10_000) == plain
    assert plain.sha256 == hashlib.sha256((tmp_path / "beside").read_bytes()).hexdigest()


def test_a_commit_that_fails_anywhere_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    counted = CountedFiles(lambda *_: None)
    commit(counted, path)
    seen = set()
    for operation in range(counted.count):

        def refuse(number: int, _: str, operation: int = operation) -> None:
            if number == operation:
                raise OSError(errno.EIO, "refused")

        path.write_bytes(OLD)
        with pytest.raises(OSError, match="refused"):
            commit(CountedFiles(refuse), path)
        seen.add(path.read_bytes())
        assert path.read_bytes() in (OLD, NEW)
    assert seen == {OLD, NEW}


def test_the_order_is_write_sync_rename_sync_of_the_folder(tmp_path: Path) -> None:
    order: list[str] = []
    commit(CountedFiles(lambda _, name: order.append(name)), tmp_path / "a")
    assert order == ["create", "allocate", "write", "write", "write", "sync", "rename", "sync"]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:7]))
    commit(Files(), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == NEW


@pytest.mark.parametrize(("number", "survives"), [(errno.EOPNOTSUPP, True), (errno.EINVAL, True), (errno.ENOSPC, False)])
def test_a_full_disk_is_found_before_writing_where_the_file_system_can_tell(
    number: int, survives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(module.os, "posix_fallocate", refuse)
    if survives:
        commit(Files(), tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == NEW
    else:
        with pytest.raises(OSError, match="refused"):
            commit(Files(), tmp_path / "a")
        assert not (tmp_path / "a").exists()


def test_json_is_the_same_for_equal_values(tmp_path: Path) -> None:
    first = Files().commit_json(tmp_path / "a", {"b": 1, "a": [1.5]})
    second = Files().commit_json(tmp_path / "b", {"a": [1.5], "b": 1})
    assert first == second
    with pytest.raises(ValueError, match="JSON compliant"):
        Files().commit_json(tmp_path / "c", {"a": float("nan")})


def test_orphans_are_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in ("keep.json", "a.tmp", "shards/b.safetensors.tmp", "shards/b.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert sweep_temporaries(tmp_path, Files()) == 2
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["b.safetensors", "keep.json"]


def test_an_orphan_that_goes_by_itself_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.tmp").touch()
    other = CountedFiles(lambda _, name: (tmp_path / "a.tmp").unlink() if name == "remove" else None)
    assert sweep_temporaries(tmp_path, other) == 1


def test_new_folders_are_flushed_from_the_top_down(tmp_path: Path) -> None:
    class Watched(Files):
        flushed: ClassVar[list[Path]] = []

        def fsync(self, path: Path) -> None:
            self.flushed.append(path)

    files = Watched()
    files.make_folder(tmp_path / "a" / "b")
    assert files.flushed == [tmp_path, tmp_path / "a"]
    files.make_folder(tmp_path / "a" / "b")
    assert len(files.flushed) == 2
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        files.make_folder(tmp_path / "file")


def test_a_tree_is_removed_operation_by_operation_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "file").touch()
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "inner" / "file").touch()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "keep")
    order: list[str] = []
    CountedFiles(lambda _, name: order.append(name)).remove_tree(tmp_path / "tree")
    assert order == ["remove", "remove_one_folder", "remove", "remove_one_folder"]
    assert [path.name for path in tmp_path.rglob("*")] == ["keep", "file"]


HOLD = """
import sys, time
from pathlib import Path
from difffeat.runtime.files import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock; killed at the end."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with (
        holder(tmp_path) as process,
        pytest.raises(StoreLocked, match=rf"is being written by process {process.pid} on .* delete .*lock"),
        Lock(tmp_path),
    ):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    with holder(tmp_path):
        pass
    assert (tmp_path / "lock").exists()
    with Lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"pid": "x"}, {"boot": "another boot"}, {"started": "1"}, {"pid": 2**22 + 5}])
def test_a_lock_from_before_is_taken_over(change: dict[str, object], tmp_path: Path) -> None:
    with Lock(tmp_path):
        owner = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps({**owner, **change}))
    with Lock(tmp_path):
        pass
    assert not (tmp_path / "lock").exists()


def stale(folder: Path) -> None:
    """The lock of a process that is gone."""
    with Lock(folder):
        owner = json.loads((folder / "lock").read_text())
    (folder / "lock").write_text(json.dumps({**owner, "started": "1"}))


def test_of_two_that_find_a_stale_lock_the_slower_leaves_the_fasters_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale(tmp_path)
    parse, fast, calls = module._parse_owner, Lock(tmp_path), []

    def overtaken(text: bytes) -> object:
        calls.append(text)
        if len(calls) == 1:
            fast.__enter__()
        return parse(text)

    monkeypatch.setattr(module, "_parse_owner", overtaken)
    with pytest.raises(StoreLocked, match=f"is being written by process {os.getpid()}"), Lock(tmp_path):
        pass
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    fast.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_who_waits_for_the_lock_may_lose_its_draft_to_the_sweep_of_who_holds_it(tmp_path: Path) -> None:
    swept: list[int] = []

    def sweep(_: int, name: str) -> None:
        if name == "link" and not swept:
            swept.append(sweep_temporaries(tmp_path, Files()))

    with Lock(tmp_path, CountedFiles(sweep)):
        assert swept == [1]
        assert (tmp_path / "lock").exists()


def test_a_lock_that_cannot_be_removed_does_not_hide_what_went_wrong_and_is_stale(tmp_path: Path) -> None:
    armed = False

    def refuse(_: int, name: str) -> None:
        if name == "remove" and armed:
            raise OSError(errno.EIO, "refused")

    lock = Lock(tmp_path, CountedFiles(refuse)).__enter__()
    armed = True
    lock.__exit__(RuntimeError, RuntimeError("work"), None)
    assert (tmp_path / "lock").exists()
    armed = False
    with Lock(tmp_path, CountedFiles(refuse)) as again:
        armed = True
        with pytest.raises(OSError, match="refused"):
            again.__exit__(None, None, None)
        armed = False


@pytest.mark.parametrize("operation", range(5))
def test_whatever_stops_the_locking_the_next_one_gets_it(operation: int, tmp_path: Path) -> None:
    def stop(number: int, _: str) -> None:
        if number >= operation:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Lock(tmp_path, CountedFiles(stop)):
        pass
    with Lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_two_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    with Lock(tmp_path), pytest.raises(StoreLocked, match=f"is being written by process {os.getpid()} on"), Lock(tmp_path):
        pass


@pytest.mark.parametrize(("started", "free"), [("1", True), ("", True), (None, False)])
def test_without_the_kernels_locks_the_process_that_is_named_decides(
    started: str | None, free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_flock", lambda _: None)
    with Lock(tmp_path):
        owner = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps(owner if started is None else {**owner, "started": started}))
    if free:
        with Lock(tmp_path):
            pass
    else:
        with pytest.raises(StoreLocked, match=f"is being written by process {os.getpid()}"), Lock(tmp_path):
            pass


def test_a_lock_of_another_host_is_never_taken_over(tmp_path: Path) -> None:
    with Lock(tmp_path):
        owner = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps({**owner, "host": "elsewhere", "pid": 1}))
    with pytest.raises(StoreLocked, match=r"process 1 on elsewhere. Wait for it, or if that machine is gone, delete"), Lock(tmp_path):
        pass


def test_garbage_in_place_of_a_lock_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"\0\xff")
    with Lock(tmp_path):
        pass


def test_the_lock_goes_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="work"), Lock(tmp_path):
        raise RuntimeError("work")
    assert list(tmp_path.iterdir()) == []
