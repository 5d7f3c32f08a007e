"""Corruption of any file of a store: found, named and mended alone, and afterwards every byte is as before."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import StoreError, StoreMismatch
from difffeat.recipe import RunRecipe
from difffeat.runtime.check import check
from difffeat.runtime.files import LOCK
from difffeat.runtime.manifest import MANIFEST, read_manifest
from difffeat.runtime.matching import Mode
from difffeat.runtime.origin import ORIGIN
from difffeat.runtime.repair import diagnose, set_aside
from difffeat.runtime.store import Store, verify
from difffeat.runtime.writer import SUMMARY_HTML, SUMMARY_JSON
from tests.faults.outcome import Outcome, Size, outcome, told
from tests.faults.scenarios import make_source, run
from tests.runtime.fake import encoded, tree

SEEDS = {"short": 4, "long": 60}
PAGE = 128
"""Bytes zeroed at once: these stores are smaller than a real page."""

INFORMATION = (LOCK, ORIGIN, SUMMARY_JSON, SUMMARY_HTML)
"""Files that no feature depends on."""

Damage = Callable[[Path, random.Random], str | None]
"""Spoils one file of a store, and says which (relative to the store); None where the store has nothing of that kind."""


def _pick(store: Path, rng: random.Random, pattern: str, least: int = 1) -> list[Path]:
    files = sorted(path for path in store.glob(pattern) if path.is_file() and path.name not in INFORMATION)
    return rng.sample(files, least) if len(files) >= least else []


def _edit(pattern: str, change: Callable[[bytearray, random.Random], None]) -> Damage:
    def damage(store: Path, rng: random.Random) -> str | None:
        for path in _pick(store, rng, pattern):
            content = bytearray(path.read_bytes())
            before = bytes(content)
            change(content, rng)
            path.write_bytes(content)
            return path.relative_to(store).as_posix() if bytes(content) != before else None
        return None

    return damage


def _flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def _zero(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(0, len(content), PAGE)
    end = min(start + PAGE, len(content))
    content[start:end] = bytes(end - start)


def _extend(content: bytearray, rng: random.Random) -> None:
    content += rng.randbytes(rng.randint(1, 64))


def _delete(pattern: str) -> Damage:
    def damage(store: Path, rng: random.Random) -> str | None:
        for path in _pick(store, rng, pattern):
            path.unlink()
            return path.relative_to(store).as_posix()
        return None

    return damage


def _swap(pattern: str) -> Damage:
    def damage(store: Path, rng: random.Random) -> str | None:
        pair = _pick(store, rng, pattern, 2)
        if not pair or pair[0].read_bytes() == pair[1].read_bytes():
            return None
        first, second = (path.read_bytes() for path in pair)
        pair[0].write_bytes(second)
        pair[1].write_bytes(first)
        return pair[0].relative_to(store).as_posix()

    return damage


EVERY = "**/*"
DAMAGES: dict[str, Damage] = {
    "a flipped bit": _edit(EVERY, _flip),
    "a flipped bit in a shard": _edit("shards/*", _flip),
    "a flipped bit in a receipt": _edit("receipts/*", _flip),
    "a file cut off": _edit(EVERY, _truncate),
    "a zeroed page": _edit(EVERY, _zero),
    "bytes at the end": _edit(EVERY, _extend),
    "a deleted shard": _delete("shards/*"),
    "a deleted receipt": _delete("receipts/*"),
    "a deleted samples table": _delete("samples*.parquet"),
    "two swapped shards": _swap("shards/*"),
    "two swapped receipts": _swap("receipts/*"),
}
"""What befalls a store by itself."""


def replaced(other: Path, pattern: str) -> Damage:
    """A file of another store in place of one of the same name: a stale or a foreign one."""

    def damage(store: Path, rng: random.Random) -> str | None:
        for path in _pick(store, rng, pattern):
            name = path.relative_to(store).as_posix()
            if (other / name).is_file() and (other / name).read_bytes() != path.read_bytes():
                shutil.copyfile(other / name, path)
                return name
        return None

    return damage


def mend(store: Path, again: Callable[..., Any]) -> None:
    """As `difffeat store repair` does: set aside what is damaged, and run again. A manifest that cannot be read takes a run with --overwrite."""
    try:
        found = diagnose(store)
    except StoreError:
        again(overwrite=True)
        return
    set_aside(store, found)
    if found.needs_extraction:
        try:
            again()
        except StoreMismatch:  # the manifest is another store's, and whole
            again(overwrite=True)


def named(store: Path, spoiled: str) -> bool:
    """Whether the check says of this file, or of the shard it belongs to, that something is wrong."""
    try:
        problems = check(store)
    except StoreError as error:
        return spoiled in str(error)
    if spoiled == MANIFEST:  # whole, but another store's: every receipt is a stranger to it
        return {problem.shard for problem in problems} >= set(range(len(read_manifest(store).shards)))
    number = re.match(r"(?:shards|receipts)/(\d+)", spoiled)
    return any(problem.file == spoiled or (number is not None and problem.shard == int(number[1])) for problem in problems)


def campaign(size: Size, work: Path) -> Iterator[Outcome]:
    """Each damage with many seeds."""
    source = make_source(work / "source")
    run("image", source, work / "whole")
    run("image", source, work / "foreign", run=RunRecipe(seed=9))
    damages = DAMAGES | {
        "a foreign receipt": replaced(work / "foreign", "receipts/*"),
        "a foreign shard": replaced(work / "foreign", "shards/*"),
        "a foreign manifest": replaced(work / "foreign", "manifest.json"),
    }
    expected = tree(work / "whole")
    for name, damage in damages.items():
        with outcome(name) as found:
            for seed in range(SEEDS[size]):
                _one(work, source, damage, seed, expected, found)
        yield found
    with outcome("a receipt from before healing") as found:
        _stale(work / "healing", found)
    yield found


def _stale(work: Path, found: Outcome) -> None:
    """The receipt of a shard that has been rewritten since, put back."""
    work.mkdir()
    source = make_source(work / "source")
    run("image", source, work / "before")
    shutil.copytree(work / "before", work / "whole")
    (source / "03.png").write_bytes(encoded(3))
    run("image", source, work / "whole", mode=Mode.RETRY)
    found.points += 1
    shutil.copyfile(work / "before" / "receipts" / "00000.json", work / "whole" / "receipts" / "00000.json")
    found.reached += named(work / "whole", "receipts/00000.json")
    found.expect(found.reached == 1, "the stale receipt is not named")
    mend(work / "whole", lambda **options: run("image", source, work / "whole", **options))
    run("image", source, work / "anew")
    for tap in Store.open(work / "anew").taps:
        same = np.array_equal(np.asarray(Store.open(work / "whole")[tap]), np.asarray(Store.open(work / "anew")[tap]))
        found.expect(same, f"{tap} after mending is not that of a store made anew")
    found.expect(told(lambda: verify(work / "whole")) == [], "the mended store does not verify")


def _one(work: Path, source: Path, damage: Damage, seed: int, expected: dict[str, str], found: Outcome) -> None:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(work / "whole", out)
    spoiled = damage(out, random.Random(seed))
    if spoiled is None:
        return
    found.points += 1
    seen = named(out, spoiled)
    found.reached += 1
    if not seen and spoiled.startswith("samples") and Store.open(out).ids == Store.open(work / "whole").ids and not check(out):
        found.note = "of the samples table, bits that change no row and no field are not noticed"
        return
    found.expect(seen, f"seed {seed}: {spoiled} was spoiled and is not named")
    mend(out, lambda **options: run("image", source, out, **options))
    found.expect(tree(out) == expected, f"seed {seed}: {spoiled} was spoiled; after mending {_difference(tree(out), expected)} differ")
    found.expect(told(lambda: verify(out)) == [], f"seed {seed}: {spoiled}: the mended store does not verify")


def _difference(found: dict[str, str], expected: dict[str, str]) -> str:
    return ", ".join(sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)))
