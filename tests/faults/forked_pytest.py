"""Runs of pytest on a copy of the sources, forked from a process that has imported the libraries.

Importing torch, pandas and the like takes half of the time of a short run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

# what many tests import; never the project's own packages, whose sources differ from run to run
LIBRARIES = [
    *("pytest", "hypothesis", "numpy", "torch", "torch.optim", "torch.utils._foreach_utils"),
    *("pandas", "scipy.stats", "matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("pydantic", "typer.testing", "rich.console", "PIL.Image", "lightning.fabric", "torchmetrics"),
]
OWN = ("apollo_qn", "apollo_bench", "bench", "tests")

# the libraries are imported before a test can ask for one thread
os.environ.setdefault("OMP_NUM_THREADS", "1")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


def run(root: Path, arguments: list[str], limit: float) -> tuple[int, str]:
    """Run pytest in ``root`` and return its exit status and what it printed.

    Raises:
        TimeoutError: it has run for more than ``limit`` seconds.
    """
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        process = _context.Process(target=_pytest, args=(root, arguments, output.name))
        process.start()
        process.join(limit)
        if process.is_alive():
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise TimeoutError
        assert process.exitcode is not None
        return process.exitcode, output.read()


def _pytest(root: Path, arguments: list[str], output: str) -> None:
    os.setsid()  # so that what a test starts ends with it
    descriptor = os.open(output, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]  # those of this script
    os.chdir(root)
    sources = [str(root / "src"), str(root / "bench/src")]
    sys.path[:0] = [*sources, str(root)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*sources, os.environ.get("PYTHONPATH", "")])
    os.environ["OMP_NUM_THREADS"] = "1"
    # a change within a second would keep the old bytecode
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.argv = ["pytest", *arguments]
    import pytest

    status = int(pytest.main(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of a test that failed must not keep it
