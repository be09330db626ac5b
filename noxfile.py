"""Run the optimizer's fast tests with the oldest, the newest and other promised versions of torch.

``make test-matrix`` runs every session whose Python is on this machine. The environments are made
from the package registry, with the newest packages that pip finds. requirements/dev.txt has no say.
"""

from __future__ import annotations

import os

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"

# Python, torch. The oldest of both are those that pyproject.toml promises. 2.10 is the first torch
# with the CPU kernel (OLDEST in setup.py). Raise the newest when a new one is on the registry.
# Python 3.14 and 3.15 were not tried, for want of an interpreter; torch 2.15 has wheels for both.
# tests/test_release.py compares this list with pyproject.toml and with the workflows.
VERSIONS = [("3.10", "2.8"), ("3.11", "2.10"), ("3.12", "2.13"), ("3.13", "2.15")]


@nox.session
@nox.parametrize("python,torch", VERSIONS, ids=[f"py{p}-torch{t}" for p, t in VERSIONS])
def tests(session: nox.Session, torch: str) -> None:
    """Install torch and this package, and run the fast tests; arguments after -- go to pytest."""
    # the interpreter of Triton before 3.7 fails with NumPy 2.4
    numpy = "numpy<2.4" if torch in ("2.8", "2.10") else "numpy"
    session.install(f"torch=={torch}.*", numpy, "setuptools>=77", "wheel")
    # APOLLO_QN_WHEEL: a wheel to test, instead of a build with this torch
    package = os.environ.get("APOLLO_QN_WHEEL", ".")
    # without isolation, so that the build finds this torch
    session.install("--no-build-isolation", f"{package}[test]")
    session.run("python", "-m", "pytest", "-m", "not slow", "tests", *session.posargs)
