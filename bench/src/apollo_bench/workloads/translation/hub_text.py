"""Parallel text of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads import arrow_tables
from apollo_bench.workloads.translation.parallel_text import (
    ParallelCorpus,
    TextPairs,
    even,
    make_corpus,
)

_SPLITS = ("train", "validation", "test")
_NESTED = "translation"  # the hub's column of one text per language


def load_hub(
    name: str, languages: tuple[str, str], remedy: str, subset: str | None = None
) -> ParallelCorpus:
    """Read the splits train, validation and test.

    Args:
        name: name on the hub, or a folder with the layout of the hub.
        languages: source and target: names of the columns, or of the parts of ``translation``.
        remedy: what to do without the hub; the error message ends with it.
        subset: configuration on the hub; None: the only one.

    Raises:
        ExperimentError: the data set, a split or a language is missing, or a row has no text.
    """
    splits = arrow_tables.hub_splits(name, remedy, subset)
    found = []
    for split in _SPLITS:
        where = f"{name}, split {split}"
        if split not in splits:
            raise ExperimentError(f"{where}: not there, only {', '.join(splits)}; {remedy}")
        found.append(_pairs(splits[split], languages, where, remedy))
    return make_corpus(found[0], found[1], found[2], languages, name)


def _pairs(rows: Any, languages: tuple[str, str], where: str, remedy: str) -> TextPairs:
    columns: list[str] = rows.column_names
    nested = _NESTED in columns
    if not nested and not set(languages) <= set(columns):
        raise ExperimentError(
            f"{where}: no columns {' and '.join(languages)}, nor {_NESTED}, there are "
            f"{', '.join(columns) or 'none'}; {remedy}"
        )
    pairs = TextPairs([], [])
    for number, row in enumerate(rows):
        texts = row[_NESTED] if nested else row
        for side, language in zip(pairs, languages, strict=True):
            text = texts.get(language) if isinstance(texts, dict) else None
            if not isinstance(text, str):
                raise ExperimentError(f"{where}, row {number}: no text of the language {language}")
            side.append(even(text))
    return pairs
