"""The user's parallel text: two aligned files, or two per split, of any languages."""

from __future__ import annotations

import itertools
from pathlib import Path

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.translation.parallel_text import (
    NOT_EMPTY,
    ParallelCorpus,
    TextPairs,
    clean,
    find_text,
    make_corpus,
    read_named,
)
from apollo_bench.workloads.unused_files import remarks_beside

_SPLITS = (("train",), ("valid", "val", "validation", "dev"), ("test",))


def load(folder: Path | None, languages: tuple[str, str], test_share: float) -> ParallelCorpus:
    """Read and check the whole corpus.

    Args:
        folder: contains ``train``, ``valid`` and ``test``, or one text of any name, in two files
            that end in the languages: ``novel.fr`` and ``novel.it``, plain or gzipped.
        languages: source and target.
        test_share: part of the pairs, from the end, for each of validation and test, where there is
            one text.

    Raises:
        ExperimentError: a file is missing, damaged, not UTF-8, or two are misaligned.
    """
    source, target = languages
    needed = (
        f"--data needs a folder with NAME.{source} and NAME.{target}, or with train, valid and "
        f"test.{{{source},{target}}}; data.languages names their endings"
    )
    if folder is None or not folder.is_dir():
        where = "no --data" if folder is None else f"{folder}: no such folder"
        raise ExperimentError(f"{where}; {needed}")
    names = _names(folder, source) & _names(folder, target)
    if not names:
        there = sorted(path.name for path in folder.iterdir() if path.is_file())[:8]
        raise ExperimentError(
            f"{folder}: no two files of one name that end in .{source} and .{target}, there are "
            f"{', '.join(there) or 'no files'}; {needed}"
        )
    if "train" not in names and len(names) == 1:
        [only] = names
        pairs = read_named(folder, only, languages, needed)
        corpus = _cut(pairs, languages, test_share, str(folder))
        return corpus._replace(remarks=_remarks(folder, [only], languages))
    splits, read = [], []
    for choices in _SPLITS:
        name = next((name for name in choices if name in names), None)
        if name is None:
            raise ExperimentError(
                f"{folder}: no {choices[0]}.{source} and .{target} among "
                f"{', '.join(sorted(names))}; {needed}"
            )
        splits.append(read_named(folder, name, languages, needed))
        read.append(name)
    corpus = make_corpus(splits[0], splits[1], splits[2], languages, str(folder))
    return corpus._replace(remarks=_remarks(folder, read, languages))


def _remarks(folder: Path, names: list[str], languages: tuple[str, str]) -> list[str]:
    texts = [f"{name}.{language}" for name in names for language in languages]
    return remarks_beside(folder, [find_text(folder, text, "") for text in texts])


def _names(folder: Path, language: str) -> set[str]:
    found = set()
    for path in folder.iterdir():
        name = path.name.removesuffix(".gz")
        if path.is_file() and name.endswith(f".{language}"):
            found.add(name.removesuffix(f".{language}"))
    return found


def _cut(
    pairs: TextPairs, languages: tuple[str, str], test_share: float, where: str
) -> ParallelCorpus:
    kept, counts = clean(pairs, NOT_EMPTY)
    held_out = max(1, round(test_share * kept.size))
    edges = (0, kept.size - 2 * held_out, kept.size - held_out, kept.size)
    if edges[1] < 1:
        raise ExperimentError(
            f"{where}: {kept.size} pairs of sentences, too few to hold out {held_out} twice"
        )
    train, valid, test = (
        TextPairs(*(side[first:last] for side in kept)) for first, last in itertools.pairwise(edges)
    )
    corpus = make_corpus(train, valid, test, languages, where)
    # held-out pairs do not count as lost
    return corpus._replace(counts=counts._replace(read=counts.read - 2 * held_out))
