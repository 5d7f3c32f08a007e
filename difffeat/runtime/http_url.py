"""URLs of the web as they are sent: what is written is kept byte for byte, and only what may not stand in a request is escaped."""

from __future__ import annotations

import re
from urllib.parse import quote, urljoin, urlsplit

from difffeat.runtime.remote_errors import Unreadable

_HTTP = re.compile(r"https?://", re.IGNORECASE)
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_KEPT = "%/:=&?~#+!$,;'@()*[]|"
"""Beside letters, digits and `_.-~`: characters that clients send as they are."""


def is_http(url: str) -> bool:
    """Whether this is a web address."""
    return _HTTP.match(url) is not None


def sendable(url: str) -> str:
    """The address as it is asked for: scheme in lower case, without its fragment, spaces and non-ASCII characters escaped as UTF-8.

    Raises Unreadable for one that names no host.
    """
    scheme, _, rest = url.strip().partition("://")
    rest = rest.partition("#")[0]
    at = min((rest.index(mark) for mark in "/?" if mark in rest), default=len(rest))
    authority, path = rest[:at], rest[at:]
    path = path if path.startswith("/") else f"/{path}"
    try:
        address = f"{scheme.lower()}://{_host(authority)}{quote(_BARE_PERCENT.sub('%25', path), safe=_KEPT)}"
        parts = urlsplit(address)
        if not parts.hostname:
            raise ValueError("it names no host")
        _ = parts.port
    except ValueError as error:  # UnicodeError among them
        raise Unreadable(f"it is not an address ({error})") from None
    return address


def _host(authority: str) -> str:
    user, at, host = authority.rpartition("@")
    host = host if host.isascii() else host.encode("idna").decode()
    return f"{quote(user, safe='%:!$&()*+,;=~')}{at}{host}"


def redirected(url: str, location: str) -> str:
    """Where a redirect leads. Raises Unreadable for a place that is not on the web: a server may not point at this machine's files."""
    target = urljoin(url, location.strip().encode("latin-1", "replace").decode("utf-8", "replace"))
    if not is_http(target):
        raise Unreadable(f"it redirects to {target[:200]!r}, which is not a web address")
    return sendable(target)


def host_of(url: str) -> str:
    """Scheme, host and port; of what is no address, the beginning."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url[:100]
    return f"{parts.scheme.lower()}://{parts.netloc.rpartition('@')[2].lower()}"
