"""WordNet's text: embedded, from a folder, damaged."""

from __future__ import annotations

import gzip
import shutil
from collections import Counter
from pathlib import Path

import pytest

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.language_modeling import wordnet
from apollo_bench.workloads.language_modeling.token_corpus import Corpus, TokenStream

SHARED = Path(__file__).parents[5] / "shared" / "data"
TEXTS = {
    "train": "a dog barks\na cat\n\na dog , a cat\n",
    "valid": "a bird\n",
    "test": "the dog\n \ndog",
}


def folder(path: Path, **texts: str) -> Path:
    path.mkdir(exist_ok=True)
    for split, text in {**TEXTS, **texts}.items():
        (path / f"wordnet_{split}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return path


def words(corpus: Corpus, tokens: TokenStream) -> str:
    return " ".join(corpus.vocabulary.decode(tokens[:]))


@pytest.fixture(scope="module")
def embedded() -> Corpus:
    return wordnet.load()


def test_embedded(embedded: Corpus) -> None:
    ends = [int((tokens[:] == embedded.vocabulary.end).sum()) for tokens in embedded[:3]]
    assert ends == [86_000, 4_000, 4_000]
    assert len(embedded.train) > 800_000
    assert embedded.vocabulary.words[:4] == ("</S>", "<UNK>", "the", "a")
    assert 15_000 < len(embedded.vocabulary) < 30_000
    assert embedded.empty_lines == 0
    for tokens in embedded[:3]:
        assert tokens[len(tokens) - 1 :].tolist() == [embedded.vocabulary.end]
        unknown = (tokens[:] == embedded.vocabulary.unknown).mean()
        assert 0.005 < unknown < 0.05


def test_embedded_numbers_fall_in_frequency(embedded: Corpus) -> None:
    counts = Counter(embedded.train[:].tolist())
    frequencies = [counts[number] for number in range(2, len(embedded.vocabulary))]
    assert frequencies == sorted(frequencies, reverse=True)
    assert frequencies[-1] >= wordnet.MIN_COUNT


def test_embedded_sentences_are_in_one_split() -> None:
    texts = [
        gzip.decompress((wordnet.EMBEDDED / name).read_bytes()).decode("ascii").splitlines()
        for name in wordnet.FILES
    ]
    assert len({line for lines in texts for line in lines}) == sum(map(len, texts))
    assert all(line == line.lower() == line.strip() for lines in texts for line in lines)


def test_embedded_size_and_licence() -> None:
    files = list(wordnet.EMBEDDED.iterdir())
    assert sum(file.stat().st_size for file in files) < 2_000_000
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in (
        wordnet.EMBEDDED / "LICENSE"
    ).read_text("ascii")
    for name in wordnet.FILES:
        # the gzip header has neither file name nor time
        assert (wordnet.EMBEDDED / name).read_bytes()[3:8] == bytes(5)


def test_folder(tmp_path: Path) -> None:
    corpus = wordnet.load(folder(tmp_path))
    assert corpus.vocabulary.words == ("</S>", "<UNK>", "a", "cat", "dog")
    assert words(corpus, corpus.train) == (
        "a dog <UNK> </S> a cat </S> a dog <UNK> a cat </S>"  # the empty line is no sentence
    )
    assert words(corpus, corpus.valid) == "a <UNK> </S>"
    assert words(corpus, corpus.test) == "<UNK> dog </S> dog </S>"
    assert corpus.empty_lines == 2


def test_size_of_the_vocabulary(tmp_path: Path) -> None:
    corpus = wordnet.load(folder(tmp_path), size=4)
    assert corpus.vocabulary.words == ("</S>", "<UNK>", "a", "cat")
    assert words(corpus, corpus.test) == "<UNK> <UNK> </S> <UNK> </S>"


def test_fingerprint(tmp_path: Path) -> None:
    first = wordnet.load(folder(tmp_path / "a")).fingerprint
    assert wordnet.load(folder(tmp_path / "b")).fingerprint == first
    assert wordnet.load(folder(tmp_path / "b"), size=4).fingerprint != first
    changed = folder(tmp_path / "c", test="the cat\ndog\n")
    assert wordnet.load(changed).fingerprint != first


def test_bad_files(tmp_path: Path) -> None:
    path = folder(tmp_path) / "wordnet_valid.txt.gz"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-9], r"cannot be read whole \(Compressed file ended"),
        (b"a dog\n", r"cannot be read whole \(Not a gzipped file"),
        (gzip.compress(b"a dog\na c\xe1t\n"), r"line 2: not UTF-8 \(byte 0xe1\)"),
        (gzip.compress(b"\n \n"), "no words in it; --data needs"),
    ):
        path.write_bytes(content)
        with pytest.raises(ExperimentError, match=rf"wordnet_valid.txt.gz[:,] {message}") as caught:
            wordnet.load(tmp_path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ExperimentError, match=r"wordnet_valid.txt.gz: no such file; --data needs"):
        wordnet.load(tmp_path)
    folder(tmp_path, train="all words once\n")
    with pytest.raises(ExperimentError, match=r"wordnet_train.txt.gz: no word occurs 2 times"):
        wordnet.load(tmp_path)


def test_corrupt_embedded_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "wordnet"
    shutil.copytree(wordnet.EMBEDDED, copy)
    shutil.copyfile(copy / "wordnet_test.txt.gz", copy / "wordnet_valid.txt.gz")
    monkeypatch.setattr(wordnet, "EMBEDDED", copy)
    with pytest.raises(ExperimentError, match=r"wordnet_valid.txt.gz: corrupt, .* reinstall"):
        wordnet.load()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_shared() -> None:
    corpus = wordnet.load(SHARED)
    ends = [int((tokens[:] == corpus.vocabulary.end).sum()) for tokens in corpus[:3]]
    assert ends == [143_179, 6_000, 6_000]
    assert len(corpus.train) == 1_359_257 + 143_179
