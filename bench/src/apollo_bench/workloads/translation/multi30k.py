"""Multi30k, task 1: captions of photographs in English and German (Elliott et al., 2016)."""

from __future__ import annotations

from pathlib import Path

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.translation.hub_text import load_hub
from apollo_bench.workloads.translation.parallel_text import ParallelCorpus, make_corpus, read_named

HUB = "bentrevett/multi30k"
LANGUAGES = ("en", "de")
SPLITS = ("train", "val", "test_2016_flickr")
_REMEDY = f"--data needs a folder with {{{','.join(SPLITS)}}}.{{en,de}}, plain or .gz"


def load(folder: Path | None = None, hub: str = HUB) -> ParallelCorpus:
    """Read and check the whole corpus.

    Args:
        folder: folder of the six files of raw text, plain or gzipped; None: the hub.
        hub: name of the corpus on the hub.

    Raises:
        ExperimentError: a file is missing, damaged, not UTF-8, or two are misaligned.
    """
    if folder is None:
        return load_hub(hub, LANGUAGES, _REMEDY)
    if not folder.is_dir():
        raise ExperimentError(f"{folder}: no such folder; {_REMEDY}")
    train, valid, test = (read_named(folder, split, LANGUAGES, _REMEDY) for split in SPLITS)
    return make_corpus(train, valid, test, LANGUAGES, str(folder))
