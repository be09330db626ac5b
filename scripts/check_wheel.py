"""Build sdist and wheel, install the wheel in a fresh environment and train with it.

Once as it is, and once as where there is no compiler.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRIAL = """
import sys
import torch
from apollo_qn import Apollo
from apollo_qn.backends import cpu
import apollo_qn
assert "site-packages" in apollo_qn.__file__, apollo_qn.__file__
assert (cpu.why_not() is None) is (sys.argv[1] == "compiled"), cpu.why_not()
p = torch.nn.Parameter(torch.ones(3))
optimizer = Apollo([p], lr=0.1, warmup_steps=0)
for _ in range(50):
    optimizer.zero_grad()
    (p**2).sum().backward()
    optimizer.step()
assert p.abs().max() < 0.1, p
"""


def main() -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if compiler:
            try_out(folder / "compiled", "compiled", {})
        said = try_out(folder / "pure", "pure", {"CC": str(shutil.which("false"))})
        if said.count("UserWarning: Apollo") != 1:
            sys.exit(f"without a compiler the wheel must say so once, it says: {said!r}")


def try_out(folder: Path, kind: str, environment: dict[str, str]) -> str:
    """Build, install, train; returns what training wrote to stderr."""
    # the wheel is built from the sdist, so both are tried, with the pinned setuptools
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)),
        **environment,
    )
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    # torch is taken from this environment: only our own files are on trial
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "torch.pth").write_text(f"{Path(__import__('torch').__file__).parent.parent}\n")
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
        *("--disable-pip-version-check", "--target", str(site), str(wheel)),
    )
    said = run(str(python), "-c", TRIAL, kind, cwd=folder)
    run(str(python), "-m", "apollo_qn.experiments.cli", "tasks", cwd=folder)
    print(
        f"{kind}: {sdist.name} ({sdist.stat().st_size:,} bytes) and {wheel.name} "
        f"({wheel.stat().st_size:,} bytes) build, install and train"
    )
    return said


def run(*command: str, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stderr


if __name__ == "__main__":
    main()
