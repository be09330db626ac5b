"""Subwords shared by two languages: byte pair encoding learned from the training text."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from apollo_bench.atomic_write import write_atomically
from apollo_bench.errors import ExperimentError, first_line
from apollo_bench.workloads.translation.parallel_text import TextPairs, even

PADDING, BEGIN, END, UNKNOWN = range(4)
# no byte is written with these brackets, so that no text equals a special token
SPECIAL = ("⟨padding⟩", "⟨begin⟩", "⟨end⟩", "⟨unknown⟩")
_BYTES = 256
SMALLEST = len(SPECIAL) + _BYTES
_MIN_FREQUENCY = 2  # smallest number of occurrences of a pair that becomes a subword


def normalize(text: str) -> str:
    """Return the text in canonical composition (NFC), with single spaces."""
    return even(unicodedata.normalize("NFC", text))


class Subwords:
    """A vocabulary of subwords; ``decode(encode(text)) == normalize(text)`` for every text.

    Every byte is in the vocabulary, so that no text needs the unknown token. It exists because
    models and files expect one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def learned(cls, pairs: TextPairs, size: int) -> Subwords:
        """Learn from the text of both languages; the same text gives the same subwords.

        Args:
            pairs: training text.
            size: size of the vocabulary with the special tokens, at least 260; it is smaller if the
                text has too few pairs of subwords that occur twice.

        Raises:
            ExperimentError: the size is too small.
        """
        if size < SMALLEST:
            raise ExperimentError(
                f"a vocabulary of {size} subwords: at least {SMALLEST} are needed, "
                f"{_BYTES} bytes and {len(SPECIAL)} special tokens"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=_MIN_FREQUENCY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = map(normalize, itertools.chain(*pairs))
        tokenizer.train_from_iterator(texts, trainer, length=2 * pairs.size)
        return cls(_of_model(tokenizer.model))

    @classmethod
    def load(cls, path: Path) -> Subwords:
        """Read what ``save`` wrote; raises ExperimentError for a missing or bad file."""
        try:
            tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
        except FileNotFoundError:
            raise ExperimentError(f"{path}: no such file of subwords") from None
        except Exception as error:  # the library raises bare Exception
            raise ExperimentError(
                f"{path}: not a whole file of subwords ({first_line(error)})"
            ) from None
        found = [tokenizer.token_to_id(name) for name in SPECIAL]
        if found != list(range(len(SPECIAL))):
            raise ExperimentError(
                f"{path}: the special tokens {', '.join(SPECIAL)} have the numbers {found}, "
                f"they must be 0 to {len(SPECIAL) - 1}"
            )
        return cls(tokenizer)

    def save(self, path: Path) -> None:
        """Write the JSON of the library ``tokenizers``, atomically."""
        write_atomically(path, self._tokenizer.to_str().encode())

    @property
    def size(self) -> int:
        """Size of the vocabulary, special tokens included."""
        size: int = self._tokenizer.get_vocab_size()
        return size

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text's subwords, without begin and end."""
        numbers: list[int] = self._tokenizer.encode(normalize(text)).ids
        return numbers

    def encode_all(self, texts: Sequence[str]) -> tuple[NDArray[numpy.int32], NDArray[numpy.int64]]:
        """Return the ids of all texts in one array, and the number of ids per text."""
        rows = self._tokenizer.encode_batch_fast([normalize(text) for text in texts])
        lengths = numpy.fromiter((len(row) for row in rows), numpy.int64, len(rows))
        numbers = itertools.chain.from_iterable(row.ids for row in rows)
        return numpy.fromiter(numbers, numpy.int32, int(lengths.sum())), lengths

    def decode(self, numbers: Iterable[int]) -> str:
        """Return the text of ids without special tokens; invalid UTF-8 becomes U+FFFD."""
        text: str = self._tokenizer.decode([n for n in numbers if n >= len(SPECIAL)])
        return text.removeprefix(" ")


def _of_model(model: models.BPE) -> Tokenizer:
    # a new tokenizer, because that of the trainer finds special tokens in plain text
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
