"""The only door to the disk: every write, fsync, rename and removal of a store goes through `Files`.

Tests replace the object to count operations, to fail at the k-th, or to kill the process there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from difffeat.errors import StoreLocked

TEMPORARY = ".tmp"
LOCK = "lock"


@dataclass(frozen=True)
class Written:
    """Size and SHA-256 of a file that is safely on disk."""

    bytes: int
    sha256: str


class Files:
    """Primitive operations, one method each."""

    def create(self, path: Path) -> int:
        """A new, empty file; its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def allocate(self, descriptor: int, size: int) -> None:
        """Reserve disk space, so that a full disk is found before writing. File systems without this are left to find out while writing."""
        if size and hasattr(os, "posix_fallocate"):
            with contextlib.suppress(_Unsupported):
                _fallocate(descriptor, size)

    def write(self, descriptor: int, chunk: bytes | memoryview) -> None:
        """All of a chunk."""
        left = memoryview(chunk).cast("B")
        while left:
            left = left[os.write(descriptor, left) :]

    def sync(self, descriptor: int) -> None:
        """Flush a file's bytes to the disk."""
        os.fsync(descriptor)

    def fsync(self, path: Path) -> None:
        """Flush a file, or a folder's entries, to the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Replace `target` by `source` in one step."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Delete a file."""
        path.unlink()

    def make_folder(self, path: Path) -> None:
        """A folder and its parents."""
        path.mkdir(parents=True, exist_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Delete a folder and all in it."""
        shutil.rmtree(path)

    def commit(self, path: Path, chunks: Iterable[bytes | memoryview], size: int) -> Written:
        """Write a file so that it is either whole or not there, whatever happens.

        Temporary name in the same folder, space reserved, hashed while written, fsync, rename, fsync of the folder.
        """
        temporary = path.with_name(path.name + TEMPORARY)
        digest, count = hashlib.sha256(), 0
        descriptor = self.create(temporary)
        try:
            self.allocate(descriptor, size)
            for chunk in chunks:
                self.write(descriptor, chunk)
                digest.update(chunk)
                count += memoryview(chunk).nbytes
            self.sync(descriptor)
        finally:
            os.close(descriptor)
        self.rename(temporary, path)
        self.fsync(path.parent)
        return Written(count, digest.hexdigest())

    def commit_json(self, path: Path, value: object) -> Written:
        """`commit` of a JSON document (sorted keys, indented)."""
        text = (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
        return self.commit(path, [text], len(text))


class _Unsupported(OSError):
    """The file system cannot reserve space."""


def _fallocate(descriptor: int, size: int) -> None:
    import errno

    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise _Unsupported from error
        raise


def sweep_temporaries(folder: Path, files: Files) -> int:
    """Remove what a killed run left half-written; how many files it was."""
    orphans = sorted(folder.rglob(f"*{TEMPORARY}"))
    for path in orphans:
        files.remove(path)
    return len(orphans)


def hash_file(path: Path) -> Written:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Written(path.stat().st_size, digest)


@dataclass(frozen=True)
class _Owner:
    host: str
    boot: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> _Owner:
        return cls(socket.gethostname(), _boot_id(), os.getpid(), _process_start(os.getpid()))

    def alive(self) -> bool:
        """Whether the owner may still be running. Of another host we cannot know, so it counts as alive."""
        mine = _Owner.current()
        if self.host != mine.host:
            return True
        return self.boot == mine.boot and _process_start(self.pid) == self.started != ""


class Lock:
    """One writer at a time: a lock file naming host, boot and process. A lock whose owner is gone is taken over.

    Raises StoreLocked naming the owner.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK

    def __enter__(self) -> Self:
        for _ in range(3):
            if self._try_create():
                return self
            owner = self._read_owner()
            if owner is not None and owner.alive():
                raise StoreLocked(
                    f"{self.path.parent} is being written by process {owner.pid} on {owner.host}. Wait for it, or if that machine is gone, delete "
                    f"{self.path}."
                )
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        raise StoreLocked(f"{self.path} keeps coming back: another process starts on the same store. Run one at a time.")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _try_create(self) -> bool:
        """Create the lock with its content in one step: written aside, then linked, which fails when it exists."""
        aside = self.path.with_name(f"{LOCK}.{os.getpid()}{TEMPORARY}")
        aside.write_text(json.dumps(vars(_Owner.current())))
        try:
            os.link(aside, self.path)
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    def _read_owner(self) -> _Owner | None:
        try:
            return _Owner(**json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _process_start(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty when there is none. Tells a process from a later one with its number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return _alive_without_proc(pid)


def _alive_without_proc(pid: int) -> str:
    if Path("/proc/self").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "?"
    return "?"


def iter_chunks(data: bytes | memoryview, size: int = 1 << 24) -> Iterator[memoryview]:
    """A buffer in pieces of at most `size` bytes."""
    view = memoryview(data).cast("B")
    for start in range(0, len(view), size):
        yield view[start : start + size]
