"""Files found by names as people write them: other case, other Unicode form, backslashes, spaces at the ends, no suffix."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass, field

from difffeat.runtime.blobs import Blob
from difffeat.runtime.places import blob_at
from difffeat.runtime.remote import is_url
from difffeat.runtime.samples import IMAGE_SUFFIXES

Listing = dict[str, list[str]]


@dataclass
class FileNames:
    """Looks names up below folders, each of which is listed once, and only where a name is not there as it is written.

    **Fields:** `mended` how many names were written otherwise than their files are called; `first` the first of them.
    """

    mended: int = 0
    first: str = ""
    _folders: dict[tuple[str, bool], Listing] = field(default_factory=dict)
    _found: dict[tuple[str, str], str | None] = field(default_factory=dict)

    def image(self, base: str, name: str) -> tuple[Blob, str]:
        """The bytes of the file that `name` means, below the folder or URL `base`; and the name with slashes and without spaces at its ends."""
        if is_url(name) or (not is_url(base) and os.path.exists(os.path.join(base, name))):
            return blob_at(base, name), name
        tidy = name.strip()
        tidy = tidy.replace("\\", "/") if "/" not in tidy else tidy
        if is_url(base):
            return blob_at(base, tidy), tidy
        found = tidy if tidy != name and os.path.exists(os.path.join(base, tidy)) else self._find(base, tidy)
        if found is None:
            return blob_at(base, tidy), tidy
        self.mended += 1
        self.first = self.first or f"{found} for {name!r}"
        return blob_at(base, found), tidy

    def notes(self) -> list[str]:
        """A sentence, where names were mended."""
        return (
            [f"{self.mended} images are called otherwise than they are named (case, Unicode form, suffix, spaces): {self.first}"]
            if self.mended
            else []
        )

    def _find(self, base: str, name: str) -> str | None:
        """The path below `base` that is there and differs in nothing that people overlook; None where there is none, or several."""
        root, parts = ("/" if name.startswith("/") else ""), [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or not parts:
            return None
        folder = self._folder(root or base, "/".join(parts[:-1]))
        last = None if folder is None else self._entry(os.path.join(root or base, folder), parts[-1], last=True)
        return None if folder is None or last is None else f"{root}{folder}{'/' if folder else ''}{last}"

    def _folder(self, root: str, below: str) -> str | None:
        """The folder that `below` means; each is looked for once, since images of a list share theirs."""
        if not below:
            return ""
        if (root, below) not in self._found:
            upper, _, name = below.rpartition("/")
            above = self._folder(root, upper)
            own = None if above is None else self._entry(os.path.join(root, above), name, last=False)
            self._found[root, below] = None if above is None or own is None else f"{above}{'/' if above else ''}{own}"
        return self._found[root, below]

    def _entry(self, folder: str, part: str, *, last: bool) -> str | None:
        """The name in a folder that `part` means."""
        if os.path.exists(os.path.join(folder, part)):
            return part
        alike = self._alike(folder, part, last=last)
        return alike[0] if len(alike) == 1 else None

    def _alike(self, folder: str, part: str, *, last: bool) -> list[str]:
        alike = self._listing(folder, stems=False).get(key_of(part), [])
        if not alike and last and os.path.splitext(part)[1].lower() not in IMAGE_SUFFIXES:
            alike = self._listing(folder, stems=True).get(key_of(part), [])
        return alike

    def _listing(self, folder: str, *, stems: bool) -> Listing:
        if (folder, stems) not in self._folders:
            listing: Listing = {}
            try:
                names = os.listdir(folder)
            except OSError:  # what cannot be listed holds nothing that can be found; its images are told when they are read
                names = []
            for name in names:
                stem, suffix = os.path.splitext(name)
                if not stems or suffix.lower() in IMAGE_SUFFIXES:
                    listing.setdefault(key_of(stem if stems else name), []).append(name)
            self._folders[folder, stems] = listing
        return self._folders[folder, stems]


def key_of(name: str) -> str:
    """What two names share that people take for one: composed, without case, without spaces at the ends."""
    return unicodedata.normalize("NFC", name.strip()).casefold()
