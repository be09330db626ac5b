"""The help of every command."""

from __future__ import annotations

import pytest
import torch
import typer.main
from typer.core import TyperGroup
from typer.testing import CliRunner

import apollo_bench
import apollo_qn
from apollo_bench.cli import app

GROUP = typer.main.get_command(app)
assert isinstance(GROUP, TyperGroup)
COMMANDS = GROUP.commands


def without_spaces(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_text_is_shown_in_80_columns(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], terminal_width=80).output
    assert max(map(len, shown.splitlines())) <= 80
    command = COMMANDS[name]
    texts = [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]
    assert all(texts[1:])
    for text in filter(None, texts):
        assert without_spaces(text) in without_spaces(shown)


def test_tables_of_the_recipe_and_defaults_are_shown() -> None:
    shown = CliRunner().invoke(app, ["compare", "--help"], terminal_width=80).output
    assert "table [quick]" in shown
    assert "[default: runs/compare, or" in shown


def test_version_names_what_a_report_of_a_bug_needs() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert shown.output.startswith(f"apollo-bench {apollo_bench.__version__} (")
    assert f"apollo-qn {apollo_qn.__version__}, torch {torch.__version__}" in shown.output


def test_without_a_command_the_help_is_shown() -> None:
    shown = CliRunner().invoke(app, [])
    assert "Train with Apollo and other optimizers, and report." in shown.output
    assert "--version" in shown.output
