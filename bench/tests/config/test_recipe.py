"""Recipes: valid keys and values, resolved runs, and error messages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_bench.config import recipe
from apollo_bench.config.optimizer_settings import ApolloSettings, SGDSettings
from apollo_bench.config.schema import LRShape, Schedule
from apollo_bench.errors import ExperimentError
from apollo_bench.optimizers.registry import build_optimizer, lr_factor
from apollo_bench.seeds import MAX_SEED
from apollo_qn import Apollo
from bench.tests.conftest import TINY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def error_of(text: str, path: Path) -> str:
    path.write_text(text)
    with pytest.raises(ExperimentError) as caught:
        recipe.load(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("depth = 8", "depht = 8", "model.depth: missing; model.depht: unknown key, allowed are "),
        (
            "momentum",
            "momemtum",
            "optimizers.sgd.momemtum: unknown key, allowed are method, lr",
        ),
        ("epochs = 2", "epochs = 0", "schedules.cosine.epochs: is 0: Input should be greater than"),
        ("epochs = 2", 'epochs = "2"', "epochs: is '2': Input should be a valid integer"),
        ("epochs = 2", "epochs = 2.0", "epochs: is 2.0: Input should be a valid integer"),
        ("lr = 0.1", "lr = inf", "optimizers.sgd.lr: is inf: Input should be a finite number"),
        ("lr = 0.1", "lr = -1", "optimizers.sgd.lr: is -1: Input should be greater than 0"),
        (
            '"cosine"',
            '"linear"',
            "is 'linear': Input should be 'constant', 'cosine', 'milestone' or 'inverse-sqrt'",
        ),
        ('"cosine"', '"milestone"', "milestones are needed with kind 'milestone'"),
        (
            'kind = "cosine"',
            'kind = "milestone"\nmilestones = [1, 2]',
            "schedules.cosine: milestones are [1.0, 2.0], allowed are increasing epochs below 2",
        ),
        (
            'kind = "cosine"',
            'kind = "milestone"\nmilestones = [1, 1]',
            "milestones are [1.0, 1.0], allowed are increasing epochs",
        ),
        (
            'kind = "cosine"',
            'kind = "milestone"\nmilestones = ["1"]',
            "schedules.cosine.milestones.0: is '1': Input should be a valid number",
        ),
        ('[schedules.cosine]\nkind = "cosine"\nepochs = 2', "", "schedules: missing"),
        ("depth = 8", "depth = 12", "model: depth is 12, allowed are 8, 14, 20"),
        ('"resnet"', '"resnets"', "model.family: is 'resnets', allowed are 'resnet', 'resnext'"),
        ('family = "resnet"', "", "model.family: missing"),
        (
            'family = "resnet"',
            'family = "resnext"',
            "model.depth: is 8: Input should be 50 or 101; model.width: unknown key, allowed are "
            "family, depth, groups, group_width",
        ),
        (
            "crop_padding = 2",
            "croppadding = 2",
            "data.croppadding: unknown key, allowed are kind, train_examples, validation, "
            "crop_padding, flip",
        ),
        ("crop_padding", "kind = 3\ncrop_padding", "data.kind: is '3', allowed are 'small-images'"),
        (
            "crop_padding",
            'kind = "photographs"\ncrop_padding',
            "data.crop_padding: unknown key, allowed are kind, train_examples, validation, size",
        ),
        (
            "crop_padding = 2",
            'kind = "photographs"\ntest_resize = 64',
            "data: test_resize is 64, allowed is size or more",
        ),
        (
            '"sgd"',
            '"sdg"',
            "optimizers.sgd.method: is 'sdg', allowed are 'sgd', 'adam', 'radam', 'nadamw', "
            "'muon', 'apollo', 'apollow', 'apollo-averaged'",
        ),
        (
            'method = "sgd"',
            'clas = "my_module:X"',
            "optimizers.sgd.method: missing, allowed are 'sgd', ",
        ),
        (
            "weight_decay = { equal_strength_to",
            "weight_decay = { equal",
            "optimizers.adam.weight_decay.equal_strength_to: missing; "
            "optimizers.adam.weight_decay.equal: unknown key, allowed are equal_strength_to",
        ),
        ("[3, 4]", "[3, 3]", "seeds must be distinct, got [3, 3]"),
        ("[3, 4]", "[]", "seeds: is []: List should have at least 1 item"),
        (
            'equal_strength_to = "apollo"',
            'equal_strength_to = "radam"',
            "optimizers.adam.weight_decay.equal_strength_to is 'radam', allowed are the "
            "optimizers that state a number: sgd, apollo",
        ),
        ("seeds = [3, 4]", "seeds = [3, 4", "not valid TOML"),
    ],
)
def test_mistakes_name_file_key_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert old in TINY
    assert expected in error_of(TINY.replace(old, new, 1), tmp_path / "wrong.toml")


def test_unknown_task_or_file(tmp_path: Path) -> None:
    with pytest.raises(
        ExperimentError, match="no task 'mnist'; there are cifar10, fashion-mnist, imagenet"
    ):
        recipe.load("mnist")
    with pytest.raises(ExperimentError, match=r"none\.toml: cannot be read \(No such file"):
        recipe.load(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_our_recipes_are_valid(name: str) -> None:
    plan = recipe.load(name)
    for name in plan.schedules:
        quick = plan.with_quick_settings().runs(schedules=[name])[0]
        assert quick.train.schedule.length < plan.schedules[name].length


def test_decay_of_equal_strength(recipe_file: Path) -> None:
    """Eq. (14): gamma eta is the same; SGD and Apollo have the same gamma."""
    plan = recipe.load("fashion-mnist")
    specs = {spec.name: spec.optimizer for spec in plan.runs(list(plan.optimizers), 1)}
    assert specs["sgd"].weight_decay == specs["apollo"].weight_decay > 0
    assert specs["adam"].weight_decay == specs["radam"].weight_decay == 5e-4  # not adjusted
    for name in ("adam-adj", "radam-adj"):
        strength = specs[name].weight_decay * specs[name].lr  # type: ignore[operator]
        assert strength == pytest.approx(
            specs["apollo"].weight_decay * specs["apollo"].lr,  # type: ignore[operator]
            rel=1e-12,
        )
    # the decay follows another rate of the reference, because it is a rule and not a number
    recipe_file.write_text(TINY.replace("lr = 0.5", "lr = 5.0"))
    changed = recipe.load(str(recipe_file))
    assert changed.run("adam", 1).optimizer.weight_decay == pytest.approx(5.0 * 4e-4 / 0.01)
    # the paper's CIFAR-10: 5e-4 x 500 = 0.25
    text = TINY.replace("weight_decay = 4e-4", "weight_decay = 5e-4").replace("0.01\nw", "0.001\nw")
    recipe_file.write_text(text)
    adam = recipe.load(str(recipe_file)).run("adam", 1).optimizer
    assert (adam.lr, adam.weight_decay) == (0.001, pytest.approx(0.25))


# the paper's table: section 4.1 and appendix B.1
PAPER = {
    "cifar10": {
        "model": "ResNet-110, width 16",
        "batch_size": 128,
        "milestone": (164, [80, 120]),
        "cosine": (200, []),
        "decay": 5e-4,
        "adjusted": 0.25,
    },
    "imagenet": {
        "model": "ResNeXt-50 32x4d",
        "batch_size": 256,
        "milestone": (120, [40, 80]),
        "cosine": (120, []),
        "decay": 2e-4,
        "adjusted": 0.1,
    },
}


@pytest.mark.parametrize("task", PAPER)
def test_recipes_of_the_paper(task: str) -> None:
    paper = PAPER[task]
    plan = recipe.load(task)
    assert len(plan.seeds) == 5
    assert (str(plan.model), plan.train.batch_size) == (paper["model"], paper["batch_size"])
    for kind, schedule in plan.schedules.items():
        assert (schedule.epochs, schedule.milestones) == paper[kind]
        assert (schedule.kind, schedule.factor) == (kind, 0.1)
    specs = {spec.name: spec.optimizer for spec in plan.runs(seeds=1)}
    decay, adjusted = paper["decay"], pytest.approx(paper["adjusted"], rel=1e-12)
    expected = {
        "sgd": (0.1, decay),
        "adam": (0.001, decay),
        "radam": (0.001, decay),
        "adam-adj": (0.001, adjusted),
        "radam-adj": (0.001, adjusted),
        "apollo": (0.5, decay),
    }
    assert {name: (own.lr, own.weight_decay) for name, own in specs.items()} == expected
    sgd, apollo = specs["sgd"], specs["apollo"]
    assert isinstance(sgd, SGDSettings)
    assert sgd.momentum == 0.9
    assert isinstance(apollo, ApolloSettings)
    assert (apollo.beta, apollo.eps, apollo.sigma) == (0.9, 1e-4, 1.0)
    assert (apollo.warmup_steps, apollo.warmup_init_lr) == (100, 0.01)


def test_the_rate_falls_at_the_end_of_an_epoch() -> None:
    schedule = recipe.load("cifar10").schedules["milestone"]
    factor = lr_factor(schedule, "sgd", 164 * 390)
    assert [factor(80 * 390 - 1), factor(80 * 390)] == pytest.approx([1.0, 0.1])
    assert [factor(120 * 390 - 1), factor(120 * 390)] == pytest.approx([0.1, 0.01])


def test_seeds_beyond_the_largest_are_refused(recipe_file: Path) -> None:
    plan = recipe.load(str(recipe_file), [f"seeds=[{MAX_SEED - 1}]"])
    assert [spec.seed for spec in plan.runs(["sgd"], 2)] == [MAX_SEED - 1, MAX_SEED]
    with pytest.raises(ExperimentError, match=rf"--seeds is 3: 2 more seeds follow {MAX_SEED - 1}"):
        plan.runs(["sgd"], 3)


def test_runs_are_optimizers_times_seeds(recipe_file: Path) -> None:
    plan = recipe.load(str(recipe_file))
    pairs = [(spec.name, spec.seed) for spec in plan.runs(["apollo", "sgd"], 3)]
    assert pairs == [(name, seed) for seed in (3, 4, 5) for name in ("apollo", "sgd")]
    assert [spec.seed for spec in plan.with_quick_settings().runs(["sgd"])] == [3]
    with pytest.raises(ExperimentError, match="no optimizer 'adagrad' in this recipe; there are"):
        plan.runs(["adagrad"])


def test_optimizers_are_built_with_the_recipes_settings(recipe_file: Path) -> None:
    plan = recipe.load(str(recipe_file))
    network = torch.nn.Linear(2, 2)
    made = {name: build_optimizer(plan.run(name, 1).optimizer, network) for name in plan.optimizers}
    assert [type(one) for one in made.values()] == [
        torch.optim.SGD,
        torch.optim.AdamW,
        torch.optim.RAdam,
        Apollo,
    ]
    groups = {name: one.param_groups[0] for name, one in made.items()}
    assert groups["sgd"]["momentum"] == 0.9
    assert groups["radam"]["decoupled_weight_decay"] is True
    assert groups["adam"]["weight_decay"] == pytest.approx(0.02)
    assert groups["radam"]["weight_decay"] == pytest.approx(0.01)
    assert groups["apollo"]["decoupled_weight_decay"] is False
    assert (groups["apollo"]["warmup_steps"], groups["apollo"]["warmup_init_lr"]) == (6, 0.01)
    assert groups["apollo"]["weight_decay"] == 4e-4
    with pytest.raises(TypeError, match="not resolved"):
        build_optimizer(plan.optimizers["adam"], network)


def test_runs_of_several_schedules(recipe_file: Path) -> None:
    other = '[schedules.steps]\nkind = "milestone"\nepochs = 4\nmilestones = [1, 3]\n'
    recipe_file.write_text(TINY.replace("[optimizers.sgd]", f"{other}\n[optimizers.sgd]"))
    plan = recipe.load(str(recipe_file))
    assert [spec.schedule for spec in plan.runs(["sgd"], 1)] == ["cosine", "steps"]
    specs = plan.runs(["sgd"], 1, ["steps", "cosine"])
    assert [(spec.schedule, spec.train.schedule.epochs) for spec in specs] == [
        ("steps", 4),
        ("cosine", 2),
    ]
    assert specs[0].train.schedule.milestones == [1, 3]
    assert specs[0].train.batch_size == plan.train.batch_size
    assert recipe.RunSpec.model_validate(specs[0].model_dump()) == specs[0]
    quick = plan.with_quick_settings().run("sgd", 1, "steps").train.schedule
    assert (quick.epochs, quick.milestones) == (1, [0.25, 0.75])
    with pytest.raises(ExperimentError, match="no schedule 'linear' in this recipe; there are "):
        plan.run("sgd", 1, "linear")


def test_schedules() -> None:
    cosine = lr_factor(Schedule(kind="cosine", epochs=4), "sgd", 100)
    assert [cosine(0), cosine(50), cosine(100)] == pytest.approx([1.0, 0.5, 0.0])
    steps = lr_factor(Schedule(kind="milestone", epochs=4, milestones=[2, 3]), "sgd", 100)
    assert [steps(step) for step in (0, 49, 50, 74, 75, 100)] == pytest.approx(
        [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    )
    warm = LRShape(kind="cosine", warmup_steps=50)
    schedule = Schedule(kind="cosine", epochs=4, overrides={"adam": warm})
    adam, sgd = (lr_factor(schedule, name, 100) for name in ("adam", "sgd"))
    assert [adam(step) / sgd(step) for step in (0, 24, 49, 75)] == pytest.approx([0.02, 0.5, 1, 1])


def test_a_run_does_not_depend_on_the_schedules_of_other_optimizers(recipe_file: Path) -> None:
    shapes = "[schedules.cosine.overrides]\nsgd = { kind = 'constant' }\n"
    recipe_file.write_text(TINY.replace("[optimizers.sgd]", f"{shapes}\n[optimizers.sgd]"))
    with_shape = recipe.load(str(recipe_file))
    recipe_file.write_text(TINY)
    without = recipe.load(str(recipe_file))
    assert with_shape.run("apollo", 3) != without.run("apollo", 3)
    assert with_shape.run("apollo", 3).without_others() == without.run("apollo", 3).without_others()
    assert with_shape.run("sgd", 3).without_others() != without.run("sgd", 3).without_others()
    assert with_shape.run("sgd", 3).shared() == without.run("apollo", 4).shared()


def test_names_of_the_paper_and_of_the_task(recipe_file: Path) -> None:
    for text, expected in (
        ("[paper.linear]\nsgd = { mean = 1 }", "paper is ['linear'], allowed are some of cosine"),
        ("[paper.cosine]\nx = { mean = 1 }", "paper.cosine is ['x'], allowed are some of sgd, "),
    ):
        assert expected in error_of(f"{TINY}\n{text}\n", recipe_file)
    text = TINY.replace('"fashion-mnist"', '"fashion"')
    assert "task is 'fashion', allowed are cifar10, fashion-mnist, " in error_of(text, recipe_file)


def test_the_main_job_has_both_schedules_and_trains_one() -> None:
    plan = recipe.load("fashion-mnist")
    assert {spec.schedule for spec in plan.runs()} == {"cosine"}
    assert {spec.schedule for spec in plan.sweep("lr-robustness")} == {"cosine"}
    milestone = plan.run("sgd", 1, "milestone").train.schedule
    assert (milestone.kind, milestone.milestones) == ("milestone", [2, 3])
    shorter = recipe.load("fashion-mnist", quick=True).schedules["milestone"]
    assert (shorter.epochs, shorter.milestones) == (2, [1.0, 1.5])


def test_any_value_can_be_set(recipe_file: Path) -> None:
    def load(*settings: str, **choice: Any) -> recipe.Recipe:
        return recipe.load(str(recipe_file), settings, **choice)

    assert load("train.batch_size=64").train.batch_size == 64
    assert load("train.precision=bf16-mixed").train.precision == "bf16-mixed"
    assert load('train.precision="bf16-mixed"').train.precision == "bf16-mixed"
    assert load("seeds = [7, 8]").seeds == [7, 8]
    assert load("schedules.cosine.epochs=9").schedules["cosine"].epochs == 9
    assert load("schedule.epochs=9").schedules["cosine"].epochs == 9
    assert load("optimizers.adam.weight_decay=0.5").run("adam", 1).optimizer.weight_decay == 0.5
    assert load("sweeps.weight-decay.values=[1e-3]").sweeps["weight-decay"].values == [1e-3]
    # for all selected optimizers; coupled decay follows
    changed = load("optimizer.lr=0.25", optimizers=["apollo", "sgd"])
    rates = {name: settings.lr for name, settings in changed.optimizers.items()}
    assert rates == {"sgd": 0.25, "adam": 0.01, "radam": 0.02, "apollo": 0.25}
    assert changed.run("adam", 1).optimizer.weight_decay == pytest.approx(4e-4 * 0.25 / 0.01)
    # --set overrides --quick
    assert load("schedule.epochs=3", quick=True).schedules["cosine"].epochs == 3
    assert load(quick=True).schedules["cosine"].epochs == 1


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("lr", "--set is 'lr', allowed is key=value, as in --set optimizer.lr=0.25"),
        ("=3", "--set is '=3', allowed is key=value"),
        ("train.=3", "--set is 'train.=3', allowed is key=value"),
        ("train.batch_size=", "--set is 'train.batch_size=', allowed is key=value"),
        ("seeds.first=1", "--set seeds.first=1: seeds is [3, 4], it has no keys of its own"),
        ("train.batch_size=no", "train.batch_size: is 'no': Input should be a valid integer"),
        ("optimizer.sigma=2", "optimizers.sgd.sigma: unknown key, allowed are method, lr, mom"),
        ("optimizer=3", "optimizer: unknown key"),
    ],
)
def test_wrong_settings(recipe_file: Path, setting: str, expected: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        recipe.load(str(recipe_file), [setting])
    assert expected in str(caught.value)
    assert f"--set {setting}" in str(caught.value) or "--set is" in str(caught.value)


def test_the_papers_results_stand_in_its_recipes() -> None:
    cifar, imagenet = (recipe.load(task).paper for task in ("cifar10", "imagenet"))
    for paper in (cifar, imagenet):
        assert [len(paper[schedule]) for schedule in ("milestone", "cosine")] == [6, 6]
    assert (cifar["milestone"]["apollo"].mean, cifar["milestone"]["apollo"].std) == (94.20, 0.12)
    assert imagenet["cosine"]["adam"].mean == 71.19


FORMER = """
[data]
kind = "sentence-pairs"
subwords = 300
beams = 7

[schedules.cosine]
kind = "cosine"
epochs = 2
instead = { sgd = { kind = "constant" } }

[train]
batch_size = 32
average_last = 3

[model]
family = "transformer"
width = 8
inner = 8
heads = 2
layers = 1
longest = 77

[tuning]
tries = 5
ranges = { sgd = { lr = [0.1, 1.0] } }
"""


def test_former_keys_are_read(recipe_file: Path) -> None:
    tables = tomllib.loads(recipe_file.read_text()) | tomllib.loads(FORMER)
    plan = recipe.Recipe.model_validate(tables)
    assert plan.search is not None
    assert plan.search.trials == 5
    spec = plan.run("sgd", 3)
    now = spec.model_dump()
    assert now["data"]["beam_size"] == 7
    assert now["model"]["max_length"] == 77
    assert now["train"]["average_checkpoints"] == 3
    assert now["train"]["schedule"]["overrides"]["sgd"]["kind"] == "constant"
    assert recipe.RunSpec.model_validate(now) == spec


def test_settings_name_a_table_by_its_former_or_its_present_name(recipe_file: Path) -> None:
    search = ["search.trials=5", "search.ranges.sgd.lr=[0.1, 1.0]"]
    plan = recipe.load(str(recipe_file), [*search, "tuning.trials=7"]).search
    assert plan is not None
    assert (plan.trials, list(plan.ranges)) == (7, ["sgd"])
