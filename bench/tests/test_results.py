"""The committed tables follow from the committed metrics; a change of either is noticed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from apollo_bench.config import recipe
from apollo_bench.config.optimizer_settings import ApolloSettings
from apollo_bench.config.schema import LRShape
from apollo_bench.search import trials

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "results").glob("*/*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_gives_all_the_same_chance(path: Path) -> None:
    plan = recipe.load(str(path))
    held_out = [] if plan.data.has_validation_split() else ["data.validation=5000"]
    tried = trials.make_trials(recipe.load(str(path), held_out))
    assert plan.search is not None
    assert {spec.name for spec in tried} == set(plan.optimizers)
    assert len(tried) == plan.search.trials * len(plan.optimizers)
    for ranges in plan.search.ranges.values():
        assert set(ranges) == {"lr"}
        low, high = ranges["lr"]
        assert high / low == pytest.approx(100.0)
    assert len(plan.seeds) >= (3 if path.stem in ("length-whole", "length-all") else 5)
    assert plan.search.seed not in plan.seeds
    if path.stem in ("forms", "warmup") or path.stem.startswith("length-"):
        return
    # all but RAdam warm up, for the same number of steps
    for shape in plan.schedules.values():
        warmups = {
            own.warmup_steps
            if isinstance(own, ApolloSettings)
            else shape.overrides.get(name, shape).warmup_steps
            for name, own in plan.optimizers.items()
            if own.method != "radam"
        }
        assert len(warmups) == 1
        assert None not in warmups


@pytest.mark.parametrize("task", ["multi30k", "cifar10", "wordnet"])
def test_the_recipes_of_the_lengths_differ_in_length_alone(task: str) -> None:
    plans = {
        share: recipe.load(str(ROOT / "results" / task / f"length-{length}.toml"))
        for share, length in {16: "16th", 4: "quarter", 1: "whole"}.items()
    }
    whole = plans[1]
    steps = whole.schedules["milestone"].steps(156)  # updates per epoch on images

    def milestones(shape: LRShape, length: int) -> list[float]:
        assert shape.kind == "milestone"
        return [milestone / length for milestone in shape.milestones]

    for share, plan in plans.items():
        schedule, reference = plan.schedules["milestone"], whole.schedules["milestone"]
        assert schedule.length * share == reference.length
        assert (plan.model, plan.data) == (whole.model, whole.data)
        assert plan.train.model_copy(update={"evaluate_every": None}) == whole.train.model_copy(
            update={"evaluate_every": None}
        )
        assert steps // share % (plan.train.evaluate_every or 1) == 0
        assert plan.search == whole.search
        expected = milestones(reference, reference.length)
        for name, own in plan.optimizers.items():
            shape = schedule.overrides.get(name, schedule)
            assert milestones(shape, schedule.length) == pytest.approx(expected)
            warmup = own.warmup_steps if isinstance(own, ApolloSettings) else shape.warmup_steps
            long = name.endswith("-long-warmup")
            assert warmup == round((0.2 if long else 0.02) * steps / share), name
            # two forms of one optimizer with equal decay
            other = plan.optimizers[name.removesuffix("-long-warmup")]
            free = {"warmup_steps": 0} if isinstance(own, ApolloSettings) else {}
            assert own.model_copy(update=free) == other.model_copy(update=free)
            known = whole.optimizers[name]
            assert own.model_copy(update=free) == known.model_copy(update=free)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script, which works on a copy of the committed files."""
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("results", ROOT / "scripts" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in ("results", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(script, "FIGURES", tmp_path / "docs" / "figures")
    monkeypatch.setattr(script, "PAGES", (tmp_path / "docs" / "results.md", tmp_path / "README.md"))
    # one archive is enough for this test
    monkeypatch.setattr(script, "archives", lambda: ["wordnet/comparison"])
    monkeypatch.setattr(script, "TASKS", ("wordnet",))
    monkeypatch.setattr(script, "PLANS", {"recipe": script.PLANS["recipe"]})
    monkeypatch.setattr("sys.argv", ["results.py", "--check"])
    return script


def test_what_is_committed_is_right(
    results: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "PAGES", ())
    assert results.main() == 0, capsys.readouterr().err


def test_a_changed_table_is_noticed(
    results: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = results.PAGES[0]
    page.write_text("<!-- results: wordnet/comparison -->\nApollo wins\n<!-- end -->\n")
    monkeypatch.setattr(results, "PAGES", (page,))
    assert results.main() == 1
    assert "-Apollo wins" in capsys.readouterr().err


def better(content: dict[str, Any], _: Path) -> None:
    content["runs"][0]["result"]["test_perplexity"] -= 1.0


def other_rate(content: dict[str, Any], _: Path) -> None:
    for run in content["runs"]:
        own = run["manifest"]["recipe"]
        if own["name"] == "sgd":
            own["optimizer"]["lr"] *= 1.5


def other_data(content: dict[str, Any], _: Path) -> None:
    content["common"]["data"]["fingerprint"] = "0" * 64


def one_less(content: dict[str, Any], folder: Path) -> None:
    gone = content["runs"].pop(0)["run"]
    path = folder / "evaluations.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    table = b"".join(line for line in lines if not line.startswith(f"{gone},".encode()))
    path.write_bytes(table)
    content["evaluations.csv"] = hashlib.sha256(table).hexdigest()


def one_more(content: dict[str, Any], _: Path) -> None:
    [*_, last] = (run for run in content["runs"] if "-apollo-cosine" in run["run"])
    again = json.loads(json.dumps(last))
    again["run"] += "-again"
    again["manifest"]["recipe"]["sweep"]["value"] = 8.0
    again["result"]["verdict"] = "diverged"  # a finished run would need evaluations
    content["runs"].append(again)


def saw_the_test_data(content: dict[str, Any], _: Path) -> None:
    content["runs"][0]["result"]["test_perplexity"] = 100.0


@pytest.mark.parametrize(
    ("analysis", "change", "message"),
    [
        ("comparison", better, "results.md is not what the metrics give"),
        ("comparison", other_rate, "has other settings than the protocol's"),
        ("comparison", other_data, "not all trained on the same data"),
        ("comparison", one_less, " is missing"),
        ("tuning", one_more, "is none of the protocol's"),
        ("tuning", saw_the_test_data, "has seen the test data"),
    ],
)
def test_a_change_of_the_evidence_is_noticed(
    results: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    analysis: str,
    change: Callable[[dict[str, Any], Path], None],
    message: str,
) -> None:
    monkeypatch.setattr(results, "PAGES", ())
    path = results.RESULTS / "wordnet" / analysis / "runs.json"
    content = json.loads(path.read_text())
    change(content, path.parent)
    path.write_text(json.dumps(content))
    assert results.main() == 1
    assert message in capsys.readouterr().err


def test_a_missing_archive_is_noticed(
    results: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "PAGES", ())
    shutil.rmtree(results.RESULTS / "wordnet" / "curvature")
    assert results.main() == 1
    assert "wordnet/curvature is missing" in capsys.readouterr().err
