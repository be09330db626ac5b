"""An extension of griffe: turns the reStructuredText of docstrings into Markdown.

This concerns references (``:class:`apollo_qn.Apollo```), code after ``::`` and ``.. code-block::``.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Module, NameResolutionError, Object

_ROLE = re.compile(r":(?:class|func|meth|mod):`([\w.]+)`")
# at the beginning of a description Markdown would take it for a quotation
_AT_LEAST = re.compile(r"(?<=: )>=")
# griffe reads a section of this name as code with its results if it is plural
_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
_INDENTED = r"\n\n((?:(?P=margin)    .*(?:\n|$)|[ ]*\n)+)"
_CODE_BLOCK = re.compile(
    rf"^(?P<margin>[ ]*)\.\. code-block:: (?P<language>\w+){_INDENTED}", re.MULTILINE
)
_LITERAL = re.compile(rf"^(?P<margin>[ ]*)(?P<before>.*?)[ ]?::{_INDENTED}", re.MULTILINE)


class Markdown(Extension):
    """Rewrites all docstrings of a package."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Rewrite the docstrings once all modules are read, so that names can be found."""
        _rewrite(pkg)


def _rewrite(obj: Object) -> None:
    if obj.docstring:
        text = _CODE_BLOCK.sub(_code_block, obj.docstring.value)
        text = _EXAMPLE.sub(r"\1Examples:", text)
        text = _AT_LEAST.sub(r"\>=", _LITERAL.sub(_literal, text))
        obj.docstring.value = _ROLE.sub(lambda found: _reference(obj, found[1]), text)
    if isinstance(obj, Module | Class):
        for member in obj.members.values():
            if isinstance(member, Object):  # not an alias
                _rewrite(member)


def _code_block(found: re.Match[str]) -> str:
    return _fence(found["margin"], found["language"], found[3])


def _literal(found: re.Match[str]) -> str:
    before = found["before"]
    # a "::" after a full stop, or alone on its line, leaves no colon
    colon = "" if not before or before.endswith(".") else ":"
    lead = f"{found['margin']}{before}{colon}\n\n" if before else ""
    return lead + _fence(found["margin"], "python", found[3])


def _fence(margin: str, language: str, code: str) -> str:
    lines = code.rstrip().removeprefix(margin).split("\n")
    body = "\n".join(
        margin + line.removeprefix(margin)[4:] for line in [margin + lines[0], *lines[1:]]
    )
    return f"{margin}```{language}\n{body}\n{margin}```\n\n"


def _reference(obj: Object, name: str) -> str:
    """Return a link if the reference knows the name, else the name."""
    shown = name.rpartition(".")[2]
    return f'<autoref identifier="{_path(obj, name)}" optional><code>{shown}</code></autoref>'


def _path(obj: Object, name: str) -> str:
    try:
        return obj.resolve(name)
    except NameResolutionError:
        pass
    module: Object | None = obj.module
    while module is not None:  # as the packages above offer it
        if name in module.members:
            return f"{module.path}.{name}"
        module = module.parent if isinstance(module.parent, Module) else None
    return name
