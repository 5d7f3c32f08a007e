"""Compiled plans on disk: each beside a sealed sidecar that says what it was built from, and is used only while that is still so."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difffeat.engines.base import TensorSpec
from difffeat.engines.seal import is_sealed, seal
from difffeat.errors import ConfigError, UntrustedFile
from difffeat.recipe import canonical_json

FOLDER = "engines"
LOCK = "build.lock"
TIMING_CACHE = "timing.cache"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Smallest, most frequent and largest batch; for text also lengths in tokens (`max_length` None: the longest that the model takes)."""

    min_batch: int = 1
    opt_batch: int = 32
    max_batch: int = 64
    min_length: int = 1
    opt_length: int = 32
    max_length: int | None = None

    def __post_init__(self) -> None:
        for what in ("batch", "length"):
            sizes = [getattr(self, f"{bound}_{what}") for bound in ("min", "opt", "max")]
            known = [size for size in sizes if size is not None]
            if known[0] < 1 or known != sorted(known):
                raise ConfigError(f"a profile needs 1 <= min <= opt <= max for its {what}, got {', '.join(map(str, known))}")

    def covers(self, batch: int, length: int | None = None) -> bool:
        """Whether batches of this size, and captions of this length, fit."""
        return self.min_batch <= batch <= self.max_batch and (length is None or self.min_length <= length <= (self.max_length or length))

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], ...]:
        """Min, opt and max shape of an input."""
        return tuple(
            tuple(getattr(self, f"{bound}_{axis}") if isinstance(axis, str) else axis for axis in spec.shape) for bound in ("min", "opt", "max")
        )


@dataclass(frozen=True)
class Plan:
    """A compiled engine on disk. `seconds` is None and `reason` empty when it was there already."""

    path: Path
    sidecar: Mapping[str, Any]
    seconds: float | None
    reason: str

    @property
    def identity(self) -> str:
        """File name and SHA-256, as an engine's `identity` has them."""
        return f"{self.path.name} {self.sidecar['sha256']}"

    @property
    def size(self) -> int:
        """Bytes of the plan."""
        return int(self.sidecar["bytes"])


def read_plan(plan: Plan) -> bytes:
    """The bytes of a plan, checked against what was sealed in the moment of reading. Raises UntrustedFile, ConfigError (no key)."""
    content = plan.path.read_bytes()
    stored, reason = sealed(plan.path.with_suffix(".json"))
    if stored is None or stored != dict(plan.sidecar) or hashlib.sha256(content).hexdigest() != stored["sha256"]:
        raise UntrustedFile(f"{plan.path} is not the plan that this user sealed ({reason or 'its bytes differ'}). Delete it; it is then built anew.")
    return content


def read_sidecar(path: Path) -> tuple[dict[str, Any] | None, str]:
    """What a plan was built from, if it is whole and sealed by this user; else why it may not be loaded. Raises ConfigError (no key)."""
    stored, reason = sealed(path.with_suffix(".json"))
    if stored is not None and not is_whole(path, stored):
        return None, f"{path.name} is not the file that was sealed"
    return stored, reason


def sealed(beside: Path) -> tuple[dict[str, Any] | None, str]:
    """What a sidecar says, if this user sealed it; else why not. Raises ConfigError and UntrustedFile where the key cannot be used."""
    if not beside.is_file():
        return None, f"{beside.name}, which says what it was built from, is missing"
    stored, mark = _parsed(beside)
    if stored is None:
        return None, f"{beside.name} is damaged"
    if not is_sealed(stored, mark):
        return None, f"{beside.with_suffix('.plan').name} does not carry this user's seal"
    return stored, ""


def _parsed(beside: Path) -> tuple[dict[str, Any] | None, object]:
    """What a sidecar says and the seal it carries, whoever made it; None where it says nothing."""
    try:
        stored = json.loads(beside.read_bytes())
        mark = stored.pop("seal", None)
        canonical_json(stored).encode()  # what is not JSON's own, or no text, has no seal
        return dict(stored), mark
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None, None


def is_whole(target: Path, sidecar: Mapping[str, Any]) -> bool:
    """Whether a file has the bytes that its sidecar was sealed for."""
    if not target.is_file():
        return False
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sidecar.get("sha256")


def existing(target: Path, made_from: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The sidecar of a plan that may be used, or why there is none."""
    beside = target.with_suffix(".json")
    if not target.is_file():
        return None, why_none(target.parent, made_from)
    stored, reason = sealed(beside)
    if stored is None:
        return None, reason
    if different := differences(made_from, stored):
        return None, f"{beside.name} is of another build: {'; '.join(different)}"
    if not is_whole(target, stored):
        return None, f"{target.name} is not the file that was sealed"
    return stored, ""


def why_none(folder: Path, made_from: Mapping[str, Any]) -> str:
    """Why no plan that is there is the one that is wanted: in what the nearest one differs."""
    told = [(path, *_parsed(path)) for path in sorted(folder.glob("*.json"))]
    same = ("engine", "graph")
    like = [(path, stored, mark) for path, stored, mark in told if stored is not None and all(stored.get(k) == made_from[k] for k in same)]
    if not like:
        return f"there is none yet of {made_from['engine']} for the {made_from['graph']} graph"
    path, stored, mark = min(like, key=lambda one: len(differences(made_from, one[1])))
    words = differences(made_from, stored) + ([] if is_sealed(stored, mark) else ["not this user's seal"])
    if not words:
        return f"of {path.with_suffix('.plan').name} only its sidecar is left"
    nearest = f"of {len(like)} plans there the nearest, {path.with_suffix('.plan').name}," if len(like) > 1 else path.with_suffix(".plan").name
    return f"{nearest} has {'; '.join(words)}"


def differences(made_from: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """In what a plan that is there differs from the one that is wanted, in words."""
    found = []
    for name, wanted in made_from.items():
        has = stored.get(name)
        if isinstance(wanted, Mapping) and isinstance(has, Mapping):
            found += differences(wanted, has)
        elif has != wanted:
            found.append(f"{name.replace('_', ' ')} {_short(has)} in place of {_short(wanted)}")
    return found


def _short(value: Any) -> str:
    """Enough of it to tell it from another; a GPU by its name."""
    text = repr(value[0] if isinstance(value, list) and value else value)
    return text if len(text) <= 50 else f"{text[:14]}...{text[-1]}"


def last_seconds(folder: Path, made_from: Mapping[str, Any]) -> float | None:
    """How long the slowest build of the same graph by the same builder for the same device took, whatever its profile; None where none is known."""
    found = []
    for path in folder.glob("*.json"):
        stored, _ = _parsed(path)
        if stored is not None and not differences(made_from, stored) and isinstance(stored.get("seconds"), float):
            found.append(stored["seconds"])
    return max(found, default=None)


@contextlib.contextmanager
def one_build(folder: Path, say: Say) -> Iterator[None]:
    """Builds in one folder come one after the other: workers that start together then share a plan, whose bytes no second build would repeat."""
    try:
        import fcntl
    except ImportError:  # a system without such locks; two builds at once then end with the plan of the later one
        yield
        return
    with (folder / LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that builds a plan in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            say(f"{folder} takes no locks ({error.strerror}): build there from one process at a time")
        yield


def store(target: Path, content: memoryview, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """The file, then its sealed sidecar, which is returned; each whole or not there. The folder is the user's alone."""
    sidecar = {**made_from, "bytes": content.nbytes, "sha256": hashlib.sha256(content).hexdigest()}
    target.parent.mkdir(exist_ok=True, mode=0o700)
    marked = json.dumps({**sidecar, "seal": seal(sidecar)}, indent=2, sort_keys=True).encode() + b"\n"
    for path, data in ((target, content), (target.with_suffix(".json"), marked)):
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    return sidecar


class TimingCache:
    """Measured timings of kernels, kept between builds on one device; sealed like a plan, since the library parses them natively."""

    def __init__(self, path: Path, made_for: Mapping[str, Any], wanted: bool) -> None:
        self._path, self._made_for, self._wanted = path, dict(made_for), wanted

    def give(self, config: Any) -> None:
        """Hand what is there to a build."""
        if not self._wanted:
            return
        stored, _ = sealed(self._path.with_suffix(".json"))
        usable = stored is not None and not differences(self._made_for, stored) and is_whole(self._path, stored)
        config.set_timing_cache(config.create_timing_cache(self._path.read_bytes() if usable else b""), False)

    def keep(self, config: Any) -> None:
        """Write what a build has measured."""
        if self._wanted and (cache := config.get_timing_cache()) is not None:
            store(self._path, memoryview(cache.serialize()), self._made_for)
