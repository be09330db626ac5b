"""The user's text: one file that is cut into splits, or one file per split."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.language_modeling import vocabulary as vocabularies
from apollo_bench.workloads.language_modeling.language_settings import TextFileData
from apollo_bench.workloads.language_modeling.text_files import read_text
from apollo_bench.workloads.language_modeling.token_corpus import Corpus, TokenStream
from apollo_bench.workloads.language_modeling.vocabulary import Vocabulary
from apollo_bench.workloads.unused_files import remarks_beside

_SPLITS = (("train",), ("valid", "val", "validation", "dev"), ("test",))
_ENDINGS = (".txt", ".txt.gz")
NEEDED = "--data needs a text file, or a folder with train.txt, valid.txt and test.txt"

Lines = list[list[str]]  # the words of each line


def load(path: Path | None, data: TextFileData) -> Corpus:
    """Read the text; the training part gives the vocabulary.

    Args:
        path: UTF-8 text, plain or gzipped, or a folder of one such file per split.
        data: unit, vocabulary and share of the held-out texts.

    Raises:
        ExperimentError: a file is missing, damaged or not UTF-8, or has too few words.
    """
    if path is None or not path.exists():
        where = "no --data" if path is None else f"{path}: no such file"
        raise ExperimentError(f"{where}; {NEEDED}")
    remarks: list[str] = []
    if path.is_dir():
        paths = _split_files(path)
        texts = [_read(one, data.unit) for one in paths]
        remarks = remarks_beside(path, paths)
    else:
        texts = _one_file(path, data)
    for name, lines in zip(("training", "validation", "test"), texts, strict=True):
        if not any(lines):
            raise ExperimentError(f"{path}: no words in the {name} text; {NEEDED}")
    counts = Counter(itertools.chain.from_iterable(texts[0]))
    words = vocabularies.from_counts(counts, data.min_count, data.vocabulary, str(path))
    digest = hashlib.sha256(words.digest.encode())
    for lines in texts:
        for line in lines:
            digest.update(" ".join(line).encode() + b"\n")
        digest.update(b"\0")
    train, valid, test = (_encode(lines, words) for lines in texts)
    empty = sum(not line for lines in texts for line in lines)
    return Corpus(train, valid, test, words, digest.hexdigest(), empty, remarks)


def _split_files(folder: Path) -> list[Path]:
    found = []
    for names in _SPLITS:
        paths = [folder / f"{name}{ending}" for name in names for ending in _ENDINGS]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ExperimentError(f"{folder / names[0]}.txt: no such file; {NEEDED}")
        found.append(path)
    return found


def _one_file(path: Path, data: TextFileData) -> list[Lines]:
    """Cut a text by its lines, or a text of few lines within them."""
    lines = _read(path, data.unit)
    sizes = list(itertools.accumulate(len(line) for line in lines))
    total = sizes[-1] if sizes else 0
    edges = [round(total * (1 - 2 * data.test_share)), round(total * (1 - data.test_share))]
    parts: list[Lines] = [[], [], []]
    done = 0
    for line in lines:
        cuts = [max(0, min(len(line), edge - done)) for edge in edges]
        pieces = (line[: cuts[0]], line[cuts[0] : cuts[1]], line[cuts[1] :])
        for part, piece in zip(parts, pieces, strict=True):
            if piece:
                part.append(piece)
        done += len(line)
    empty = sum(not line for line in lines)
    parts[0] += [[] for _ in range(empty)]  # only counted
    return parts


def _read(path: Path, unit: str) -> Lines:
    lines = read_text(path, NEEDED)
    if unit == "word":
        return [line.split() for line in lines]
    # indentation is part of the text; a carriage return before the line feed is not
    return [list(line.removesuffix("\r")) for line in lines]


def _encode(lines: Lines, words: Vocabulary) -> TokenStream:
    numbers = itertools.chain.from_iterable(words.encode(line) for line in lines if line)
    return TokenStream([numpy.fromiter(numbers, numpy.int32)])
