"""Ctrl-C in the first seconds, terminals of ASCII, users without a home, values out of range."""

from __future__ import annotations

import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from apollo_bench.cli import app
from apollo_bench.config import recipe
from apollo_bench.errors import ExperimentError
from apollo_bench.launch import worker
from apollo_bench.report import page
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.training.checkpoint_files import read_checkpoint
from apollo_bench.training.loop import train
from apollo_bench.workloads.validation_cache import ValidationCache
from bench.tests.conftest import TINY
from bench.tests.helpers import (
    PATIENCE,
    assert_identical,
    prepared,
    result,
    spec_of,
    wait_for_checkpoint,
)

# runs the entry with a module of the test's own in place of the commands
ENTRY = """
import sys
from importlib.machinery import ModuleSpec

class Finder:
    def find_spec(name, path=None, target=None):
        return ModuleSpec(name, Finder) if name == "apollo_bench.cli" else None
    def create_module(spec):
        return None
    def exec_module(module):
        exec(sys.argv[1], module.__dict__)

sys.meta_path.insert(0, Finder)
from apollo_bench.entry import main
main()
"""
SWALLOWING = """
import time
print("importing", flush=True)
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""
PRINTING = r"""
def app(prog_name):
    print("81.25 ± 0.10 …", "\udce9", "猫")
"""


def entry(module: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", ENTRY, module],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_ctrl_c_during_an_import_that_swallows_exceptions() -> None:
    process = entry(SWALLOWING)
    assert process.stdout is not None
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors == b"\nStopped.\n"


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", b"81.25 +- 0.10 ... \xe9 ?\n"),
        ("latin-1", b"81.25 \xb1 0.10 ... \xe9 ?\n"),
        ("utf-8", "81.25 ± 0.10 … ".encode() + b"\xe9 " + "猫\n".encode()),
    ],
)
def test_a_terminal_without_the_characters(encoding: str, printed: bytes) -> None:
    out, errors = entry(PRINTING, PYTHONIOENCODING=encoding).communicate(timeout=PATIENCE)
    assert errors == b""
    assert out == printed


def test_a_user_without_a_home_and_without_a_passwd_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(user: int) -> None:
        raise KeyError(user)

    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    cache = ValidationCache("tree.json")
    cache.add("name", "digest")
    cache.save()
    assert not ValidationCache("tree.json").contains("name", "digest")
    assert not list(tmp_path.iterdir())


def test_a_report_in_a_folder_that_is_not_utf8(finished: Path) -> None:
    folder = finished.rename(os.fsdecode(os.fsencode(finished) + b"\xe9"))
    (folder / "runs" / "damaged").mkdir()
    (folder / "runs" / "damaged" / "run.json").write_text("")
    page.write([folder], folder)
    assert "compared?/runs/damaged" in (folder / "report.html").read_text("utf-8")
    assert read_checkpoint(next(folder.glob("runs/*/checkpoint/newest.pt")))["step"] > 0


def test_runs_in_such_a_folder_are_refused(recipe_file: Path, tmp_path: Path) -> None:
    """TensorBoard cannot write there."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    done = CliRunner().invoke(app, ["train", str(recipe_file), "--optimizer", "sgd", "--out", out])
    assert done.exit_code == 2
    assert "caf\\udce9', which is not UTF-8, as TensorBoard needs" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "-1"],
        ["--seed", str(2**63)],
        ["--threads", "0"],
        ["--threads", "100000"],
        ["--devices", "100000"],
    ],
)
def test_numbers_out_of_range(arguments: list[str], tmp_path: Path) -> None:
    command = ["train", "fashion-mnist", "--optimizer", "sgd", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, *arguments])
    assert done.exit_code == 2
    assert arguments[0] in done.stderr
    assert re.search(r"than or equal\s+to|not in the range", done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_of_a_recipe_out_of_range(recipe_file: Path, seed: int) -> None:
    recipe_file.write_text(TINY.replace("seeds = [3, 4]", f"seeds = [3, {seed}]"))
    with pytest.raises(ExperimentError, match=r"seeds.*(greater|less) than or equal to"):
        recipe.load(str(recipe_file))


def test_a_report_on_a_misspelt_folder_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When imported, matplotlib creates its cache folder, which must not create this one."""
    monkeypatch.setenv("MPLCONFIGDIR", "")
    monkeypatch.delenv("MPLCONFIGDIR")
    folder = tmp_path / "empty"
    folder.mkdir()
    for path, message in ((tmp_path / "typo", "no such folder"), (folder, "no runs in it")):
        done = CliRunner().invoke(app, ["report", str(path)])
        assert done.exit_code == 2
        assert done.stderr.startswith(f"apollo-bench: {path}: {message}")
        assert "MPLCONFIGDIR" not in os.environ
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@contextmanager
def held_lock(directory: RunDirectory, parent: int, seconds: float) -> Iterator[None]:
    """Hold a run's lock for a while in a child process that names ``parent`` as its parent."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ[worker.PARENT_PID] = str(parent)
        with worker.lock_run(directory):
            os.write(writer, b".")
            time.sleep(seconds)
            os._exit(0)
    os.read(reader, 1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path) -> RunDirectory:
    directory, _ = prepared(tmp_path / "run", spec_of(recipe_file, "sgd"))
    return directory


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_worker_whose_command_was_killed_is_waited_for(run: RunDirectory) -> None:
    """The worker ends after its current step; a second command waits for it."""
    with held_lock(run, ended_process(), 0.3):
        before = time.monotonic()
        worker.lock_run(run).close()
        assert time.monotonic() - before > 0.2
    stops = iter([False, False, True])
    with held_lock(run, ended_process(), 60), pytest.raises(ExperimentError, match="another proc"):
        worker.lock_run(run, lambda: next(stops))


def test_a_zombie_is_not_alive() -> None:
    """A zombie's parent has not read its exit status, as happens in containers."""
    process = subprocess.Popen(["true"])
    deadline = time.monotonic() + PATIENCE
    while worker._is_alive(process.pid):
        assert time.monotonic() < deadline
    os.kill(process.pid, 0)  # a zombie still has its number
    process.wait()
    assert worker._is_alive(os.getpid())


def test_a_worker_of_another_command_is_not(run: RunDirectory) -> None:
    with held_lock(run, os.getpid(), 60):
        before = time.monotonic()
        with pytest.raises(ExperimentError, match="run: another process is training this run"):
            worker.lock_run(run)
        assert time.monotonic() - before < 5


@pytest.mark.slow
def test_the_same_command_at_once_after_sigkill(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(TINY.replace("epochs = 2", "epochs = 8"))
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "apollo_bench", "train", str(recipe_file)),
        *("--optimizer", "apollo", "--threads", "1", "--out", str(out)),
    ]
    directory = RunDirectory(out / "runs" / "fashion-mnist-apollo-cosine-seed3")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for_checkpoint(process, directory)
    process.kill()
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    whole, task = prepared(tmp_path / "whole", directory.spec())
    train(whole, directory.spec(), task)
    assert_identical(result(whole), result(directory))
