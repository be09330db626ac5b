"""Forked workers: what they inherit, how they end, and what is left when their server dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from apollo_bench.config import recipe
from apollo_bench.config.execution import Execution
from apollo_bench.launch import fork_server, worker
from apollo_bench.launch.fork_server import ForkedWorker, ForkServer, WorkerPool
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.workloads import tasks
from apollo_bench.workloads.workload import WorkloadSpec
from bench.tests.helpers import PATIENCE

# pytest's process has threads, which a fork would lose
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

FORK = multiprocessing.get_context("fork")


class Process:
    """A process with the methods of ``subprocess.Popen`` that a server needs."""

    def __init__(self, target: Callable[[], None]) -> None:
        self._process = FORK.Process(target=target)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = PATIENCE) -> int:
        deadline = time.monotonic() + timeout
        while self._process.exitcode is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("server", timeout)
            time.sleep(0.005)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


@contextmanager
def server(
    serve: Callable[[Any], None] = fork_server.serve,
) -> Iterator[tuple[ForkServer, Process]]:
    ours, theirs = multiprocessing.Pipe()

    def run() -> None:
        ours.close()
        # pytest has replaced both streams; the log must get these
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
        serve(theirs)

    process = Process(run)
    theirs.close()
    made = ForkServer(cast("subprocess.Popen[bytes]", process), ours)
    yield made, process
    made.close()


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def status(of: ForkedWorker) -> int | None:
    until(lambda: of.poll() is not None)
    return of.returncode


@pytest.fixture
def directory(recipe_file: Path, tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.prepare(recipe.load(str(recipe_file)).run("sgd", 3), "data", None, ["test"])
    return made


def test_every_end_of_a_worker_is_reported(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter((0, worker.EXIT_STOPPED, "killed", "wrong"))

    def train(directory: RunDirectory, workload: object) -> int:
        end = directory.log.with_name("end").read_text()
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if end == "wrong":
            raise ValueError("this is why")
        return int(end)

    monkeypatch.setattr(worker, "train_in_this_process", train)
    found = []
    with server() as (made, _):
        for end in ends:
            directory.log.with_name("end").write_text(str(end))
            one = made.start(directory)
            until(lambda one=one: one.poll() is not None or one.pid is not None)
            found.append(status(one))
            assert one.pid not in (None, os.getpid())
    assert found == [0, worker.EXIT_STOPPED, -signal.SIGKILL, 1]
    assert "ValueError: this is why" in directory.log.read_text()


def test_data_are_read_once_and_the_workers_inherit_them(
    directory: RunDirectory, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs with other data or batches get a workload of their own."""
    calls = directory.path / "calls"

    def make(spec: WorkloadSpec, *arguments: object) -> int:
        with calls.open("a") as file:
            file.write(f"{spec.train.batch_size}\n")
        return spec.train.batch_size

    def train(directory: RunDirectory, workload: object) -> int:
        return 0 if workload == directory.spec().train.batch_size else 1

    monkeypatch.setattr(tasks, "make", make)
    monkeypatch.setattr(worker, "train_in_this_process", train)
    other = RunDirectory(directory.path.with_name("other"))
    spec = recipe.load(str(recipe_file), ["train.batch_size=64"]).run("apollo", 4)
    other.prepare(spec, "data", None, ["test"])
    with server() as (made, _):
        found = [status(made.start(one)) for one in (directory, other, directory, other)]
    assert found == [0] * 4
    assert calls.read_text() == "32\n64\n"


def test_data_that_cannot_be_read_are_left_to_the_worker(directory: RunDirectory) -> None:
    """The worker writes the reason into its own log."""
    manifest = directory.read()
    manifest["data"]["folder"] = str(directory.path / "nowhere")
    directory._write(manifest)
    with server() as (made, _):
        assert status(made.start(directory)) == worker.EXIT_USER_ERROR
    assert "apollo-bench: " in directory.log.read_text()
    assert "nowhere" in directory.log.read_text()


def test_a_lost_server_ends_its_workers(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(directory: RunDirectory, workload: object) -> int:
        parent = int(os.environ[worker.PARENT_PID])
        directory.log.with_name("begun").touch()
        until(lambda: not worker._is_alive(parent))
        directory.log.with_name("ended").touch()
        return worker.EXIT_STOPPED

    monkeypatch.setattr(worker, "train_in_this_process", train)
    with server() as (made, process):
        one = made.start(directory)
        until(directory.log.with_name("begun").exists)
        assert one.poll() is None
        process.kill()
        assert status(one) == -signal.SIGKILL
        assert made.is_lost
    until(directory.log.with_name("ended").exists)


def test_a_signal_before_the_fork_stops_what_is_read(directory: RunDirectory) -> None:
    def serve(connection: object) -> None:
        time.sleep(PATIENCE)  # imports and reads

    with server(serve) as (made, _):
        one, two = made.start(directory), made.start(directory)
        one.terminate()
        assert status(one) == status(two) == -signal.SIGTERM


def test_a_signal_beside_other_workers_waits_for_the_fork(directory: RunDirectory) -> None:
    """The server must stay alive to report how the other workers ended."""
    step = multiprocessing.get_context("fork").Event()

    def serve(connection: Any) -> None:
        numbers = [connection.recv()[0] for _ in range(2)]
        child = FORK.Process(target=time.sleep, args=(PATIENCE,))
        child.start()
        connection.send((numbers[0], child.pid, None))
        step.wait()
        other = FORK.Process(target=time.sleep, args=(PATIENCE,))
        other.start()
        connection.send((numbers[1], other.pid, None))
        for number, process in zip(numbers, (child, other), strict=True):
            process.join()
            connection.send((number, process.pid, process.exitcode))

    with server(serve) as (made, _):
        one, two = made.start(directory), made.start(directory)
        until(lambda: one.poll() is None and one.pid is not None)
        two.terminate()
        assert not made.is_lost
        step.set()
        one.kill()
        assert (status(one), status(two)) == (-signal.SIGKILL, -signal.SIGTERM)


class FakeServer:
    """Records the calls of a pool."""

    def __init__(self) -> None:
        self.is_lost, self.started, self.closed = False, 0, False

    def start(self, directory: RunDirectory) -> None:
        self.started += 1

    def close(self) -> None:
        self.closed = True


def test_one_server_and_a_new_one_for_a_lost_one(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[FakeServer] = []

    def start_server(environment: dict[str, str], log: Path) -> FakeServer:
        servers.append(FakeServer())
        return servers[-1]

    monkeypatch.setattr(fork_server, "start_server", start_server)
    pool = WorkerPool({})
    pool.close()
    for _ in range(2):
        pool.start(directory)
    servers[0].is_lost = True
    pool.start(directory)
    assert [one.started for one in servers] == [2, 1]
    pool.close()
    assert servers[1].closed


def test_which_runs_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert fork_server.can_fork(Execution())
    for other in ({"accelerator": "gpu"}, {"threads": 2}, {"devices": 2}):
        assert not fork_server.can_fork(Execution.model_validate(other))
    monkeypatch.setattr("sys.platform", "darwin")
    assert not fork_server.can_fork(Execution())
