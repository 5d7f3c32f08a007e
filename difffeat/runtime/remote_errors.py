"""What goes wrong behind a URL, and addresses as they may be shown."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime

_PASSWORD = re.compile(r"(://[^/?#@:]*:)[^/?#@]+@")


class RemoteError(OSError):
    """Something behind a URL that could not be had, after all attempts."""


class Refused(OSError):
    """A server answered, and not with what was asked for: `status` of HTTP, `retry_after` seconds where it says when to come back."""

    def __init__(self, status: int, reason: str, retry_after: float | None = None) -> None:
        super().__init__(f"the server answers {status} {reason}".rstrip())
        self.status, self.retry_after = status, retry_after


class TooLong(ValueError):
    """A body beyond the limit. Another attempt would only get there again."""


class CutOff(OSError):
    """A body that ends too soon."""


class Unreadable(ValueError):
    """A reply that cannot be followed or decoded. Another attempt would get the same."""


def without_password(place: str) -> str:
    """A place as it may be written down: passwords of its URLs are `PASSWORD`, since a store is passed on and backed up."""
    return _PASSWORD.sub(r"\1PASSWORD@", place)


def seconds_until(retry_after: str | None, now: float) -> float | None:
    """`Retry-After` as seconds from now: a number, or a date. None for anything else."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - now)
    except (ValueError, OverflowError):
        return None
