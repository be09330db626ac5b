"""Fork workers from a process that has imported the modules and read the data.

A new Python process needs seconds to import the modules and to read the data. A forked worker
starts with both in memory. It is still a separate process: its crash affects no other run, and no
run can change the state that the next one starts with. The forkserver of multiprocessing does not
suffice: it imports modules in advance, but cannot read the data of runs that are named later.

``python -m apollo_bench.launch.fork_server FD`` serves one scheduler over the connection with file
descriptor FD.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from apollo_bench.config.execution import Execution
from apollo_bench.launch import worker
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.workloads import tasks
from apollo_bench.workloads.workload import Workload

_CLOSING = 5.0  # seconds to wait until an idle server has ended
_POLL_SECONDS = 0.05  # between two checks of the workers


def can_fork(execution: Execution) -> bool:
    """Return whether a run may be trained in a forked process.

    A fork inherits neither the threads of its parent nor a GPU.
    """
    alone = execution.processes == 1 and execution.threads == 1 and execution.accelerator == "cpu"
    return alone and sys.platform == "linux"


class ForkedWorker:
    """A worker that a server forks, with the methods of ``Popen`` that a scheduler calls.

    Args:
        server: server of the worker.
    """

    def __init__(self, server: ForkServer) -> None:
        self.pid: int | None = None  # None: not forked yet
        self.returncode: int | None = None
        self._server = server
        self._signal: int | None = None  # sent when the worker is forked

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the worker exists."""
        self._server.receive()
        return self.returncode

    def terminate(self) -> None:
        """Ask the worker to write a checkpoint and to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End the worker at once."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is not None:
            return
        self._signal = number
        if self.pid is None:
            self._server.signal_if_idle(number)
        else:
            self.forked(self.pid)

    def forked(self, pid: int) -> None:
        """Record the worker's process, and send a signal that was requested before the fork."""
        self.pid = pid
        if self._signal is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, self._signal)


class ForkServer:
    """The scheduler's side of a server.

    Args:
        process: process of the server.
        connection: this end of the connection to it.
    """

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self._process, self._connection = process, connection
        self._workers: dict[int, ForkedWorker] = {}  # workers that have not ended, by number
        self._started = 0

    @property
    def is_lost(self) -> bool:
        """Whether the server has ended."""
        return self._process.poll() is not None

    def start(self, directory: RunDirectory) -> ForkedWorker:
        """Start the worker of a prepared run."""
        self._started += 1
        made = self._workers[self._started] = ForkedWorker(self)
        with suppress(OSError):  # the server is lost; the next poll reports it
            self._connection.send((self._started, str(directory.path.resolve())))
        return made

    def receive(self) -> None:
        """Read the server's messages, and note a lost server."""
        try:
            while self._workers and self._connection.poll():
                number, pid, status = self._connection.recv()
                if status is None:
                    self._workers[number].forked(pid)
                else:
                    self._workers.pop(number).returncode = status
        except (EOFError, OSError):
            status = self._process.wait() or 1
            for lost in self._workers.values():  # they end, too: the server is their parent
                lost.returncode = status
            self._workers.clear()

    def signal_if_idle(self, number: int) -> None:
        """Send a signal to the server while it has forked no worker."""
        if all(one.pid is None for one in self._workers.values()):
            self._process.send_signal(number)

    def close(self) -> None:
        """End the server, whose workers have ended."""
        self._connection.close()
        try:
            self._process.wait(_CLOSING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_server(environment: dict[str, str], log: Path) -> ForkServer:
    """Start a server.

    Args:
        environment: environment variables of the server and its workers.
        log: file that the server's messages are appended to.
    """
    ours, theirs = multiprocessing.Pipe()
    with log.open("ab") as file:
        # in a session of its own, as every worker: Ctrl-C reaches only the scheduler
        process = subprocess.Popen(
            [sys.executable, "-m", "apollo_bench.launch.fork_server", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
            pass_fds=[theirs.fileno()],
        )
    theirs.close()
    return ForkServer(process, ours)


class WorkerPool:
    """The fork server of a scheduler: started when a run first needs it, and again when lost.

    Args:
        environment: environment variables of the workers.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._server: ForkServer | None = None

    def start(self, directory: RunDirectory) -> ForkedWorker:
        """Start the worker of a prepared run."""
        if self._server is None or self._server.is_lost:
            self._server = start_server(self._environment, directory.log)
        return self._server.start(directory)

    def close(self) -> None:
        """End the server, whose workers have ended."""
        if self._server is not None:
            self._server.close()


def main() -> None:
    """Serve the scheduler that started this process."""
    torch.set_num_threads(1)  # a fork would lose any other thread
    _import_for_training()
    status = 1
    try:
        serve(Connection(int(sys.argv[1])))
        status = 0
    except Exception:  # for example, the scheduler ended while a message was sent to it
        traceback.print_exc()
    finally:
        os._exit(status)  # without waiting for the workers, which end when this process has ended


def serve(connection: Connection) -> None:
    """Fork a worker per request, until the scheduler closes the connection."""
    workers: dict[int, BaseProcess] = {}  # by number
    workloads: dict[object, Workload | None] = {}
    while True:
        # poll exit codes: a worker's child processes would keep its sentinel open
        for number, process in list(workers.items()):
            if process.exitcode is not None:
                connection.send((number, process.pid, process.exitcode))
                del workers[number]
        if not connection.poll(_POLL_SECONDS if workers else None):
            continue
        try:
            number, path = connection.recv()
        except EOFError:
            return
        directory = RunDirectory(Path(path))
        _log_to(directory)
        key = _workload_key(directory)
        if key not in workloads:
            workloads[key] = _read_workload(directory)
            gc.freeze()  # otherwise a garbage collection in a worker would copy all memory
        process = multiprocessing.get_context("fork").Process(
            target=_work, args=(connection, directory, workloads[key])
        )
        process.start()
        workers[number] = process
        connection.send((number, process.pid, None))


def _work(connection: Connection, directory: RunDirectory, workload: Workload | None) -> None:
    connection.close()  # otherwise the scheduler would not notice the end of the server
    os.setsid()
    os.environ[worker.PARENT_PID] = str(os.getppid())
    sys.exit(worker.train_in_this_process(directory, workload))


def _log_to(directory: RunDirectory) -> None:
    """Append the output of this process and its children to the log of a run."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with directory.log.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _workload_key(directory: RunDirectory) -> object:
    """Return what the workload of a run depends on; None if its manifest cannot be read."""
    try:
        spec, _, data, *_ = worker.read_manifest(directory)
    except Exception:
        return None
    settings = spec.model.model_dump_json(), spec.data.model_dump_json()
    return spec.task, *settings, spec.train.batch_size, data


def _read_workload(directory: RunDirectory) -> Workload | None:
    """Return the workload of a run; None if it cannot be made: the worker will say why."""
    try:
        spec, execution, data, *_ = worker.read_manifest(directory)
        return tasks.make(spec, data, "cpu", execution.threads)
    except Exception:
        return None


def _import_for_training() -> None:
    """Import what training would import later."""
    import lightning_fabric  # noqa: F401

    torch.optim.SGD([torch.zeros(1)])  # imports torch._dynamo


if __name__ == "__main__":
    main()
