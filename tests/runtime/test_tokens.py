"""Captions become the tokens the model was trained on, in batches of like length that lose nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from difffeat.engines import open_engine
from difffeat.errors import CaptionError, SourceError, UnknownTokens
from difffeat.runtime.extract import extract
from difffeat.runtime.samples import Sample
from difffeat.runtime.sources import open_source
from difffeat.runtime.summary import summary_text
from difffeat.runtime.tokens import Captions, batches_by_length, pad_tokens, require_known
from tests.artifacts import exported

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


def word_level(unknown: str | None = "<unknown>") -> dict[str, Any]:
    return {"type": "WordLevel", "vocab": {"<unknown>": 0, "the": 1, "cat": 2}, "unk_token": unknown}


SPLIT = {"type": "WhitespaceSplit"}
MODELS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "words": (word_level(), SPLIT, 2),
    "pieces": ({"type": "WordPiece", "vocab": word_level()["vocab"], "unk_token": "<unknown>", "max_input_chars_per_word": 100,
                "continuing_subword_prefix": "##"}, SPLIT, 2),
    "unigram": ({"type": "Unigram", "unk_id": 0, "vocab": [["<unknown>", 0.0], ["the", -1.0], ["cat", -1.0], ["x", -9.0]]}, SPLIT, 2),
    "dropping pairs": ({"type": "BPE", "vocab": {"t": 0, "h": 1, "e": 2, "c": 3, "a": 4}, "merges": []}, SPLIT, 2),
    "bytes": ({"type": "BPE", "vocab": {chr(c): i for i, c in enumerate(range(0x21, 0x180))}, "merges": []},
              {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, 0),
}  # fmt: skip


def captions_of(model: dict[str, Any], pre: Any, folder: Path, **more: Any) -> Captions:
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": pre,
             "post_processor": None, "decoder": None, "model": model, **more}  # fmt: skip
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(whole))
    return Captions(path, max_length=200, vocab=1000, protocol="joined", truncate=False)


@pytest.mark.parametrize("kind", MODELS)
def test_unknown_words_are_counted_in_every_kind_of_tokenizer(kind: str, tmp_path: Path) -> None:
    model, pre, unknown = MODELS[kind]
    captions = captions_of(model, pre, tmp_path)
    assert captions.encode_counted(Sample("a", captions=("the dog cat bird",)))[1] == unknown
    assert captions.encode_counted(Sample("a", captions=("the cat",)))[1] == 0


def test_what_a_tokenizers_file_cuts_or_pads_does_not_count(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unknown>"}
    captions = captions_of(word_level(), SPLIT, tmp_path, truncation=cut, padding=pad)
    assert captions.encode(Sample("a", captions=("the cat the cat",))).tolist() == [1, 2, 1, 2]


def test_captions_that_are_mostly_unknown_are_refused_before_anything_runs(tmp_path: Path) -> None:
    captions, said = captions_of(word_level(), SPLIT, tmp_path), list[str]()
    samples = [Sample(str(number), captions=(f"the dog number {number}",)) for number in range(5000)]
    with pytest.raises(UnknownTokens, match=r"of captions such as 'the dog number 0' are unknown .* or pass --allow-unknown"):
        require_known(captions, samples, allow=False, say=said.append)
    require_known(captions, samples, allow=True, say=said.append)
    assert said == ["1000 different captions were looked at, and they are 1 to the model: it tells no more of them apart"]
    require_known(captions, [Sample("a", captions=("the cat dog dog",)), Sample("b")], allow=False, say=said.append)
    require_known(captions, [], allow=False, say=said.append)
    assert len(said) == 1


def test_a_store_of_captions_says_how_many_words_are_unknown(tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,caption\n" + "".join(f"{number},the two digits bicycle\n" for number in range(8)))
    artifact = exported("text")
    with open_engine(artifact, "ort", threads=1) as engine:
        summary = extract(engine, open_source(manifest), tmp_path / "out", tokenizer=artifact.tokenizer)
        assert (summary.tokens, summary.unknown) == (32, 8)
        assert "8 of 32 tokens are unknown to the tokenizer (25.0%)" in summary_text(summary)
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["unknown_tokens"] == 8
        manifest.write_text("id,caption\n" + "".join(f"{number},a bicycle leans against walls {number}\n" for number in range(8)))
        with pytest.raises(UnknownTokens, match="are unknown to this artifact's tokenizer"):
            extract(engine, open_source(manifest), tmp_path / "bad", tokenizer=artifact.tokenizer)
        assert not (tmp_path / "bad").exists()
        assert extract(engine, open_source(manifest), tmp_path / "bad", tokenizer=artifact.tokenizer, allow_unknown=True).rows == 8
