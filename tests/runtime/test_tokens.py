"""Captions become the tokens the model was trained on, in batches of like length that lose nobody."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from difffeat.errors import CaptionError, SourceError
from difffeat.runtime.samples import Sample
from difffeat.runtime.tokens import Captions, batches_by_length, pad_tokens

WORDS = {"<unk>": 0, "Ġa": 1, "Ġcat": 2, "a": 3, "Ġdog": 4}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Byte-level, as Plaid's is: the leading space is part of the first token."""
    made = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.add_special_tokens(["<end>"])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def captions(tokenizer: Path, *, max_length: int = 4, vocab: int = 6, protocol: str = "joined", truncate: bool = False) -> Captions:
    return Captions(tokenizer, max_length=max_length, vocab=vocab, protocol=protocol, truncate=truncate)


def sample(*texts: str, problem: str | None = None) -> Sample:
    return Sample("x", captions=texts, problem=problem)


def test_a_leading_space_and_no_special_tokens(tokenizer: Path) -> None:
    assert captions(tokenizer).encode(sample("a cat")).tolist() == [1, 2]


def test_captions_are_joined_or_the_first_is_taken(tokenizer: Path) -> None:
    assert captions(tokenizer).encode(sample("a cat", "a dog")).tolist() == [1, 2, 1, 4]
    assert captions(tokenizer, protocol="first").encode(sample("a cat", "a dog")).tolist() == [1, 2]


def test_too_long_is_refused_or_cut(tokenizer: Path) -> None:
    long = sample("a cat a cat a")
    with pytest.raises(CaptionError, match=r"the caption has 5 tokens, the model takes 4. Shorten it, or pass --truncate or --captions first."):
        captions(tokenizer).encode(long)
    assert captions(tokenizer, truncate=True).encode(long).tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("given_sample", "message"),
    [
        (sample(), "the sample has no caption. Add one, or leave it out of the text store."),
        (sample(problem="x.txt is not UTF-8 (byte 3). Save it as UTF-8."), "x.txt is not UTF-8 (byte 3). Save it as UTF-8."),
        (sample("\ud800"), "the caption cannot be tokenised"),
    ],
)
def test_captions_that_are_none_are_told(tokenizer: Path, given_sample: Sample, message: str) -> None:
    with pytest.raises(CaptionError) as caught:
        captions(tokenizer).encode(given_sample)
    assert message in str(caught.value)


def test_another_models_tokenizer_is_noticed(tokenizer: Path) -> None:
    with pytest.raises(CaptionError, match="the tokenizer gave id 4, the model knows 3: it is another model's tokenizer"):
        captions(tokenizer, vocab=3).encode(sample("a dog"))


def test_a_broken_tokenizer_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="is no tokenizer that the tokenizers library reads"):
        captions(tmp_path / "tokenizer.json")


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60), batch_size=st.integers(1, 9), multiple=st.sampled_from([1, 8, 16]))
def test_every_row_is_in_one_batch_that_is_long_enough_and_no_longer_than_needed(lengths: list[int], batch_size: int, multiple: int) -> None:
    planned = batches_by_length(np.array(lengths), batch_size, multiple)
    assert sorted(int(row) for rows, _ in planned for row in rows) == list(range(len(lengths)))
    for rows, length in planned:
        longest = max(lengths[row] for row in rows)
        assert length % multiple == 0
        assert longest <= length < longest + multiple
        assert len(rows) <= batch_size
    padded = sum(length * len(rows) for rows, length in planned)
    assert padded <= len(lengths) * (max(lengths) + multiple)


def test_rows_of_equal_length_keep_their_order() -> None:
    assert [rows.tolist() for rows, _ in batches_by_length(np.array([5, 2, 5, 2]), 2, 8)] == [[1, 3], [0, 2]]


def test_padding_rows_are_one_token_long() -> None:
    tokens, lengths = pad_tokens([np.array([7, 8, 9]), np.array([4])], batch_size=3, length=4)
    assert tokens.tolist() == [[7, 8, 9, 0], [4, 0, 0, 0], [0, 0, 0, 0]]
    assert lengths.tolist() == [3, 1, 1]
    assert tokens.dtype == lengths.dtype == np.int64
