"""The One Billion Word benchmark: from its shards of text to token files.

The archive 1-billion-word-language-modeling-benchmark-r13output has 99 shards of training text,
news.en-00001-of-00100 to -00099, and 50 shards of held-out text, which were cut from shard 0. As
usual, ``heldout-00000`` is the test set of published perplexities. The other 49 held-out shards are
the validation set.

Every sentence ends with </S>; nothing marks its beginning. So each word and each </S> is predicted
once and counted once. This is word-level perplexity as Chelba et al. and Jozefowicz et al. measure
it. The paper's code also puts <S> before each sentence and counts it, although it is certain after
</S>. It also tests on all held-out shards.
"""

from __future__ import annotations

import fcntl
import hashlib
import heapq
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy

from apollo_bench.atomic_write import replacing, write_atomically
from apollo_bench.errors import ExperimentError
from apollo_bench.progress_callback import ProgressCallback
from apollo_bench.workloads import output_files
from apollo_bench.workloads.language_modeling import text_files, token_files
from apollo_bench.workloads.language_modeling import vocabulary as vocabularies
from apollo_bench.workloads.language_modeling.token_corpus import Corpus, TokenIds, TokenStream
from apollo_bench.workloads.language_modeling.token_files import Description
from apollo_bench.workloads.language_modeling.vocabulary import END, START, Vocabulary
from apollo_bench.workloads.validation_cache import ValidationCache

ARCHIVE = "1-billion-word-language-modeling-benchmark-r13output"
TRAIN = "training-monolingual.tokenized.shuffled"
HELD_OUT = "heldout-monolingual.tokenized.shuffled"
TEST = 0  # the held-out shard of the test set
MIN_COUNT = 3  # smallest number of occurrences of a word in the vocabulary, as in the standard one
EMPTY, UNKNOWNS, SENTENCES = "empty_lines", "unknown_words", "sentences"
FORMAT = 1
_VOCABULARY = "vocabulary.txt"
_CHECKED = "checked.json"  # cache of validated files, next to the token files
_REMEDY = "run apollo-bench prepare one-billion-word again; what is finished is kept"

_Job = TypeVar("_Job", bound=Hashable)
_Result = TypeVar("_Result")


def prepare(
    raw: Path, out: Path, vocabulary: Path | None, workers: int, report_progress: ProgressCallback
) -> None:
    """Turn the benchmark's text into token files, one per shard, in parallel.

    After an interruption the next call continues with the missing shards. A shard is prepared again
    if its text, the vocabulary or its token file has changed.

    Args:
        raw: the unpacked archive, or the folder that contains it.
        out: folder of the token files, created if it is missing.
        vocabulary: the standard 1b_word_vocab.txt; None: the words that occur MIN_COUNT times.
        workers: processes; 1: this process.
        report_progress: called with a title, the work done and all work.

    Raises:
        ExperimentError: a shard is missing, truncated or not UTF-8, the vocabulary is unusable, or
            ``out`` cannot be written or is in use.
    """
    if workers < 1:
        raise ExperimentError(f"--workers is {workers}, allowed are 1 and more")
    raw = raw / ARCHIVE if (raw / ARCHIVE).is_dir() else raw
    shards = {
        "train": _shards(raw / TRAIN, "news.en-", 1),
        "heldout": _shards(raw / HELD_OUT, "news.en.heldout-", 0),
    }
    jobs = {
        f"{split}/{number:05}.tokens": path
        for split, paths in shards.items()
        for number, path in paths.items()
    }
    with _locked_folder(out), _Workers(workers) as pool:
        described = (token_files.description_path(Path(name)).as_posix() for name in jobs)
        output_files.reserve(out, [*jobs, *described, _VOCABULARY, _manifest(out).name, _CHECKED])
        _manifest(out).unlink(missing_ok=True)
        counted: list[Path] = []
        if vocabulary is None:
            counted = _count(list(shards["train"].values()), out / "counts", pool, report_progress)
            words = _most_frequent(counted, str(raw / TRAIN))
        else:
            words = vocabularies.read(vocabulary)
        digest = words.digest
        encode = partial(_encode_shard, out, digest, words.end, words.unknown)
        vocabularies.write(out / _VOCABULARY, words)
        del words  # each worker has its own
        for split in shards:
            (out / split).mkdir(exist_ok=True)
        made = pool.do(encode, list(jobs.items()), partial(report_progress, "Tokenizing shards"))
        files = {name: made[name, path] for name, path in jobs.items()}
        manifest = _summary(files, digest)
        write_atomically(_manifest(out), json.dumps(manifest, indent=1).encode() + b"\n")
        _remove(counted)
        _id_cache.clear()
    counts = manifest["counts"]
    report_progress(
        f"Prepared {len(jobs)} shards: {manifest['tokens']:,} tokens, "
        f"{counts[SENTENCES]:,} sentences, "
        f"{counts[UNKNOWNS]:,} unknown words, {counts[EMPTY]:,} empty lines skipped",
        len(jobs),
        len(jobs),
    )


def load(folder: Path) -> Corpus:
    """Return what ``prepare`` made, memory-mapped.

    Raises:
        ExperimentError: preparation is incomplete, or a file is missing, damaged, truncated or made
            with another vocabulary.
    """
    listing = _manifest(folder)
    try:
        manifest: dict[str, Any] = json.loads(listing.read_bytes())
        if manifest["format"] != FORMAT:
            raise ExperimentError(
                f"{listing}: format {manifest['format']!r}, not {FORMAT}; {_REMEDY}"
            )
        files, digest, empty = manifest["files"], manifest["vocabulary"], manifest["counts"][EMPTY]
        splits: dict[str, list[TokenIds]] = {"train": [], "valid": [], "test": []}
        sums = [digest]
        validated = ValidationCache(_CHECKED, folder)
        for name, expected in files.items():
            path = folder / name
            described = token_files.describe(path).sha256 == expected
            if not described or not validated.holds(path, expected):
                raise ExperimentError(f"{path}: not the file that was prepared; {_REMEDY}")
            splits[_split_of(name)].append(token_files.read(path, digest))
            sums.append(expected)
        validated.save()
    except FileNotFoundError:
        raise ExperimentError(
            f"{listing}: no such file, not prepared to the end; {_REMEDY}"
        ) from None
    except OSError as error:
        raise ExperimentError(f"{listing}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExperimentError(f"{listing}: damaged; {_REMEDY}") from None
    words = vocabularies.read(folder / _VOCABULARY)
    if words.digest != digest:
        raise ExperimentError(f"{folder / _VOCABULARY}: changed since; {_REMEDY}")
    fingerprint = hashlib.sha256("".join(sums).encode()).hexdigest()
    train, valid, test = (TokenStream(parts) for parts in splits.values())
    return Corpus(train, valid, test, words, fingerprint, empty)


def _split_of(name: str) -> str:
    split, _, file = name.partition("/")
    if split == "train":
        return "train"
    return "test" if file == f"{TEST:05}.tokens" else "valid"


def _manifest(folder: Path) -> Path:
    return folder / "corpus.json"


def _summary(files: dict[str, Description], digest: str) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for description in files.values():
        counts.update(description.counts)
    return {
        "format": FORMAT,
        "vocabulary": digest,
        "tokens": sum(description.tokens for description in files.values()),
        "counts": {name: counts[name] for name in (SENTENCES, UNKNOWNS, EMPTY)},
        "files": {name: description.sha256 for name, description in files.items()},
    }


def _shards(folder: Path, prefix: str, first: int) -> dict[int, Path]:
    """Return the shards by number; those before ``first`` may be missing."""
    if not folder.is_dir():
        raise ExperimentError(
            f"{folder}: no such folder; the unpacked benchmark has {TRAIN} and {HELD_OUT}"
        )
    found, totals = {}, set()
    for path in sorted(folder.iterdir()):
        if match := re.fullmatch(re.escape(prefix) + r"(\d{5})-of-(\d{5})", path.name):
            found[int(match[1])] = path
            totals.add(match[2])
    if not found:
        raise ExperimentError(f"{folder}: no shards {prefix}00000-of-00000 in it")
    if len(totals) > 1:
        raise ExperimentError(f"{folder}: shards of {' and of '.join(sorted(totals))} mixed")
    total = totals.pop()
    for number in range(first, int(total)):
        if number not in found:
            raise ExperimentError(
                f"{folder / f'{prefix}{number:05}-of-{total}'}: no such file; "
                f"{len(found)} shards of {total} are there"
            )
    return found


def _encode_shard(
    out: Path, digest: str, end: int, unknown: int, job: tuple[str, Path]
) -> Description:
    name, path = job
    target = out / name
    source = token_files.describe_source(path)
    if token_files.is_made_from(target, digest, [source]):
        return token_files.describe(target)
    counts = Counter({SENTENCES: 0, UNKNOWNS: 0, EMPTY: 0})
    blocks = _encode(path, _word_ids(out / _VOCABULARY, digest), end, unknown, counts)
    return token_files.write(target, blocks, digest, [source], counts)


_id_cache: dict[str, dict[bytes, int]] = {}  # ids of one vocabulary, by its digest


def _word_ids(path: Path, digest: str) -> dict[bytes, int]:
    """Return the id of each word, read once per process; it takes less memory than Vocabulary."""
    if digest not in _id_cache:
        with path.open("rb") as file:
            numbers = {line[:-1]: number for number, line in enumerate(file)}
        # markers in the text are not words
        for marker in (START, END):
            numbers.pop(marker.encode(), None)
        _id_cache.clear()
        _id_cache[digest] = numbers
    return _id_cache[digest]


def _encode(
    path: Path, numbers: dict[bytes, int], end: int, unknown: int, counts: Counter[str]
) -> Iterator[TokenIds]:
    number_of, missing = numbers.get, itertools.repeat(unknown)
    for lines in text_files.blocks(path):
        found: list[int] = []
        for words in lines:
            if words:
                found += map(number_of, words, missing)
                found.append(end)
            else:
                counts[EMPTY] += 1
        tokens = numpy.array(found, numpy.int32)
        counts[SENTENCES] += int((tokens == end).sum())
        counts[UNKNOWNS] += int((tokens == unknown).sum())
        yield tokens


def _count(
    paths: list[Path], folder: Path, pool: _Workers, report_progress: ProgressCallback
) -> list[Path]:
    """Write sorted counts of each shard's words into files of the folder, and return these."""
    folder.mkdir(exist_ok=True)
    made = pool.do(partial(_count_shard, folder), paths, partial(report_progress, "Counting words"))
    return [made[path] for path in paths]


def _most_frequent(counted: list[Path], origin: str) -> Vocabulary:
    """Return the vocabulary of the training text from the counts of its shards."""
    merged = heapq.merge(*map(_counts, counted))
    words = (
        (word.decode(), sum(count for _, count in pairs))
        for word, pairs in itertools.groupby(merged, itemgetter(0))
    )
    return vocabularies.from_counts(words, MIN_COUNT, origin=origin)


def _count_shard(folder: Path, path: Path) -> Path:
    target = folder / f"{path.name}.{token_files.describe_source(path).sha256[:16]}"
    if not target.exists():
        counts: Counter[bytes] = Counter()
        for lines in text_files.blocks(path):
            counts.update(itertools.chain.from_iterable(lines))
        with _written(target), replacing(target) as file:
            for word in sorted(counts):
                file.write(b"%s %d\n" % (word, counts[word]))
    return target


def _counts(path: Path) -> Iterator[tuple[bytes, int]]:
    with path.open("rb") as file:
        for line in file:
            word, count = line.split()
            yield word, int(count)


class _Workers:
    """Worker processes; with ``count`` 1 this process does all jobs."""

    def __init__(self, count: int) -> None:
        # Workers are forked from a server that has imported this module. A fork of this process
        # could hang, because its threads may hold locks.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pool = None if count == 1 else ProcessPoolExecutor(count, context, _end_with_parent)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def do(
        self,
        work: Callable[[_Job], _Result],
        jobs: list[_Job],
        report_progress: Callable[[int, int], None],
    ) -> dict[_Job, _Result]:
        """Return the result of each job; the first error ends all jobs."""
        report_progress(0, len(jobs))
        done: dict[_Job, _Result] = {}
        for job, result in self._results(work, jobs):
            done[job] = result
            report_progress(len(done), len(jobs))
        return done

    def _results(
        self, work: Callable[[_Job], _Result], jobs: list[_Job]
    ) -> Iterator[tuple[_Job, _Result]]:
        if self._pool is None:
            for job in jobs:
                yield job, work(job)
            return
        try:
            waiting = {self._pool.submit(work, job): job for job in jobs}
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool:
            raise ExperimentError(
                "a process that prepared a shard was killed, perhaps because memory ran out; "
                f"{_REMEDY}"
            ) from None


def _end_with_parent() -> None:
    """End this worker when its parent is killed, so that it never writes beside a new one.

    On Ctrl-C the parent lets each worker finish its shard.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _locked_folder(out: Path) -> Iterator[None]:
    """Create the output folder, and lock it for this process."""
    with _written(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / "lock").open("a")  # a file of the user keeps its content
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ExperimentError(f"{out}: another process is preparing it") from None
        with _written(out):
            yield


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise ExperimentError(f"{where}: cannot be written ({error.strerror})") from None


def _remove(counted: list[Path]) -> None:
    """Remove files of counts, and their folder unless other files are in it."""
    for path in counted:
        path.unlink()
    with suppress(OSError):
        for folder in {path.parent for path in counted}:
            folder.rmdir()
