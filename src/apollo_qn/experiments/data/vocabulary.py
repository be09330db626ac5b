"""Words and their numbers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from apollo_qn.experiments.errors import ExperimentError

END, UNKNOWN = "</S>", "<UNK>"


class _Numbers(dict[str, int]):
    """Where a word is not known, the number that stands for all such."""

    unknown: int

    def __missing__(self, word: str) -> int:
        return self.unknown


class Vocabulary:
    """Numbers words by their place, the most frequent first.

    That order is what the adaptive softmax's cut-offs count on.

    Args:
        words: each once; ``</S>`` (a sentence's end) and ``<UNK>`` (any other word) among them.
        origin: what an error calls it.

    Raises:
        ExperimentError: a word twice, or one of the two is missing.
    """

    def __init__(self, words: list[str], origin: str) -> None:
        self.words = words
        self.numbers = _Numbers({word: number for number, word in enumerate(words)})
        if len(self.numbers) < len(words):
            twice = next(word for word, count in Counter(words).items() if count > 1)
            raise ExperimentError(f"{origin}: the word {twice!r} stands there twice")
        for word, meaning in ((END, "a sentence's end"), (UNKNOWN, "a word that is not known")):
            if word not in self.numbers:
                raise ExperimentError(f"{origin}: {word} is missing, which stands for {meaning}")
        self.end, self.unknown = self.numbers[END], self.numbers[UNKNOWN]
        self.numbers.unknown = self.unknown
        self.digest = hashlib.sha256("\n".join(words).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.words)

    def encode_all(self, lines: list[str]) -> Iterator[int]:
        """The numbers of the sentences' words, which spaces divide, each sentence with its end."""
        text = f" {END} ".join([*lines, ""])
        return map(self.numbers.__getitem__, text.split())

    @classmethod
    def of_text(cls, lines: Iterable[str], least: int, origin: str) -> Vocabulary:
        """The words that stand in a text at least so often; of equally frequent ones by name.

        Raises:
            ExperimentError: the text has no words.
        """
        counts: Counter[str] = Counter()
        sentences = 0
        for line in lines:
            counts.update(line.split())
            sentences += 1
        if not counts:
            raise ExperimentError(f"{origin}: no words in it")
        kept = {word: count for word, count in counts.items() if count >= least}
        kept[UNKNOWN] = max(1, counts.total() - sum(kept.values()))
        kept[END] = sentences
        return cls(sorted(kept, key=lambda word: (-kept[word], word)), origin)

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """Read a file of a word a line, such as the benchmark's ``1b_word_vocab.txt``.

        Raises:
            ExperimentError: the file cannot be read, or is no vocabulary.
        """
        try:
            words = path.read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise ExperimentError(f"{path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise ExperimentError(f"{path}: not UTF-8 at byte {error.start}") from None
        return cls([word.rstrip("\r") for word in words if word.strip()], str(path))
