"""Read parallel text by hand, because an error must name its line and misaligned files must fail.

Line n of one file translates line n of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.gzip_files import open_binary
from apollo_bench.workloads.text_encoding import MARK, line_end_error, utf16_error


class TextPairs(NamedTuple):
    """Sentences of two languages; pair n is ``source[n]``, ``target[n]``."""

    source: list[str]
    target: list[str]

    @property
    def size(self) -> int:
        """Number of pairs."""
        return len(self.source)


class LengthLimits(NamedTuple):
    """Limits of the pairs that are trained on; the caller chooses the unit of length."""

    min_length: int = 1
    max_length: int | None = 250  # None: any
    ratio: float | None = 1.5  # largest ratio of the longer to the shorter; None: any


# the limits of fairseq's prepare-wmt14en2de.sh: for training data, in subwords
FAIRSEQ = LengthLimits()
NOT_EMPTY = LengthLimits(1, None, None)


class FilterCounts(NamedTuple):
    """Counts of the read and the skipped pairs; a skipped pair counts under its first reason."""

    read: int
    empty: int = 0  # a side is shorter than min_length
    long: int = 0
    ratio: int = 0

    @property
    def kept(self) -> int:
        """Number of remaining pairs."""
        return self.read - self.empty - self.long - self.ratio

    def __str__(self) -> str:
        skipped = {"empty": self.empty, "too long": self.long, "of unlike lengths": self.ratio}
        reasons = ", ".join(f"{count:,} {what}" for what, count in skipped.items() if count)
        return f"{self.kept:,} of {self.read:,} pairs" + (f", without {reasons}" if reasons else "")


class ParallelCorpus(NamedTuple):
    """A corpus as text, with white space normalized."""

    train: TextPairs  # without the pairs that are empty on a side
    valid: TextPairs  # complete, like the test set
    test: TextPairs
    source_language: str  # for example "en"
    target_language: str
    fingerprint: str  # of all sentences; it does not depend on the files
    counts: FilterCounts  # of the training pairs
    remarks: Sequence[str] = ()  # on the files, for the user and the report


def make_corpus(
    train: TextPairs,
    valid: TextPairs,
    test: TextPairs,
    languages: tuple[str, str],
    where: str,
) -> ParallelCorpus:
    """Drop empty training pairs, and check the others.

    Args:
        train, valid, test: pairs as they were read.
        languages: source and target language.
        where: name of the corpus in errors.

    Raises:
        ExperimentError: a split is empty, or a line of a held-out split is.
    """
    cleaned, counts = clean(train, NOT_EMPTY)
    for name, pairs in (("train", cleaned), ("valid", valid), ("test", test)):
        if not pairs.size:
            raise ExperimentError(f"{where}: no sentence pairs in the split {name}")
    for name, pairs in (("valid", valid), ("test", test)):
        for language, side in zip(languages, pairs, strict=True):
            if "" in side:
                raise ExperimentError(
                    f"{where}: line {1 + side.index('')} of the split {name} is empty in "
                    f"{language}; held-out text must be complete"
                )
    digest = hashlib.sha256()
    for pairs in (cleaned, valid, test):
        for side in pairs:
            digest.update(f"{len(side)}\n".encode())
            for sentence in side:
                digest.update(sentence.encode() + b"\n")
    return ParallelCorpus(cleaned, valid, test, *languages, digest.hexdigest(), counts)


def read_pairs(source: Path, target: Path, remedy: str) -> TextPairs:
    """Read two files of one sentence per line; empty lines are kept.

    Args:
        source, target: files in UTF-8, plain or gzipped, whatever their names are.
        remedy: what the user should do about a bad file; the message ends with it.

    Raises:
        ExperimentError: a file is missing, damaged or not UTF-8, or the two differ in lines.
    """
    pairs = TextPairs(read_lines(source, remedy), read_lines(target, remedy))
    check_aligned(pairs, str(source), str(target), remedy)
    return pairs


def read_named(folder: Path, name: str, languages: tuple[str, str], remedy: str) -> TextPairs:
    """Read files such as ``name.en`` and ``name.de``, plain or gzipped, as in ``read_pairs``."""
    source, target = (find_text(folder, f"{name}.{language}", remedy) for language in languages)
    return read_pairs(source, target, remedy)


def find_text(folder: Path, name: str, remedy: str) -> Path:
    """Return a text file in a folder, plain or with ``.gz`` after its name.

    Raises:
        ExperimentError: neither exists.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise ExperimentError(f"{folder / name}: no such file, nor {name}.gz; {remedy}")


def check_aligned(pairs: TextPairs, source: str, target: str, remedy: str) -> None:
    """Raise ExperimentError if the two sides, named ``source`` and ``target``, differ in size."""
    if len(pairs.source) != len(pairs.target):
        raise ExperimentError(
            f"{source} has {len(pairs.source):,} lines, {target} has {len(pairs.target):,}: "
            f"line n of one must translate line n of the other; {remedy}"
        )


def read_lines(path: Path, remedy: str) -> list[str]:
    """Return every line of a UTF-8 file, plain or gzipped, with white space normalized.

    Raises:
        ExperimentError: the file is missing, damaged or not UTF-8 (the message names the line), or
            its lines end in carriage returns alone.
    """
    lines: list[str] = []
    returns = 0  # carriage returns that are not before a line feed
    with open_binary(path, remedy) as file:
        try:
            # only line feeds end a line: str.splitlines also cuts at characters within sentences
            for number, row in enumerate(file, 1):
                if number == 1 and (problem := utf16_error(row)):
                    raise ExperimentError(f"{path}: {problem}; {remedy}")
                if b"\0" in row:
                    raise ExperimentError(f"{path}, line {number}: a zero byte, damaged; {remedy}")
                returns += row.count(b"\r") - row.endswith(b"\r\n")
                lines.append(even(row.removeprefix(MARK if number == 1 else b"").decode()))
        except UnicodeDecodeError as error:
            bad = error.object[error.start]
            raise ExperimentError(
                f"{path}, line {len(lines) + 1}: not UTF-8, byte 0x{bad:02x}; {remedy}"
            ) from None
    if problem := line_end_error(returns, len(lines)):
        raise ExperimentError(f"{path}: {problem}")
    return lines


def even(text: str) -> str:
    """Return the text with single spaces, and none at its ends."""
    return " ".join(text.split())


def clean(pairs: TextPairs, limits: LengthLimits = FAIRSEQ) -> tuple[TextPairs, FilterCounts]:
    """Return the pairs within limits on words, for tokenized text."""
    source, target = (
        numpy.fromiter((len(text.split()) for text in side), numpy.int64, len(side))
        for side in pairs
    )
    kept, counts = passes_filter(source, target, limits)
    if counts.kept == counts.read:
        return pairs, counts
    chosen = numpy.flatnonzero(kept).tolist()
    return TextPairs(*([side[index] for index in chosen] for side in pairs)), counts


def passes_filter(
    source: NDArray[numpy.int64], target: NDArray[numpy.int64], limits: LengthLimits
) -> tuple[NDArray[numpy.bool_], FilterCounts]:
    """Return which pairs are within limits, by the rules of Moses's clean-corpus-n.

    Args:
        source, target: lengths of the two sides, shape (n,).
        limits: limits of length and ratio, inclusive.

    Returns:
        A mask of shape (n,), and the counts.
    """
    shorter, longer = numpy.minimum(source, target), numpy.maximum(source, target)
    empty = shorter < max(1, limits.min_length)
    long = ~empty & (longer > limits.max_length) if limits.max_length else numpy.zeros_like(empty)
    kept = ~(empty | long)
    if limits.ratio is None:
        unlike = numpy.zeros_like(empty)
    else:
        unlike = kept & (longer > limits.ratio * shorter)
    skipped: Sequence[NDArray[numpy.bool_]] = (empty, long, unlike)
    return kept & ~unlike, FilterCounts(len(source), *(int(mask.sum()) for mask in skipped))
