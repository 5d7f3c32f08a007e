"""A corpus of which three in a hundred samples are bad in every way we know of: each is set aside with its reason, no other is touched, and mending
heals exactly the bad rows.

    python -m tests.faults.poison FOLDER [--samples 20000] [--share 0.03] [--seed 0]     writes such a corpus, and poison.json beside it
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from difffeat.errors import TooManyBadSamples
from difffeat.runtime.matching import Mode
from difffeat.runtime.store import Store, verify
from difffeat.workflows.scenes import tokenizer_json
from tests.faults.outcome import Outcome, Size, outcome, told
from tests.faults.scenarios import run
from tests.runtime.fake import encoded, tree

SAMPLES = {"short": 300, "long": 20_000}
SHARE = 0.03
GOOD_IMAGES = 16
SHARD = 16


@dataclass(frozen=True)
class Poison:
    """One way to be bad.

    **Fields:** `put` spoils the sample whose files are `NAME.png` and `NAME.txt`; `images`, `text` the error it gives in an extraction of that
    modality, None where it is fine there; `says` what the message must hold.
    """

    put: Callable[[Path], None]
    images: str | None
    text: str | None
    says: str


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def photo(mode: str = "RGB", side: int = 64) -> Image.Image:
    """Smooth enough to be a JPEG of some size."""
    coarse = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side)).convert(mode)


def png_header(width: int, height: int) -> bytes:
    """A PNG that states a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def image(content: Callable[[], bytes], suffix: str = ".png") -> Callable[[Path], None]:
    """Put these bytes in place of the image."""

    def put(sample: Path) -> None:
        sample.with_suffix(".png").unlink()
        sample.with_suffix(suffix).write_bytes(content())

    return put


def caption(content: bytes) -> Callable[[Path], None]:
    """Put these bytes in place of the captions."""

    def put(sample: Path) -> None:
        sample.with_suffix(".txt").write_bytes(content)

    return put


def special(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something that is no regular file in place of the image."""

    def put(sample: Path) -> None:
        sample.with_suffix(".png").unlink()
        make(sample.with_suffix(".png"))

    return put


POISONS: dict[str, Poison] = {
    "truncated JPEG": Poison(image(lambda: saved(photo(side=200), "JPEG")[:2000], ".jpg"), "DecodeError", None, "damaged or truncated"),
    "truncated PNG": Poison(image(lambda: encoded(0)[:300]), "DecodeError", None, "damaged or truncated"),
    "CMYK": Poison(image(lambda: saved(photo("CMYK"), "JPEG"), ".jpg"), None, None, ""),
    "palette": Poison(image(lambda: saved(photo("P"), "PNG")), None, None, ""),
    "16-bit": Poison(image(lambda: saved(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG")), None, None, ""),
    "float": Poison(image(lambda: saved(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), ".tif"), None, None, ""),
    "empty image": Poison(image(lambda: b""), "DecodeError", None, "the file is empty"),
    "text in a .jpg": Poison(image(lambda: b"dear diary", ".jpg"), "DecodeError", None, "no image in a format we accept"),
    "PNG in a .jpg": Poison(image(lambda: saved(photo(), "PNG"), ".jpg"), None, None, ""),
    "bomb": Poison(image(lambda: png_header(60_000, 60_000)), "ImageTooLarge", None, "Resize it first"),
    "broken link": Poison(special(lambda path: path.symlink_to("nowhere.png")), "DecodeError", None, "cannot be read"),
    "pipe": Poison(special(lambda path: os.mkfifo(path)), "DecodeError", None, "no regular file"),
    "device": Poison(special(lambda path: path.symlink_to("/dev/zero")), "DecodeError", None, "no regular file"),
    "bad UTF-8": Poison(caption(b"two \xff\xfe three"), None, "CaptionError", "is not UTF-8 (byte 4)"),
    "over-long caption": Poison(caption(b"two " * 500), None, "CaptionError", "tokens, the model takes 32"),
    "empty caption": Poison(caption(b" \n\n"), None, "CaptionError", "has no caption"),
    "no caption": Poison(lambda sample: sample.with_suffix(".txt").unlink(), None, "CaptionError", "has no caption"),
    "huge caption file": Poison(caption(b"x" * (2 << 20)), None, "CaptionError", "more than the limit of"),
}


def make_corpus(folder: Path, count: int, share: float, seed: int) -> dict[str, str]:
    """Write `count` samples, each kind of poison in turn on a seeded `share` of them; sample id -> kind."""
    folder.mkdir(parents=True)
    whole = [encoded(index) for index in range(GOOD_IMAGES)]
    for index in range(count):
        (folder / f"{index:05d}.png").write_bytes(whole[index % GOOD_IMAGES])
        (folder / f"{index:05d}.txt").write_text("the " * (1 + 5 * index % 9) + "two")
    rng, kinds = random.Random(seed), list(POISONS)
    chosen = sorted(rng.sample(range(count), max(len(kinds), round(share * count))))
    rng.shuffle(chosen)
    placed = {f"{index:05d}": kinds[number % len(kinds)] for number, index in enumerate(chosen)}
    for name, kind in placed.items():
        POISONS[kind].put(folder / name)
    return placed


def mend(folder: Path, name: str) -> None:
    """A good sample in place of a spoiled one, under the same id."""
    for path in folder.glob(f"{name}.*"):
        path.unlink()
    index = int(name)
    (folder / f"{name}.png").write_bytes(encoded(index % GOOD_IMAGES))
    (folder / f"{name}.txt").write_text("the " * (1 + 5 * index % 9) + "two")


def campaign(size: Size, work: Path) -> Iterator[Outcome]:
    """The corpus through an image and a text extraction, then mended and retried; each modality has its own copy, to be mended in."""
    (work / "tokenizer.json").write_text(tokenizer_json())
    for kind in ("image", "text"):
        source, out = work / f"{kind}-corpus", work / kind
        placed = make_corpus(source, SAMPLES[size], SHARE, seed=0)
        with outcome(f"{len(placed)} bad of {SAMPLES[size]} samples, {kind}") as found:
            _told(kind, source, out, placed, found)
        yield found
        with outcome(f"more bad samples than --max-bad-fraction allows, {kind}") as found:
            _stopped(kind, source, work, found)
        yield found
        with outcome(f"bad samples mended and retried, {kind}") as found:
            _healed(kind, source, out, placed, found)
        yield found


def _healed(kind: str, source: Path, out: Path, placed: dict[str, str], found: Outcome) -> None:
    """Exactly the mended rows change; files without one keep their bytes, and so does every other row."""
    before, files = Store.open(out), tree(out)
    ids = before.ids
    kept = {tap: np.array(before[tap]) for tap in before.taps}
    bad = [entry["id"] for entry in before.quarantined]
    rows = np.array([entry["row"] for entry in before.quarantined])
    shards = {int(row) // SHARD for row in rows}
    for name in bad:
        mend(source, name)
    summary = run(kind, source, out, batch_size=16, shard_size=SHARD, mode=Mode.RETRY)
    store = Store.open(out)
    found.points, found.reached = len(bad), summary.healed
    found.expect((summary.exit_code, summary.quarantined, summary.rows) == (0, 0, len(before)), f"after mending: {summary}")
    found.expect(bool(store.valid.all()) and not (out / "quarantine.jsonl").exists(), "something is still set aside")
    found.expect(store.ids == ids, "rows were moved")
    others = np.setdiff1d(np.arange(len(before)), rows)
    for tap in store.taps:
        found.expect(np.array_equal(np.array(store[tap])[others], kept[tap][others]), f"{tap}: rows changed that were not mended")
        found.expect(bool(np.array(store[tap])[rows].any(axis=1).all()), f"{tap}: mended rows are still empty")
    touched = {name for name, digest in tree(out).items() if files.get(name) != digest and name.startswith(("shards", "receipts"))}
    found.expect({int(Path(name).name[:5]) for name in touched} == shards, f"other shards were written: {sorted(touched)}")
    found.expect(told(lambda: verify(out)) == [], "the store does not verify")
    run(kind, source, out.with_name(f"{kind}-anew"), batch_size=16, shard_size=SHARD)
    anew = Store.open(out.with_name(f"{kind}-anew"))
    for tap in store.taps:
        found.expect(np.array_equal(np.array(store[tap]), np.array(anew[tap])), f"{tap}: a healed store is not one made of good samples at once")
    found.note = f"{len(shards)} of {-(-len(before) // SHARD)} shards rewritten; {len([n for n in placed if n not in bad])} others left as they were"


def _told(kind: str, source: Path, out: Path, placed: dict[str, str], found: Outcome) -> None:
    summary = run(kind, source, out, batch_size=16, shard_size=SHARD)
    expected = {name: error for name, how in placed.items() if (error := POISONS[how].images if kind == "image" else POISONS[how].text)}
    store = Store.open(out)
    entries = {entry["id"]: entry for entry in store.quarantined}
    found.points, found.reached = len(expected), len(entries)
    found.expect(summary.exit_code == 3, f"exit code {summary.exit_code}")
    found.expect(summary.quarantined == len(expected), f"the summary counts {summary.quarantined}")
    found.expect(int(store.valid.sum()) + len(entries) == len(store) == len(store.ids), "rows and quarantine are not the source")
    found.expect(told(lambda: verify(out)) == [], "the store does not verify")
    for name in sorted(expected.keys() ^ entries.keys()):
        found.differences.append(f"{name} ({placed.get(name, 'good')}) is {'in quarantine' if name in entries else 'not in quarantine'}")
    for name, entry in entries.items():
        poison = POISONS[placed[name]] if name in placed else None
        right = poison is not None and entry["error"] == expected.get(name) and poison.says in entry["message"]
        found.expect(right and store.ids[entry["row"]] == name and not store.valid[entry["row"]], f"{placed.get(name)}: {entry}")
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    found.expect(lines == store.quarantined, "quarantine.jsonl is not what the receipts say")
    found.note = ", ".join(f"{count} × {name}" for name, count in sorted(Counter(placed[name] for name in entries if name in placed).items()))


def _stopped(kind: str, source: Path, work: Path, found: Outcome) -> None:
    """Stopped at the limit with exit code 4, and going on with a higher one ends in the same bytes."""
    out = work / f"{kind}-limited"
    found.points = 1
    try:
        run(kind, source, out, batch_size=16, shard_size=SHARD, max_bad_fraction=0.005)
        found.differences.append("it did not stop")
    except TooManyBadSamples as error:
        found.reached = 1
        found.expect(error.exit_code == 4, f"exit code {error.exit_code}")
        found.expect("--max-bad-fraction 0.005 allows" in str(error), str(error))
    run(kind, source, out, batch_size=16, shard_size=SHARD)
    found.expect(tree(out) == tree(work / kind), "going on with a higher limit gives other bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.faults.poison", description="Write a corpus with bad samples in it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=SAMPLES["long"])
    parser.add_argument("--share", type=float, default=SHARE)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    made = make_corpus(asked.folder / "samples", asked.samples, asked.share, asked.seed)
    (asked.folder / "poison.json").write_text(json.dumps(made, indent=2, sort_keys=True) + "\n")
