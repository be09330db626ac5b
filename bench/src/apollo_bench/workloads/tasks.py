"""The tasks: how to make the workload of each, and what ``apollo-bench tasks`` prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.image_classification import image_workload
from apollo_bench.workloads.language_modeling import language_workload
from apollo_bench.workloads.translation import translation_workload
from apollo_bench.workloads.workload import Metric, Resources, Workload, WorkloadSpec


class TaskEntry(NamedTuple):
    """How the workload of a task is made, and what ``apollo-bench tasks`` prints about it."""

    make: Callable[[WorkloadSpec, Resources], Workload]
    monitored: Metric  # evaluated during training
    final: Metric  # of the trained model
    data: str
    source: str


TASKS = {
    "fashion-mnist": TaskEntry(
        image_workload.make_fashion_mnist,
        image_workload.ACCURACY,
        image_workload.ACCURACY,
        "8000 + 2000 gray images 28 x 28, 10 classes (whole set: 60000 + 10000)",
        "embedded; whole set: --data /usr/share/datasets/fashion-mnist "
        "(Debian's dataset-fashion-mnist)",
    ),
    "cifar10": TaskEntry(
        image_workload.make_cifar10,
        image_workload.ACCURACY,
        image_workload.ACCURACY,
        "50000 + 10000 color images 32 x 32, 10 classes",
        "Hugging Face hub (uoft-cs/cifar10), or --data with cifar-10-python.tar.gz, its folder, "
        "or parquet files",
    ),
    "imagenet": TaskEntry(
        image_workload.make_imagenet,
        image_workload.ACCURACY,
        image_workload.ACCURACY,
        "1281167 + 50000 photographs, 1000 classes",
        "Hugging Face hub (ILSVRC/imagenet-1k), or --data with train/CLASS/*.JPEG and "
        "val/CLASS/*.JPEG",
    ),
    "wordnet": TaskEntry(
        language_workload.make_wordnet,
        language_workload.VALIDATION,
        language_workload.TEST,
        "765 thousand words of WordNet's definitions (the larger set: 1.36 million)",
        "embedded; larger: --data with wordnet_{train,valid,test}.txt.gz",
    ),
    "one-billion-word": TaskEntry(
        language_workload.make_one_billion_word,
        language_workload.VALIDATION,
        language_workload.TEST,
        "0.8 billion words of news, a vocabulary of 793471",
        "statmt.org/lm-benchmark; `apollo-bench prepare` makes what --data needs",
    ),
    "phrases": TaskEntry(
        translation_workload.make_phrases,
        translation_workload.VALIDATION,
        translation_workload.TEST,
        "20000 + 1000 + 1000 pairs of English and German dates, numbers, amounts and times",
        "embedded",
    ),
    "multi30k": TaskEntry(
        translation_workload.make_multi30k,
        translation_workload.VALIDATION,
        translation_workload.TEST,
        "29000 + 1014 + 1000 pairs of English and German captions",
        "Hugging Face hub (bentrevett/multi30k), or --data with {train,val,test_2016_flickr}."
        "{en,de}.gz",
    ),
    "wmt14-en-de": TaskEntry(
        translation_workload.make_wmt14,
        translation_workload.VALIDATION,
        translation_workload.TEST,
        "4.5 million + 3000 + 3003 pairs of English and German sentences",
        "Hugging Face hub (wmt/wmt14), or --data with {train,newstest2013,newstest2014}.{en,de}",
    ),
    # the user's data, by kind; the name of the task is that of the data
    "image-folder": TaskEntry(
        image_workload.make_image_folder,
        image_workload.ACCURACY,
        image_workload.ACCURACY,
        "your images, one folder per class",
        "--data with CLASS/*, or with train/CLASS/* and test/CLASS/*",
    ),
    "text-file": TaskEntry(
        language_workload.make_text_file,
        language_workload.VALIDATION,
        language_workload.TEST,
        "your text",
        "--data with a text file, or a folder of train.txt, valid.txt and test.txt",
    ),
    "aligned-text": TaskEntry(
        translation_workload.make_aligned_text,
        translation_workload.VALIDATION,
        translation_workload.TEST,
        "your sentences and their translations, of any two languages",
        "--data with NAME.fr and NAME.it, say, and --set data.languages=fr,it",
    ),
}


def entry_of(spec: WorkloadSpec) -> TaskEntry:
    """Return the entry of a run's task, or of the kind of the user's data.

    Raises:
        ExperimentError: unknown task.
    """
    name = spec.data.kind if spec.data.is_custom else spec.task
    if name not in TASKS:
        raise ExperimentError(f"task is {spec.task!r}, allowed are {', '.join(TASKS)}")
    return TASKS[name]


def make(
    spec: WorkloadSpec,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> Workload:
    """Make the workload of a run.

    Example:
        >>> from apollo_bench.config import recipe
        >>> workload = make(recipe.load("fashion-mnist").run("apollo", seed=1))
        >>> workload.steps_per_epoch, workload.units_per_step, workload.unit
        (125, 64.0, 'images')

    Args:
        spec: task, model, data and batch size, as a ``config.recipe.RunSpec`` has them.
        folder: folder of local data; None: the task's own.
        device: device of the batches, and of small data sets.
        workers: processes that decode images; None: one per core.

    Raises:
        ExperimentError: unknown task, or bad data.
    """
    return entry_of(spec).make(spec, Resources(folder, torch.device(device), workers))
