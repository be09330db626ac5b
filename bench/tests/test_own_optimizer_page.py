"""The optimizer, recipe and commands of docs/own_optimizer.md work."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from apollo_bench.cli import app, selection
from apollo_bench.config import recipe
from apollo_bench.config.custom_optimizer import CustomSettings
from apollo_bench.errors import ExperimentError
from apollo_bench.optimizers.custom import try_steps

PAGE = Path(__file__).parents[2] / "docs" / "own_optimizer.md"
TEXT = PAGE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in blocks("sh")
    for line in block.replace("\\\n", " ").splitlines()
]
# leave out commands that need other files or packages
SELECTED = [words for words in COMMANDS if not {"--against", "--tuned", "--data"} & {*words}]
SELECTED = [words for words in SELECTED if not re.search("pytorch_opt|schedulefree", str(words))]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "my_module.py").write_text(blocks("python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for variable in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    yield tmp_path
    sys.modules.pop("my_module", None)


def options(words: list[str]) -> dict[str, Any]:
    """Return the options of a command as its function receives them."""
    group = typer.main.get_command(app)
    context = group.make_context("apollo-bench", list(words[:1]), resilient_parsing=True)
    _, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
    return dict(command.make_context(words[0], list(rest), parent=context).params)


@pytest.mark.parametrize("words", SELECTED, ids=shlex.join)
def test_a_command_selects_what_can_be_trained(words: list[str]) -> None:
    own = options(words)
    names = own.get("optimizers") or own.get("optimizer")
    analysis = own.get("analysis")
    task = own["task"] or "wordnet"
    chosen = selection.select(task, own["settings"], names, None, analysis=analysis)
    for name in chosen.optimizers or []:
        spec = chosen.recipe.run(name, 1)
        if isinstance(spec.optimizer, CustomSettings):
            assert try_steps(spec.optimizer, [(3, 2), (3,)], f"optimizers.{name}").remarks == []


def test_the_recipe_table_is_valid() -> None:
    path = Path("mine.toml")
    base = (recipe.RECIPES / "fashion-mnist.toml").read_text()
    path.write_text(f"{base}\n[search]\ntrials = 3\n{blocks('toml')[0]}")
    plan = recipe.load(str(path))
    assert plan.run("mine", 1).optimizer.lr == 0.01
    assert plan.search is not None
    assert plan.search.ranges["mine"] == {"lr": [0.0003, 0.03]}


@pytest.mark.parametrize("row", re.findall(r"^\| `(.*?)` \| `(.*?)` \|$", TEXT, re.MULTILINE))
def test_the_errors_are_as_shown(row: tuple[str, str]) -> None:
    written, shown = row
    table = {"class": "my_module:SignMomentum"}
    key, _, value = written.partition(" = ")
    settings = [f"optimizers.mine.{key}={value}"]

    def train() -> None:
        tables = {"optimizers": {"mine": table}}
        spec = recipe.load("fashion-mnist", settings, tables=tables).run("mine", 1)
        assert isinstance(spec.optimizer, CustomSettings)
        try_steps(spec.optimizer, [(3,)], "optimizers.mine")

    with pytest.raises(ExperimentError) as caught:
        train()
    for part in shown.split(" ... "):
        assert part in str(caught.value)


@pytest.mark.slow
def test_the_example_trains_and_is_compared_with_baselines(folder: Path) -> None:
    quick = ["--quick", "--seeds", "1"]
    done = CliRunner().invoke(
        app,
        ["compare", "fashion-mnist", *quick, "--optimizers", "sgd", "--out", "runs/baselines"],
    )
    assert done.exit_code == 0, done.output
    [words] = [words for words in COMMANDS if "--against" in words]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "SignMomentum" in done.stdout
    assert "SGD" in done.stdout
    assert len(list(Path("runs").glob("against-*/runs/*"))) == 1
