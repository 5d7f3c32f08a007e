"""Where a store came from, in the words of whoever made it: informational, in no digest, so that a later repair can be typed without remembering.

The manifest decides what a store's bytes are; `origin.json` only adds what it cannot know, the places of artifact and source on this machine.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from difffeat.errors import StoreCorrupt
from difffeat.runtime.files import Files
from difffeat.runtime.manifest import Manifest, read_json

FORMAT = "difffeat-origin/1"
ORIGIN = "origin.json"
_PASSWORD = re.compile(r"(://[^/?#@:]*:)[^/?#@]+@")


@dataclass(frozen=True)
class Origin:
    """Artifact and source as they were given, and the options of `difffeat extract` that the manifest does not hold.

    **Fields:** `options` name of the option without dashes in front -> its value; True or False for a switch.
    """

    artifact: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, artifact: str, source: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Origin:
        """Out of options by their Python names; those that have their default are left out."""
        chosen = {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}
        plain = {name.replace("_", "-"): without_password(str(value)) if isinstance(value, (Path, str)) else value for name, value in chosen.items()}
        return cls(artifact, without_password(source), plain)

    def write(self, store: Path, files: Files) -> None:
        """Beside the manifest, by the commit protocol."""
        files.commit_json(store / ORIGIN, {"format": FORMAT, **asdict(self)})


def without_password(place: str) -> str:
    """A place as it may be written down: passwords of its URLs are `PASSWORD`, since a store is passed on and backed up."""
    return _PASSWORD.sub(r"\1PASSWORD@", place)


def read_origin(store: Path) -> Origin | None:
    """The origin of a store; None where it was made from Python, or by an older version. Raises StoreCorrupt when it is damaged."""
    path = store / ORIGIN
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        if data["format"] != FORMAT or not all(isinstance(data[key], str) for key in ("artifact", "source")):
            raise ValueError(f"format {data['format']!r}")
        return Origin(data["artifact"], data["source"], dict(data["options"]))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreCorrupt(f"{path} is damaged ({type(error).__name__}: {error}). It is only informational: delete it.") from None


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
    if manifest.engine.get("device", "cpu") != "cpu":
        options["device"] = manifest.engine["device"]
    options |= origin.options if origin is not None else {}
    words = ["difffeat", "extract", *([origin.artifact, origin.source] if origin is not None else ["ARTIFACT", "SOURCE"]), "-o", str(store)]
    for name, value in options.items():
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return shlex.join(words)
