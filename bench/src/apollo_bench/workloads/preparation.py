"""Conversion of raw downloads into the form that training reads, by task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from apollo_bench.available_cores import available_cores
from apollo_bench.progress_callback import ProgressCallback
from apollo_bench.workloads.image_classification import cifar10
from apollo_bench.workloads.language_modeling import one_billion_word
from apollo_bench.workloads.translation import encoded_corpus, multi30k, wmt14
from apollo_bench.workloads.translation.parallel_text import ParallelCorpus


class PrepareOptions(NamedTuple):
    """Options of a preparation; None: the default of the task, or unused by it."""

    vocabulary: Path | None = None  # file of the vocabulary
    workers: int | None = None  # processes
    subwords: int | None = None  # size of the joint vocabulary


class Prepared(NamedTuple):
    """Where prepared data lie, and a line about them for the user."""

    folder: Path
    remark: str = ""


Preparer = Callable[[Path, Path, PrepareOptions, ProgressCallback], Prepared]


def _translation(load: Callable[[Path], ParallelCorpus]) -> Preparer:
    def prepare(
        raw: Path, out: Path, options: PrepareOptions, report_progress: ProgressCallback
    ) -> Prepared:
        if options.subwords is None:
            raise ValueError("subwords is None, needed is the size of the joint vocabulary")
        report_progress("Reading sentences", 0, 0)
        text = load(raw)
        report_progress("Learning subwords and encoding", 0, 0)
        corpus = encoded_corpus.encode(text, options.subwords, clean=True)
        encoded_corpus.prepare(corpus, out, report_progress)
        return Prepared(out, str(corpus.counts))

    return prepare


def _cifar10(
    raw: Path, out: Path, options: PrepareOptions, report_progress: ProgressCallback
) -> Prepared:
    report_progress("Decoding images", 0, 0)
    return Prepared(cifar10.prepare(cifar10.load(raw), out))


def _one_billion_word(
    raw: Path, out: Path, options: PrepareOptions, report_progress: ProgressCallback
) -> Prepared:
    workers = options.workers or available_cores()
    one_billion_word.prepare(raw, out, options.vocabulary, workers, report_progress)
    return Prepared(out)


PREPARERS: dict[str, Preparer] = {
    "one-billion-word": _one_billion_word,
    "wmt14-en-de": _translation(wmt14.load),
    "multi30k": _translation(multi30k.load),
    "cifar10": _cifar10,
}
