"""The kernel built in other ways: without a warning, with sanitizers, for other processors."""

from __future__ import annotations

import hashlib
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

from tests.helpers import NEEDS_CPU, NEEDS_KERNEL

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/apollo_qn/backends/kernel.c"
COMPILER = shutil.which(os.environ.get("CC", "gcc"))
NEEDS_COMPILER = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
pytestmark = [NEEDS_KERNEL, NEEDS_CPU, NEEDS_COMPILER, pytest.mark.slow]
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(scope="module")
def flags() -> list[str]:
    """Those of setup.py."""
    given: dict[str, Any] = {}
    original, setuptools.setup = setuptools.setup, given.update  # type: ignore[assignment]
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
    return list(given["ext_modules"][0].extra_compile_args)


def build(folder: Path, flags: list[str], *others: str) -> Path:
    """Compile the kernel into ``folder``; a warning is an error."""
    assert COMPILER is not None
    folder.mkdir()
    target = folder / "_kernel.abi3.so"
    command = [COMPILER, *flags, "-Werror", "-shared", "-fPIC", *others]
    done = subprocess.run(
        [*command, "-o", str(target), str(SOURCE), "-lm", "-lpthread"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return folder


def run(kernel: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OTHER_KERNEL": str(kernel), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=850,
    )


BITS = """
import hashlib
import tests.other_kernel
from apollo_qn.backends import cpu
from tests.backends.test_cpu import OF_KINDS, trained
from tests.helpers import as_numpy
assert cpu.why_not() is None
digest = hashlib.sha256()
for mode, kind in OF_KINDS:
    for column in trained(mode, kind)():
        for x in column:
            digest.update(as_numpy(x).tobytes())
print(digest.hexdigest())
"""


def test_the_same_bits_on_every_processor(flags: list[str], tmp_path: Path) -> None:
    variants = {"generic": ["-DNO_DISPATCH"], "dispatched": []}
    with open("/proc/cpuinfo") as file:
        known = file.read()
    if X86 and "avx2" in known:
        variants["avx2"] = ["-DNO_DISPATCH", "-mavx2", "-mfma"]
    if X86 and "avx512vl" in known:
        variants["avx512"] = ["-DNO_DISPATCH", "-march=x86-64-v4"]
    found = {}
    for name, others in variants.items():
        done = run(build(tmp_path / name, flags, *others), "-c", BITS)
        assert done.returncode == 0, done.stderr
        found[name] = done.stdout.strip()
        assert len(found[name]) == hashlib.sha256().digest_size * 2
    assert len(set(found.values())) == 1, found


@pytest.mark.timeout(900)  # two minutes on an idle core; CI's may be busy
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD is Linux's")
def test_under_sanitizers(flags: list[str], tmp_path: Path) -> None:
    """The kernel's tests with AddressSanitizer and UBSan; an error ends the process."""
    # without dispatch: its resolvers run before the sanitizer does
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g"]
    kernel = build(tmp_path / "sanitized", flags, "-DNO_DISPATCH", *sanitize)
    assert COMPILER is not None
    # torch throws C++ exceptions: the sanitizer wants to see their library when it starts
    libraries = [
        subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(os.path.isabs(library) for library in libraries):
        pytest.skip("the compiler comes without the sanitizer's libraries")
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        # leaks would be Python's own
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    chosen = "not sixteen_million and not fork and not more_threads and not large_tensors"
    done = run(
        kernel,
        *("-m", "pytest", "-p", "tests.other_kernel", "-p", "no:cacheprovider", "-q", "--no-cov"),
        *("tests/backends/test_cpu.py", "-k", chosen),
        **environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # and that it would have been found: one element beyond the end of a tensor
    done = run(kernel, "-c", BEYOND, **environment)
    assert "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]


BEYOND = """
import tests.other_kernel
import torch
from apollo_qn import Apollo
p = torch.nn.Parameter(torch.ones(1000))
p.grad = torch.ones(1000)
optimizer = Apollo([p], fused=True)
optimizer.step()
next(iter(optimizer._kept.plans.values()))._n[0] = 1001
optimizer.step()
"""
