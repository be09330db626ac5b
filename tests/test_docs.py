"""The code of README and docs/ runs, and their commands exist.

Of a page every fenced ``python`` block is executed, in order, in one namespace, in a process of
its own. What a page takes for granted (a model, data) stands in it as a comment that is not shown::

    <!-- prelude
    model = torch.nn.Linear(4, 2)
    -->

Before a block ``<!-- from: examples/amp.py -->`` says that it is made of lines of that file, which
is tested elsewhere; ``<!-- not run: WHY -->`` leaves it out. ``<!-- needs: jax optax -->`` skips a
page where a package is missing.
"""

from __future__ import annotations

import inspect
import linecache
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import apollo_qn
from apollo_qn import Apollo

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LIMIT = 300.0  # seconds per page: a bound for hangs, not for busy machines

# Code that README takes for granted; hidden comments would disturb readers of its source.
README_PRELUDE = """
import torch
model = torch.nn.Linear(4, 2)
data = [(torch.randn(8, 4), torch.randint(2, (8,)))] * 3
loss_of = torch.nn.functional.cross_entropy
"""

_COMMENT = re.compile(r"<!--\s*(prelude\n|from:|not run:|needs:)(.*?)-->", re.DOTALL)
_COMMANDS = ("apollo-bench", "apollo_bench")


class Block(NamedTuple):
    """A block of code of a page; ``line`` is the number of lines before it."""

    code: str
    line: int
    example: str | None  # the file of examples/ that has the same lines


class Page(NamedTuple):
    """The tested parts of a page."""

    blocks: list[Block]
    needs: list[str]
    commands: list[tuple[str, bool]]  # words, and whether the command is complete


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(path: Path) -> Page:
    page = Page([], [], [])
    if path.name == "README.md":
        page.blocks.append(Block(README_PRELUDE, 0, None))
    kind = said = ""  # set by the comment before the block
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        if token.type == "html_block" and (comment := _COMMENT.search(token.content)):
            kind, said = comment[1].strip(), comment[2].strip()
            if kind == "prelude":
                page.blocks.append(Block(comment[2], _line(token), None))
            elif kind == "needs:":
                page.needs.extend(said.split())
        elif token.type == "fence" and token.info == "python":
            assert kind != "not run:" or said, f"{name(path)}:{_line(token)}: not run, but why?"
            if kind != "not run:":
                page.blocks.append(
                    Block(token.content, _line(token), said if kind == "from:" else None)
                )
            kind = said = ""
        elif token.type == "fence" and token.info == "sh":
            page.commands.extend((line, True) for line in _lines(token.content))
        elif token.type == "inline":
            codes = [child.content for child in token.children or [] if child.type == "code_inline"]
            page.commands.extend((code, False) for code in codes)
    return page


def _line(token: Token) -> int:
    """Return the number of lines before the content."""
    assert token.map is not None
    return token.map[0] + 1


def _lines(script: str) -> Iterator[str]:
    yield from script.replace("\\\n", " ").splitlines()


def run_page(path: Path, folder: Path) -> None:
    """Execute the blocks; a traceback shows lines of the page."""
    os.chdir(folder)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in read(path).blocks:
        if block.example is None:
            code = "\n" * block.line + block.code
            linecache.checkcache(str(path))
            exec(compile(code, str(path), "exec"), namespace)


@pytest.fixture(scope="module")
def processes() -> Iterator[Pool]:
    """Yield a pool that runs each page in a new process, forked after PyTorch was imported."""
    context = multiprocessing.get_context("forkserver")
    # an optimizer imports torch._dynamo when it is made
    context.set_forkserver_preload(["torch._dynamo", "apollo_qn", "tests.test_docs"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        yield pool


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not b.example for b in read(page).blocks)], ids=name
)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, processes: Pool) -> None:
    if missing := [package for package in read(page).needs if find_spec(package) is None]:
        pytest.skip(f"{', '.join(missing)} not installed")
    processes.apply_async(run_page, (page, tmp_path)).get(LIMIT)


def test_what_a_page_shows_of_an_example_is_in_it() -> None:
    for page in PAGES:
        for block in read(page).blocks:
            if block.example is None:
                continue
            there = [line.strip() for line in (ROOT / block.example).read_text().splitlines()]
            for line in block.code.splitlines():
                found = line.strip() in ("", "...", *there)
                assert found, f"{name(page)}: not in {block.example}: {line}"


def commands() -> list[tuple[str, list[str], bool]]:
    """Return every command: its place, its words, and whether they are complete."""
    found = []
    for page in PAGES:
        for text, whole in read(page).commands:
            if not any(command in text for command in _COMMANDS):
                continue
            words = shlex.split(text, comments=True)
            for command in _COMMANDS:
                if command in words:
                    found.append((name(page), words[words.index(command) + 1 :], whole))
    return found


def test_commands_are_those_of_the_command_line() -> None:
    typer = pytest.importorskip("typer")
    from apollo_bench import cli

    group = typer.main.get_command(cli.app)
    usage_error: Any = typer.BadParameter.__base__
    assert issubclass(usage_error, Exception)
    shown = commands()
    assert len(shown) > 20
    wrong = []
    for where, words, whole in shown:
        context = group.make_context("apollo-bench", list(words[:1]), resilient_parsing=True)
        try:
            if not words:
                continue
            _, command, rest = group.resolve_command(context, list(words))
            command.make_context(words[0], rest, parent=context)
        except usage_error as error:
            if whole or not type(error).__name__.startswith("Missing"):
                wrong.append(f"{where}: {shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def leaves(tree: Any) -> Iterator[str]:
        if isinstance(tree, str):
            yield tree
        else:
            for branch in tree.values() if isinstance(tree, dict) else tree:
                yield from leaves(branch)

    pages = {page.relative_to(DOCS).as_posix() for page in PAGES if page.is_relative_to(DOCS)}
    assert sorted(leaves(settings["nav"])) == sorted(pages)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_search_finds_a_name_by_its_parts() -> None:
    yaml = pytest.importorskip("yaml")
    plugins = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["plugins"]
    (settings,) = [p["search"] for p in plugins if isinstance(p, dict) and "search" in p]
    words = re.split(settings["separator"], "optimizer.load_state_dict(state)")
    assert words[:4] == ["optimizer", "load", "state", "dict"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site with warnings as errors, and return its folder."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_reference_has_the_signatures(site: Path) -> None:
    pages = {
        "optimizer": [Apollo, Apollo.load_state_dict, apollo_qn.apollo],
    }
    for page, documented in pages.items():
        text = (site / "api" / f"{page}.html").read_text(encoding="utf-8")
        signatures = re.findall(r'<div class="doc-signature.*?</div>', text, re.DOTALL)
        plain = [re.sub(r"<.*?>", "", signature) for signature in signatures]
        for thing in documented:
            wanted = [name for name in inspect.signature(thing).parameters if name != "self"]
            assert any(
                all(re.search(rf"\b{name}\b", signature) for name in wanted) for signature in plain
            ), f"{page}: no signature of {thing.__name__}"


@pytest.mark.slow
def test_the_site_is_complete(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        text = page.read_text(encoding="utf-8")
        where = page.relative_to(site)
        assert "could not be found" not in text, where
        # no markup of Sphinx and no formula is left as text
        assert not re.search(r":(class|func|meth|mod):|\.\. code-block|arithmatex", text), where
        # pages fetch nothing from other sites
        assert not re.search(r'<(script|link|img)[^>]+(src|href)="(https?:)?//', text), where
    assert "<math" in (site / "method.html").read_text(encoding="utf-8")
