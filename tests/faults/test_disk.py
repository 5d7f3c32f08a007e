"""The model of the disk is as harsh as POSIX allows, and no harsher."""

from __future__ import annotations

import random
from pathlib import Path

from difffeat.runtime.files import Files
from tests.faults.disk import Disk, Journal
from tests.runtime.fake import tree

OLD, NEW = b"o" * 300, b"n" * 500


def states(disk: Disk, tmp_path: Path, count: int = 300) -> list[dict[str, bytes]]:
    found = []
    for seed in range(count):
        target = tmp_path / f"state-{seed}"
        disk.cut(target, random.Random(seed))
        found.append({path.name: path.read_bytes() for path in target.rglob("*") if path.is_file()})
    return found


def replay(journal: Journal, start: Path | None = None) -> Disk:
    disk = Disk(start)
    for operation in journal.operations:
        disk.apply(operation)
    return disk


def test_what_was_not_flushed_is_gone_zero_torn_or_there(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    journal = Journal(tmp_path / "root")
    journal.write(journal.create(tmp_path / "root" / "a"), NEW)
    found = states(replay(journal), tmp_path)
    contents = {state["a"] for state in found if "a" in state}
    assert any("a" not in state for state in found)
    assert {b"", NEW} <= contents
    assert any(len(content) == len(NEW) and b"\0" in content and b"n" in content for content in contents)
    assert any(0 < len(content) < len(NEW) for content in contents)


def test_a_rename_without_its_flush_may_come_undone_even_over_a_flushed_file(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").write_bytes(OLD)
    before = Disk(tmp_path / "root")
    journal = Journal(tmp_path / "root")
    descriptor = journal.create(tmp_path / "root" / "a.tmp")
    journal.write(descriptor, NEW)
    journal.rename(tmp_path / "root" / "a.tmp", tmp_path / "root" / "a")
    for operation in journal.operations:
        before.apply(operation)
    assert {OLD, NEW} < {state["a"] for state in states(before, tmp_path)}, "old, new, and torn ones, for the bytes were not flushed"
    assert not before.durable("a")


def test_a_commit_survives_every_cut_once_it_is_over_and_is_old_or_new_before(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_bytes(OLD)
    start = tmp_path / "start"
    start.mkdir()
    (start / "a").write_bytes(OLD)
    journal = Journal(root)
    journal.commit(root / "a", [NEW], len(NEW))
    for stop in range(len(journal.operations) + 1):
        disk = Disk(start)
        for operation in journal.operations[:stop]:
            disk.apply(operation)
        seen = {state["a"] for state in states(disk, tmp_path / str(stop), 40)}
        assert seen <= {OLD, NEW}
        assert disk.durable("a") == (stop != len(journal.operations) - 1), "all but between the rename and the flush of the folder"
    assert seen == {NEW}


def test_a_folder_whose_parent_was_not_flushed_may_be_gone_with_all_in_it(tmp_path: Path) -> None:
    class Careless(Journal):
        def make_folder(self, path: Path) -> None:
            self.make_one_folder(path)

    root = tmp_path / "root"
    root.mkdir()
    for kind, may_be_lost in ((Careless, True), (Journal, False)):
        journal = kind(root)
        journal.make_folder(root / kind.__name__)
        journal.commit(root / kind.__name__ / "a", [NEW], len(NEW))
        lost = [state for state in states(replay(journal), tmp_path / kind.__name__) if "a" not in state]
        assert bool(lost) == may_be_lost


def test_the_journal_replayed_is_what_lies_on_the_disk(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    journal = Journal(root)
    journal.make_folder(root / "x" / "y")
    journal.commit(root / "x" / "y" / "a", [OLD, NEW], len(OLD) + len(NEW))
    journal.link(root / "x" / "y" / "a", root / "b")
    journal.commit(root / "x" / "c", [NEW], 0)
    journal.remove(root / "x" / "c")
    journal.make_folder(root / "gone" / "deep")
    journal.remove_tree(root / "gone")
    disk = replay(journal)
    disk.flush()
    disk.cut(tmp_path / "laid", None)
    assert tree(tmp_path / "laid") == tree(root)
    (root / "behind its back").touch()
    assert tree(tmp_path / "laid") != tree(root)
    assert isinstance(journal, Files)
