"""Shared fixtures: a recipe whose runs take a second, and one thread, as in a worker."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from apollo_bench.training.loop import train
from bench.tests.helpers import prepared, spec_of, stop_after

# The optimizer's tests alone run on a GPU: models, processes and files of these stay on the CPU.
collect_ignore_glob = [] if os.environ.get("APOLLO_QN_TEST_DEVICE", "cpu") == "cpu" else ["*"]

torch.set_num_threads(1)
# the same examples every time
settings.register_profile("bench", deadline=None, derandomize=True, max_examples=40, database=None)
settings.load_profile("bench")

TINY = """
task = "fashion-mnist"
seeds = [3, 4]

[model]
family = "resnet"
depth = 8
width = 2

[data]
train_examples = 384
crop_padding = 2

[train]
batch_size = 32
log_every = 5
checkpoint_every = 0.05

[schedules.cosine]
kind = "cosine"
epochs = 2

[optimizers.sgd]
method = "sgd"
lr = 0.1
momentum = 0.9
weight_decay = 5e-4

[optimizers.adam]
method = "adam"
lr = 0.01
weight_decay = { equal_strength_to = "apollo" }

[optimizers.radam]
method = "radam"
lr = 0.02
weight_decay = { equal_strength_to = "apollo" }

[optimizers.apollo]
method = "apollo"
lr = 0.5
weight_decay = 4e-4
warmup_steps = 6
warmup_init_lr = 0.01

[quick]
epochs = 1
seeds = 1
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@contextmanager
def settings_of_a_worker() -> Iterator[None]:
    """Use one thread, and undo what training changes for the whole process."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


@pytest.fixture(autouse=True)
def _settings_of_a_worker() -> Iterator[None]:
    with settings_of_a_worker():
        yield


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two optimizers with two seeds; one of the four runs stops after its first epoch.

    Trained once per test process. A test copies it and never writes to it.
    """
    folder = tmp_path_factory.mktemp("finished")
    recipe_file = folder / "tiny.toml"
    recipe_file.write_text(TINY)
    with settings_of_a_worker():
        for name in ("sgd", "apollo"):
            for seed in (3, 4):
                spec = spec_of(recipe_file, name, seed)
                directory, task = prepared(folder / "compared" / "runs" / spec.label, spec)
                steps = 13 if (name, seed) == ("apollo", 4) else 99
                train(directory, spec, task, stop_after(steps))
    return folder / "compared"


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """Return a copy of :func:`finished_once` for one test."""
    return shutil.copytree(finished_once, tmp_path / "compared")


@pytest.fixture
def single_process_group() -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
