"""Every parser of a file that lies on a disk, given valid documents a little spoiled: it reads them or raises its typed error, nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from difffeat.engines import Artifact
from difffeat.engines.seal import seal
from difffeat.engines.tensorrt_plans import read_sidecar
from difffeat.errors import ConfigError, DifffeatError, ForeignGraph, GraphError, SampleError, SourceError, StoreError, StoreLocked
from difffeat.recipe import GraphRecipe, RunRecipe
from difffeat.runtime.files import LOCK, Lock
from difffeat.runtime.manifest import read_manifest, read_receipt, receipt_path, shard_path
from difffeat.runtime.preprocess import decode, quiet_pillow
from difffeat.runtime.store import Store, map_shard, verify
from difffeat.runtime.tokens import Captions
from difffeat.workflows.scenes import tokenizer_json
from tests.faults.listings import listings
from tests.faults.mutations import spoiled_bytes, spoiled_json
from tests.faults.outcome import Outcome, Size, outcome
from tests.faults.poison import photo, saved
from tests.faults.scenarios import make_source, run
from tests.runtime.fake import RECIPE

EXAMPLES = {"short": 40, "long": 2_000}


@dataclass(frozen=True)
class Target:
    """A file, what reads it, and the errors that may come of it. Content that is JSON is spoiled as JSON too."""

    path: Path
    read: Callable[[], Any]
    allowed: tuple[type[DifffeatError], ...]
    json: bool = False


def targets(work: Path) -> dict[str, Target]:
    """Each parser, on files in folders of its own."""
    source = make_source(work / "source")
    run("image", source, work / "whole")
    copies = {name: Path(shutil.copytree(work / "whole", work / name)) for name in ("manifest", "receipt", "shard", "samples", "lock")}
    manifest = read_manifest(work / "whole")
    found = {
        "manifest": Target(copies["manifest"] / "manifest.json", lambda: _look(copies["manifest"]), (StoreError,), json=True),
        "receipt": Target(receipt_path(copies["receipt"], 1), lambda: _receipt(copies["receipt"], manifest), (StoreError,), json=True),
        "shard header": Target(
            shard_path(copies["shard"], 0), lambda: _sum(map_shard(shard_path(copies["shard"], 0), manifest, manifest.shards[0])), (StoreError,)
        ),
        "samples.parquet": Target(copies["samples"] / "samples.parquet", lambda: _look(copies["samples"]), (StoreError,)),
        "lock": Target(copies["lock"] / LOCK, lambda: _lock(copies["lock"]), (StoreLocked,), json=True),
        "graph recipe": _json_text(work / "graph.json", RECIPE.to_dict(), lambda text: GraphRecipe.from_json(text).fingerprint),
        "run recipe": _json_text(work / "run.json", RunRecipe().to_dict(), lambda text: RunRecipe.from_dict(json.loads(text)).to_dict()),
        "sidecar": _sidecar(work / "plans"),
        "tokenizer": _tokenizer(work / "tokenizer.json"),
    }
    with Lock(copies["lock"]):
        held = (copies["lock"] / LOCK).read_bytes()
    (copies["lock"] / LOCK).write_bytes(held)
    sources = {f"source {name}": Target(path, read, (DifffeatError,), is_json) for name, (path, read, is_json) in listings(work / "listings").items()}
    return found | _picture_targets(work) | _artifact_targets(work) | sources


def _picture_targets(work: Path) -> dict[str, Target]:
    """Images with much besides pixels in them."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8298] = 6, "a description", "someone"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    extras = {"exif": exif.tobytes(), "icc_profile": bytes(range(200))}
    found = {}
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        path = work / f"picture.{kind.lower()}"
        path.write_bytes(saved(photo("P" if kind == "GIF" else "RGB", 24), kind, **({} if kind in ("GIF", "BMP") else extras)))
        found[f"{kind} picture"] = Target(path, lambda path=path: _decode(path), (SampleError,))
    path = work / "exif"
    path.write_bytes(extras["exif"])
    found["EXIF"] = Target(path, lambda: _decode_with(path.read_bytes()), (SampleError,))
    return found


def _decode_with(exif: bytes) -> None:
    """A picture with these metadata, in a format whose own checksums do not stop them."""
    with quiet_pillow():
        decode(saved(photo("RGB", 24), "WEBP", exif=exif), 16, "center")
        decode(saved(photo("RGB", 24), "PNG", exif=exif), 16, "center")


def _decode(path: Path) -> None:
    with quiet_pillow():
        decode(path.read_bytes(), 16, "center")


def _artifact_targets(work: Path) -> dict[str, Target]:
    from tests.artifacts import exported

    folder = Path(shutil.copytree(exported("sweep").path, work / "artifact"))
    return {
        "graph": Target(folder / "model.onnx", lambda: Artifact.open(folder), (GraphError,)),
        "recipe.json": Target(folder / "recipe.json", lambda: Artifact.open(folder), (GraphError,), json=True),
        "sweep table": Target(folder / "table.safetensors", lambda: Artifact(folder, exported("sweep").recipe).sweep_table(), (GraphError,)),
    }


def _look(store: Path) -> None:
    """All that a reader may touch."""
    verify(store)
    opened = Store.open(store, partial=True)
    _ = opened.ids, opened.captions, opened.labels, opened.valid, opened.quarantined, opened.manifest
    for tap in opened.taps:
        np.asarray(opened[tap])


def _receipt(store: Path, manifest: Any) -> None:
    receipt = read_receipt(store, manifest, 1)
    if receipt is not None:
        receipt.to_dict()


def _sum(arrays: dict[str, np.ndarray]) -> float:
    with np.errstate(all="ignore"):
        return float(sum(np.nan_to_num(array.astype(np.float64)).sum() for array in arrays.values()))


def _lock(folder: Path) -> None:
    with Lock(folder):
        return


def _json_text(path: Path, value: dict[str, Any], read: Callable[[str], Any]) -> Target:
    path.write_text(json.dumps(value))

    def parse() -> None:
        try:
            text = path.read_text()
            json.loads(text)
        except (ValueError, RecursionError):
            return
        read(text)

    return Target(path, parse, (ForeignGraph,), json=True)


def _sidecar(folder: Path) -> Target:
    """A sidecar with a true seal, so that what is spoiled behind the seal is read too."""
    folder.mkdir()
    os.environ["DIFFFEAT_DATA"] = str(folder / "data")
    made = {"engine": "rtx", "version": "1", "profile": {"min_batch": 1, "opt_batch": 2, "max_batch": 4}, "sha256": "0" * 64, "bytes": 1}
    (folder / "a.plan").write_bytes(b"x")
    (folder / "a.json").write_text(json.dumps({**made, "seal": seal(made)}))
    return Target(folder / "a.json", lambda: read_sidecar(folder / "a.plan"), (), json=True)


def _tokenizer(path: Path) -> Target:
    path.write_text(tokenizer_json())
    return Target(path, lambda: Captions(path, max_length=32, vocab=64, protocol="joined", truncate=False), (SourceError, ConfigError), json=True)


def campaign(size: Size, work: Path) -> Iterator[Outcome]:
    """A seeded stream of spoiled documents for every parser."""
    for name, target in targets(work).items():
        with outcome(f"parser of {name}") as found:
            fuzz(target, EXAMPLES[size], found)
        yield found


def fuzz(target: Target, examples: int, found: Outcome) -> None:
    """Read spoiled documents; what is not allowed to escape becomes a difference (the shortest document that shows it)."""
    whole = target.path.read_bytes()
    spoiled: st.SearchStrategy[bytes] = spoiled_bytes(whole)
    if target.json:
        spoiled = st.one_of(spoiled, spoiled_json(json.loads(whole)))

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(content=spoiled)
    def read(content: bytes) -> None:
        found.points += 1
        target.path.write_bytes(content)
        try:
            target.read()
        except target.allowed:
            found.reached += 1

    try:
        read()
    except Exception as error:  # whatever it is, it is what the promise excludes
        found.differences.append(f"{type(error).__name__}: {error} (after {target.path.read_bytes()!r:.200})")
    finally:
        target.path.write_bytes(whole)
        found.note = f"{found.reached} refused"
        found.reached = found.points
