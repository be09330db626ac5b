"""Build both distributions, install their wheels in a fresh environment and train there.

Once as it is and, with ``--pure``, once more as on a machine without a compiler, where pip must
tell the user.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 1_500_000  # bytes of the optimizer's wheel: no data, no evaluation
TRIAL = """
import sys
from importlib.metadata import version
import torch
from apollo_qn import Apollo
from apollo_qn.backends import cpu
import apollo_qn
assert "site-packages" in apollo_qn.__file__, apollo_qn.__file__
assert version("apollo-qn") == apollo_qn.__version__
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
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if compiler:
            try_out(folder / "compiled", "compiled", {})
        if "--pure" not in sys.argv[1:]:
            return
        no_compiler = {"CXX": str(shutil.which("false"))}
        said = try_out(folder / "pure", "pure", no_compiler)
        if said.count("ApolloWarning: Apollo") != 1:
            sys.exit(f"without a compiler the wheel must say so once, it says: {said!r}")
        told = on_a_terminal(
            *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"),
            *("--wheel-dir", str(folder / "told"), str(ROOT)),
            environment=no_compiler,
        )
        if "WITHOUT its CPU kernel" not in told or "--no-cache-dir" not in told:
            sys.exit(f"without a compiler pip must tell how to get the kernel, it says: {told!r}")


def on_a_terminal(*command: str, environment: dict[str, str]) -> str:
    """Run a command in a session with a terminal of its own; return what the terminal shows."""
    process, terminal = pty.fork()
    if process == 0:
        os.execve(command[0], command, {**os.environ, **environment})
    shown = b""
    with contextlib.suppress(OSError):  # Linux raises one at the end
        while more := os.read(terminal, 4096):
            shown += more
    _, status = os.waitpid(process, 0)
    text = shown.decode(errors="replace")
    if status:
        sys.exit(f"{' '.join(command)}\n{text}")
    return text


def try_out(folder: Path, kind: str, environment: dict[str, str]) -> str:
    """Build, install and train; return what training wrote to stderr."""
    qn = build(ROOT, folder / "apollo-qn", environment)
    bench = build(ROOT / "bench", folder / "apollo-bench", environment)
    if (kind == "pure") != qn.name.endswith("-py3-none-any.whl"):
        sys.exit(f"the wheel of a {kind} build has the wrong tag: {qn.name}")
    if qn.stat().st_size > LARGEST:
        sys.exit(f"{qn.name} has {qn.stat().st_size:,} bytes, allowed are {LARGEST:,}")
    for wheel in (qn, bench):
        if links := relative_links(wheel):
            sys.exit(f"a package index cannot follow these links of {wheel.name}: {links}")
    # the other packages are taken from this environment: only our own files are on trial
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    install(qn, site)
    said = run(str(python), "-c", TRIAL, kind, cwd=folder)
    if (site / "apollo_bench").exists():
        sys.exit(f"{qn.name} holds apollo_bench")
    install(bench, site)
    command = site / "bin" / "apollo-bench"
    if not command.exists():
        sys.exit(f"{bench.name} installs no command apollo-bench")
    run(str(python), str(command), "--version", cwd=folder)
    run(str(python), str(command), "tasks", cwd=folder)
    run(
        *(str(python), "-m", "apollo_bench", "train", "fashion-mnist", "--optimizer", "apollo"),
        *("--set", "data.train_examples=128", "--set", "schedule.epochs=1"),
        cwd=folder,
    )
    print(f"{kind}: {summary(qn)} and {summary(bench)} build, install and train")
    return said


def build(project: Path, out: Path, environment: dict[str, str]) -> Path:
    """Build sdist and wheel, the wheel from the sdist; return the wheel."""
    # --no-isolation: with the pinned setuptools
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(project)),
        environment=environment,
    )
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        if any("/tests/" in name for name in archive.getnames()):
            sys.exit(f"{sdist.name} holds tests, which need the repository")
    return wheel


def relative_links(wheel: Path) -> list[str]:
    """Return the links in a wheel's description that lead nowhere outside the repository."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        links = re.findall(r"\]\(([^)]+)\)", archive.read(name).decode())
    return [link for link in links if not link.startswith(("https://", "#"))]


def install(wheel: Path, site: Path) -> None:
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
        *("--disable-pip-version-check", "--target", str(site), str(wheel)),
    )


def summary(wheel: Path) -> str:
    return f"{wheel.name} ({wheel.stat().st_size:,} bytes)"


def run(*command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stderr


if __name__ == "__main__":
    main()
