"""Optimizers that are named by their class: refused before training, or trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from apollo_bench import user_code
from apollo_bench.cli import app, selection
from apollo_bench.config import recipe
from apollo_bench.config.custom_optimizer import CustomSettings, short_names
from apollo_bench.config.execution import Execution
from apollo_bench.config.optimizer_settings import METHODS
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.launch import custom_code_checks
from apollo_bench.optimizers.custom import Abilities, try_steps
from apollo_bench.optimizers.registry import build_optimizer
from apollo_bench.runs.run_directory import RunDirectory
from apollo_bench.search.trials import make_trials
from apollo_bench.training.loop import train
from apollo_bench.workloads import tasks
from bench.tests.conftest import TINY
from bench.tests.helpers import PATIENCE, assert_identical, prepared, result

MODULE = "custom_optimizers"
SHAPES = [(7, 3, 3, 3), (7,), (5, 7), ()]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the user's folder with a module that is importable from there only."""
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(Path(__file__).with_name(f"{MODULE}.py"), work)
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for variable in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    yield work
    sys.modules.pop(MODULE, None)


def spec_of(text: str, epochs: int = 2) -> RunSpec:
    path = Path("mine.toml")
    small = TINY.replace("train_examples = 384", "train_examples = 160\nvalidation = 64")
    path.write_text(f"{small}\n[optimizers.mine]\n{text}\n")
    return recipe.load(str(path), [f"schedules.cosine.epochs={epochs}"]).run("mine", 3)


def of(name: str) -> str:
    return f'class = "{MODULE}:{name}"'


def tried(spec: RunSpec) -> Abilities:
    assert isinstance(spec.optimizer, CustomSettings)
    return try_steps(spec.optimizer, SHAPES, "optimizers.mine")


def test_settings_have_the_defaults_of_the_signature() -> None:
    spec = spec_of(f"{of('SignDescent')}\nmomentum = 0\nscales = [1, 2]")
    assert spec.optimizer.model_dump() == {
        "class": f"{MODULE}:SignDescent",
        "lr": 0.01,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "nesterov": False,
        "scales": [1.0, 2.0],
    }
    assert RunSpec.model_validate_json(json.dumps(spec.model_dump())) == spec
    made = build_optimizer(spec.optimizer, torch.nn.Linear(2, 2))
    assert type(made).__name__ == "SignDescent"
    assert made.param_groups[0]["momentum"] == 0


def test_weight_decay_can_be_coupled_to_it_and_by_it() -> None:
    coupled = f'{of("SignDescent")}\nlr = 0.02\nweight_decay = {{ equal_strength_to = "apollo" }}'
    assert spec_of(coupled).optimizer.weight_decay == pytest.approx(4e-4 * 0.5 / 0.02)
    assert spec_of(of("make")).optimizer.weight_decay is None
    with pytest.raises(ExperimentError, match=r"optimizers\.mine\.lr is missing; the weight decay"):
        spec_of(coupled.replace("lr = 0.02\n", ""))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            of("SignDescent") + "\nmomntum = 0.5",
            ".momntum is 0.5: SignDescent has no such argument",
        ),
        (of("SignDescent") + "\nmomntum = 0.5", "allowed are lr, momentum, weight_decay, nesterov"),
        (of("SignDescent") + '\nmomentum = "x"', ".momentum must be a finite number, got 'x'"),
        (of("SignDescent") + "\nmomentum = true", ".momentum must be a finite number, got True"),
        (of("SignDescent") + "\nmomentum = inf", ".momentum must be a finite number, true, false"),
        (of("TakesAnything") + "\nsince = 2020-01-01", ", got datetime.date(2020, 1, 1)"),
        (of("TakesAnything") + "\nmore = { x = [nan] }", "these, got {'x': [nan]}"),
        (of("SignDescent") + "\nnesterov = 1", ".nesterov must be true or false, got 1"),
        (of("SignDescent") + "\nscales = 1", ".scales must be a list, as [1.0, 1.0], got 1"),
        (of("SignDescent") + '\nscales = ["x", 1]', ".scales.0 must be a finite number, got 'x'"),
        (of("SignDescent") + "\nlr = -1", ".lr: is -1: Input should be greater than 0"),
        (of("make") + "\nweight_decay = 0.1", ".weight_decay is 0.1: make has no such argument"),
        (of("NeedsLength"), ".total is missing; NeedsLength needs it"),
        (of("NeedsLength") + "\ntotal = 9", ".lr is missing; NeedsLength has no number as its"),
        (of("WithoutRate"), f"is '{MODULE}:WithoutRate': WithoutRate has no argument lr, which"),
        (of("NoOptimizer"), "NoOptimizer': NoOptimizer is no torch.optim.Optimizer"),
        (of("__doc__"), "one, got '" + f"{MODULE}:__doc__': it is \"A user's optimizers"),
        (of("NeedsClosure"), "NeedsClosure.step needs a closure; training calls step()"),
        (of("Nothing"), f"{MODULE} has no Nothing; it has SignDescent, ScheduleFree, "),
        ('class = "no_such:X"', "is 'no_such:X': no module no_such in "),
        ('class = "broken:X"', "importing broken raised ZeroDivisionError: division by zero ("),
        (
            'class = "lacking:X"',
            "importing lacking raised ModuleNotFoundError: No module named 'no",
        ),
        ('class = "leaving:X"', "importing leaving raised SystemExit: 3"),
        (
            'method = "lion"',
            "needs the package pytorch_optimizer, which is not installed; pip inst",
        ),
        ('class = "SignDescent"', "'SignDescent' is not module:name, as my_module:MyOptimizer"),
        ('class = "../x:Y"', "'../x:Y' is not module:name"),
        ('class = "my_module.py:X"', "names a file; leave out `.py`: my_module:X"),
        ('class = "./my_module.py:X"', "names a file; leave out `.py`: my_module:X"),
    ],
)
def test_mistakes_name_argument_value_and_what_is_right(
    folder: Path, text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.py").write_text("x = 1\ny = x / 0\n")
    (folder / "lacking.py").write_text("import no_such_package\n")
    (folder / "leaving.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)  # as if it were not installed
    with pytest.raises(ExperimentError) as caught:
        spec_of(text)
    message = str(caught.value)
    assert expected in message
    assert "optimizers.mine" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (of("SignDescent") + "\nmomentum = 2", "making SignDescent raised ValueError: momentum is"),
        (of("InsistsOnClosure"), ".step() without a closure raised AssertionError: a closure is"),
        (of("Leaves"), ".step() without a closure raised SystemExit: 3 ("),
        (of("Unsavable"), "saving the state of Unsavable raised "),
        (of("Unreadable"), "the state dict of Unreadable must hold tensors, numbers,"),
        (of("make_nothing"), "it must return a torch.optim.Optimizer, got a NoneType"),
        ('method = "sparseadam"', "RuntimeError: SparseAdam does not support dense gradients"),
    ],
)
def test_what_cannot_train_is_refused_before_training(text: str, expected: str) -> None:
    spec = spec_of(text)
    with pytest.raises(ExperimentError) as caught:
        tried(spec)
    assert str(caught.value).startswith("optimizers.mine.class is '")
    assert expected in str(caught.value)


def test_a_trial_step_tells_what_a_run_will_meet() -> None:
    assert tried(spec_of(of("SignDescent"))) == (False, [])
    assert tried(spec_of(of("make"))) == (False, [])
    assert tried(spec_of(of("ScheduleFree"))) == (False, [])
    needs_graph, [remark] = tried(spec_of(of("SecondOrder")))
    assert needs_graph
    assert "backward passes keep their graph" in remark
    _, [remark] = tried(spec_of(of("Forgetful")))
    assert "a run that is interrupted and resumed differs" in remark
    _, [remark] = tried(spec_of(f"{of('TakesAnything')}\nmomntum = 3"))
    assert remark == "TakesAnything does not name the arguments momntum; it takes any."


def test_a_trial_step_draws_no_random_number_of_the_run() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    tried(spec_of(of("SecondOrder")))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", sorted(short_names()))
def test_all_of_torch_by_short_name(name: str) -> None:
    if not short_names()[name].path.startswith("torch.") or name in METHODS:
        return
    if name in ("lbfgs", "sparseadam"):
        with pytest.raises(ExperimentError, match=r"closure|sparse"):
            tried(spec_of(f'method = "{name}"'))
        return
    spec = spec_of(f'method = "{name}"')
    assert tried(spec).needs_graph is False
    made = build_optimizer(spec.optimizer, torch.nn.Linear(2, 2))
    assert type(made) is getattr(torch.optim, short_names()[name].path.partition(":")[2])
    if name == "nesterov":
        assert (made.param_groups[0]["momentum"], made.param_groups[0]["nesterov"]) == (0.9, True)


def test_the_command_line_names_classes(folder: Path) -> None:
    Path("tiny.toml").write_text(TINY)

    def names(optimizers: str) -> list[str] | None:
        chosen = selection.select("tiny.toml", ["optimizer.lr=0.03"], optimizers, None)
        for name in chosen.optimizers or []:
            assert chosen.recipe.run(name, 3).optimizer.lr == 0.03
        return chosen.optimizers

    assert names(f"{MODULE}:SignDescent,sgd") == ["SignDescent", "sgd"]
    assert names(f"all,{MODULE}:make") == ["sgd", "adam", "radam", "apollo", "make"]
    assert names("torch.optim:SGD,adagrad,muon") == ["torch-optim-SGD", "adagrad", "muon"]
    Path("other.py").write_text(f"from {MODULE} import *\n")
    twice = f"{MODULE}:SignDescent,other:SignDescent"
    assert names(twice) == ["SignDescent", "other-SignDescent"]
    Path("tiny.toml").write_text(f"{TINY}\n[optimizers.mine]\n{of('SignDescent')}\n")
    assert names(f"{MODULE}:SignDescent") == ["mine"]
    with pytest.raises(ExperimentError, match="no optimizer 'adagard' in this recipe"):
        names("adagard")


def test_a_search_draws_from_ranges_of_a_class() -> None:
    Path("tiny.toml").write_text(TINY)
    settings = [
        *("search.trials=3", "search.ranges.SignDescent.lr=[0.01, 1]", "data.validation=64"),
        "search.ranges.SignDescent.weight_decay=[1e-4, 1e-2]",
    ]
    chosen = selection.select("tiny.toml", settings, f"{MODULE}:SignDescent", None, False, "tuning")
    trials = make_trials(chosen.recipe, chosen.optimizers)
    assert [spec.optimizer.lr for spec in trials] == [0.1, 0.0316, 0.316]
    assert all(1e-4 < (spec.optimizer.weight_decay or 0) < 1e-2 for spec in trials)
    for key in ("momntum", "nesterov"):
        settings[1] = f"search.ranges.SignDescent.{key}=[0.1, 0.9]"
        chosen = selection.select(
            "tiny.toml", settings, f"{MODULE}:SignDescent", None, False, "tuning"
        )
        with pytest.raises(ExperimentError, match=f"{key}: not a number of this optimizer"):
            make_trials(chosen.recipe, chosen.optimizers)


def trained(path: Path, spec: RunSpec, stop_after: int | None = None) -> RunDirectory:
    directory, workload = prepared(path, spec)
    left = iter([False] * (10**6 if stop_after is None else stop_after))
    if train(directory, spec, workload, lambda: next(left, True)) == "stopped":
        train(directory, spec, workload)
    return directory


@pytest.mark.parametrize("name", ["ScheduleFree", "SecondOrder"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    spec = spec_of(of(name))
    whole = trained(tmp_path / "whole", spec)
    for stop_after in (2, 5):  # within an epoch, and at an evaluation
        again = trained(tmp_path / f"resumed-{stop_after}", spec, stop_after)
        assert_identical(result(whole), result(again))


def test_schedule_free_weights_are_evaluated_and_kept(tmp_path: Path) -> None:
    spec = spec_of(of("ScheduleFree"), epochs=1)
    modes: list[str] = sys.modules[MODULE].ScheduleFree.modes
    modes.clear()
    directory = trained(tmp_path / "run", spec)
    # modes before the last three belong to the trial steps
    assert modes[-3:] == ["train", "eval", "train"]
    newest = torch.load(directory.checkpoint, weights_only=True)
    best = torch.load(directory.best, weights_only=True)
    other = {name: state["other"] for name, state in newest["optimizer"]["state"].items()}
    kept = next(best["model"][name] for name in best["model"] if "conv" in name)
    assert any(torch.equal(kept, averaged) for averaged in other.values())
    assert not any(torch.equal(kept, weights) for weights in newest["model"].values())


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def test_an_archive_and_its_report_need_no_module(folder: Path, tmp_path: Path) -> None:
    spec = spec_of(f"{of('SignDescent')}\nmomentum = 0.8")
    directory = RunDirectory(tmp_path / "out" / "runs" / spec.label)
    workload, code = tasks.make(spec), custom_code_checks.code_of(spec)
    directory.prepare(spec, workload.fingerprint, None, ["test"], code=code)
    train(directory, spec, workload)
    [source] = directory.read()["code"]
    assert (source["path"], source["folder"]) == (f"{MODULE}:SignDescent", str(folder))
    # the run must be trained with the code that it began with
    module = folder / f"{MODULE}.py"
    module.write_text(module.read_text() + "\n# changed\n")
    with pytest.raises(ExperimentError, match=f"other settings .the code of {MODULE}:SignDescent"):
        directory.check(spec, workload.fingerprint, Execution(), custom_code_checks.code_of(spec))
    module.unlink()
    sys.modules.pop(MODULE)
    done = invoke("archive", str(tmp_path / "out"), "--out", str(tmp_path / "kept"))
    assert done.exit_code == 0, done.output
    assert str(tmp_path) not in (tmp_path / "kept" / "runs.json").read_text()
    page = (tmp_path / "kept" / "report.html").read_text()
    assert f"class = {MODULE}:SignDescent" in page
    assert "momentum = 0.8" in page


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    Path("tiny.toml").write_text(TINY.replace("epochs = 2", "epochs = 1"))
    out = tmp_path / "out"
    command = ["compare", "tiny.toml", "--out", str(out), "--seeds", "1", "--optimizers"]
    done = invoke(*command, f"sgd,{MODULE}:ScheduleFree,nesterov", "--set", "optimizer.lr=0.02")
    assert done.exit_code == 0, done.output
    for label in ("SGD", "ScheduleFree", "SGD, Nesterov"):
        assert label in done.stdout
    assert {path.name for path in (out / "runs").iterdir()} == {
        f"fashion-mnist-{name}-cosine-seed3" for name in ("sgd", "ScheduleFree", "nesterov")
    }


def test_workers_elsewhere_find_the_code_and_notice_another(folder: Path, tmp_path: Path) -> None:
    (folder / "plain.py").write_text("class Plain:\n    pass\n")  # without torch: imported at once
    user_code.import_object("plain:Plain", "code")
    source = user_code.describe_source("plain:Plain")
    del sys.modules["plain"]
    script = (
        "import json, sys\nfrom apollo_bench import user_code\n"
        "user_code.require_sources([json.loads(sys.argv[1])])\n"
    )

    def worker(source: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, json.dumps(source)],
            cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip

    assert worker(source).returncode == 0
    assert "changed since the run was prepared" in worker({**source, "version": "sha256:0"}).stderr
    installed = user_code.describe_source("torch.optim:Adagrad")
    assert installed["folder"] is None
    assert str(installed["version"]).startswith("torch ")


def test_modules_beside_the_file_are_part_of_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is not mixed with other code, wherever the user keeps her update rule."""
    monkeypatch.syspath_prepend(str(tmp_path))
    parts = (
        "pack_a/__init__.py",
        "pack_a/entry.py",
        "pack_a/rule.py",
        "pack_a/deep.py",
        "beside.py",
    )
    (tmp_path / "pack_a").mkdir()
    texts = ("", "from . import rule", "from pack_a.deep import f\nimport beside", "f = 1", "")
    for name, text in zip((*parts, "unrelated.py"), (*texts, "import beside"), strict=True):
        (tmp_path / name).write_text(f"{text}\n")
    user_code.import_object("pack_a.entry:rule", "code")

    def version() -> str | None:
        return user_code.describe_source("pack_a.entry:rule")["version"]

    before = {version()}
    (tmp_path / "unrelated.py").write_text("changed = 1\n")
    assert before == {version()}
    for count, name in enumerate(parts, 2):
        with (tmp_path / name).open("a") as file:
            file.write("# changed\n")
        before.add(version())
        assert len(before) == count, name
    for name in [name for name in sys.modules if name.partition(".")[0] in ("pack_a", "beside")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[optimizers.sgd]", '[optimizers."../../escaped/x"]'),
        ("[optimizers.sgd]", '[optimizers."a/b"]'),
        ("[optimizers.sgd]", "[optimizers.'$x_{$']"),
        ("[optimizers.sgd]", '[optimizers."mine[/bold]"]'),
        ("[optimizers.sgd]", '[optimizers.""]'),
        ("[optimizers.sgd]", '[optimizers.".."]'),
        ("[optimizers.sgd]", '[optimizers."ü"]'),
        ("[optimizers.sgd]", f"[optimizers.{'x' * 65}]"),
        ("[optimizers.sgd]", '[optimizers."x\\n"]'),
        ("[schedules.cosine]", '[schedules."../x"]'),
    ],
)
def test_names_that_are_paths_or_markup_are_refused(folder: Path, old: str, new: str) -> None:
    Path("names.toml").write_text(TINY.replace(old, new))
    with pytest.raises(ExperimentError, match="is not allowed; use letters, digits and") as caught:
        recipe.load("names.toml")
    assert "\n" not in str(caught.value)


def test_names_that_differ_in_case_only_are_refused() -> None:
    Path("names.toml").write_text(TINY.replace("[optimizers.adam]", "[optimizers.SGD]"))
    with pytest.raises(ExperimentError, match="optimizers: 'sgd' and 'SGD' differ in case only"):
        recipe.load("names.toml")


def test_a_run_of_a_bad_name_is_refused(finished: Path) -> None:
    path = finished / "runs" / "fashion-mnist-sgd-cosine-seed3" / "run.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"]["name"] = "../x"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ExperimentError, match=r"name: the name '\.\./x' is not allowed"):
        RunDirectory(path.parent).spec()
