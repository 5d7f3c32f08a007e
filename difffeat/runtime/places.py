"""Places are paths or URLs as text: opening, joining, and brace patterns of several."""

from __future__ import annotations

import glob
import itertools
import os
import re
from contextlib import closing
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from difffeat.errors import SourceError
from difffeat.runtime.blobs import Blob, FileBlob, UrlBlob
from difffeat.runtime.http_url import is_http
from difffeat.runtime.remote import is_url, local_path, open_remote

MAX_PLACES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def open_place(place: str) -> Any:
    """A binary file to read from, as a context manager. Raises OSError where it is not there or cannot be read, MissingExtra."""
    return closing(open_remote(place)) if is_url(place) else open(place, "rb")


def blob_at(base: str, name: str) -> Blob:
    """The bytes of `name`: a URL, an absolute path, or something below the folder or URL `base`. Below a URL there are no paths of this machine."""
    if ":" in name and is_url(name):
        path = local_path(name)
        return UrlBlob(name) if path is None else FileBlob("", path)
    if is_http(base):
        name = name.replace("#", "%23")  # a name has no fragment
    return UrlBlob(f"{base.rstrip('/')}/{name.lstrip('/')}") if is_url(base) else FileBlob(base, name)


def below(root: str, path: str) -> str:
    """The address of a file that was listed below a folder: on the web its name is escaped, whatever stands in it."""
    return f"{root.partition('?')[0].rstrip('/')}/{quote(path, errors='surrogateescape')}" if is_http(root) else f"{root.rstrip('/')}/{path}"


def parent(place: str) -> str:
    """The folder a place lies in."""
    if is_http(place):
        return place.partition("?")[0].partition("#")[0].rpartition("/")[0]
    return place.rpartition("/")[0] if is_url(place) else os.path.dirname(place) or "."


def path_of(place: str) -> str:
    """The place without a URL's query."""
    return urlsplit(place).path if is_http(place) else place


def suffix_of(place: str) -> str:
    """Its suffix in lower case; a URL's query does not belong to it."""
    return PurePosixPath(path_of(place)).suffix.lower()


def absolute(place: str) -> str:
    """A path from the root; URLs stay as they are. Nothing is taken out of it: behind a link `..` is not the folder before."""
    if is_url(place):
        return local_path(place) or place
    path = os.path.join(os.getcwd(), os.path.expanduser(place))
    return path if ".." in path.split(os.sep) else os.path.normpath(path)


def is_hidden(path: str) -> bool:
    """Whether a file below a folder, or a folder it lies in, has a name that begins with a dot."""
    return path.startswith(".") or "/." in path


def is_pattern(place: str) -> bool:
    """Whether this names several places: `{000..150}`, `{train,val}`, or, on disk, `*`, `**`, `?` and `[a-z]`."""
    return not os.path.exists(place) and (_BRACES.search(place) is not None or _is_glob(place))


def _is_glob(place: str) -> bool:
    return not is_url(place) and glob.has_magic(place)


def fixed_part(pattern: str) -> str:
    """The folders of a pattern on disk before the first that holds a sign of it; empty where it begins with one."""
    parts = pattern.split("/")
    first = next(place for place, part in enumerate(parts) if _BRACES.search(part) is not None or glob.has_magic(part))
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")


def expand(pattern: str) -> list[str]:
    """Every place of a pattern, braces in the order they are written, those of `*`, `**`, `?` and `[...]` sorted.

    Raises SourceError naming the places that are not there (on disk; a URL's are found out when they are opened), or when there are too many.
    """
    named = _braces(pattern)
    missing = [place for place in named if not _is_glob(place) and not is_url(place) and not os.path.exists(place)]
    if missing:
        some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise SourceError(f"{len(missing)} of the {len(named)} files of {pattern} do not exist: {some}. Get them, or narrow the pattern.")
    found = [place for name in named for place in (_globbed(name) if _is_glob(name) and not os.path.exists(name) else [name])]
    if not found:
        raise SourceError(f"no file matches {pattern}. Check the path, and quote the pattern so that the shell leaves it alone.")
    return found


def _globbed(pattern: str) -> list[str]:
    """What matches, sorted; not what a link in a circle makes of it, which `**` follows."""
    known: dict[str, bool] = {}

    def circles(folder: str) -> bool:
        if folder not in known:
            above = [folder]
            while (upper := os.path.dirname(above[-1])) not in ("", above[-1]):
                above.append(upper)
            known[folder] = len({os.path.realpath(own) for own in above}) < len(above)
        return known[folder]

    return sorted(found for found in glob.glob(pattern, recursive=True) if "**" not in pattern or not circles(os.path.dirname(found)))


def _braces(pattern: str) -> list[str]:
    """Each `{...}` replaced by each of its alternatives, the last varying fastest; numbers keep the zeros they are written with."""
    pieces = _BRACES.split(pattern)  # text, inside, text, inside, ..., text
    choices = [_alternatives(piece, pattern) if index % 2 else [piece] for index, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_PLACES:
        raise SourceError(f"{pattern} names {count} files, more than {MAX_PLACES}. Narrow the pattern.")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    if (match := _RANGE.fullmatch(inside)) is None:
        return inside.split(",")
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise SourceError(f"{{{inside}}} in {pattern} runs backwards. Write the smaller number first.")
    if last - first >= MAX_PLACES:
        raise SourceError(f"{{{inside}}} in {pattern} names more than {MAX_PLACES} files. Narrow the pattern.")
    width = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 0
    return [str(number).zfill(width) for number in range(first, last + 1)]
