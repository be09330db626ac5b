"""English and German phrases: dates, numbers, amounts and times; embedded."""

from __future__ import annotations

from pathlib import Path

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.checksums import checksums, verify
from apollo_bench.workloads.translation.parallel_text import ParallelCorpus, make_corpus, read_named

EMBEDDED = Path(__file__).parent / "embedded" / "phrases"
LANGUAGES = ("en", "de")
SPLITS = ("train", "valid", "test")
FILES = tuple(f"{split}.{language}.gz" for split in SPLITS for language in LANGUAGES)


def load(folder: Path | None = None) -> ParallelCorpus:
    """Read and check the six files.

    Args:
        folder: folder of files of the same names, plain or gzipped; None: the embedded ones, whose
            checksums are verified.

    Raises:
        ExperimentError: a file is missing, damaged, not UTF-8, or two are misaligned.
    """
    if folder is None:
        folder = EMBEDDED
        remedy = "reinstall apollo-bench, or make them again with scripts/make_phrases.py"
        verify(folder, checksums(folder, FILES, remedy), remedy)
    else:
        remedy = f"--data needs a folder with {{{','.join(SPLITS)}}}.{{en,de}}, plain or .gz"
        if not folder.is_dir():
            raise ExperimentError(f"{folder}: no such folder; {remedy}")
    train, valid, test = (read_named(folder, split, LANGUAGES, remedy) for split in SPLITS)
    return make_corpus(train, valid, test, LANGUAGES, str(folder))
