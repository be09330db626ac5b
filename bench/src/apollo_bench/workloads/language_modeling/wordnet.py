"""WordNet's definitions and examples: the embedded part, or the larger set from a folder."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.checksums import find_files
from apollo_bench.workloads.language_modeling import vocabulary as vocabularies
from apollo_bench.workloads.language_modeling.text_files import gzipped_lines
from apollo_bench.workloads.language_modeling.token_corpus import Corpus, TokenStream
from apollo_bench.workloads.language_modeling.vocabulary import Vocabulary

EMBEDDED = Path(__file__).parent / "embedded" / "wordnet"
FILES = tuple(f"wordnet_{split}.txt.gz" for split in ("train", "valid", "test"))
MIN_COUNT = 2  # occurrences in the training text that a word needs to be known


def load(folder: Path | None = None, size: int | None = None) -> Corpus:
    """Read the three splits; the training text gives the vocabulary.

    Args:
        folder: folder of FILES, gzipped, one tokenized sentence per line; None: the embedded part,
            whose checksums are verified.
        size: largest number of words, with END and UNKNOWN; None: every word that occurs MIN_COUNT
            times.

    Raises:
        ExperimentError: a file is missing, damaged, truncated, not UTF-8 or without words.
    """
    folder, digests, remedy = find_files(
        folder, EMBEDDED, FILES, "make_wordnet.py", ", ".join(FILES)
    )
    texts = [gzipped_lines(folder / name, remedy) for name in FILES]
    for name, lines in zip(FILES, texts, strict=True):
        if not any(lines):
            raise ExperimentError(f"{folder / name}: no words in it; {remedy}")
    counts = Counter(itertools.chain.from_iterable(texts[0]))
    words = vocabularies.from_counts(counts, MIN_COUNT, size, str(folder / FILES[0]))
    train, valid, test = (_encode(lines, words) for lines in texts)
    empty = sum(not line for lines in texts for line in lines)
    fingerprint = hashlib.sha256(
        "".join([*(digests[name] for name in FILES), words.digest]).encode()
    ).hexdigest()
    return Corpus(train, valid, test, words, fingerprint, empty)


def _encode(lines: list[list[str]], words: Vocabulary) -> TokenStream:
    numbers = itertools.chain.from_iterable(words.encode(line) for line in lines if line)
    return TokenStream([numpy.fromiter(numbers, numpy.int32)])
