"""A hook of MkDocs: turns links to files outside docs/, which the site lacks, into file names."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>(?:\.\./)+[^)#\s]+)\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Replace the links of a page to files outside docs/; a missing file is an error."""
    docs = Path(config.docs_dir).resolve()

    def named(found: re.Match[str]) -> str:
        path = (docs / page.file.src_uri).parent.joinpath(found["target"]).resolve()
        if path.is_relative_to(docs):
            return found[0]
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: there is no {found['target']}")
        place = f"`{path.relative_to(docs.parent).as_posix()}`"
        text = found["text"]
        return place if text.strip("`") == path.name else f"{text} ({place})"

    return _LINK.sub(named, markdown)
