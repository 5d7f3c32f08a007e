"""A disk with a page cache, as POSIX lets one behave: what was not flushed may be there, gone, zero, torn or in another order after a power cut.

`Journal` performs every operation for real and writes it down. `Disk` replays a prefix of the journal on a model; `Disk.cut` lays one of the states
that a power cut may leave into a folder. The model is harsher than file systems are: each name in an unflushed folder, and each block of an unflushed
file, takes any of its past states on its own. Only an fsync of the file makes its bytes last, only an fsync of the folder its names.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difffeat.runtime.files import Files

BLOCK = 64
"""Bytes that reach the disk in one piece. Real ones are larger; these stores are small, and are to be torn too."""


class Journal(Files):
    """Writes down every operation below a folder, in order."""

    def __init__(self, root: Path) -> None:
        self.root, self.operations = root, list[tuple[Any, ...]]()
        self._open: dict[int, Path] = {}

    def _note(self, name: str, *arguments: Any) -> None:
        self.operations.append((name, *(part.relative_to(self.root).as_posix() if isinstance(part, Path) else part for part in arguments)))

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._open[descriptor] = path
        self._note("create", path)
        return descriptor

    def allocate(self, descriptor: int, size: int) -> None:
        super().allocate(descriptor, size)
        self._note("allocate", self._open[descriptor], size)

    def write(self, descriptor: int, chunk: bytes | memoryview) -> None:
        super().write(descriptor, chunk)
        self._note("write", self._open[descriptor], bytes(chunk))

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        self._note("sync", self._open[descriptor])

    def fsync(self, path: Path) -> None:
        if path == self.root or self.root in path.parents:
            self._note("flush_folder" if path.is_dir() else "sync", path)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._note("rename", source, target)

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self._note("link", source, target)

    def remove(self, path: Path) -> None:
        super().remove(path)
        self._note("remove", path)

    def make_one_folder(self, path: Path) -> None:
        there = path.is_dir()
        super().make_one_folder(path)
        if not there:
            self._note("make_folder", path)

    def remove_one_folder(self, path: Path) -> None:
        super().remove_one_folder(path)
        self._note("remove", path)


@dataclass(eq=False)
class File:
    """Bytes on the disk, bytes in the cache."""

    durable: bytes = b""
    cached: bytearray = field(default_factory=bytearray)
    place: int = 0

    @property
    def flushed(self) -> bool:
        return self.durable == self.cached

    def after(self, rng: random.Random) -> bytes:
        """What a power cut may leave: any size in between; all of it old, new or zero, or each block on its own, torn in its middle too."""
        if self.flushed:
            return self.durable
        low, high = sorted((len(self.durable), len(self.cached)))
        size = rng.choice([low, high, rng.randint(low, high)])
        old, new = self.durable.ljust(size, b"\0")[:size], bytes(self.cached).ljust(size, b"\0")[:size]
        if rng.random() < 0.25:
            return rng.choice([old, new, bytes(size)])
        blocks = []
        for start in range(0, size, BLOCK):
            end = min(start + BLOCK, size)
            tear = rng.randint(start, end)
            blocks.append(rng.choice([old[start:end], new[start:end], bytes(end - start), new[start:tear] + old[tear:end]]))
        return b"".join(blocks)


@dataclass(eq=False)
class Folder:
    """Names on the disk, and what became of names since they were flushed."""

    durable: dict[str, File | Folder] = field(default_factory=dict)
    cached: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[tuple[str, File | Folder | None]] = field(default_factory=list)

    def bind(self, name: str, node: File | Folder | None) -> None:
        self.changes.append((name, node))
        if node is None:
            del self.cached[name]
        else:
            self.cached[name] = node

    def flush(self) -> None:
        self.durable, self.changes = dict(self.cached), []

    def after(self, rng: random.Random) -> Iterator[tuple[str, File | Folder]]:
        """What a power cut may leave: each name as flushed, or as any later change made it."""
        names = dict(self.durable)
        for name in sorted({name for name, _ in self.changes}):
            node = rng.choice([self.durable.get(name), *(node for other, node in self.changes if other == name)])
            names.pop(name, None)
            if node is not None:
                names[name] = node
        yield from sorted(names.items())


class Disk:
    """The state after some operations, begun from a folder that is all on the disk (None: empty)."""

    def __init__(self, start: Path | None = None) -> None:
        self.root = _durable(start) if start is not None else Folder()

    def apply(self, operation: tuple[Any, ...]) -> None:
        """One operation of a journal."""
        name, path, *rest = operation
        getattr(self, f"_{name}")(path, *rest)

    def durable(self, path: str) -> bool:
        """Whether a file is there after any power cut from here on, whole."""
        node: File | Folder | None = self.root
        for part in Path(path).parts:
            if not isinstance(node, Folder) or any(name == part for name, _ in node.changes):
                return False
            node = node.durable.get(part)
        return isinstance(node, File) and node.flushed

    def flush(self) -> None:
        """Everything reaches the disk."""
        _flush(self.root)

    def cut(self, target: Path, rng: random.Random | None) -> None:
        """Lay a state that a power cut may leave into a new folder; without `rng` the one in which nothing unflushed survived."""
        _lay(self.root, target, rng)

    def _parent(self, path: str) -> tuple[Folder, str]:
        node: File | Folder = self.root
        *folders, name = Path(path).parts
        for part in folders:
            assert isinstance(node, Folder)
            node = node.cached[part]
        assert isinstance(node, Folder)
        return node, name

    def _node(self, path: str) -> File | Folder:
        if path == ".":
            return self.root
        folder, name = self._parent(path)
        return folder.cached[name]

    def _file(self, path: str) -> File:
        node = self._node(path)
        assert isinstance(node, File)
        return node

    def _create(self, path: str) -> None:
        folder, name = self._parent(path)
        if name in folder.cached:
            file = self._file(path)
            file.cached, file.place = bytearray(), 0
        else:
            folder.bind(name, File())

    def _allocate(self, path: str, size: int) -> None:
        file = self._file(path)
        file.cached.extend(bytes(max(0, size - len(file.cached))))

    def _write(self, path: str, chunk: bytes) -> None:
        file = self._file(path)
        file.cached[file.place : file.place + len(chunk)] = chunk
        file.place += len(chunk)

    def _sync(self, path: str) -> None:
        file = self._file(path)
        file.durable = bytes(file.cached)

    def _flush_folder(self, path: str) -> None:
        folder = self._node(path)
        assert isinstance(folder, Folder)
        folder.flush()

    def _rename(self, source: str, target: str) -> None:
        self._link(source, target)
        self._remove(source)

    def _link(self, source: str, target: str) -> None:
        folder, name = self._parent(target)
        folder.bind(name, self._node(source))

    def _remove(self, path: str) -> None:
        folder, name = self._parent(path)
        folder.bind(name, None)

    def _make_folder(self, path: str) -> None:
        folder, name = self._parent(path)
        folder.bind(name, Folder())


def _durable(path: Path) -> Folder:
    found: dict[str, File | Folder] = {}
    for entry in sorted(path.iterdir()):
        content = b"" if entry.is_dir() else entry.read_bytes()
        found[entry.name] = _durable(entry) if entry.is_dir() else File(content, bytearray(content))
    return Folder(dict(found), dict(found))


def _flush(folder: Folder) -> None:
    folder.flush()
    for node in folder.cached.values():
        if isinstance(node, Folder):
            _flush(node)
        else:
            node.durable = bytes(node.cached)


def _lay(folder: Folder, target: Path, rng: random.Random | None) -> None:
    target.mkdir(parents=True)
    for name, node in sorted(folder.durable.items()) if rng is None else folder.after(rng):
        if isinstance(node, Folder):
            _lay(node, target / name, rng)
        else:
            (target / name).write_bytes(node.durable if rng is None else node.after(rng))
