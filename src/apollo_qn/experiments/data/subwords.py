"""Subwords of both languages, by byte-pair encoding (Sennrich et al., 2016)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PADDING, BEGIN, END, UNKNOWN = range(4)
_AT_ONCE = 8192  # texts that are encoded together
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


class Subwords:
    """Sentences as numbers and back.

    Text is brought to Unicode's form NFC and runs of spaces count as one; of what is left,
    ``decode(encode(text)) == text`` wherever its characters stood in the training text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @classmethod
    def learn(cls, texts: Iterable[Iterable[str]], size: int) -> Subwords:
        """Learn ``size`` subwords, the special ones among them, from the texts of all languages."""
        tokenizer = Tokenizer(models.BPE(unk_token=_SPECIAL[UNKNOWN]))
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(pattern="\N{NO-BREAK SPACE}", content=" "),
                normalizers.Strip(),
            ]
        )
        # a word begins with its space; digits and punctuation stand alone
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="always"),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Punctuation(),
            ]
        )
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=_SPECIAL, show_progress=False, min_frequency=2
        )
        tokenizer.train_from_iterator(chain.from_iterable(texts), trainer)
        return cls(tokenizer)

    def encode(self, texts: list[str]) -> Iterator[list[int]]:
        """The numbers of each text, without begin and end."""
        for start in range(0, len(texts), _AT_ONCE):
            for one in self._tokenizer.encode_batch_fast(texts[start : start + _AT_ONCE]):
                yield one.ids

    @classmethod
    def load(cls, text: str) -> Subwords:
        """What ``save`` returned; raises ValueError for anything else."""
        try:
            return cls(Tokenizer.from_str(text))
        except Exception as error:  # of the library's own kind
            raise ValueError(str(error)) from None

    def save(self) -> str:
        """As JSON."""
        return str(self._tokenizer.to_str())

    def decode(self, numbers: list[int]) -> str:
        """The text of some numbers; special ones are left out."""
        return str(self._tokenizer.decode(numbers))
