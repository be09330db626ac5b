"""WMT14 English to German: news, validated on newstest2013 and tested on newstest2014."""

from __future__ import annotations

import re
from pathlib import Path

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.translation.hub_text import load_hub
from apollo_bench.workloads.translation.parallel_text import (
    ParallelCorpus,
    TextPairs,
    check_aligned,
    even,
    find_text,
    make_corpus,
    read_lines,
    read_named,
)

HUB = "wmt/wmt14"
SUBSET = "de-en"
LANGUAGES = ("en", "de")
TRAIN, VALID, TEST = "train", "newstest2013", "newstest2014"
# files of the organizers' archives, for example europarl-v7.de-en.en
_PARTS = ("*.de-en.en", "*.de-en.en.gz")
# their test set has one <seg> per line; these are the files of English to German
_SGML = ("newstest2014-deen-src.en.sgm", "newstest2014-deen-ref.de.sgm")
_SEGMENT = re.compile(r"<seg\b[^>]*>(.*?)</seg>")
_REMEDY = (
    f"--data needs a folder with {TRAIN}.{{en,de}} or the organizers' *.de-en.{{en,de}}, with "
    f"{VALID}.{{en,de}}, and with {TEST}.{{en,de}} or {' and '.join(_SGML)}; plain or .gz"
)


def load(folder: Path | None = None, hub: str = HUB) -> ParallelCorpus:
    """Read and check the whole corpus.

    Args:
        folder: folder of the raw text, plain or gzipped, also in folders below it; None: the hub.
            The training text is ``train.{en,de}``, or else all of ``*.de-en.{en,de}`` in the order
            of their names.
        hub: name of the corpus on the hub.

    Raises:
        ExperimentError: a file is missing, damaged, not UTF-8, or two are misaligned.
    """
    if folder is None:
        return load_hub(hub, LANGUAGES, _REMEDY, SUBSET)
    if not folder.is_dir():
        raise ExperimentError(f"{folder}: no such folder; {_REMEDY}")
    # small files first, so that their errors come before minutes of reading
    valid, test = _named(folder, VALID), _test(folder)
    return make_corpus(_training(folder), valid, test, LANGUAGES, str(folder))


def _named(folder: Path, name: str) -> TextPairs:
    found = _folder_of(folder, f"{name}.{LANGUAGES[0]}") or folder
    return read_named(found, name, LANGUAGES, _REMEDY)


def _training(folder: Path) -> TextPairs:
    if _folder_of(folder, f"{TRAIN}.{LANGUAGES[0]}"):
        return _named(folder, TRAIN)
    parts = {
        path.with_name(path.name.removesuffix(".gz")).with_suffix("")
        for pattern in _PARTS
        for path in folder.rglob(pattern)
    }
    if not parts:
        return _named(folder, TRAIN)  # raises the error that names the missing file
    pairs = TextPairs([], [])
    for part in sorted(parts):
        read = read_named(part.parent, part.name, LANGUAGES, _REMEDY)
        pairs.source.extend(read.source)
        pairs.target.extend(read.target)
    return pairs


def _test(folder: Path) -> TextPairs:
    found = _folder_of(folder, _SGML[0])
    if found is None or _folder_of(folder, f"{TEST}.{LANGUAGES[0]}"):
        return _named(folder, TEST)
    source, target = (find_text(found, name, _REMEDY) for name in _SGML)
    pairs = TextPairs(_segments(source), _segments(target))
    check_aligned(pairs, str(source), str(target), _REMEDY)
    return pairs


def _segments(path: Path) -> list[str]:
    lines = read_lines(path, _REMEDY)
    # entities stay as they are, as in sacreBLEU
    return [even(text) for line in lines for text in _SEGMENT.findall(line)]


def _folder_of(folder: Path, name: str) -> Path | None:
    """Return the first folder that contains a file, plain or gzipped; None if there is none."""
    for found in (folder, *sorted(path for path in folder.rglob("*") if path.is_dir())):
        if (found / name).is_file() or (found / f"{name}.gz").is_file():
            return found
    return None
