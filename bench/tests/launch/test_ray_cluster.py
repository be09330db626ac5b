"""A real Ray cluster on this machine gives the same results, even if a worker is killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apollo_bench.runs.run_directory import RunDirectory
from bench.tests.conftest import TINY
from bench.tests.helpers import PATIENCE, assert_identical, result

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
COMPARE = [sys.executable, "-m", "apollo_bench", "compare"]
MORE = ["--optimizers", "sgd,apollo", "--seeds", "1", "--threads", "1"]


def start(
    recipe_file: Path, out: Path, *options: str, address: str = "", folder: Path | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMPARE, str(recipe_file), *MORE, *options, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=folder,
        env={**os.environ, "RAY_ADDRESS": address, "RAY_USAGE_STATS_ENABLED": "0"},
    )


def runs(out: Path) -> list[RunDirectory]:
    return [
        RunDirectory(out / "runs" / f"fashion-mnist-{name}-cosine-seed3")
        for name in ("sgd", "apollo")
    ]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def task_of(run: RunDirectory) -> int:
    """Return the Ray worker whose child process trains this run."""
    found = subprocess.run(
        ["pgrep", "-f", f"worker {run.path}"], capture_output=True, text=True, check=True
    )
    child = found.stdout.split()[0]
    with open(f"/proc/{child}/stat", encoding="utf-8") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def test_a_killed_worker_changes_nothing(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(TINY.replace("epochs = 2", "epochs = 6"))
    process = start(recipe_file, tmp_path / "ray", "--cluster", "ray")
    victim = runs(tmp_path / "ray")[1]
    wait_for(victim.checkpoint, process)
    assert victim.verdict() is None
    task = task_of(victim)
    assert b"ray::" in Path(f"/proc/{task}/cmdline").read_bytes()
    os.kill(task, signal.SIGKILL)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "Report:" in out

    local = start(recipe_file, tmp_path / "local")
    assert local.wait(timeout=PATIENCE) == 0
    for one, other in zip(runs(tmp_path / "ray"), runs(tmp_path / "local"), strict=True):
        assert_identical(result(one), result(other))


def test_an_optimizer_of_the_user_is_found_by_the_tasks(recipe_file: Path, tmp_path: Path) -> None:
    work, name = tmp_path / "work", "custom_optimizers"
    work.mkdir()
    shutil.copy(Path(__file__).parents[1] / "optimizers" / f"{name}.py", work)
    own = ["--optimizers", f"{name}:ScheduleFree"]
    process = start(recipe_file, tmp_path / "ray", *own, "--cluster", "ray", folder=work)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "ScheduleFree" in out
    local = start(recipe_file, tmp_path / "local", *own, folder=work)
    assert local.wait(timeout=PATIENCE) == 0
    label = "fashion-mnist-ScheduleFree-cosine-seed3"
    folders = [tmp_path / where / "runs" / label for where in ("ray", "local")]
    assert_identical(*(result(RunDirectory(folder)) for folder in folders))


def test_interrupted_it_leaves_checkpoints_and_no_process(
    recipe_file: Path, tmp_path: Path
) -> None:
    recipe_file.write_text(TINY.replace("epochs = 2", "epochs = 200"))
    process = start(recipe_file, tmp_path / "ray", "--cluster", "ray")
    found = runs(tmp_path / "ray")[0]
    wait_for(found.checkpoint, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert "Stopped; nothing is lost" in err
    left = ["pgrep", "-f", f"worker {found.path}"]
    assert subprocess.run(left, capture_output=True, check=False).returncode == 1


def test_no_cluster_there(recipe_file: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but it does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = start(recipe_file, tmp_path / "ray", "--cluster", "ray", address=address)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert (
        f"apollo-bench: --cluster ray: RAY_ADDRESS is '{address}', where no cluster answers" in err
    )


def test_unknown_engine(recipe_file: Path, tmp_path: Path) -> None:
    process = start(recipe_file, tmp_path / "ray", "--cluster", "slurm")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "apollo-bench: --cluster is 'slurm', allowed are ray" in err
    assert not (tmp_path / "ray").exists()
