"""Every page of ``examples/`` in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "examples").glob("*.py"))
# packages that an example needs beside torch and apollo-bench
NEEDS = {
    "huggingface_trainer": ("transformers", "accelerate"),
    "lightning_trainer": ("lightning",),
    "accelerate_loop": ("accelerate",),
    "optuna_tuning": ("optuna",),
}
# the default compiler would take longer than the training
OPTIONS = {"compiled_step": ("--backend", "eager")}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_loss_falls(page: Path, tmp_path: Path) -> None:
    for module in NEEDS.get(page.stem, ()):
        pytest.importorskip(module)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(page), *OPTIONS.get(page.stem, ())],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"^loss ([\d.]+) -> ([\d.]+)", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    first, last = map(float, found.groups())
    assert last < 0.75 * first
    assert not list(tmp_path.iterdir())  # the example leaves no file


def test_the_table_names_every_page() -> None:
    table = (ROOT / "examples" / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+\.py)\)", table)) == {page.name for page in PAGES}
