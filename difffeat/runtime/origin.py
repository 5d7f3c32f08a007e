"""Where a store came from, in the words of whoever made it: informational, in no digest, so that a later repair can be typed without remembering.

The manifest decides what a store's bytes are; `origin.json` only adds what it cannot know, the places of artifact and source on this machine.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from difffeat.engines.base import recorded_switches
from difffeat.errors import StoreCorrupt
from difffeat.recognise import not_an_option
from difffeat.runtime.files import Files
from difffeat.runtime.manifest import Manifest, read_json
from difffeat.runtime.places import absolute, is_pattern
from difffeat.runtime.remote_errors import without_password

FORMAT = "difffeat-origin/1"
ORIGIN = "origin.json"
_PLACES = ("images", "coco_captions", "classes", "latents")
"""Options that name a file or folder."""
_UNUSUAL = frozenset("[]{}*?")


@dataclass(frozen=True)
class Origin:
    """Artifact and source as they were given, and the options of `difffeat extract` that the manifest does not hold.

    **Fields:** `options` name of the option without dashes in front -> its value; True or False for a switch; `added` the same of each later run
    that added samples, None where nobody knows.
    """

    artifact: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    added: tuple[Origin | None, ...] = ()

    @classmethod
    def of(cls, artifact: str, source: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Origin:
        """Out of options by their Python names; those that have their default are left out. Places on this machine become absolute, so that the
        command which names them can be typed anywhere.
        """
        chosen = {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}
        plain = {name.replace("_", "-"): _plain(name, value) for name, value in chosen.items()}
        return cls(absolute(artifact), without_password(_absolute_source(source)), plain)

    def of_part(self, part: int) -> Origin | None:
        """Of the samples in one part of the samples table; None where nobody knows."""
        if part == 0:
            return replace(self, added=())
        return self.added[part - 1] if part <= len(self.added) else None

    def with_part(self, part: int, origin: Origin) -> Origin:
        """When samples were added as this part (1 is the first that was added)."""
        known = self.added[: part - 1]
        return replace(self, added=(*known, *(None for _ in range(part - 1 - len(known))), origin))

    def write(self, store: Path, files: Files) -> None:
        """Beside the manifest, by the commit protocol."""
        files.commit_json(store / ORIGIN, {"format": FORMAT, **asdict(self)})

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The inverse of `asdict`. Raises KeyError, TypeError and ValueError on anything else."""
        if not all(isinstance(data[key], str) for key in ("artifact", "source")):
            raise ValueError("artifact and source must be text")
        added = tuple(None if own is None else cls.from_dict(own) for own in data.get("added", ()))
        return cls(data["artifact"], data["source"], dict(data["options"]), added)


def _absolute_source(source: str) -> str:
    """A pattern stays as it is below a folder whose own name would be taken for one."""
    return source if is_pattern(source) and not _UNUSUAL.isdisjoint(os.getcwd()) else absolute(source)


def _plain(name: str, value: Any) -> Any:
    """An option's value in types of JSON."""
    if not isinstance(value, (Path, str)):
        return value
    return without_password(absolute(str(value)) if name in _PLACES else str(value))


def read_origin(store: Path) -> Origin | None:
    """The origin of a store; None where it was made from Python, or by an older version. Raises StoreCorrupt when it is damaged."""
    path = store / ORIGIN
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}")
        return Origin.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise StoreCorrupt(f"{path} is damaged ({type(error).__name__}: {error}). It is only informational: delete it.") from None


def readable_origin(store: Path) -> Origin | None:
    """The origin, None where there is none or it is damaged (which `store verify` tells)."""
    try:
        return read_origin(store)
    except StoreCorrupt:
        return None


def extract_command(store: Path, manifest: Manifest, origin: Origin | None) -> str:
    """The `difffeat extract` command that goes on with a store: options out of its manifest, places out of its origin."""
    run = manifest.recipe.run
    options: dict[str, Any] = {
        "engine": manifest.engine["name"],
        "batch-size": manifest.batch_size,
        "shard-size": manifest.shard_rows,
        "seed": run.seed,
        "draws": run.draws,
        "preprocess": run.preprocessing,
        "captions": run.captions,
        "store-dtype": run.store_dtype,
    }
    if len(manifest.samples) > 1:
        options["append"] = True
    if run.truncate:
        options["truncate"] = True
    if not manifest.recipe.graph.takes_text and run.pixels != "shown":
        options["pixels"] = run.pixels
    if manifest.engine.get("device", "cpu") != "cpu":
        options["device"] = manifest.engine["device"]
    options |= {name.replace("_", "-"): value for name, value in recorded_switches(manifest.engine).items()}
    options |= origin.options if origin is not None else {}
    words = [
        "difffeat",
        "extract",
        *([origin.artifact, origin.source] if origin is not None else ["ARTIFACT", "SOURCE"]),
        "-o",
        not_an_option(str(store)),
    ]
    for name, value in options.items():
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return shlex.join(words)


def extract_commands(store: Path, manifest: Manifest, origin: Origin | None, shards: Iterable[int]) -> list[str]:
    """The commands that compute these shards: one, or where samples were added one for each source that holds any of them."""
    parts = dict.fromkeys(manifest.part_of(shard) for shard in shards)
    return list(dict.fromkeys(extract_command(store, manifest, None if origin is None else origin.of_part(part)) for part in parts))
