"""A hook of MkDocs: turns formulas into MathML when the site is built; pages need no script."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

# what pymdownx.arithmatex leaves of $...$ and $$...$$
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_NUMBER = re.compile(r"\\tag\{(\w+)\}")
# what the converter makes of a command or a separator that it does not know
_UNKNOWN = re.compile(r"<mi>(\\\w+|&(?:amp;)?)</mi>")


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Replace the formulas of a page's HTML."""

    def mathml(found: re.Match[str]) -> str:
        formula = html.unescape(found[3]).strip()
        number = _NUMBER.search(formula)
        formula = _NUMBER.sub("", formula)
        result: str = convert(formula, display="inline" if found[2] == "(" else "block")
        if unknown := _UNKNOWN.search(result):
            raise PluginError(f"{page.file.src_uri}: {unknown[1]} is unknown in ${formula}$")
        if found[2] == "(":
            return result
        label = f"<span>({number[1]})</span>" if number else ""
        return f'<div class="formula">{result}{label}</div>'

    return _FORMULA.sub(mathml, content)
