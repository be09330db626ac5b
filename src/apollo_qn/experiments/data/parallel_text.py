"""Sentences in two languages, line by line the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from apollo_qn.experiments.data.text_files import read_lines
from apollo_qn.experiments.errors import ExperimentError

# of training pairs, as fairseq's scripts clean with Moses' clean-corpus-n: words, and their ratio
LONGEST, RATIO = 250, 1.5


@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations, and what was left out."""

    source: list[str]
    target: list[str]
    empty: int = 0  # pairs of which a side is empty
    unlike: int = 0  # pairs of too many words, or too different in length

    def __len__(self) -> int:
        return len(self.source)

    def first(self, count: int | None) -> Pairs:
        """The first so many; None: all."""
        return Pairs(self.source[:count], self.target[:count], self.empty, self.unlike)


def read_pairs(source: Path, target: Path, clean: bool) -> Pairs:
    """Read two files, plain or gzipped, UTF-8, a sentence a line.

    Args:
        source: one language.
        target: the other, line by line the same.
        clean: as of ``choose``.

    Raises:
        ExperimentError: the files differ in their number of lines or cannot be read; or as
            ``choose`` does.
    """
    return choose(_aligned(source, target), (str(source), str(target)), clean)


def choose(pairs: Iterable[tuple[str, str]], names: tuple[str, str], clean: bool) -> Pairs:
    """Leave out what no model can learn from, and count it.

    Args:
        pairs: sentences and translations.
        names: of both sides, for errors.
        clean: for training: leave out pairs of which a side has more than 250 words or more than
            1.5 times as many as the other (few words apart), as fairseq does.

    Raises:
        ExperimentError: no pair is left; or one side alone is empty and ``clean`` is off.
    """
    kept: tuple[list[str], list[str]] = ([], [])
    empty = unlike = number = 0
    for number, (one, other) in enumerate(pairs, 1):
        counts = len(one.split()), len(other.split())
        if min(counts) == 0:
            if max(counts) and not clean:
                bad = names[0] if counts[0] == 0 else names[1]
                raise ExperimentError(f"{bad}, line {number}: empty, its translation is not")
            empty += 1
        elif clean and _is_unlike(*counts):
            unlike += 1
        else:
            kept[0].append(one)
            kept[1].append(other)
    if not kept[0]:
        raise ExperimentError(f"{names[0]} and {names[1]}: no pairs in {number} lines")
    return Pairs(*kept, empty, unlike)


def _aligned(source: Path, target: Path) -> Iterator[tuple[str, str]]:
    lines = itertools.zip_longest(read_lines(source), read_lines(target))
    for number, (one, other) in enumerate(lines):
        if one is None or other is None:
            rest = 1 + sum(1 for _ in lines)
            longer, shorter = (target, source) if one is None else (source, target)
            raise ExperimentError(
                f"{longer} has {number + rest} lines, {shorter} has {number}: they must be "
                "translations of each other line by line"
            )
        yield one, other


def _is_unlike(one: int, other: int) -> bool:
    few, many = sorted((one, other))
    # a ratio says little of a word or two
    return many > LONGEST or (many > RATIO * few and many > few + 2)
