"""Byte pair encoding: lossless, reproducible, and special tokens that no text can contain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.translation.encoded_pairs import EncodedPairs, TokenizedSentences
from apollo_bench.workloads.translation.parallel_text import FilterCounts, LengthLimits, TextPairs
from apollo_bench.workloads.translation.subwords import (
    BEGIN,
    END,
    PADDING,
    SMALLEST,
    SPECIAL,
    UNKNOWN,
    Subwords,
    normalize,
)

TEXT = TextPairs(
    ["the dog runs in the park", "the cat sleeps in the house", "a dog and a cat in the park"],
    ["der Hund läuft im Park", "die Katze schläft im Haus", "ein Hund und eine Katze im Park"],
)


@pytest.fixture(scope="module")
def subwords() -> Subwords:
    return Subwords.learned(TEXT, 290)


def test_special_tokens_are_the_first(subwords: Subwords) -> None:
    assert (PADDING, BEGIN, END, UNKNOWN) == (0, 1, 2, 3)
    assert subwords.size == 290
    assert subwords.decode(range(len(SPECIAL))) == ""
    assert subwords.decode([BEGIN, *subwords.encode("der Hund"), END, PADDING]) == "der Hund"


def test_every_byte_comes_back(subwords: Subwords) -> None:
    """Ids of single bytes follow those of the special tokens."""
    text = "".join(map(chr, range(33, 127)))
    assert subwords.decode(subwords.encode(text)) == text
    assert subwords.decode([len(SPECIAL)]) != ""


def test_both_languages_are_learned(subwords: Subwords) -> None:
    for word in ("the", "dog", "Hund", "Park", "im"):
        assert len(subwords.encode(word)) < len(f" {word}".encode()), word


@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    subwords = Subwords.learned(TEXT, 290)
    numbers = subwords.encode(text)
    assert min(numbers, default=len(SPECIAL)) >= len(SPECIAL)
    assert subwords.decode(numbers) == normalize(text)


def test_normalization_is_the_one_stated(subwords: Subwords) -> None:
    text = " \ta\u0308  5\u00a0000\u202f€\r\n"
    assert normalize(text) == "\u00e4 5 000 €"
    assert subwords.decode(subwords.encode(text)) == "\u00e4 5 000 €"


def test_text_cannot_name_a_special_token() -> None:
    text = TextPairs([" ".join(SPECIAL)] * 50, ["<pad> </s> ⟨end⟩"] * 50)
    subwords = Subwords.learned(text, 400)
    for special in (*SPECIAL, "x⟨end⟩y"):
        numbers = subwords.encode(special)
        assert min(numbers) >= len(SPECIAL)
        assert subwords.decode(numbers) == special


def test_broken_bytes_are_decoded_all_the_same(subwords: Subwords) -> None:
    half = subwords.encode("€")[:-1]
    assert "\ufffd" in subwords.decode(half)


def test_saved_and_loaded(subwords: Subwords, tmp_path: Path) -> None:
    path = tmp_path / "subwords.json"
    subwords.save(path)
    again = Subwords.load(path)
    sentence = "die Katze läuft – 3,5 € ⟨end⟩"
    assert again.encode(sentence) == subwords.encode(sentence)
    assert again.size == subwords.size
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


LEARN = """
import sys
from pathlib import Path
from apollo_bench.workloads.translation.phrases import load
from apollo_bench.workloads.translation.subwords import Subwords
train = load().train
Subwords.learned(type(train)(train.source[:2000], train.target[:2000]), 600).save(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_same_in_every_process(tmp_path: Path) -> None:
    contents = set()
    for number, parallel in enumerate(("true", "false")):
        path = tmp_path / f"{number}.json"
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": parallel}
        environment["PYTHONHASHSEED"] = str(number)
        subprocess.run([sys.executable, "-c", LEARN, str(path)], env=environment, check=True)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_a_vocabulary_too_small() -> None:
    with pytest.raises(ExperimentError, match="of 259 subwords: at least 260 are needed"):
        Subwords.learned(TEXT, SMALLEST - 1)
    assert Subwords.learned(TEXT, SMALLEST).size == SMALLEST
    # the text has no more pairs that occur twice
    assert Subwords.learned(TEXT, 10_000).size < 400


def test_bad_files(tmp_path: Path, subwords: Subwords) -> None:
    path = tmp_path / "subwords.json"
    with pytest.raises(ExperimentError, match=r"subwords\.json: no such file of subwords"):
        Subwords.load(path)
    subwords.save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:-20], b"{}", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ExperimentError, match="not a whole file of subwords"):
            Subwords.load(path)
    path.write_bytes(whole.replace("⟨unknown⟩".encode(), b"<unk>"))
    with pytest.raises(ExperimentError, match=r"have the numbers \[0, 1, 2, None\]"):
        Subwords.load(path)


def test_pairs_are_held_flat(subwords: Subwords) -> None:
    pairs = TextPairs([*TEXT.source, ""], [*TEXT.target, "der"])
    encoded = EncodedPairs.of(pairs, subwords)
    assert encoded.size == 4
    for side, texts in zip(encoded, pairs, strict=True):
        assert side.tokens.dtype == numpy.int32
        assert side.offsets.dtype == numpy.int64
        assert side.lengths.tolist() == [len(subwords.encode(text)) for text in texts]
        for number, text in enumerate(texts):
            assert side.sentence(number).tolist() == subwords.encode(text)
    some = encoded.chosen(numpy.array([3, 0, 0]))
    assert some.target.sentence(0).tolist() == subwords.encode("der")
    for number in (1, 2):
        assert some.source.sentence(number).tolist() == subwords.encode(pairs.source[0])


def test_encoding_in_chunks(subwords: Subwords, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = EncodedPairs.of(TEXT, subwords)
    monkeypatch.setattr("apollo_bench.workloads.translation.encoded_pairs._CHUNK", 2)
    parts = EncodedPairs.of(TEXT, subwords)
    for one, other in zip(whole, parts, strict=True):
        assert numpy.array_equal(one.tokens, other.tokens)
        assert numpy.array_equal(one.offsets, other.offsets)
    assert EncodedPairs.of(TextPairs([], []), subwords).size == 0


def sentences(*lengths: int) -> TokenizedSentences:
    tokens = numpy.arange(sum(lengths), dtype=numpy.int32) + 10
    return TokenizedSentences.concatenate([(tokens, numpy.array(lengths, numpy.int64))])


def test_cleaning_counts_subwords() -> None:
    pairs = EncodedPairs(sentences(4, 3, 0, 9, 8), sentences(6, 5, 2, 8, 8))
    kept, counts = pairs.cleaned(LengthLimits(1, 8, 1.5))
    assert counts == FilterCounts(read=5, empty=1, long=1, ratio=1)
    assert kept.source.lengths.tolist() == [4, 8]
    assert kept.target.lengths.tolist() == [6, 8]
    assert kept.target.sentence(1).tolist() == pairs.target.sentence(4).tolist()


def test_longer_than_the_model() -> None:
    pairs = EncodedPairs(sentences(4, 9, 1), sentences(6, 2, 10))
    # begin or end takes one position
    assert pairs.fitting(11)[1] == 0
    kept, skipped = pairs.fitting(10)
    assert (kept.size, skipped) == (2, 1)
    assert kept.fitting(9)[1] == 1
    pairs.check_fitting(11, "test.en")
    with pytest.raises(ExperimentError) as caught:
        pairs.check_fitting(9, "test.en")
    assert str(caught.value).startswith(
        "model.max_length is 9, but line 2 of test.en has 10 subwords"
    )
    assert str(caught.value).endswith("so set it to 11 or more")
