"""Build sdist and wheel, install the wheel in a fresh environment, train and save with it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRIAL = """
import torch
from apollo_qn import Apollo
import apollo_qn
assert "site-packages" in apollo_qn.__file__, apollo_qn.__file__
p = torch.nn.Parameter(torch.ones(3))
optimizer = Apollo([p], lr=0.1, warmup_steps=0)
for _ in range(50):
    optimizer.zero_grad()
    (p**2).sum().backward()
    optimizer.step()
assert p.abs().max() < 0.1, p
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # the wheel is built from the sdist, so both are tried, with the pinned setuptools
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT))
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
        run(str(python), "-c", TRIAL, cwd=folder)
        run(str(python), "-m", "apollo_qn.experiments.cli", "tasks", cwd=folder)
        print(
            f"{sdist.name} ({sdist.stat().st_size:,} bytes) and {wheel.name} "
            f"({wheel.stat().st_size:,} bytes) build, install and train"
        )


def run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
