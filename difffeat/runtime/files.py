"""The only door to the disk: every write, fsync, rename and removal of a store goes through `Files`.

Tests replace the object to count operations, to fail at the k-th, or to kill the process there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from difffeat.errors import StoreLocked

TEMPORARY = ".tmp"
LOCK = "lock"
_ATTEMPTS = 8
_HASH_BESIDE = 4 << 20
"""Bytes from which on a thread for the hash is worth starting."""


@dataclass(frozen=True)
class Written:
    """Size and SHA-256 of a file that is safely on disk."""

    bytes: int
    sha256: str


class Files:
    """Primitive operations, one method each. `tag` makes the temporary names of one writer different from those of others in the same folder."""

    tag = ""

    def create(self, path: Path) -> int:
        """A new, empty file; its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)  # less the umask

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

    def link(self, source: Path, target: Path) -> None:
        """A second name for a file. Raises FileExistsError where the name is taken, in one step with taking it."""
        os.link(source, target)

    def remove(self, path: Path) -> None:
        """Delete a file."""
        path.unlink()

    def make_one_folder(self, path: Path) -> None:
        """A folder in one that is there."""
        path.mkdir(exist_ok=True)

    def remove_one_folder(self, path: Path) -> None:
        """Delete an empty folder."""
        path.rmdir()

    def make_folder(self, path: Path) -> None:
        """A folder and its parents, their names flushed to the disk: a power cut must not lose the way to what is written in it later."""
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            self.make_one_folder(folder)
            self.fsync(folder.parent)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))

    def remove_tree(self, path: Path) -> None:
        """Delete a folder and all in it."""
        for entry in sorted(path.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                self.remove_tree(entry)
            else:
                self.remove(entry)
        self.remove_one_folder(path)

    def commit(self, path: Path, chunks: Iterable[bytes | memoryview], size: int) -> Written:
        """Write a file so that it is either whole or not there, whatever happens.

        Temporary name in the same folder, space reserved, hashed while written, fsync, rename, fsync of the folder.
        """
        temporary = path.with_name(path.name + self.tag + TEMPORARY)
        digest, count = hashlib.sha256(), 0
        descriptor = self.create(temporary)
        try:
            self.allocate(descriptor, size)
            with _hashing(digest, beside=size >= _HASH_BESIDE) as update:
                for chunk in chunks:
                    update(chunk)
                    self.write(descriptor, chunk)
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


@contextlib.contextmanager
def _hashing(digest: Any, *, beside: bool) -> Iterator[Callable[[bytes | memoryview], object]]:
    """`digest.update`; `beside` in a thread of its own, since a disk and a core can work at once. At the end all that was given has been hashed."""
    if not beside:
        yield digest.update
        return
    with ThreadPoolExecutor(1, "hash") as thread:
        under_way: list[Future[None]] = []
        yield lambda chunk: under_way.append(thread.submit(digest.update, chunk))
        for future in under_way:
            future.result()


class _Unsupported(OSError):
    """The file system cannot reserve space."""


def _fallocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise _Unsupported from error
        raise


def sweep_temporaries(folder: Path, files: Files) -> int:
    """Remove what a killed run left half-written; how many files it was. A process that waits for the lock may take its own away meanwhile."""
    orphans = sorted(folder.rglob(f"*{TEMPORARY}"))
    for path in orphans:
        with contextlib.suppress(FileNotFoundError):
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

    def elsewhere(self) -> bool:
        """Whether the owner is of another host, of which nothing can be known."""
        return self.host != socket.gethostname()

    def alive(self) -> bool:
        """Whether the owner, of this host, may still be running."""
        return self.boot == _boot_id() and _process_start(self.pid) == self.started != ""


class Lock:
    """One writer at a time: a lock file naming host, boot and process, on which the writer holds the kernel's own lock.

    That one goes with the process, however it ends, so a file that nobody holds is stale and is taken over. Where the file system has none, the
    process that the file names decides. A file of another host is never taken over.

    Raises StoreLocked naming the owner.
    """

    def __init__(self, folder: Path, files: Files | None = None) -> None:
        self.path, self._files = folder / LOCK, files or Files()
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        try:
            self._take()
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._descriptor is None or os.path.samestat(os.fstat(self._descriptor), self.path.stat()):  # else its folder was renamed with it
                self._files.remove(self.path)
        except FileNotFoundError:
            return
        except OSError:
            if error is None:  # else what went wrong first says more; a lock that stays is stale, for nobody holds it
                raise
        finally:
            self._let_go()

    def _take(self) -> None:
        for _ in range(_ATTEMPTS):
            if self._try_create():
                return
            owner = self._owner()
            if not self._remove_stale():
                who = "another process" if owner is None else f"process {owner.pid} on {owner.host}"
                raise StoreLocked(f"{self.path.parent} is being written by {who}. Wait for it, or if that machine is gone, delete {self.path}.")
        raise StoreLocked(f"{self.path} keeps coming back: another process starts on the same store. Run one at a time.")

    def _let_go(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _try_create(self) -> bool:
        """Create the file with its content, and held, in one step: written aside, then linked, which fails when it exists."""
        aside = self.path.with_name(f"{LOCK}.{secrets.token_hex(8)}{TEMPORARY}")
        try:
            self._descriptor = self._files.create(aside)
            _flock(self._descriptor)
            self._files.write(self._descriptor, json.dumps(vars(_Owner.current())).encode())
            self._files.link(aside, self.path)
        except (FileExistsError, FileNotFoundError):  # the latter: who holds the lock swept our file as an orphan
            self._let_go()
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                self._files.remove(aside)
        return True

    def _remove_stale(self) -> bool:
        """Delete the file if its owner is gone; whether it is out of the way. The kernel's lock on that very file, and the second look under it, keep
        the slower of two processes that both found it stale from deleting the one that the faster has made since.
        """
        try:
            with self.path.open("rb") as file:
                free = _flock(file.fileno())
                owner = _parse_owner(file.read())
                if free is False or (owner is not None and (owner.elsewhere() or (free is None and owner.alive()))):
                    return False
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    self._files.remove(self.path)
        except FileNotFoundError:
            pass
        return True

    def _owner(self) -> _Owner | None:
        try:
            return _parse_owner(self.path.read_bytes())
        except OSError:
            return None


def _parse_owner(text: bytes) -> _Owner | None:
    """None for anything that no lock of ours holds, as a power cut may leave it."""
    try:
        data = json.loads(text)
        return _Owner(host=str(data["host"]), boot=str(data["boot"]), pid=int(data["pid"]), started=str(data["started"]))
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None


def _flock(descriptor: int) -> bool | None:
    """Try for the kernel's exclusive lock on an open file, kept until it is closed: whether it was free; None where there is no such lock (Windows,
    some network file systems).
    """
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


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
