"""Corpora of sentences in English and German."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from apollo_qn.experiments.data.checksums import checksums, verify
from apollo_qn.experiments.data.parallel_text import Pairs, choose, read_pairs
from apollo_qn.experiments.errors import ExperimentError

PHRASES = Path(__file__).parent / "embedded" / "phrases"


class Translations(NamedTuple):
    """Sentences in three splits, from English into German."""

    train: Pairs
    valid: Pairs
    test: Pairs

    @property
    def fingerprint(self) -> str:
        """Changes when a sentence does."""
        digest = hashlib.sha256()
        for pairs in self:
            for text in (*pairs.source, *pairs.target):
                digest.update(text.encode() + b"\n")
        return digest.hexdigest()


def phrases(folder: Path | None = None) -> Translations:
    """The embedded phrases, whose checksums are verified; or files of the same names elsewhere.

    Raises:
        ExperimentError: a file is missing, damaged, or misaligned.
    """
    if folder is None:
        remedy = "reinstall apollo-qn, or make them anew with scripts/make_phrases.py"
        names = [f"{split}.{side}.gz" for split in ("train", "valid", "test") for side in _SIDES]
        verify(PHRASES, checksums(PHRASES, names, remedy), remedy)
    splits = ("train", "valid", "test")
    # German writes its numbers in one word: no sign of a bad pair here
    return _from_folder(PHRASES if folder is None else folder, splits, clean=False)


def multi30k(folder: Path | None = None) -> Translations:
    """Captions of photographs (Elliott et al., 2016), task 1.

    Args:
        folder: with {train,val,test_2016_flickr}.{en,de}, plain or gzipped; None: the hub.

    Raises:
        ExperimentError: the data are not there, damaged, or misaligned.
    """
    if folder is None:
        return _from_hub("bentrevett/multi30k", None, ("train", "validation", "test"), _MULTI30K)
    return _from_folder(folder, ("train", "val", "test_2016_flickr"))


def wmt14(folder: Path | None = None) -> Translations:
    """News (section 4.3 of the paper); validated on newstest2013, tested on newstest2014.

    Args:
        folder: with {train,newstest2013,newstest2014}.{en,de}, plain or gzipped; None: the hub.

    Raises:
        ExperimentError: the data are not there, damaged, or misaligned.
    """
    if folder is None:
        return _from_hub("wmt/wmt14", "de-en", ("train", "validation", "test"), _WMT14)
    return _from_folder(folder, ("train", "newstest2013", "newstest2014"))


_SIDES = ("en", "de")
_MULTI30K = "--data needs a folder with {train,val,test_2016_flickr}.{en,de}.gz"
_WMT14 = "--data needs a folder with {train,newstest2013,newstest2014}.{en,de}"


def _from_folder(folder: Path, splits: tuple[str, str, str], clean: bool = True) -> Translations:
    if not folder.is_dir():
        raise ExperimentError(f"{folder}: no such folder")
    found = []
    for place, split in enumerate(splits):
        source, target = (_file(folder, f"{split}.{side}") for side in _SIDES)
        found.append(read_pairs(source, target, clean and place == 0))
    return Translations(*found)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise ExperimentError(f"{folder / name}: no such file, nor {name}.gz")


def _from_hub(
    name: str, subset: str | None, splits: tuple[str, str, str], remedy: str
) -> Translations:
    from apollo_qn.experiments.data import tables  # needs an extra of its own

    sets = tables.open_hub(name, remedy, subset)
    found = []
    for place, split in enumerate(splits):
        if split not in sets:
            raise ExperimentError(f"{name}: no split {split}, only {', '.join(sets)}; {remedy}")
        rows = sets[split]
        if "translation" in rows.column_names:
            rows = rows.flatten().rename_columns({f"translation.{side}": side for side in _SIDES})
        source, target = (f"{name}, split {split}, {side}" for side in _SIDES)
        pairs = zip(*(rows[side] for side in _SIDES), strict=True)
        found.append(choose(pairs, (source, target), clean=place == 0))
    return Translations(*found)
