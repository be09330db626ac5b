"""A parallel corpus as subwords: made for each run where it is small, prepared where it is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from numpy.typing import DTypeLike, NDArray

from apollo_qn.experiments.data.parallel_text import Pairs
from apollo_qn.experiments.data.sentence_pairs import EncodedPairs, Side
from apollo_qn.experiments.data.subwords import Subwords
from apollo_qn.experiments.data.translations import Translations
from apollo_qn.experiments.errors import ExperimentError
from apollo_qn.experiments.files import write_atomically

_FORMAT = 1
_LIST = "corpus.json"
_SPLITS = ("train", "valid", "test")
Tell = Callable[[str, int, int], None]  # what is done, how much, of how much


class EncodedCorpus(NamedTuple):
    """Sentences of three splits, and what their translations are compared with."""

    subwords: Subwords
    train: EncodedPairs
    valid: EncodedPairs
    test: EncodedPairs
    references: list[str]  # of the test set
    fingerprint: str
    empty: int  # training pairs that were left out: of which a side is empty
    unlike: int  # and of which the sides differ too much in length


def encode(corpus: Translations, size: int) -> EncodedCorpus:
    """Learn ``size`` subwords from the training text and encode everything."""
    subwords = Subwords.learn([corpus.train.source, corpus.train.target], size)
    train, valid, test = (_encoded(pairs, subwords) for pairs in corpus)
    left_out = corpus.train.empty, corpus.train.unlike
    references, fingerprint = corpus.test.target, corpus.fingerprint
    return EncodedCorpus(subwords, train, valid, test, references, fingerprint, *left_out)


def prepare(corpus: Translations, size: int, out: Path, tell: Tell) -> None:
    """Encode a corpus into files that are memory-mapped; each is written atomically.

    Args:
        corpus: the text.
        size: of the subwords of both languages.
        out: made where it is missing.
        tell: progress.
    """
    out.mkdir(parents=True, exist_ok=True)
    steps = 2 + len(_SPLITS)
    tell("Learning subwords", 0, steps)
    subwords = Subwords.learn([corpus.train.source, corpus.train.target], size)
    write_atomically(out / "subwords.json", subwords.save().encode())
    about: dict[str, Any] = {
        "format": _FORMAT,
        "subwords": subwords.digest,
        "fingerprint": corpus.fingerprint,
        "left_out": {"empty": corpus.train.empty, "unlike": corpus.train.unlike},
        "sizes": {},
    }
    for done, (split, pairs) in enumerate(zip(_SPLITS, corpus, strict=True), 1):
        tell("Encoding sentences", done, steps)
        for name, side in zip(("source", "target"), _encoded(pairs, subwords), strict=True):
            for part, values, dtype in (
                ("tokens", side.tokens, "<i4"),
                ("starts", side.starts, "<i8"),
            ):
                file = f"{split}.{name}.{part}"
                write_atomically(out / file, values.astype(dtype, copy=False).tobytes())
                about["sizes"][file] = len(values)
    references = "".join(f"{text}\n" for text in corpus.test.target)
    write_atomically(out / "references.txt", references.encode())
    # last: where it is, all the others are whole
    write_atomically(out / _LIST, json.dumps(about, indent=2).encode() + b"\n")
    tell("Encoding sentences", steps, steps)


def is_prepared(folder: Path | None) -> bool:
    """Whether ``prepare`` has been at work there."""
    return folder is not None and (folder / _LIST).exists()


def load(folder: Path, size: int) -> EncodedCorpus:
    """What ``prepare`` wrote.

    Raises:
        ExperimentError: a file is damaged, or has another number of subwords than ``size``.
    """
    remedy = "prepare it anew"
    try:
        about = json.loads((folder / _LIST).read_text())
        subwords = Subwords.load((folder / "subwords.json").read_text())
        references = (folder / "references.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{folder}: damaged ({error}); {remedy}") from None
    if about.get("format") != _FORMAT or about.get("subwords") != subwords.digest:
        raise ExperimentError(f"{folder / _LIST}: does not fit subwords.json; {remedy}")
    if len(subwords) != size:
        raise ExperimentError(
            f"data.subwords is {size}, {folder} has {len(subwords)}; {remedy}, or give its number"
        )

    def column(file: str, dtype: DTypeLike) -> NDArray[Any]:
        path, count = folder / file, about["sizes"].get(file, -1)
        size = numpy.dtype(dtype).itemsize * count
        if not path.exists() or path.stat().st_size != size:
            raise ExperimentError(f"{path}: missing or cut short, {size} bytes expected; {remedy}")
        return numpy.memmap(path, dtype, "r", shape=(count,))

    def side(split: str, name: str) -> Side:
        return Side(
            column(f"{split}.{name}.tokens", "<i4"), column(f"{split}.{name}.starts", "<i8")
        )

    train, valid, test = (
        EncodedPairs(side(split, "source"), side(split, "target")) for split in _SPLITS
    )
    digest = hashlib.sha256((about["fingerprint"] + about["subwords"]).encode()).hexdigest()
    left_out = about["left_out"]["empty"], about["left_out"]["unlike"]
    return EncodedCorpus(subwords, train, valid, test, references, digest, *left_out)


def _encoded(pairs: Pairs, subwords: Subwords) -> EncodedPairs:
    return EncodedPairs(
        Side.of(subwords.encode(pairs.source)), Side.of(subwords.encode(pairs.target))
    )
