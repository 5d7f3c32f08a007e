"""Every error that difffeat raises on purpose.

One class for each failure that a caller can act on; the message says what happened, where, and how to mend it.

    DifffeatError                     exit code 1
    ├── ConfigError                   2  an option or argument makes no sense (also a ValueError)
    ├── NotYetAvailable               2  asked for something that a later release brings
    ├── MissingExtra                  2  a library is not installed; prints the install command (also an ImportError)
    ├── WeightsError                     a checkpoint cannot be used
    │   ├── CheckpointNotFound           no such file, folder or hub repository (or the hub cannot be reached)
    │   ├── CheckpointMismatch           missing, surplus or wrongly shaped tensors, each named
    │   └── UntrustedFile                the file could run code, or its bytes are not what was pinned
    ├── GraphError                       an exported artifact cannot be used
    │   ├── ForeignGraph                 no difffeat recipe in it, or one of another format
    │   ├── RecipeMismatch               recipe.json and the graph's metadata disagree, or two recipes do
    │   ├── UnsafeGraph                  external data outside the artifact's own folder
    │   └── ParityError                  features differ from the fp32 reference beyond tolerance
    ├── EngineError                      a graph cannot be run
    │   ├── ProviderMissing              the device that was asked for is not what would run
    │   ├── BadFeed                      an input is missing, surplus, or of the wrong shape or type
    │   ├── OutOfMemory               4  the device is out of memory; resumable
    │   └── NonFiniteFeature             NaN or infinity, or a value beyond the store's fp16 range
    ├── SourceError                      samples cannot be listed
    │   ├── EmptySource                  nothing to extract
    │   ├── SourceFormatError            a manifest without its columns, or with unreadable content
    │   ├── DuplicateSample              two samples share an id
    │   └── UnknownTokens                most of the captions are words that the tokenizer does not know
    ├── SampleError                      one sample is bad; becomes a quarantine entry
    │   ├── DecodeError                  bytes that are no image we accept
    │   ├── ImageTooLarge                beyond the pixel limit (decompression bombs)
    │   └── CaptionError                 no caption, not UTF-8, or over the token limit
    ├── StoreError                       a feature store cannot be used
    │   ├── StoreNotFound                no manifest there
    │   ├── StoreMismatch                resume with another configuration; every difference is named
    │   ├── StoreLocked                  another process is writing
    │   ├── StoreIncomplete           4  shards are missing; resume the extraction
    │   ├── StoreWriteError           4  the disk refused a write (full, failing, read-only); resumable (also an OSError)
    │   └── StoreCorrupt              5  bytes are not what the receipts say
    ├── TooManyBadSamples             4  quarantine beyond --max-bad-fraction
    ├── Interrupted                   4  stopped by the user; resumable
    ├── ClusterError                  4  workers of a cluster die, differ or cannot be had; resumable
    ├── OutputError                   4  the system refused a file outside a store, or standard output (full, failing, read-only; also an OSError)
    └── ProbeError                       labels or features that cannot be scored or fitted (also a ValueError)

Exit codes of the commands: 0 fine, 3 finished with quarantined samples, the rest as drawn above (1 where nothing is drawn).
"""

from __future__ import annotations

import importlib.util

EXIT_OK = 0
EXIT_QUARANTINE = 3


class DifffeatError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class ConfigError(DifffeatError, ValueError):
    """An option or argument makes no sense."""

    exit_code = 2


class NotYetAvailable(DifffeatError):
    """Part of the design that a later release brings."""

    exit_code = 2


class MissingExtra(DifffeatError, ImportError):
    """A library is not installed: one of the extra named, or, for None, one that belongs to no extra."""

    exit_code = 2

    def __init__(self, library: str, extra: str | None, purpose: str) -> None:
        wanted = library if extra is None else f"'difffeat[{extra}]'"
        super().__init__(f"{purpose} needs {library}, which is not installed. Run: pip install {wanted} -c constraints.txt")
        self.library = library
        self.extra = extra


def require(extra: str, purpose: str, *libraries: str) -> None:
    """Raises MissingExtra for the first library that is not installed; imports none of them."""
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise MissingExtra(library, extra, purpose)


class WeightsError(DifffeatError):
    """A checkpoint cannot be used. Messages quote names out of files that may be hostile: they stay short and hold no control characters."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


def printable(text: str, most: int = 4000) -> str:
    """Text without control characters, cut to a length that a terminal bears."""
    kept = "".join(character if character.isprintable() or character == "\n" else "�" for character in text[:most])
    return kept if len(text) <= most else f"{kept} ..."


class CheckpointNotFound(WeightsError):
    """No such file, folder or hub repository, or the hub cannot be reached."""


class CheckpointMismatch(WeightsError):
    """Missing, surplus or wrongly shaped tensors."""


class UntrustedFile(WeightsError):
    """The file could run code, or its bytes are not what was pinned."""


class GraphError(DifffeatError):
    """An exported artifact cannot be used."""


class ForeignGraph(GraphError):
    """The graph carries no recipe of ours, or one of another format."""


class RecipeMismatch(GraphError):
    """Two recipes that must agree do not."""


class UnsafeGraph(GraphError):
    """The graph points to data outside the artifact's own folder."""


class ParityError(GraphError):
    """Features differ from the fp32 reference beyond tolerance."""


class EngineError(DifffeatError):
    """A graph cannot be run."""


class ProviderMissing(EngineError):
    """The device that was asked for is not what would run."""


class BadFeed(EngineError):
    """An input is missing, surplus, or of the wrong shape or type."""


class OutOfMemory(EngineError):
    """The device is out of memory; finished shards are kept."""

    exit_code = 4


class NonFiniteFeature(EngineError):
    """A feature is NaN or infinite, or does not fit the store's type."""


class SourceError(DifffeatError):
    """Samples cannot be listed."""


class EmptySource(SourceError):
    """There is nothing to extract."""


class SourceFormatError(SourceError):
    """A manifest lacks columns or holds unreadable content."""


class DuplicateSample(SourceError):
    """Two samples share an id."""


class UnknownTokens(SourceError):
    """Most of the captions are words that the tokenizer does not know."""


class SampleError(DifffeatError):
    """One sample is bad; extraction turns this into a quarantine entry."""


class DecodeError(SampleError):
    """Bytes that are no image we accept."""


class ImageTooLarge(SampleError):
    """An image beyond the pixel limit."""


class CaptionError(SampleError):
    """A caption that is absent, not UTF-8 or over the token limit."""


class StoreError(DifffeatError):
    """A feature store cannot be used."""


class StoreNotFound(StoreError):
    """There is no store at this path."""


class StoreMismatch(StoreError):
    """A resume with another configuration than the store was begun with."""


class StoreLocked(StoreError):
    """Another process is writing to the store."""


class StoreIncomplete(StoreError):
    """Shards are missing."""

    exit_code = 4


class StoreWriteError(StoreError, OSError):
    """The disk refused a write: full, failing or read-only. What was finished is kept."""

    exit_code = 4


class StoreCorrupt(StoreError):
    """Bytes on disk are not what the receipts say."""

    exit_code = 5


class TooManyBadSamples(DifffeatError):
    """More samples went to quarantine than was allowed."""

    exit_code = 4


class Interrupted(DifffeatError):
    """Stopped by the user; finished shards are kept."""

    exit_code = 4


class ClusterError(DifffeatError):
    """Workers of a cluster die, differ from one another, or cannot be had; finished shards are kept."""

    exit_code = 4


class OutputError(DifffeatError, OSError):
    """The system refused a file or folder outside a store, or standard output; the same command works once that is mended."""

    exit_code = 4


class ProbeError(DifffeatError, ValueError):
    """Labels or features that cannot be scored or fitted."""


class ProbeWarning(UserWarning):
    """A fit gave a result that may be taken for more than it is: the loss is still falling, or a choice lies at the edge of its grid."""
