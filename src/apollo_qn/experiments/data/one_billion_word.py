"""The One Billion Word benchmark (Chelba et al., 2013): from its shards to token files.

Of its 50 held-out shards the first is the test text, as everywhere, and the second the validation
text. Every sentence ends with ``</S>``, which is predicted and counted like any word.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import sys
from array import array
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy

from apollo_qn.experiments.data.corpus import Corpus, Stream, Tokens
from apollo_qn.experiments.data.text_files import read_lines
from apollo_qn.experiments.data.vocabulary import Vocabulary
from apollo_qn.experiments.errors import ExperimentError
from apollo_qn.experiments.files import write_atomically

VOCABULARY = "1b_word_vocab.txt"
_TRAINING = "training-monolingual.tokenized.shuffled"
_HELD_OUT = "heldout-monolingual.tokenized.shuffled"
_SHARDS = {
    "train": (_TRAINING, "news.en-*", 99),  # 00001 to 00099; 00000 was held out
    "valid": (_HELD_OUT, "news.en.heldout-00001*", 1),
    "test": (_HELD_OUT, "news.en.heldout-00000*", 1),
}
_FORMAT = 1
_AT_ONCE = 4096  # lines that are encoded together
_LIST = "corpus.json"
Tell = Callable[[str, int, int], None]  # what is done, how much, of how much


def prepare(
    raw: Path, out: Path, vocabulary: Path | None, workers: int, partial: bool, tell: Tell
) -> None:
    """Turn the benchmark's shards into token files; what is there already is kept.

    Each shard becomes a file of little-endian 32-bit numbers with a description beside it, both
    written atomically, so that a preparation that was interrupted or killed goes on with the shards
    that are missing.

    Args:
        raw: with the benchmark's two folders of shards, plain or gzipped.
        out: made where it is missing.
        vocabulary: a word a line; None: ``1b_word_vocab.txt`` in ``raw``.
        workers: processes.
        partial: whether some training shards are enough.
        tell: progress.

    Raises:
        ExperimentError: shards or the vocabulary are missing, damaged or not UTF-8; files of
            another vocabulary are there.
    """
    words = Vocabulary.read(raw / VOCABULARY if vocabulary is None else vocabulary)
    shards = {split: _find(raw, split, partial) for split in _SHARDS}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / VOCABULARY, "".join(f"{word}\n" for word in words.words).encode())
    jobs = [(path, out / _name(path)) for paths in shards.values() for path in paths]
    missing = [(path, target) for path, target in jobs if not _is_done(path, target, words.digest)]
    tell("Tokenising shards", len(jobs) - len(missing), len(jobs))
    # where processes can be forked they share the vocabulary, and torch, which they do not need
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_use, initargs=(words,))
    try:
        waiting = [pool.submit(_tokenise, path, target) for path, target in missing]
        for done, future in enumerate(as_completed(waiting), len(jobs) - len(missing) + 1):
            future.result()
            tell("Tokenising shards", done, len(jobs))
    except BrokenProcessPool:
        raise ExperimentError(
            f"{out}: a process that tokenised was killed (out of memory?); the same command goes "
            "on with the shards that are missing"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    listing = {
        "format": _FORMAT,
        "vocabulary": words.digest,
        "shards": {split: [_name(path) for path in paths] for split, paths in shards.items()},
    }
    write_atomically(out / _LIST, json.dumps(listing, indent=2).encode() + b"\n")


def load(folder: Path | None = None) -> Corpus:
    """The prepared text, memory-mapped.

    Raises:
        ExperimentError: nothing has been prepared there, or a file is damaged.
    """
    remedy = "`apollo-qn prepare one-billion-word --raw DIR --out DIR` makes it"
    if folder is None:
        raise ExperimentError(f"one-billion-word needs --data with the prepared text; {remedy}")
    listing = _read_json(folder / _LIST, remedy)
    words = Vocabulary.read(folder / VOCABULARY)
    if listing.get("format") != _FORMAT or listing.get("vocabulary") != words.digest:
        raise ExperimentError(
            f"{folder / _LIST}: of another format or vocabulary than this one's; {remedy}"
        )
    digest = hashlib.sha256(words.digest.encode())
    streams = {}
    for split in _SHARDS:
        parts = []
        for name in listing["shards"][split]:
            about = _read_json(folder / f"{name}.json", remedy)
            parts.append(_mapped(folder / f"{name}.tokens", about["tokens"], remedy))
            digest.update(about["sha256"].encode())
        streams[split] = Stream(parts)
    return Corpus(**streams, vocabulary=words, fingerprint=digest.hexdigest())


def _find(raw: Path, split: str, partial: bool) -> list[Path]:
    folder, pattern, expected = _SHARDS[split]
    found = sorted((raw / folder).glob(pattern))
    if not found:
        raise ExperimentError(
            f"{raw / folder / pattern}: no such shards; --raw needs the benchmark's folder, with "
            f"{_TRAINING} and {_HELD_OUT}"
        )
    if len(found) < expected and not partial:
        raise ExperimentError(
            f"{raw / folder}: {len(found)} shards, the benchmark has {expected}; "
            "--partial takes those that are there"
        )
    return found


def _name(shard: Path) -> str:
    return shard.name.removesuffix(".gz")


def _is_done(path: Path, target: Path, vocabulary: str) -> bool:
    try:
        about = json.loads(target.with_name(f"{target.name}.json").read_text())
        size = target.with_name(f"{target.name}.tokens").stat().st_size
    except (OSError, ValueError):
        return False
    return bool(
        about.get("vocabulary") == vocabulary
        and about.get("source_bytes") == path.stat().st_size
        and size == 4 * about.get("tokens", -1)
    )


_words: Vocabulary  # of a process that tokenises


def _use(words: Vocabulary) -> None:
    global _words
    _words = words


def _tokenise(path: Path, target: Path) -> None:
    tokens, sentences, empty = array("i"), 0, 0
    lines = read_lines(path)
    while batch := list(itertools.islice(lines, _AT_ONCE)):
        full = [line for line in batch if line.strip()]
        sentences += len(full)
        empty += len(batch) - len(full)
        tokens.extend(_words.encode_all(full))
    if not sentences:
        raise ExperimentError(f"{path}: no sentences in it")
    content = numpy.frombuffer(tokens, numpy.int32).astype("<i4", copy=False).tobytes()
    about = {
        "tokens": len(tokens),
        "sentences": sentences,
        "empty_lines": empty,
        "unknown": tokens.count(_words.unknown),
        "sha256": hashlib.sha256(content).hexdigest(),
        "vocabulary": _words.digest,
        "source": path.name,
        "source_bytes": path.stat().st_size,
    }
    write_atomically(target.with_name(f"{target.name}.tokens"), content)
    # last: where it is, the tokens are whole
    write_atomically(target.with_name(f"{target.name}.json"), json.dumps(about).encode() + b"\n")


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ExperimentError(f"{path}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{path}: damaged ({error}); {remedy}") from None
    return found


def _mapped(path: Path, count: int, remedy: str) -> Tokens:
    try:
        size = path.stat().st_size
        if size != 4 * count:
            raise ExperimentError(
                f"{path}: has {size} bytes, {4 * count} are expected: cut short? {remedy}"
            )
        return numpy.memmap(path, "<i4", "r", shape=(count,))
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
