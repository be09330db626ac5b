"""Vocabularies: words and their ids, the frequent words first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from apollo_bench.atomic_write import write_atomically
from apollo_bench.errors import ExperimentError
from apollo_bench.regular_files import open_regular

START = "<S>"  # in the standard vocabulary; our streams do not contain it
END = "</S>"
UNKNOWN = "<UNK>"


class Vocabulary:
    """Words by id and ids by word.

    Args:
        words: words in the order of their ids; an adaptive softmax expects the frequent ones first.
        origin: origin of the words, named in errors.

    Raises:
        ExperimentError: a word occurs twice, or END or UNKNOWN is missing.
    """

    def __init__(self, words: Sequence[str], origin: str = "vocabulary") -> None:
        self.words = tuple(words)
        if len(set(self.words)) != len(self.words):
            raise ExperimentError(
                f"{origin}, {_duplicate(self.words)}; each word must be there once"
            )
        for marker, meaning in ((END, "ends a sentence"), (UNKNOWN, "stands for unknown words")):
            if marker not in self.words:
                raise ExperimentError(f"{origin}: no {marker}, which {meaning}; add it as a line")
        self.end = self.words.index(END)
        self.unknown = self.words.index(UNKNOWN)

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the words in their order."""
        digest = hashlib.sha256()
        for word in self.words:
            digest.update(word.encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The id of each word."""
        return {word: number for number, word in enumerate(self.words)}

    def encode(self, sentence: Iterable[str]) -> list[int]:
        """Return the ids of a sentence's words, with END last."""
        numbers, unknown = self.numbers, self.unknown
        return [*(numbers.get(word, unknown) for word in sentence), self.end]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Return the words of ids."""
        return [self.words[number] for number in numbers]


def from_counts(
    counts: Mapping[str, int] | Iterable[tuple[str, int]],
    min_count: int,
    size: int | None = None,
    origin: str = "vocabulary",
) -> Vocabulary:
    """Return the frequent words by decreasing frequency, ties in alphabetical order.

    END and UNKNOWN come first, because nearly every text has many of both. Markers among the words
    are skipped.

    Args:
        counts: occurrences of each word.
        min_count: occurrences that a word needs.
        size: largest number of words, with END and UNKNOWN; None: no limit.
        origin: origin of the words, named in errors.

    Raises:
        ExperimentError: no word occurs often enough.
    """
    if size is not None and size < 3:
        raise ValueError(f"size is {size}; END, UNKNOWN and a word make 3")
    pairs = counts.items() if isinstance(counts, Mapping) else counts
    kept = [(-count, word) for word, count in pairs if count >= min_count]
    kept = [pair for pair in kept if pair[1] not in (START, END, UNKNOWN)]
    if not kept:
        raise ExperimentError(f"{origin}: no word occurs {min_count} times; more text is needed")
    kept.sort()
    words = [END, UNKNOWN, *(word for _, word in kept)]
    return Vocabulary(words[:size], origin)


def read(path: Path) -> Vocabulary:
    """Read a file with one word per line, such as 1b_word_vocab.txt of 793,471 words.

    Raises:
        ExperimentError: the file cannot be read, a line is not one word in UTF-8, a word occurs
            twice, or END or UNKNOWN is missing.
    """
    words = []
    try:
        with open_regular(path) as file:
            for number, line in enumerate(file, 1):
                parts = line.split()
                if len(parts) != 1:
                    raise ExperimentError(
                        f"{path}, line {number}: {len(parts)} words, allowed is one per line"
                    )
                words.append(parts[0].decode())
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror})") from None
    return Vocabulary(words, str(path))


def write(path: Path, vocabulary: Vocabulary) -> None:
    """Write one word per line, atomically."""
    write_atomically(path, "".join(f"{word}\n" for word in vocabulary.words).encode())


def _duplicate(words: Iterable[str]) -> str:
    lines: dict[str, int] = {}
    for line, word in enumerate(words, 1):
        if word in lines:
            return f"lines {lines[word]} and {line}: both {word!r}"
        lines[word] = line
    raise AssertionError("each word is there once")
