"""Every file below a folder, on disk or behind a URL, and what was not looked into."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from difffeat.errors import SourceError
from difffeat.runtime.places import is_hidden
from difffeat.runtime.remote import is_url, list_remote
from difffeat.runtime.samples import IMAGE_SUFFIXES


@dataclass
class Listing:
    """**Fields:** `files` path below the root -> bytes (−1: not known), in path order; `hidden` paths whose names begin with a dot (folders on disk
    end in a slash and are not opened); `linked` folders that are links, which are followed; `loops` links to a folder that they lie in, which are
    not; `unreadable` folders that may not be opened.
    """

    files: dict[str, int] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def notes(self) -> tuple[str, ...]:
        """A sentence for each kind of what was left out, or taken from elsewhere."""
        told = [path for path in sorted(self.hidden) if path.endswith("/") or suffix_of_name(path) in IMAGE_SUFFIXES]
        kinds = {
            f"{len(told)} hidden images and folders are left out, the first is %s: rename what belongs to the samples": told,
            f"{len(self.unreadable)} folders cannot be opened and are left out, the first is %s: change their permissions": self.unreadable,
            f"{len(self.linked)} linked folders are followed, the first is %s": self.linked,
            f"{len(self.dangling)} links lead nowhere and are left out, the first is %s: mend or remove them": self.dangling,
            f"{len(self.loops)} links lead to a folder that they lie in, and are not followed; the first is %s": self.loops,
        }
        return tuple(sentence % min(paths) for sentence, paths in kinds.items() if paths)


def list_files(root: str, name: str, *, above: Sequence[tuple[int, int]] = ()) -> Listing:
    """All files below a folder or URL. Links on disk are followed, to files and to folders, but not back to a folder they lie in, among them those
    `above` the root (device and number of each).

    Raises SourceError naming the folder that cannot be listed; folders below it that may not be opened are noted instead.
    """
    try:
        if is_url(root):
            found = dict(list_remote(root))
            return Listing({path: size for path, size in found.items() if not is_hidden(path)}, list(filter(is_hidden, found)))
        listing = Listing()
        for path in _walk(root, "", above, listing):
            listing.files[path] = -1
        listing.files = dict(sorted(listing.files.items()))
        return listing
    except OSError as error:
        where = f" in {error.filename}" if error.filename and str(error.filename) != root else ""
        raise SourceError(f"{name} cannot be listed ({error.strerror or error}{where}). Check the address and your access.") from None


def _walk(root: str, below: str, above: Sequence[tuple[int, int]], listing: Listing) -> Iterator[str]:
    """Paths of the files below a folder; `above` says which folders it lies in, so that links in a circle end."""
    folder = os.path.join(root, below) if below else root
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, _is_folder(entry), entry.is_symlink()) for entry in entries]
        status = os.stat(folder)
    except PermissionError:
        if not below:
            raise
        listing.unreadable.append(f"{below}/")
        return
    here = (*above, (status.st_dev, status.st_ino))
    for name, is_folder, is_link in found:
        path = f"{below}/{name}" if below else name
        if is_hidden(name):
            listing.hidden.append(f"{path}/" if is_folder else path)
        elif is_link and not is_folder and not os.path.exists(os.path.join(root, path)) and suffix_of_name(name) not in (*IMAGE_SUFFIXES, ".txt"):
            listing.dangling.append(path)  # of an image's name it is a row that cannot be read
        elif not is_folder:
            yield path
        elif is_link and _identity(os.path.join(root, path)) in here:
            listing.loops.append(f"{path}/")
        else:
            if is_link:
                listing.linked.append(f"{path}/")
            yield from _walk(root, path, here, listing)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link whose end cannot be looked at: as a file it is told when it is read
        return False


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def files_of(root: str, paths: Sequence[str], name: str) -> Listing:
    """What a pattern found below a folder on disk: the files themselves, and all files of folders. Captions beside an image are found too."""
    listing = Listing()
    for path in dict.fromkeys(paths):
        whole = os.path.join(root, path)
        if os.path.isdir(whole):
            parts = [] if path == "." else path.split("/")
            above = [_identity(os.path.join(root, *parts[:depth])) for depth in range(len(parts))]
            if parts and _identity(whole) in above:
                listing.loops.append(f"{path}/")
                continue
            below, prefix = list_files(whole, name, above=above), f"{path}/" if parts else ""
            listing.files.update({f"{prefix}{file}": size for file, size in below.files.items()})
            for kind in ("hidden", "linked", "loops", "dangling", "unreadable"):
                known = getattr(listing, kind)
                known.extend(own for file in getattr(below, kind) if (own := f"{prefix}{file}") not in known)
            continue
        listing.files[path] = -1
        for beside in (os.path.splitext(path)[0] + suffix for suffix in (".txt", ".TXT")):
            if suffix_of_name(path) in IMAGE_SUFFIXES and os.path.isfile(os.path.join(root, beside)):
                listing.files[beside] = -1
    listing.files = dict(sorted(listing.files.items()))
    return listing


def common_root(paths: Sequence[str]) -> str:
    """The folder below which all these absolute paths lie: of one file, its own."""
    folders = [path if os.path.isdir(path) else os.path.dirname(path) for path in paths]
    return str(Path(os.path.commonpath(folders)))


def suffix_of_name(path: str) -> str:
    """The suffix of a file's name, in lower case."""
    return os.path.splitext(path)[1].lower()
