"""Hub ids and local paths to folders and files on this disk.

Of a repository only the files that are read are fetched, each by its exact name: a pattern matches in every folder, and variants that nobody reads.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from difffeat.errors import CheckpointNotFound, ConfigError, MissingExtra, OutputError

_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"(?P<repository>{_NAME}/{_NAME})(?P<inside>(?:/[\w.+ -]+)*)/?(?:@(?P<revision>[^@\s]+))?")
_URI = re.compile(rf"hf://(?:models/)?(?P<repository>{_NAME}/{_NAME})(?:@(?P<revision>[^@/\s]+))?(?P<inside>(?:/[\w.+ -]+)*)/?")
_PAGE = re.compile(
    rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repository>{_NAME}/{_NAME})"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/\s?#]+)(?P<inside>(?:/[^/\s?#]+)*))?/?(?:[?#].*)?"
)
_FILES = (".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".json")
STEM = "diffusion_pytorch_model"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LISTED = 8


@dataclass(frozen=True)
class HubPlace:
    """A place on the hub: `repository` as owner/name, `inside` the folder or file within it ("" for its root), `revision` if one is named."""

    repository: str
    inside: str = ""
    revision: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether a single file is named."""
        return self.inside.endswith(_FILES)

    def __str__(self) -> str:
        return self.repository + (f"/{self.inside}" if self.inside else "") + (f"@{self.revision}" if self.revision else "")


def parse_hub_id(text: str) -> HubPlace | None:
    """`owner/name`, `owner/name/folder`, `owner/name/folder/file.safetensors`, each with `@revision`; `hf://` and the hub's own pages. None for what
    is none of them.
    """
    match = _URI.fullmatch(text) or _PAGE.fullmatch(text) or _HUB_ID.fullmatch(text)
    if match is None:
        return None
    inside, revision = (match["inside"] or "").strip("/"), match["revision"]
    if "://" in text:
        inside, revision = unquote(inside), revision and unquote(revision)
    if any(part in ("", ".", "..") for part in inside.split("/")) and inside:
        return None
    name_is_file = not inside and match["repository"].endswith(_FILES)
    return None if name_is_file and "://" not in text else HubPlace(match["repository"], inside, revision)


def place_words(path_or_id: str | Path) -> str:
    """Where `locate` looks, for people: a path on this disk comes before a hub id of the same name, and is said to."""
    text, path = str(path_or_id), Path(path_or_id).expanduser()
    found = parse_hub_id(text)
    if path.exists():
        return f"{text} on this disk (not from the hub, which has ids of this form)" if found is not None and not path.is_absolute() else text
    return text if found is None else f"{text} on the hub"


def locate(path_or_id: str | Path, *, option: str, subfolder: str | None = None, revision: str | None = None) -> Path:
    """A local path as it is, or a hub id downloaded (through the hub's own cache, token and offline mode).

    **Arguments:** `option` the command-line option to name in errors; `subfolder` the part of the repository that is wanted, where the id names none.

    Raises CheckpointNotFound, ConfigError (two revisions), OutputError (the disk refuses the download).
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    text = str(path_or_id)
    place = parse_hub_id(text)
    if place is None:
        raise CheckpointNotFound(
            f"{text} does not exist, and is not a hub id (owner/name).{_near(path)} Pass {option} PATH with a file or folder that does."
        )
    if None not in (revision, place.revision) and revision != place.revision:
        raise ConfigError(f"{text} names the revision {place.revision!r}, --revision {revision!r}. Leave out one.")
    return download(
        place.repository, option=option, subfolder=subfolder, revision=revision or place.revision, inside=place.inside, is_file=place.is_file
    )


def _near(path: Path) -> str:
    """The entry of the folder whose name is most like that of a path which is not there."""
    folder = path.parent
    try:
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    except OSError:
        names = []
    similar = difflib.get_close_matches(path.name, names, 1)
    return f" Is it {folder / similar[0]}?" if similar else ""


def download(repository: str, *, option: str, subfolder: str | None, revision: str | None, inside: str = "", is_file: bool = False) -> Path:
    """Fetch what is read of a hub repository: one model folder's config.json with its weights, in safetensors if it has them (whole, or in the parts
    that their index names), else in `.bin`.

    **Returns:** the local copy of the repository's root, of its folder `inside`, or of the one file. Raises as `locate`.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise MissingExtra("huggingface_hub", "export", "Loading a hub id") from None
    fetching = _Fetching(repository, revision, option)
    if is_file:
        return fetching.required(inside)
    folders = [*([f"{inside}/{subfolder}".strip("/")] if subfolder else []), inside]
    for folder in folders:
        prefix = f"{folder}/" if folder else ""
        config = fetching.optional(f"{prefix}config.json")
        if config is None:
            continue
        if not fetching.weights(prefix):
            break  # the root's weights, if it has any, are another model's
        root = config.parents[len(Path(folder).parts)]
        return root / inside if inside else root
    return fetching.nothing_there(folders)


class _Fetching:
    """One repository's files, one by one, all of the commit that the first was of."""

    def __init__(self, repository: str, revision: str | None, option: str) -> None:
        self.repository, self.revision, self.option = repository, revision, option
        self._commit: str | None = None
        self._unreached: Exception | None = None

    def required(self, name: str) -> Path:
        """A file that must be there."""
        found = self.optional(name)
        if found is None:
            self.nothing_there([name])
        return found

    def optional(self, name: str) -> Path | None:
        """A file, or None where the repository (without network: the cache) does not have it."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            found = self._fetch(name)
        except LocalEntryNotFoundError as error:
            self._unreached = (
                self._unreached or error
            )  # from now on all comes from the cache: half of one place and half of another could be of two models
            return None
        except EntryNotFoundError:
            return None
        except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's
            self._refuse(error, name)
        commit = found.parents[len(Path(name).parts) - 1].name
        self._commit = commit if _COMMIT.fullmatch(commit) else None
        return found

    def weights(self, prefix: str) -> bool:
        """The weights of one folder; whether it has any."""
        if self.optional(f"{prefix}{STEM}.safetensors") is not None:
            return True
        index = self.optional(f"{prefix}{STEM}.safetensors.index.json")
        if index is None:
            return self.optional(f"{prefix}{STEM}.bin") is not None
        for part in _parts(index):
            self.required(f"{prefix}{part}")
        return True

    def _fetch(self, name: str) -> Path:
        import huggingface_hub

        revision, cached = self._commit or self.revision, self._unreached is not None
        found = Path(huggingface_hub.hf_hub_download(self.repository, name, revision=revision, local_files_only=cached))
        if _intact(found):
            return found
        if cached or huggingface_hub.constants.HF_HUB_OFFLINE:
            raise CheckpointNotFound(
                f"{found} in the hub's cache is damaged: its bytes are not those that the hub names. Delete {found.resolve()} and run the same "
                "command again with network."
            )
        return Path(huggingface_hub.hf_hub_download(self.repository, name, revision=revision, force_download=True))

    def nothing_there(self, looked_for: list[str]) -> NoReturn:
        """Raises CheckpointNotFound that says what was looked for and what is there."""
        names = ", ".join(name if name.endswith(_FILES) else f"{name}/config.json" if name else "config.json" for name in looked_for)
        if self._unreached is not None and _offline(self._unreached):
            from huggingface_hub import constants

            raise CheckpointNotFound(
                f"{self._at()} could not be fetched: HF_HUB_OFFLINE is set, so the hub is not asked, and its cache ({constants.HF_HUB_CACHE}) has no "
                f"{names} with its weights. Run the same command once without HF_HUB_OFFLINE and with the same HF_HOME. "
                f"With no network, download the files on another machine and pass {self.option} PATH."
            ) from self._unreached
        if self._unreached is not None:
            self._refuse(self._unreached, looked_for[0])
        one = (
            f"the file {names}"
            if looked_for[0].endswith(_FILES)
            else f"a model that is read here (looked for {names} with {STEM}.safetensors or .bin)"
        )
        raise CheckpointNotFound(
            f"{self._at()} on the hub does not have {one}. {self._listing()}For another file pass {self.option} {self.repository}/FILE, or "
            f"download it and pass {self.option} PATH."
        )

    def _listing(self) -> str:
        import huggingface_hub

        try:
            names = huggingface_hub.HfApi().list_repo_files(self.repository, revision=self._commit or self.revision)
        except Exception:  # only to help: what went wrong first is told anyhow
            return ""
        kept = [name for name in names if name.endswith((*_FILES, ".onnx", ".msgpack"))] or names
        more = f" and {len(kept) - _LISTED} more" if len(kept) > _LISTED else ""
        return f"It has {', '.join(kept[:_LISTED])}{more}. " if kept else "It is empty. "

    def _at(self) -> str:
        return self.repository + (f" at revision {self.revision}" if self.revision else "")

    def _refuse(self, error: Exception, name: str) -> NoReturn:
        """Raises what a failed download means: the hub's own words, and what helps."""
        if isinstance(error, CheckpointNotFound):
            raise error
        disk = _disk_error(error)
        if disk is not None:
            where = f"{disk.filename}: " if disk.filename else ""
            raise OutputError(
                f"{name} of {self._at()} could not be kept on disk: {where}{disk.strerror or disk}. Free space or mend its permissions, or set "
                "HF_HOME to a folder with room; then run the same command again."
            ) from error
        words = " ".join(str(error).split()) or type(error).__name__
        cause = error.__cause__
        if isinstance(error, FileNotFoundError) and cause is not None and (said := " ".join(str(cause).split())) and said not in words:
            words = f"{words} ({type(cause).__name__}: {said})"
        what = f"{self._at()} could not be fetched from the hub ({type(error).__name__}: {words})"
        raise CheckpointNotFound(f"{what}. {self._advice(error)}") from None

    def _advice(self, error: Exception) -> str:
        from huggingface_hub import constants, errors

        status, endpoint = _status(error), constants.ENDPOINT
        login = "log in with `hf auth login`, or set HF_TOKEN"
        path = f"or pass {self.option} PATH (a .pt or .safetensors file, or a diffusers folder)"
        if isinstance(error, errors.GatedRepoError):
            return f"Its owner gives access on request: ask at {endpoint}/{self.repository}, {login}, {path}."
        if isinstance(error, errors.DisabledRepoError):
            return f"It was closed on the hub and cannot be had there: take another repository, {path}."
        if isinstance(error, errors.RevisionNotFoundError):
            return f"Correct --revision (a branch, a tag or a commit of {endpoint}/{self.repository}), or leave it out for its main branch."
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"There is no file or folder of that name here, and the hub has no such repository, or a private one: correct the name; if it is "
                f"private, {login}; {path}."
            )
        if isinstance(error, errors.HFValidationError):
            return f"Correct the id (owner/name), {path}."
        if status in (401, 403):
            return f"The token that was sent is not valid, or may not read this: {login} with one that may, {path}."
        if status == 429:
            return (
                f"The hub takes no more requests from here for a while: wait some minutes and run the same command again, or {login}, which has more."
            )
        if status is not None and status >= 500:
            return f"The hub at {endpoint} fails at the moment: run the same command later, {path}."
        return (
            f"Is there a network, and is {endpoint} the right address (HF_ENDPOINT, HTTPS_PROXY)? With no network, download the files on another "
            f"machine and pass {self.option} PATH; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured."
        )


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _offline(error: BaseException) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    return constants.HF_HUB_OFFLINE or any(isinstance(one, OfflineModeIsEnabled) for one in _chain(error))


def _status(error: BaseException) -> int | None:
    """HTTP status of the answer that an error is of."""
    for one in _chain(error):
        response: Any = getattr(one, "response", None)
        if isinstance(getattr(response, "status_code", None), int):
            return response.status_code
    return None


def _disk_error(error: BaseException) -> OSError | None:
    """What the disk refused, if it was the disk; a refused connection is an OSError too."""
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno in _DISK and getattr(one, "response", None) is None:
            return one
    return None


def _intact(path: Path) -> bool:
    """Whether a file of the hub's cache has the digest that it is named after; small files are named after another kind, which is not checked."""
    digest = path.resolve().name
    if not _SHA256.fullmatch(digest):
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def _parts(index: Path) -> list[str]:
    """Names of the parts that an index lists, those that lie beside it; what else is wrong with it is told when it is read."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(name for name in names if isinstance(name, str) and Path(name).name == name)
