"""Apply each fault of the tables to a copy of the sources; the fast tests must notice it.

    python -m tests.faults [WORD ...]

tries those whose description or file has one of the words; without a word all. First the tests
that the tables name must pass on an unchanged copy. The exit status is 1 where a fault survives,
or a table no longer fits the sources.
"""

from __future__ import annotations

import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults import (
    Fault,
    back_ends,
    bench,
    custom_parts,
    data_sets,
    evaluation,
    forked_pytest,
    optimizer,
    workloads,
)

ROOT = Path(__file__).resolve().parents[2]
TABLES = (optimizer, back_ends, bench, evaluation, workloads, data_sets, custom_parts)
COPIES = 2
COMPILED = (".c", ".h", ".cpp")
SOURCES = (".py", ".toml", *COMPILED)
LIMIT = 300  # seconds for the tests of one fault
_print = threading.Lock()


def main() -> int:
    words = sys.argv[1:]
    faults = [
        fault
        for table in TABLES
        for fault in table.FAULTS
        if not words or any(word in f"{fault.what} {fault.where} {fault.tests}" for word in words)
    ]
    missed = {fault.what: why for fault in faults if (why := misfit(fault))}
    fitting = [fault for fault in faults if fault.what not in missed]
    broken = None
    with tempfile.TemporaryDirectory() as name:
        copies: queue.Queue[Path] = queue.Queue()
        for i in range(COPIES):
            copies.put(copy(Path(name) / str(i)))
        if not words:
            broken = check_unchanged(copies, faults)
        with ThreadPoolExecutor(COPIES) as pool:
            results = pool.map(lambda fault: trial(fault, copies), fitting)
            missed |= {fault.what: why for fault, why in zip(fitting, results, strict=True) if why}
    for line in [*([broken] if broken else []), *(f"{k}: {why}" for k, why in missed.items())]:
        print(line, file=sys.stderr)
    noticed = len({fault.what for fault in faults} - missed.keys())
    print(f"{noticed} of {len(faults)} faults are noticed by the fast tests")
    return bool(missed or broken)


def copy(to: Path) -> Path:
    """Copy what is in version control, changed or not, and the kernels that are built in place."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    built = [path.relative_to(ROOT) for path in (ROOT / "src").rglob("*.so")]
    for path in {*map(Path, filter(None, listed.split("\0"))), *built}:
        if (ROOT / path).is_file():
            (to / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, to / path)
    return to


def places(fault: Fault, root: Path) -> list[Path]:
    """Return the files that have the old text, once for each occurrence."""
    where = root / fault.where
    files = [path for path in sorted(where.rglob("*")) if path.suffix in SOURCES]
    found = []
    for path in files or [where]:
        if path.is_file():
            found += [path] * path.read_text(encoding="utf-8").count(fault.old)
    return found


def misfit(fault: Fault) -> str | None:
    """Return why the fault does not fit the sources or tests; None if it fits."""
    found = places(fault, ROOT)
    if len(found) != 1:
        at = ", ".join(str(path.relative_to(ROOT)) for path in found)
        return f"{fault.old!r} occurs {len(found)} times in {fault.where}, not once {at}"
    missing = [path for path in fault.tests if not (ROOT / path).exists()]
    return f"no tests {', '.join(missing)}" if missing else None


def check_unchanged(copies: queue.Queue[Path], faults: list[Fault]) -> str | None:
    """Return what fails on an unchanged copy; None if all tests pass."""
    root = copies.get()
    tests = sorted({path for fault in faults for path in fault.tests if (ROOT / path).exists()})
    code, said = run_tests(root, tests, "-n", str(COPIES), limit=1800)
    copies.put(root)
    return None if code == 0 else f"the tests fail on the unchanged copy\n{said[-2000:]}"


def trial(fault: Fault, copies: queue.Queue[Path]) -> str | None:
    """Return None if the fault is noticed, and otherwise what happened."""
    root = copies.get()
    (path,) = places(fault, root)
    changed = [path, *(root / "src").rglob("*.so")] if path.suffix in COMPILED else [path]
    before = [(one, one.read_bytes()) for one in changed]
    try:
        path.write_text(path.read_text(encoding="utf-8").replace(fault.old, fault.new), "utf-8")
        if path.suffix in COMPILED:
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=root, check=True, capture_output=True)
        code, said = run_tests(root, fault.tests, "-x")
    except TimeoutError:
        # a slow machine looks the same as a hang, so that this proves nothing
        with _print:
            print(f"{fault.what}: too slow", flush=True)
        return f"too slow: the tests ran for more than {LIMIT} s"
    finally:
        for one, content in before:
            one.write_bytes(content)
        copies.put(root)
    first = next((line for line in said.splitlines() if line.startswith("FAILED")), said[-300:])
    with _print:
        print(f"{fault.what}: {first if code == 1 else f'exit status {code}'}", flush=True)
    if code == 1:
        return None
    return "no fast test fails" if code == 0 else f"pytest ends with {code}\n{said[-1500:]}"


def run_tests(root: Path, tests: object, *options: str, limit: int = LIMIT) -> tuple[int, str]:
    """Run the fast tests of these files with the sources of ``root``."""
    assert isinstance(tests, tuple | list)
    # a fast test needs 2 seconds: one that needs 60 hangs, which is a failure
    arguments = ["-m", "not slow", "--timeout=60", "--tb=line", "-rf", "-p", "no:cacheprovider"]
    return forked_pytest.run(root, [*arguments, *options, *tests], limit)


if __name__ == "__main__":
    sys.exit(main())
