"""Build the compiled part of the package; pyproject.toml says everything else.

The CPU kernel is a torch operator that uses PyTorch's stable ABI: one build serves torch 2.10 and
all later versions, with every Python. The build needs the headers of an installed torch and a C++
compiler. Without them the package is built without the kernel. torch is no requirement of the
build, because pip would then download it, gigabytes with CUDA, into a temporary environment.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

KERNEL = "apollo_qn.backends.cpu._kernel"
FOLDER = "src/apollo_qn/backends/cpu"
OLDEST = (2, 10)  # torch with parallel_for in its stable ABI
OFFERED = f"0x{OLDEST[0]:02x}{OLDEST[1]:02x}{'0' * 12}"
COMPILE = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # no fused multiply-add, so that results are bit-identical on every machine
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    f"-DTORCH_TARGET_VERSION={OFFERED}",
]
MISSING = """
**********************************************************************
apollo-qn is built WITHOUT its CPU kernel: {reason}.
The optimizer works, but its steps on a CPU are slower. To get the kernel:
  1. install torch 2.10 or newer, and a C++ compiler (GCC or Clang);
  2. pip install "setuptools>=77"
  3. pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps .
     (in a clone; otherwise the name or URL that you install from in place of the dot)
**********************************************************************
"""


def description() -> str:
    """Return README.md with links that also work outside the repository, as on a package index."""
    here = Path(__file__).parent
    project = (here / "pyproject.toml").read_text(encoding="utf-8")
    address = re.search(r'^Repository = "(.+)"$', project, re.MULTILINE)
    assert address is not None
    readme = (here / "README.md").read_text(encoding="utf-8")
    readme = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{address[1]}/raw/main/", readme)
    return re.sub(r"(?<!!)(\[[^]]*\]\()(?!https?:|#)", rf"\1{address[1]}/blob/main/", readme)


class NoKernelError(Exception):
    """The reason why the kernel cannot be built here."""


def torch_folder() -> Path:
    """Return the folder of the installed torch.

    pip hides the installed packages from an isolated build, so they are also looked up where this
    interpreter keeps them.
    """
    spec = find_spec("torch")
    folders = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    folders += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    for folder in folders:
        version = folder / "version.py"
        if not version.is_file():
            continue
        found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text(encoding="utf-8"))
        if found is None or (int(found[1]), int(found[2])) < OLDEST:
            raise NoKernelError(f"the torch in {folder} is older than {OLDEST[0]}.{OLDEST[1]}")
        if not (folder / "include/torch/csrc/stable/library.h").is_file():
            raise NoKernelError(f"the torch in {folder} comes without its C++ headers")
        return folder
    raise NoKernelError("no installed torch was found")


def tell(message: str) -> None:
    """Print a message where the user sees it.

    pip hides the output of a build that succeeds, so the message also goes to the terminal.
    """
    print(message, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with suppress(OSError), open("/dev/tty", "w", encoding="utf-8") as terminal:
            terminal.write(message)


class BuildKernel(build_ext):
    """Build the kernel where that is possible, and say why where it is not."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; a kernel that cannot be built is dropped from the distribution."""
        if ext.name != KERNEL:
            super().build_extension(ext)
            return
        try:
            self._build(ext, torch_folder())
        except (NoKernelError, BaseError, CCompilerError) as error:
            tell(MISSING.format(reason=self._reason(error)))
            self._library().unlink(missing_ok=True)  # of an older build
            self.distribution.ext_modules.remove(ext)
            self.extensions = [other for other in self.extensions if other is not ext]

    def _reason(self, error: Exception) -> str:
        if isinstance(error, NoKernelError):
            return shorten(str(error), 250)
        name = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)[0]
        # the message may begin with the whole command, as a list
        cause = shorten(str(error).rpartition("]' ")[2].rstrip("."), 250)
        output = "pip install --verbose shows its output"
        return f"the C++ compiler {name} failed ({cause}); {output}"

    def _build(self, ext: Extension, torch: Path) -> None:
        if self.compiler.compiler_type == "msvc":
            raise NoKernelError("its source is for GCC and Clang")
        objects = self.compiler.compile(
            ext.sources,
            output_dir=self.build_temp,
            extra_postargs=[*ext.extra_compile_args, "-isystem", str(torch / "include")],
            depends=ext.depends,
        )
        # torch has loaded its libraries before it loads this one, so no rpath is needed
        mac = sys.platform == "darwin"
        self.compiler.link_shared_object(
            objects,
            str(self._library()),
            libraries=[] if mac else ["torch_cpu"],
            library_dirs=[str(torch / "lib")],
            extra_postargs=["-undefined", "dynamic_lookup"] if mac else [],
            target_lang="c++",
        )

    def _library(self) -> Path:
        return Path(self.build_lib, self.get_ext_filename(KERNEL))

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's path; it belongs to no version of Python."""
        if fullname == KERNEL:
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        path: str = super().get_ext_filename(fullname)
        return path


class Wheel(bdist_wheel):
    """A wheel for every Python; without the kernel, for every platform too."""

    def run(self) -> None:
        """Build before the tag is chosen, because it depends on what could be built."""
        if not self.skip_build:
            self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of what has been built."""
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": Wheel},
    ext_modules=[
        Extension(
            KERNEL,
            [f"{FOLDER}/operators.cpp"],
            depends=[
                f"{FOLDER}/{name}.h" for name in ("kernel", "numbers", "schedule", "tensor_lists")
            ],
            extra_compile_args=COMPILE,
            language="c++",
        ),
    ],
)
