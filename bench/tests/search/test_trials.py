"""The search for settings: its trials, their scores on held-out data, and the resulting recipe."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from apollo_bench.config import recipe
from apollo_bench.config.recipe import Recipe
from apollo_bench.errors import ExperimentError
from apollo_bench.report import narrative, tables
from apollo_bench.report.summary import collect
from apollo_bench.search import best_trials, trials
from apollo_bench.training.loop import train
from bench.tests.conftest import TINY, settings_of_a_worker
from bench.tests.helpers import prepared
from bench.tests.report.made_up_runs import made_up

SEARCH = """
[search]
trials = 3

[search.ranges]
sgd = { lr = [0.01, 1.0] }
apollo = { lr = [0.1, 1e3] }
"""
HELD_OUT = "data.validation=64"


def write_recipe(folder: Path) -> Path:
    path = folder / "tuned.toml"
    path.write_text(TINY.replace("epochs = 2", "epochs = 1") + SEARCH)
    return path


@pytest.fixture
def tuned_recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def load(path: Path, *settings: str) -> Recipe:
    return recipe.load(str(path), [HELD_OUT, *settings])


def rates(plan: Recipe, name: str) -> list[float]:
    return [spec.optimizer.lr for spec in trials.make_trials(plan, [name])]


@pytest.fixture(scope="module")
def searched_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train all trials; the largest rates of Apollo diverge."""
    folder = tmp_path_factory.mktemp("searched")
    plan = load(write_recipe(folder), "search.ranges.apollo.lr=[1e-10, 1e30]")
    with settings_of_a_worker():
        for spec in trials.make_trials(plan):
            directory, task = prepared(folder / "out" / "runs" / spec.label, spec)
            train(directory, spec, task)
    return folder / "out"


@pytest.fixture
def searched(searched_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(searched_once, tmp_path / "searched")


def test_trials_are_evenly_spaced_and_equal_for_all_optimizers(tuned_recipe: Path) -> None:
    plan = load(tuned_recipe, "search.trials=7")
    found = {name: sorted(rates(plan, name)) for name in ("sgd", "apollo")}
    for name, (low, high) in {"sgd": (0.01, 1.0), "apollo": (0.1, 1e3)}.items():
        shares = [math.log(rate / low) / math.log(high / low) for rate in found[name]]
        assert shares == pytest.approx([i / 8 for i in range(1, 8)], abs=2e-3)
    # a longer search begins with the trials of a shorter one
    assert rates(load(tuned_recipe), "sgd") == rates(plan, "sgd")[:3]


def test_decay_keeps_its_strength_and_the_warmup_its_share(tuned_recipe: Path) -> None:
    for spec in trials.make_trials(load(tuned_recipe)):
        own, base = spec.optimizer, load(tuned_recipe).run(spec.name, 1).optimizer
        assert own.lr * own.weight_decay == pytest.approx(base.lr * base.weight_decay)  # type: ignore[operator]
        if spec.name == "apollo":
            assert own.warmup_init_lr / own.lr == pytest.approx(0.01 / 0.5)  # type: ignore[union-attr, operator]


def test_several_settings_at_once(tuned_recipe: Path) -> None:
    plan = load(
        tuned_recipe,
        "search.ranges.apollo.warmup_steps=[1, 100]",
        "search.ranges.apollo.weight_decay=[1e-6, 1e-2]",
        "search.trials=4",
    )
    own = [spec.optimizer for spec in trials.make_trials(plan, ["apollo"])]
    assert len({one.warmup_steps for one in own}) == 4  # type: ignore[union-attr]
    assert all(isinstance(one.warmup_steps, int) for one in own)  # type: ignore[union-attr]
    assert all(1e-6 <= one.weight_decay <= 1e-2 for one in own)  # type: ignore[operator]
    assert len({one.lr * one.weight_decay for one in own}) == 4  # type: ignore[operator]


def test_fresh_seeds_and_names(tuned_recipe: Path) -> None:
    plan = load(tuned_recipe)
    specs = trials.make_trials(plan, seeds=2)
    assert {spec.seed for spec in specs} == {101, 102}
    assert not {spec.seed for spec in specs} & set(plan.seeds)
    assert len({spec.label for spec in specs}) == len(specs) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.validation=0"], "held out of the training data.*data.validation=5000"),
        (["search.ranges.sgd.beta=[0.1, 0.2]"], "ranges.sgd.beta: not a number .*lr, momentum"),
        (["search.ranges.sgd.momentum=[0.5, 5]"], r"ranges.sgd.momentum: is 1.08.*less than 1$"),
        (["search.seed=3"], "search.seed is 3, allowed are seeds that no comparison has"),
        (
            ["search.ranges.sgd.lr=[1, 0.1]"],
            r"sgd.lr: is \[1, 0.1\]: \[low, high\] must have",
        ),
        (["search.ranges.adagrad.lr=[0.1, 1]"], "search.ranges is .*adagrad.*allowed are some of"),
        (["search.schedules=[step]"], "search.schedules"),
    ],
)
def test_what_cannot_be_tuned_is_named(
    tuned_recipe: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ExperimentError, match=message):
        trials.make_trials(load(tuned_recipe, *settings))


def test_without_ranges(recipe_file: Path, tuned_recipe: Path) -> None:
    with pytest.raises(ExperimentError, match=r"no table \[search\] in this recipe; give it"):
        trials.make_trials(recipe.load(str(recipe_file)))
    with pytest.raises(ExperimentError, match=r"search.ranges.adam is missing"):
        trials.make_trials(load(tuned_recipe), ["adam"])


def test_the_best_trial_is_taken(searched: Path, tuned_recipe: Path) -> None:
    plan = recipe.load(str(tuned_recipe))
    made = best_trials.apply_best_settings(plan, searched, ["sgd", "apollo"])
    [summary] = collect([searched])
    assert summary.metric.label == "validation accuracy"
    for name in ("sgd", "apollo"):
        rows = [row for row in summary.rows if row.name == name and row.score is not None]
        best = max(rows, key=lambda row: row.score.mean if row.score else 0.0)
        assert made.run(name, 1).optimizer == best.runs[0].spec.optimizer
    assert made.optimizers["radam"] == plan.optimizers["radam"]  # not asked for
    # the report shows all trials, also diverged ones
    chosen, all_trials = tables.tables(summary)
    assert [row[0].text for row in chosen.rows] == ["SGD", "Apollo"]
    assert chosen.rows[1][-1].text == "3, 2 diverged"
    assert [cell.text.endswith("diverged") for cell in all_trials.rows[1]].count(True) == 2
    assert chosen.rows[1][-2].text == "lr, the smallest"
    assert "SGD lr " in narrative.headline(summary)
    assert "Diverged: Apollo (2 of 3 runs)" in narrative.headline(summary)


def test_the_cost_of_a_search_is_that_of_all_its_runs(tuned_recipe: Path, tmp_path: Path) -> None:
    for spec in trials.make_trials(load(tuned_recipe), seeds=2):
        made_up(tmp_path / "search", spec, [50.0, 60.0])
    cost = {"trials": 3, "seconds": 120.0}
    assert best_trials.search_costs(tmp_path / "search") == {
        ("fashion-mnist", "cosine", "sgd"): cost,
        ("fashion-mnist", "cosine", "apollo"): cost,
    }


def test_decay_that_is_coupled_stays_so(tuned_recipe: Path, tmp_path: Path) -> None:
    extra = ["search.ranges.adam.lr=[1e-3, 1e-1]", "search.trials=1"]
    out = tmp_path / "searched"
    for spec in trials.make_trials(load(tuned_recipe, *extra), ["adam", "apollo"]):
        directory, task = prepared(out / "runs" / spec.label, spec)
        train(directory, spec, task)
    plan = recipe.load(str(tuned_recipe), ["sweeps.weight-decay.values=[1e-3]"])
    made = best_trials.apply_best_settings(plan, out, ["adam", "apollo"])
    adam, apollo = (made.run(name, 1).optimizer for name in ("adam", "apollo"))
    assert adam.lr * adam.weight_decay == pytest.approx(apollo.lr * apollo.weight_decay)  # type: ignore[operator]
    swept = {spec.name: spec.optimizer for spec in made.sweep("weight-decay", ["adam", "apollo"])}
    assert swept["apollo"].weight_decay == 1e-3
    assert swept["adam"].weight_decay == pytest.approx(1e-3 * apollo.lr / adam.lr)
    # the optimizer that decay is coupled to is tuned too, even if it is not selected
    alone = best_trials.apply_best_settings(plan, out, ["adam"], coupled=True)
    [only] = alone.sweep("weight-decay", ["adam"], seeds=1)
    assert only.optimizer == swept["adam"]


def test_a_search_of_another_experiment_is_refused(searched: Path, tuned_recipe: Path) -> None:
    names = ["sgd", "apollo"]
    for setting, what in (
        ("model.width=4", "model.width"),
        ("train.batch_size=64", "train.batch_size"),
        ("schedules.cosine.epochs=3", "train.schedule.epochs"),
        ("data.train_examples=320", "data.train_examples"),
    ):
        with pytest.raises(
            ExperimentError, match=f"the search differs in {what}: .* there, .* asked for"
        ):
            best_trials.apply_best_settings(
                recipe.load(str(tuned_recipe), [setting]), searched, names
            )
    # the interval between evaluations does not change the weights
    best_trials.apply_best_settings(
        recipe.load(str(tuned_recipe), ["train.evaluate_every=3"]), searched, names
    )
    with pytest.raises(ExperimentError, match="adam was not tuned"):
        best_trials.apply_best_settings(recipe.load(str(tuned_recipe)), searched, ["adam"])
    other = ["schedules.long.kind=constant", "schedules.long.epochs=2"]
    plan = recipe.load(str(tuned_recipe), other)
    with pytest.raises(ExperimentError, match=r"with the schedule long, only of .* \(cosine\)"):
        best_trials.apply_best_settings(plan, searched, names, ["long"])
    with pytest.raises(ExperimentError, match="one schedule, cosine, long are asked for; choose"):
        best_trials.apply_best_settings(plan, searched, names)
    assert best_trials.apply_best_settings(plan, searched, names, ["cosine"]).optimizers["sgd"].lr
    with pytest.raises(ExperimentError, match="was tuned on other data; give the same --data"):
        best_trials.check_data(searched, {"fashion-mnist": "0" * 64})
    best_trials.check_data(searched, {"wordnet": "0" * 64})


def test_what_is_not_finished_or_all_diverged_has_no_best(
    searched: Path, tuned_recipe: Path
) -> None:
    plan = recipe.load(str(tuned_recipe))
    for folder in (searched / "runs").glob("*-apollo-*-try2-*"):
        (folder / "result.json").unlink()
    with pytest.raises(ExperimentError, match="apollo is not finished; run the same command"):
        best_trials.apply_best_settings(plan, searched, ["apollo"])
    for result in (searched / "runs").glob("*-sgd-*/result.json"):
        result.write_text('{"verdict": "diverged", "step": 3, "steps": 9, "time": {"seconds": 1}}')
    with pytest.raises(ExperimentError, match="sgd: all trials diverged; give it other ranges"):
        best_trials.apply_best_settings(plan, searched, ["sgd"])


def test_the_mean_over_seeds_decides(tuned_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "searched"
    scores = {(1.0, 101): 30.0, (1.0, 102): 30.0, (2.0, 101): 50.0, (2.0, 102): 5.0}
    scores |= {(3.0, 101): 31.0, (3.0, 102): 30.0}
    for spec in trials.make_trials(load(tuned_recipe), ["sgd"], seeds=2):
        directory, _ = prepared(out / "runs" / spec.label, spec)
        assert spec.sweep is not None
        verdict = {"verdict": "finished", "step": 12, "steps": 12, "time": {"seconds": 1.0}}
        verdict["accuracy"] = scores[spec.sweep.value, spec.seed]
        directory.result.write_text(json.dumps(verdict))
        line = {"kind": "evaluation", "epoch": 1, "train_loss": 1.0, **verdict}
        del line["verdict"], line["steps"]
        directory.metrics.write_text(json.dumps(line) + "\n")
    plan = load(tuned_recipe)
    best = best_trials.apply_best_settings(plan, out, ["sgd"]).optimizers["sgd"]
    assert best.lr == rates(plan, "sgd")[2]


def test_a_trial_never_sees_the_test_text(tmp_path: Path) -> None:
    plan = recipe.load(
        "wordnet",
        [
            *("model.hidden=16", "model.embedding=4", "data.train_examples=2000"),
            *("train.batch_size=4", "schedules.cosine.updates=2"),
            *("search.trials=1", "search.ranges.adam.lr=[0.01, 0.1]"),
        ],
    )
    [tried] = trials.make_trials(plan, ["adam"])
    directory, task = prepared(tmp_path / "run", tried)
    train(directory, tried, task)
    result = directory.verdict()
    assert result is not None
    assert "valid_perplexity" in result
    assert "test_perplexity" not in result
    [summary] = collect([tmp_path])
    assert summary.metric.name == "valid_perplexity"
