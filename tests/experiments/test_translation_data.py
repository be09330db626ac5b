"""Parallel text, subwords and batches of pairs."""

from __future__ import annotations

import gzip
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apollo_qn.experiments.data import translations
from apollo_qn.experiments.data.parallel_text import choose, read_pairs
from apollo_qn.experiments.data.sentence_pairs import EncodedPairs, Side, make_batches, order_of
from apollo_qn.experiments.data.subwords import BEGIN, END, PADDING, UNKNOWN, Subwords
from apollo_qn.experiments.errors import ExperimentError

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "multi30k"


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_pairs_of_files(tmp_path: Path) -> None:
    english = write(tmp_path, "a.en", "a house", "", "yes", "one " * 10, "word " * 251)
    german = write(tmp_path, "a.de", "ein Haus", "leer", "ja", "eins zwei", "Wort " * 251)
    pairs = read_pairs(english, german, clean=True)
    assert (pairs.source, pairs.target) == (["a house", "yes"], ["ein Haus", "ja"])
    assert (pairs.empty, pairs.unlike) == (1, 2)
    with pytest.raises(ExperimentError, match=r"a.en, line 2: empty, its translation is not"):
        read_pairs(english, german, clean=False)
    german.write_text(german.read_text().replace("leer", ""))
    assert len(read_pairs(english, german, clean=False)) == 4  # both empty: left out


def test_misaligned_files(tmp_path: Path) -> None:
    english, german = write(tmp_path, "a.en", *"abcd"), write(tmp_path, "a.de", *"ab")
    with pytest.raises(ExperimentError) as caught:
        read_pairs(english, german, clean=True)
    assert str(caught.value) == (
        f"{english} has 4 lines, {german} has 2: they must be translations of each other line by "
        "line"
    )
    with pytest.raises(ExperimentError, match=r"a.de has 4 lines, .*a.de has 2|a.en has 4 lines"):
        read_pairs(german, english, clean=True)


def test_no_pairs_at_all() -> None:
    with pytest.raises(ExperimentError, match="x and y: no pairs in 1 lines"):
        choose([("", "")], ("x", "y"), clean=True)


def test_subwords_go_there_and_back() -> None:
    corpus = translations.phrases()
    subwords = Subwords.learn([corpus.train.source, corpus.train.target], 600)
    assert len(subwords) == 600
    texts = [*corpus.test.source, *corpus.test.target]
    encoded = list(subwords.encode(texts))
    assert [subwords.decode(numbers) for numbers in encoded] == texts
    assert not {PADDING, BEGIN, END} & {number for numbers in encoded for number in numbers}
    assert next(subwords.encode(["\u4e2d"]))[-1] == UNKNOWN
    again = Subwords.learn([corpus.train.source, corpus.train.target], 600)
    assert again.digest == subwords.digest
    assert subwords.decode([BEGIN, *encoded[0], END, PADDING]) == texts[0]


def pairs_of(lengths: list[tuple[int, int]]) -> EncodedPairs:
    source, target = (
        Side.of([[9 + row] * (pair[side] - 1) for row, pair in enumerate(lengths)])
        for side in (0, 1)
    )
    return EncodedPairs(source, target)


LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40)


@given(LENGTHS, st.integers(20, 120), st.integers(1, 3))
def test_batches_divide_the_pairs(lengths: list[tuple[int, int]], tokens: int, least: int) -> None:
    pairs = pairs_of(lengths)
    rows = pairs.up_to(tokens)
    assert [max(lengths[row]) <= tokens for row in rows] == [True] * len(rows)
    batches = make_batches(pairs, rows, tokens, least)
    assert sorted(row for batch in batches for row in batch) == rows.tolist()
    if len(rows) >= least:
        assert all(len(batch) >= least for batch in batches)
    if least == 1:
        for batch in batches:
            widest = max(max(lengths[row]) for row in batch)
            assert widest * len(batch) <= tokens


def test_columns_of_a_batch() -> None:
    pairs = EncodedPairs(Side.of([[5, 6], [7]]), Side.of([[8], [5, 6]]))
    source, before, wanted = pairs.columns(numpy.array([0, 1]))
    assert source.tolist() == [[5, 6, END], [7, END, PADDING]]
    assert wanted.tolist() == [[8, END, PADDING], [5, 6, END]]
    assert before.tolist() == [[BEGIN, 8, PADDING], [BEGIN, 5, 6]]
    assert source.dtype == before.dtype == wanted.dtype == torch.int64


def test_the_order_of_batches_is_the_epochs() -> None:
    assert sorted(order_of(50, 1, 2)) == list(range(50))
    assert order_of(50, 1, 2) == order_of(50, 1, 2)
    assert order_of(50, 1, 2) != order_of(50, 1, 3)
    assert order_of(50, 1, 2) != order_of(50, 2, 2)


def test_the_embedded_phrases() -> None:
    corpus = translations.phrases()
    assert [len(pairs) for pairs in corpus] == [24000, 1000, 1000]
    trained = set(corpus.train.source)
    assert not trained & {*corpus.valid.source, *corpus.test.source}
    assert not set(corpus.valid.source) & set(corpus.test.source)
    pairs = dict(zip(corpus.train.source, corpus.train.target, strict=True))
    assert any(text.startswith("am ") for text in pairs.values())


def test_the_embedded_phrases_can_be_made_again(tmp_path: Path) -> None:
    needed = {"babel": "2.18.0", "num2words": "0.5.14"}
    for name, version in needed.items():
        if importlib.metadata.version(name) != version:
            pytest.skip(f"{name} is not {version}, whose rules the phrases follow")
    script = ROOT / "scripts" / "make_phrases.py"
    subprocess.run([sys.executable, str(script), "--target", str(tmp_path)], check=True)
    for path in translations.PHRASES.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_folder_of_captions(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"train.en: no such file, nor train.en.gz"):
        translations.multi30k(tmp_path)
    with pytest.raises(ExperimentError, match=r"none: no such folder"):
        translations.multi30k(tmp_path / "none")
    for split in ("train", "val", "test_2016_flickr"):
        write(tmp_path, f"{split}.en", "a dog", "two dogs")
        (tmp_path / f"{split}.de.gz").write_bytes(gzip.compress(b"ein Hund\nzwei Hunde\n"))
    corpus = translations.multi30k(tmp_path)
    assert corpus.test.target == ["ein Hund", "zwei Hunde"]
    before = corpus.fingerprint
    write(tmp_path, "val.en", "a dog", "three dogs")
    assert translations.multi30k(tmp_path).fingerprint != before


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_multi30k() -> None:
    corpus = translations.multi30k(SHARED)
    assert [len(pairs) + pairs.empty + pairs.unlike for pairs in corpus] == [29000, 1014, 1000]
    assert corpus.train.unlike < 300
