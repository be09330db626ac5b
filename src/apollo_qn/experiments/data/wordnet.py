"""WordNet's definitions and examples: the embedded text, or a larger one from a folder."""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path

import numpy

from apollo_qn.experiments.data.checksums import checksums, verify
from apollo_qn.experiments.data.corpus import Corpus, Stream
from apollo_qn.experiments.data.text_files import read_lines
from apollo_qn.experiments.data.vocabulary import Vocabulary
from apollo_qn.experiments.errors import ExperimentError

EMBEDDED = Path(__file__).parent / "embedded" / "wordnet"
_SPLITS = ("train", "valid", "test")
_LEAST = 2  # times that a word must stand in the training text to be known


def load(folder: Path | None = None) -> Corpus:
    """Read the text; its vocabulary is made of the training sentences.

    Args:
        folder: with ``wordnet_train.txt.gz``, ``wordnet_valid.txt.gz`` and ``wordnet_test.txt.gz``,
            a sentence a line; None: the embedded text, whose checksums are verified.

    Raises:
        ExperimentError: a file is missing, damaged, empty or not UTF-8.
    """
    if folder is None:
        names = [f"{split}.txt.gz" for split in _SPLITS]
        remedy = "reinstall apollo-qn, or make it anew with scripts/make_wordnet.py"
        verify(EMBEDDED, checksums(EMBEDDED, names, remedy), remedy)
        paths = {split: EMBEDDED / name for split, name in zip(_SPLITS, names, strict=True)}
    else:
        paths = {split: folder / f"wordnet_{split}.txt.gz" for split in _SPLITS}
    lines = {split: [line for line in read_lines(path) if line] for split, path in paths.items()}
    for split, path in paths.items():
        if not lines[split]:
            raise ExperimentError(f"{path}: no sentences in it")
    vocabulary = Vocabulary.of_text(lines["train"], _LEAST, str(paths["train"]))
    digest = hashlib.sha256()
    streams = {}
    for split in _SPLITS:
        tokens = array("i", vocabulary.encode_all(lines[split]))
        encoded = numpy.frombuffer(tokens, numpy.int32)
        digest.update(encoded.tobytes())
        streams[split] = Stream([encoded])
    digest.update(vocabulary.digest.encode())
    return Corpus(**streams, vocabulary=vocabulary, fingerprint=digest.hexdigest())
