"""Import the user's own classes and functions by name: ``my_module:MyOptimizer``."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import re
import sys
import sysconfig
import traceback
import types
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from apollo_bench.errors import ExperimentError, first_line

_OBJECT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_MAX_NAMED = 8  # names of a module that an error lists


def checked_object_path(path: str) -> str:
    """Return ``path``; raise ValueError if it is not ``module:name``."""
    module_name, _, name = path.partition(":")
    if module_name.endswith(".py"):
        module_name = Path(module_name).stem
        raise ValueError(f"{path!r} names a file; leave out `.py`: {module_name}:{name}")
    if not _OBJECT_PATH.fullmatch(path):
        raise ValueError(f"{path!r} is not module:name, as my_module:MyOptimizer")
    return path


def import_object(path: str, key: str) -> Any:
    """Import a class or function; the current directory is importable, as with ``python -m``.

    Args:
        path: for example ``"my_module:MyOptimizer"``.
        key: key of the recipe, for example ``"optimizers.mine.class"``; errors begin with it.

    Raises:
        ExperimentError: there is no such module or object, or importing the module fails.
    """
    module_name, _, name = path.partition(":")
    if "" not in sys.path:
        _add_to_path(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _import_failed(path, key, module_name, error) from None
        package = module_name.partition(".")[0]
        raise ExperimentError(
            f"{key} is {path!r}: no module {error.name} in {os.getcwd()} or installed; run the "
            f"command in the folder of {package}.py, or install the package"
        ) from None
    except (Exception, SystemExit) as error:
        raise _import_failed(path, key, module_name, error) from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise ExperimentError(
                f"{key} is {path!r}: {module_name} has no {name}; {_content(found)}"
            )
        found = getattr(found, part)
    return found


def _add_to_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _import_failed(path: str, key: str, module_name: str, error: BaseException) -> ExperimentError:
    what = f"{type(error).__name__}: {first_line(error)}{origin_of(error)}"
    return ExperimentError(f"{key} is {path!r}: importing {module_name} raised {what}")


def origin_of(error: BaseException) -> str:
    """Return the last line of the user's code in a traceback, in brackets; "" if unknown."""
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        of_user = file.is_absolute() and not _is_installed(file)
        if of_user and Path(__file__).parent not in file.parents:
            where = f" ({file}, line {line})"
    return where


def _content(found: Any) -> str:
    """Return the names that a module or class defines, as text."""
    module = getattr(found, "__name__", None)
    names = [
        name
        for name, value in vars(found).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", "") == module
    ] or [name for name, value in vars(found).items() if isinstance(value, type)]
    if not names:
        return "it defines no class or function"
    more = ", ..." if len(names) > _MAX_NAMED else ""
    return f"it has {', '.join(names[:_MAX_NAMED])}{more}"


def describe_source(path: str) -> dict[str, str | None]:
    """Describe the source of an imported object, for ``run.json``.

    Args:
        path: path of an object that has been imported.

    Returns:
        ``path``; ``folder``, which must be importable on every machine of the run; and ``version``:
        that of an installed package, or the SHA-256 of the user's own module and of the modules
        of the same folder that it imports.
    """
    module_name = path.partition(":")[0]
    module = sys.modules[module_name]
    file = getattr(module, "__file__", None)
    if file is None or _is_installed(Path(file)):
        return {"path": path, "folder": None, "version": _installed_version(module)}
    depth = module_name.count(".") + (Path(file).name == "__init__.py")
    folder = Path(file).resolve().parents[depth]
    version = f"sha256:{_digest(module_name, Path(file).resolve(), folder)}"
    return {"path": path, "folder": str(folder), "version": version}


def _digest(module_name: str, file: Path, folder: Path) -> str:
    """Return the SHA-256 of a module and of the modules in ``folder`` that it imports.

    The imports are read from the source: which modules a process has loaded depends on its tasks.
    """
    found: dict[Path, str] = {}
    files = [file, *_files_of([module_name], folder)]
    while files:
        one = files.pop()
        if one not in found:
            content = one.read_bytes()
            found[one] = hashlib.sha256(content).hexdigest()
            if one.suffix == ".py":
                package = one.parent.relative_to(folder).parts
                files += _files_of(_imported_modules(content, package), folder)
    if len(found) == 1:
        return found[file]
    lines = [f"{one.relative_to(folder).as_posix()} {found[one]}" for one in sorted(found)]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _files_of(modules: Iterable[str], folder: Path) -> list[Path]:
    """Return the files in a folder of modules and of the packages that they are in."""
    files = []
    for name in modules:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            place = folder.joinpath(*parts[:end])
            candidates = (place / "__init__.py", place.with_name(f"{place.name}.py"))
            files += [file for file in candidates if file.is_file()][:1]
    return files


def _imported_modules(source: bytes, package: tuple[str, ...]) -> set[str]:
    """Return the absolute names that a source imports; some may be no modules but their content."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
    return names


def require_sources(sources: Iterable[dict[str, Any]]) -> None:
    """Import the objects of ``describe_source`` in another process, perhaps on another machine.

    Raises:
        ExperimentError: one cannot be imported, or is of other code than when the run was prepared.
    """
    for source in sources:
        if source["folder"] is not None:
            _add_to_path(source["folder"])
        import_object(source["path"], "code")
        now = describe_source(source["path"])
        if source["version"] != now["version"] and now["folder"] is not None:
            raise ExperimentError(
                f"{source['path']}: its code has changed since the run was prepared; start the "
                "command again, with another --out if the run has begun"
            )


def _is_installed(file: Path) -> bool:
    paths = sysconfig.get_paths()
    folders = {Path(paths[key]).resolve() for key in ("purelib", "platlib", "stdlib")}
    folders |= {Path(entry).resolve() for entry in sys.path if entry.endswith("site-packages")}
    return any(folder in file.resolve().parents for folder in folders)


def _installed_version(module: types.ModuleType) -> str:
    package = module.__name__.partition(".")[0]
    for distribution in metadata.packages_distributions().get(package, [package]):
        try:
            return f"{distribution} {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            continue
    return package
