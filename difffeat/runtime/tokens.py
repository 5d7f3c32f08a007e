"""Captions to token ids, and batches of like length."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import CaptionError, SourceError, UnknownTokens
from difffeat.runtime.samples import Sample

MOSTLY, NEARLY_ALL, SEVERAL = 0.5, 0.8, 5
"""Shares of unknown tokens beyond which captions are not what the model reads: of `SEVERAL` captions or more, and of fewer."""
LOOKED_AT = 1000
"""Captions, evenly spread over a source, that are looked at before it is extracted."""
FEW = 20
"""Captions of fewer different texts than that say nothing about how they collapse."""


class Captions:
    """Turns a sample's captions into token ids.

    **Arguments:** `tokenizer` path of a `tokenizer.json`; `max_length` in tokens; `protocol` `joined` (all captions, by a space) or `first`;
    `truncate` cut what is too long instead of refusing it; `vocab` size of the model's table.
    """

    def __init__(self, tokenizer: Path, *, max_length: int, vocab: int, protocol: str, truncate: bool) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # tokenizers raises bare Exception
            raise SourceError(f"{tokenizer} is no tokenizer that the tokenizers library reads ({error}). Export the artifact again.") from None
        self._tokenizer.no_truncation()  # what a file may bring along; our own limits hold
        self._tokenizer.no_padding()
        self._unknown, self._drops = _unknown_id(self._tokenizer)
        self._max_length, self._vocab, self._protocol, self._truncate = max_length, vocab, protocol, truncate

    def encode(self, sample: Sample) -> np.ndarray:
        """Token ids, int64 [S] with S ≥ 1. A leading space, no special tokens (Plaid's convention).

        Raises CaptionError.
        """
        return self.encode_counted(sample)[0]

    def text(self, sample: Sample) -> str:
        """What is read of a sample's captions."""
        return " ".join(sample.captions) if self._protocol == "joined" else sample.captions[0]

    def encode_counted(self, sample: Sample) -> tuple[np.ndarray, int]:
        """The same, and how many of the tokens stand for what the tokenizer does not know: none where it writes unknown words in bytes.

        Raises CaptionError.
        """
        if sample.problem is not None:
            raise CaptionError(sample.problem)
        if not sample.captions:
            raise CaptionError("the sample has no caption. Add one, or leave it out of the text store.")
        text = " " + self.text(sample)
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception, for lone surrogates among others
            raise CaptionError(f"the caption cannot be tokenised ({error}).") from None
        ids, unknown = encoding.ids, _dropped(text, encoding.offsets) if self._drops else encoding.ids.count(self._unknown)
        if not ids:
            raise CaptionError("the caption has no tokens. Write one, or leave the sample out of the text store.")
        if len(ids) > self._max_length:
            if not self._truncate:
                raise CaptionError(
                    f"the caption has {len(ids)} tokens, the model takes {self._max_length}. Shorten it, or pass --truncate or --captions first."
                )
            ids = ids[: self._max_length]
        if max(ids) >= self._vocab:
            raise CaptionError(f"the tokenizer gave id {max(ids)}, the model knows {self._vocab}: it is another model's tokenizer.")
        return np.asarray(ids, np.int64), unknown


def _unknown_id(tokenizer: Any) -> tuple[int | None, bool]:
    """The id of unknown words, None where there is none; and whether such words are dropped instead."""
    whole = json.loads(tokenizer.to_str())
    name = whole["model"].get("unk_token")
    found = whole["model"].get("unk_id") if name is None else tokenizer.token_to_id(name)
    in_bytes = whole["model"].get("byte_fallback") or "ByteLevel" in json.dumps([whole["pre_tokenizer"], whole["normalizer"]])
    return found, found is None and not in_bytes


def _dropped(text: str, offsets: Sequence[tuple[int, int]]) -> int:
    """Words that hold a character which no token stands for."""
    kept = bytearray(len(text))
    for start, end in offsets:
        kept[start:end] = b"\1" * (end - start)
    return len("".join("?" if char != " " and not mark else " " for char, mark in zip(text, kept, strict=True)).split())


def require_known(captions: Captions, samples: Sequence[Sample], *, allow: bool, say: Callable[[str], None]) -> None:
    """Look at a part of the captions before they are extracted: raises UnknownTokens where most of their tokens are unknown, unless that is allowed;
    says where many of them become the same.
    """
    tokens = unknown = 0
    texts, forms, example = set[str](), set[bytes](), ""
    for sample in samples[:: max(1, len(samples) // LOOKED_AT)]:
        try:
            ids, count = captions.encode_counted(sample)
        except CaptionError:
            continue  # told when it is its turn
        tokens, unknown = tokens + len(ids), unknown + count
        texts.add(captions.text(sample))
        forms.add(ids.tobytes())
        example = example or (captions.text(sample)[:80] if count else "")
    if not allow:
        require_few_unknown(tokens, unknown, len(texts), f"of captions such as {example!r}")
    if len(texts) >= FEW and 2 * len(forms) < len(texts):
        say(f"{len(texts)} different captions were looked at, and they are {len(forms)} to the model: it tells no more of them apart")


def mostly_unknown(tokens: int, unknown: int, captions: int) -> bool:
    """Whether captions are unknown to a tokenizer on the whole. Of few captions it takes a larger share: three of them may well be odd."""
    return unknown > (MOSTLY if captions >= SEVERAL else NEARLY_ALL) * tokens


def require_few_unknown(tokens: int, unknown: int, captions: int, what: str) -> None:
    """Raises UnknownTokens where most tokens of so many captions are."""
    if mostly_unknown(tokens, unknown, captions):
        raise UnknownTokens(
            f"{unknown} of {tokens} tokens {what} are unknown to this artifact's tokenizer, so features hardly depend on them. Take a text backbone "
            "whose vocabulary fits (the bundled plaid-digits knows some fifty words), or pass --allow-unknown to extract them all the same."
        )


def batches_by_length(lengths: np.ndarray, batch_size: int, multiple: int) -> list[tuple[np.ndarray, int]]:
    """Rows sorted by length and cut into batches: (rows, padded length, a multiple of `multiple`). Depends on nothing but its arguments."""
    order = np.argsort(lengths, kind="stable")
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [(rows, multiple * -(-int(lengths[rows[-1]]) // multiple)) for rows in parts]


def pad_tokens(ids: list[np.ndarray], batch_size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int64 [batch_size, length], lengths int64 [batch_size]); padded rows are one token 0 long."""
    tokens, lengths = np.zeros((batch_size, length), np.int64), np.ones(batch_size, np.int64)
    for row, own in enumerate(ids):
        tokens[row, : len(own)] = own
        lengths[row] = len(own)
    return tokens, lengths
