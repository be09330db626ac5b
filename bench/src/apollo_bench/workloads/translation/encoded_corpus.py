"""A parallel corpus as subwords: encoded for each run if small, prepared if large."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from numpy.typing import DTypeLike, NDArray

from apollo_bench.atomic_write import write_atomically
from apollo_bench.errors import ExperimentError
from apollo_bench.progress_callback import ProgressCallback
from apollo_bench.workloads import output_files
from apollo_bench.workloads.translation.encoded_pairs import EncodedPairs, TokenizedSentences
from apollo_bench.workloads.translation.parallel_text import FAIRSEQ, NOT_EMPTY, ParallelCorpus
from apollo_bench.workloads.translation.subwords import Subwords
from apollo_bench.workloads.validation_cache import ValidationCache

_FORMAT = 1
_LIST = "corpus.json"
_SUBWORDS = "subwords.json"
_REFERENCES = "references.txt"
_CHECKED = "checked.json"  # cache of validated files
_SPLITS = ("train", "valid", "test")


class EncodedCorpus(NamedTuple):
    """Encoded sentences of three splits, and the references of the test set."""

    subwords: Subwords
    train: EncodedPairs
    valid: EncodedPairs
    test: EncodedPairs
    references: list[str]  # of the test set
    fingerprint: str
    counts: str  # of the training pairs, as text
    remarks: Sequence[str] = ()  # on the files, for the user and the report


def encode(corpus: ParallelCorpus, size: int, clean: bool) -> EncodedCorpus:
    """Learn ``size`` subwords from the training text and encode all splits.

    Args:
        corpus: the text.
        size: number of subwords of both languages together.
        clean: whether training pairs must be within fairseq's limits of length and ratio.
    """
    subwords = Subwords.learned(corpus.train, size)
    train, valid, test = (
        EncodedPairs.of(pairs, subwords) for pairs in (corpus.train, corpus.valid, corpus.test)
    )
    train, counts = train.cleaned(FAIRSEQ if clean else NOT_EMPTY)
    counts = counts._replace(read=corpus.counts.read, empty=corpus.counts.empty + counts.empty)
    references, fingerprint = corpus.test.target, corpus.fingerprint
    return EncodedCorpus(
        subwords, train, valid, test, references, fingerprint, str(counts), corpus.remarks
    )


def prepare(corpus: EncodedCorpus, out: Path, report_progress: ProgressCallback) -> None:
    """Write an encoded corpus into files that are memory-mapped; each is written atomically.

    Args:
        corpus: what ``encode`` returned.
        out: folder, created if it is missing.
        report_progress: called with a title, the work done and all work.

    Raises:
        ExperimentError: a file that no preparation made would be overwritten.
    """
    columns = [
        f"{split}.{name}.{part}"
        for split in _SPLITS
        for name in ("source", "target")
        for part in ("tokens", "offsets")
    ]
    output_files.reserve(out, [*columns, _SUBWORDS, _REFERENCES, _LIST, _CHECKED])
    (out / _LIST).unlink(missing_ok=True)
    corpus.subwords.save(out / _SUBWORDS)
    about: dict[str, Any] = {
        "format": _FORMAT,
        "subwords": corpus.subwords.size,
        "fingerprint": corpus.fingerprint,
        "counts": corpus.counts,
        "files": {},  # token count and SHA-256 by file
        "subwords_sha256": hashlib.sha256((out / _SUBWORDS).read_bytes()).hexdigest(),
    }
    for done, split in enumerate(_SPLITS, 1):
        pairs: EncodedPairs = getattr(corpus, split)
        for name, side in zip(("source", "target"), pairs, strict=True):
            for part, values, dtype in (
                ("tokens", side.tokens, "<i4"),
                ("offsets", side.offsets, "<i8"),
            ):
                file = f"{split}.{name}.{part}"
                content = values.astype(dtype, copy=False).tobytes()
                write_atomically(out / file, content)
                about["files"][file] = [len(values), hashlib.sha256(content).hexdigest()]
        report_progress("Writing sentences", done, len(_SPLITS))
    references = "".join(f"{text}\n" for text in corpus.references)
    write_atomically(out / _REFERENCES, references.encode())
    about["files"][_REFERENCES] = [
        len(corpus.references),
        hashlib.sha256(references.encode()).hexdigest(),
    ]
    # written last: if it exists, all other files are complete
    write_atomically(out / _LIST, json.dumps(about, indent=2).encode() + b"\n")


def is_prepared(folder: Path | None) -> bool:
    """Return whether ``prepare`` wrote into the folder."""
    return folder is not None and (folder / _LIST).exists()


def load(folder: Path, size: int) -> EncodedCorpus:
    """Return what ``prepare`` wrote.

    Args:
        folder: folder of the files.
        size: number of subwords that the corpus must have.

    Raises:
        ExperimentError: a file is damaged, or has another number of subwords than ``size``.
    """
    remedy = "prepare it again"
    try:
        about = json.loads((folder / _LIST).read_text())
        files, counts, there = about["files"], about["counts"], about["subwords"]
        fits = (about["format"], about["subwords_sha256"])
        fingerprint = hashlib.sha256((about["fingerprint"] + fits[1]).encode()).hexdigest()
        digest = hashlib.sha256((folder / _SUBWORDS).read_bytes()).hexdigest()
    except OSError as error:
        raise ExperimentError(f"{error.filename}: {error.strerror}; {remedy}") from None
    except (ValueError, KeyError, TypeError):
        raise ExperimentError(f"{folder / _LIST}: damaged; {remedy}") from None
    if fits != (_FORMAT, digest):
        raise ExperimentError(f"{folder / _LIST}: does not fit {_SUBWORDS}; {remedy}")
    if there != size:
        raise ExperimentError(
            f"data.subwords is {size}, {folder} was prepared for {there}; {remedy}, "
            f"or --set data.subwords={there}"
        )

    validated = ValidationCache(_CHECKED, folder)

    def check(file: str) -> int:
        """Return the number of values or lines of a file, once it is validated."""
        try:
            count, sha256 = files[file]
            if not validated.holds(folder / file, sha256):
                raise ExperimentError(f"{folder / file}: not the file that was prepared; {remedy}")
        except OSError as error:
            raise ExperimentError(f"{folder / file}: {error.strerror}; {remedy}") from None
        except (LookupError, TypeError, ValueError):
            raise ExperimentError(f"{folder / _LIST}: damaged; {remedy}") from None
        return int(count)

    def column(file: str, dtype: DTypeLike) -> NDArray[Any]:
        return numpy.memmap(folder / file, dtype, "r", shape=(check(file),))

    def side(split: str, name: str) -> TokenizedSentences:
        return TokenizedSentences(
            column(f"{split}.{name}.tokens", "<i4"), column(f"{split}.{name}.offsets", "<i8")
        )

    train, valid, test = (
        EncodedPairs(side(split, "source"), side(split, "target")) for split in _SPLITS
    )
    check(_REFERENCES)
    references = (folder / _REFERENCES).read_text(encoding="utf-8").split("\n")[:-1]
    validated.save()
    subwords = Subwords.load(folder / _SUBWORDS)
    return EncodedCorpus(subwords, train, valid, test, references, fingerprint, counts)
