"""Nothing hostile runs: a typed error, nothing written elsewhere, no process started, no connection opened, memory bounded.

Each case runs in a child of its own under an audit hook (Python's own record of opened files, processes and connections) and with its peak of
resident memory measured. What other modules test in depth is not repeated here:

| hostile thing | where it is tested |
|---|---|
| pickle with code in a .pt, torch's format and bare | tests/export/test_weights.py, and here under the hook |
| ONNX external data: `..`, absolute, links, absurd offset, length, shape, type, hidden in subgraphs | tests/engines/test_artifact.py; two here too |
| tampered plan, forged or missing seal, another user's key | tests/engines/test_tensorrt_build.py, tests/engines/test_tensorrt_engine.py |
| shard headers that lie about place, type and shape | tests/runtime/test_store.py; an absurd length here, measured |
| image bombs of every accepted format, compressed metadata, special files in place of images | here |
| tar members that climb out, links, devices, absurd lengths | tests/runtime/test_sources_tar.py; one here under the hook |
| captions without end, deep JSON, absurd numbers | here |
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from difffeat.engines import Artifact
from difffeat.errors import DifffeatError
from difffeat.runtime.manifest import read_manifest, shard_path
from difffeat.runtime.preprocess import MAX_PIXELS, decode, quiet_pillow
from difffeat.runtime.sources import open_source
from difffeat.runtime.store import Store, map_shard
from tests.faults.forks import in_child
from tests.faults.outcome import Outcome, Size, outcome
from tests.faults.poison import photo, png_header, saved
from tests.faults.scenarios import make_source, run

REFUSED_MIB = 48
"""Memory that refusing may take: the largest of these files, once, and what a decoder allocates before it looks."""


@dataclass
class Seen:
    """What a piece of code did: the error it gave (with its message where it is none of ours), effects on files, processes and connections, and how
    far resident memory rose (MiB).
    """

    error: str = ""
    effects: list[str] = field(default_factory=list)
    mib: float = 0.0


@dataclass(frozen=True)
class Case:
    """**Fields:** `call` the hostile thing; `error` the typed error it must give, empty where it is harmless and read; `mib` its bound."""

    call: Callable[[], Any]
    error: str
    mib: float = REFUSED_MIB


def watched(call: Callable[[], Any]) -> Seen:
    """Run in a child under an audit hook."""

    def work() -> Seen:
        effects: list[str] = []
        start = _peak_mib()
        sys.addaudithook(lambda event, arguments: effects.append(f"{event} {arguments!r:.120}") if _is_effect(event, arguments) else None)
        error = None
        try:
            call()
        except BaseException as caught:  # judged by the caller
            error = caught
        told = "" if error is None else type(error).__name__ if isinstance(error, DifffeatError) else f"{type(error).__name__}: {error}"
        return Seen(told, list(effects), _peak_mib() - start)

    ended = in_child(work)
    return ended.value if ended.value is not None else Seen(error=f"signal {ended.signal} {ended.error} {ended.message}")


def _is_effect(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) or (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        return bool(writes) and arguments[0] != os.devnull
    started = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect", "pty.", "ctypes.dlopen")
    changed = ("os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.")
    return event.startswith(started + changed)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def campaign(size: Size, work: Path) -> Iterator[Outcome]:
    """Every case by group; images as large as is allowed in the long form only."""
    for name, cases in (
        ("image bombs", _images(size)),
        ("files", _files(work)),
        ("artifacts and weights", _artifacts(work)),
        ("stores", _stores(work)),
    ):
        with outcome(f"hostile {name}") as found:
            worst = max((_judge(kind, case, found), kind) for kind, case in cases.items())
            found.note = f"memory rose by {worst[0]:.0f} MiB at most ({worst[1]})"
        yield found


def _judge(kind: str, case: Case, found: Outcome) -> float:
    seen = watched(case.call)
    found.points += 1
    found.reached += seen.error == case.error
    found.expect(seen.error == case.error, f"{kind}: {seen.error or 'no error'}, expected {case.error or 'none'}")
    found.expect(not seen.effects, f"{kind}: {seen.effects}")
    found.expect(seen.mib < case.mib, f"{kind}: memory rose by {seen.mib:.0f} MiB, more than {case.mib}")
    return seen.mib


def _images(size: Size) -> dict[str, Case]:
    side = int(MAX_PIXELS**0.5)
    whole = {
        "PNG that states 60 000 × 60 000": png_header(60_000, 60_000),
        "PNG that states 2³¹−1 × 2³¹−1": png_header(2**31 - 1, 2**31 - 1),
        "JPEG that states 65 535 × 65 535": _restated(saved(photo(), "JPEG"), b"\xff\xc0", 5, ">HH", 65_535, 65_535),
        "GIF that states 65 535 × 65 535": _restated(saved(photo("P"), "GIF"), b"GIF8", 6, "<HH", 65_535, 65_535),
        "BMP that states 100 000 × 100 000": _restated(saved(photo(), "BMP"), b"BM", 18, "<ii", 100_000, 100_000),
        "WEBP that states 2²⁴ × 2²⁴": _webp(2**24, 2**24),
        "TIFF that states 64 × 2³¹−1": saved(photo(), "TIFF").replace(*_tiff_height(64, 2**31 - 1)),
        "PNG just beyond the limit": png_header(side + 1, side + 1),
    }
    cases = {name: Case(_decoding(data), "ImageTooLarge") for name, data in whole.items()}
    cases["PNG whose text would unpack to 256 MiB"] = Case(_decoding(_text_bomb(256)), "")
    cases["PNG whose colour profile would unpack to 256 MiB"] = Case(_decoding(_profile_bomb(256)), "")
    if size == "long":
        cases["PNG as large as the limit, one bit deep"] = Case(_decoding(_plain("1", side)), "", mib=MAX_PIXELS * 9 / 2**20)
        cases["PNG as large as the limit, transparent"] = Case(_decoding(_plain("RGBA", side)), "", mib=MAX_PIXELS * 17 / 2**20)
    return cases


def _decoding(data: bytes) -> Callable[[], Any]:
    def call() -> None:
        with quiet_pillow():
            decode(data, 32, "center")

    return call


def _restated(data: bytes, marker: bytes, offset: int, layout: str, *sizes: int) -> bytes:
    """The file with other sizes in its header, `offset` after a marker."""
    place = data.index(marker) + offset
    stated = struct.pack(layout, *sizes)
    return data[:place] + stated + data[place + len(stated) :]


def _tiff_height(height: int, stated: int) -> tuple[bytes, bytes]:
    """The little-endian entry of the height, and what it is replaced by."""
    entry = struct.pack("<HHI", 257, 4, 1)
    return entry + struct.pack("<I", height), entry + struct.pack("<I", stated)


def _webp(width: int, height: int) -> bytes:
    """An extended WEBP whose canvas is stated, with no picture in it."""
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"VP8X" + struct.pack("<I", len(canvas)) + canvas
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _with_chunk(kind: bytes, data: bytes) -> bytes:
    whole = saved(photo(), "PNG")
    return whole[:33] + _chunk(kind, data) + whole[33:]  # after the signature and IHDR


def _packed(mib: int) -> bytes:
    packer, parts = zlib.compressobj(9), []
    for _ in range(mib):
        parts.append(packer.compress(bytes(1 << 20)))
    return b"".join([*parts, packer.flush()])


def _text_bomb(mib: int) -> bytes:
    return _with_chunk(b"zTXt", b"comment\0\0" + _packed(mib))


def _profile_bomb(mib: int) -> bytes:
    return _with_chunk(b"iCCP", b"profile\0\0" + _packed(mib))


def _plain(mode: str, side: int) -> bytes:
    return saved(Image.new(mode, (side, side)), "PNG")


def _files(work: Path) -> dict[str, Case]:
    folder = make_source(work / "files" if (work / "files").mkdir() else work / "files" / "source", 6)
    one = folder / "00.png"
    names = {"pipe": lambda p: os.mkfifo(p), "device": lambda p: p.symlink_to("/dev/zero"), "socket": _bind, "folder": lambda p: p.mkdir()}
    cases = {}
    for name, make in names.items():
        place = work / f"{name}.png"
        make(place)
        source = work / f"{name}.jsonl"
        source.write_text(json.dumps({"image": str(place), "id": "a"}) + "\n" + json.dumps({"image": str(one), "id": "b"}) + "\n")
        cases[f"a {name} in place of an image"] = Case(_extracting(source, work / f"out-{name}"), "", mib=64)
    endless = work / "endless"
    endless.mkdir()
    (endless / "a.png").write_bytes(one.read_bytes())
    (endless / "a.txt").symlink_to("/dev/zero")
    cases["captions without end"] = Case(lambda: _must_tell(endless, "no regular file"), "")
    piped = work / "piped"
    piped.mkdir()
    (piped / "a.png").write_bytes(one.read_bytes())
    os.mkfifo(piped / "a.txt")
    cases["a tar whose members climb out"] = Case(_listing(_climbing_tar(work / "climb.tar")), "")
    cases["a pipe in place of captions"] = Case(lambda: _must_tell(piped, "no regular file"), "")
    return cases


def _climbing_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in ("../../escaped.png", "/tmp/escaped.png", "ok.png"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"data"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "../../../etc/passwd"
        tar.addfile(link)
    return path


def _listing(path: Path) -> Callable[[], Any]:
    """Listed and read in place, nothing unpacked; a link is no image."""

    def call() -> None:
        found = [sample.image.read() for sample in open_source(path).samples if sample.image is not None and sample.id != "link"]
        if found != [b"data"] * 3:
            raise AssertionError(f"read {found}")

    return call


def _must_tell(folder: Path, message: str) -> None:
    (sample,) = open_source(folder).samples
    if sample.problem is None or message not in sample.problem:
        raise AssertionError(f"the sample's problem is {sample.problem!r}")


def _bind(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _extracting(source: Path, out: Path) -> Callable[[], Any]:
    """The bad one goes to quarantine, and nothing but the store is written: writes of the store's own are left to its other tests."""

    def call() -> None:
        opened = open_source(source)
        from tests.faults.scenarios import ENGINES  # imported ahead of the hook by the parent already

        feeder = _feeder(ENGINES["image"]())
        found = feeder(opened.samples)
        if [failure.id for failure in found] != ["a"]:
            raise AssertionError(f"quarantined: {found}")

    return call


def _feeder(engine: Any) -> Callable[[Any], list[Any]]:
    from difffeat.runtime.batches import ImageFeeder
    from difffeat.runtime.decoding import DecodePool

    def feed(samples: Any) -> list[Any]:
        feeder = ImageFeeder(engine, 2, "center", "shown")
        (batch,), _ = feeder.plan(samples)
        with DecodePool(1) as pool:
            feeder.start(batch, pool)
            return feeder.finish(batch).failures

    return feed


class Exploit:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def _artifacts(work: Path) -> dict[str, Case]:
    import shutil

    import torch

    from difffeat.export.weights import load_dit
    from tests.artifacts import exported

    place = work / "weights"
    place.mkdir()
    torch.save({"pos_embed": Exploit(place / "touched")}, place / "torch.pt")
    (place / "bare.pt").write_bytes(pickle.dumps(Exploit(place / "touched")))
    (place / "tensors.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    absurd = json.dumps({"x": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64 - 4]}}).encode()
    (place / "shape.safetensors").write_bytes(struct.pack("<Q", len(absurd)) + absurd)
    for name, location in (("outside", "../../../../etc/passwd"), ("linked", "model.onnx_data")):
        folder = Path(shutil.copytree(exported("sweep").path, place / name))
        _point_to(folder, location)
        if name == "linked":
            (folder / "model.onnx_data").rename(place / "data")
            (folder / "model.onnx_data").symlink_to(place / "data")
    deep = Path(shutil.copytree(exported("sweep").path, place / "deep"))
    (deep / "recipe.json").write_text("[" * 200_000 + "]" * 200_000)
    return {
        "a pickle with code, in torch's format": Case(lambda: load_dit(place / "torch.pt"), "UntrustedFile", mib=96),
        "a pickle with code, bare": Case(lambda: load_dit(place / "bare.pt"), "UntrustedFile", mib=96),
        "safetensors with a header of 2⁶² bytes": Case(lambda: load_dit(place / "tensors.safetensors"), "CheckpointMismatch"),
        "safetensors with an absurd shape": Case(lambda: load_dit(place / "shape.safetensors"), "CheckpointMismatch"),
        "external data outside": Case(lambda: Artifact.open(place / "outside"), "UnsafeGraph"),
        "external data behind a link": Case(lambda: Artifact.open(place / "linked"), "UnsafeGraph"),
        "a recipe nested 200 000 deep": Case(lambda: Artifact.open(place / "deep"), "ForeignGraph"),
    }


def _point_to(folder: Path, location: str) -> None:
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def _stores(work: Path) -> dict[str, Case]:
    import shutil

    (work / "stores").mkdir()
    source = make_source(work / "stores" / "source", 6)
    run("image", source, work / "stores" / "whole")
    manifest = read_manifest(work / "stores" / "whole")

    def spoiled(name: str, file: str, content: bytes) -> Path:
        store = Path(shutil.copytree(work / "stores" / "whole", work / "stores" / name))
        (store / file).write_bytes(content)
        return store

    text = json.dumps(manifest.to_dict())
    shard = shard_path(Path(), 0).as_posix()
    long = spoiled("long", shard, struct.pack("<Q", 2**62) + b"{}")
    large = spoiled("large", "manifest.json", text.replace('"rows": 6', f'"rows": {10**400}').encode())
    deep = spoiled("deep", "manifest.json", b"[" * 500_000)
    many = spoiled("many", "manifest.json", text.replace('"shards": [4, 2]', f'"shards": [{2**61}, {2**61}]').encode())
    bomb = spoiled("bomb", "samples.parquet", _parquet_bomb())
    return {
        "a table of ten million rows in a few kilobytes": Case(lambda: Store.open(bomb).ids, "StoreCorrupt"),
        "a shard whose header has 2⁶² bytes": Case(lambda: map_shard(shard_path(long, 0), manifest, 4), "StoreCorrupt"),
        "a manifest of 10⁴⁰⁰ rows": Case(lambda: Store.open(large), "StoreCorrupt"),
        "a manifest nested 500 000 deep": Case(lambda: Store.open(deep), "StoreCorrupt"),
        "a manifest of 2⁶² rows": Case(lambda: Store.open(many), "StoreCorrupt"),
    }


def _parquet_bomb() -> bytes:
    """Ten million empty rows in a few kilobytes, where the manifest says six."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 10_000_000
    strings = pa.nulls(count, pa.list_(pa.string()))
    columns = {"id": pa.nulls(count, pa.string()), "image": pa.nulls(count, pa.string()), "bytes": pa.nulls(count, pa.int64())}
    sink = io.BytesIO()
    pq.write_table(pa.table({**columns, "captions": strings, "labels": strings}), sink, compression="zstd", store_schema=False)
    return sink.getvalue()
