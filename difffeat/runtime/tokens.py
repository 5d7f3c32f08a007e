"""Captions to token ids, and batches of like length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from difffeat.errors import CaptionError, SourceError
from difffeat.runtime.samples import Sample


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
        self._max_length, self._vocab, self._protocol, self._truncate = max_length, vocab, protocol, truncate

    def encode(self, sample: Sample) -> np.ndarray:
        """Token ids, int64 [S] with S ≥ 1. A leading space, no special tokens (Plaid's convention).

        Raises CaptionError.
        """
        if sample.problem is not None:
            raise CaptionError(sample.problem)
        if not sample.captions:
            raise CaptionError("the sample has no caption. Add one, or leave it out of the text store.")
        text = " ".join(sample.captions) if self._protocol == "joined" else sample.captions[0]
        try:
            ids = self._tokenizer.encode(" " + text, add_special_tokens=False).ids
        except Exception as error:  # tokenizers raises bare Exception, for lone surrogates among others
            raise CaptionError(f"the caption cannot be tokenised ({error}).") from None
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
        return np.asarray(ids, np.int64)


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
