"""The text and figures of a report, for trained runs and for made-up ones."""

from __future__ import annotations

import base64
import csv
import json
import re
from pathlib import Path

import pytest

from apollo_bench.config import recipe
from apollo_bench.errors import ExperimentError
from apollo_bench.optimizers.plot_style import STYLES, style_of
from apollo_bench.report import narrative, page, tables
from apollo_bench.report.figure_axes import short
from apollo_bench.report.summary import Summary, collect
from apollo_bench.runs.run_directory import RunDirectory
from bench.tests.conftest import TINY
from bench.tests.report.made_up_runs import made_up

PNG = b"\x89PNG\r\n"
CURVES = ("training_loss", "test_accuracy")
PICTURES = (*CURVES, "wall_time", "optimizer_time")


def test_report(finished: Path) -> None:
    [summary] = page.write([finished], finished)
    html = (finished / "report.html").read_text()
    for name in PICTURES:
        assert (finished / f"{name}.png").read_bytes().startswith(PNG)
        assert b"<svg" in (finished / f"{name}.svg").read_bytes()
    embedded = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", html)
    assert [base64.b64decode(one) for one in embedded] == [
        (finished / f"{name}.svg").read_bytes() for name in PICTURES
    ]

    rows = {row.name: row for row in summary.rows}
    assert list(rows) == ["sgd", "apollo"]
    assert rows["sgd"].remark == "2"
    assert rows["apollo"].remark == "1 of 2 finished, 1 unfinished"
    finals = [run.evaluations[-1]["accuracy"] for run in rows["sgd"].runs]
    assert rows["sgd"].score is not None
    assert rows["sgd"].score.mean == pytest.approx(sum(finals) / 2)
    assert rows["sgd"].score.std == pytest.approx(abs(finals[0] - finals[1]) / 2**0.5)
    assert rows["sgd"].score.text(2) in html
    assert rows["sgd"].score.text(2) in (finished / "results.md").read_text()
    share = rows["sgd"].stats("optimizer_share")
    assert share is not None
    assert 0 < share.mean < 100
    assert "in the paper" not in html
    with (finished / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["optimizer"], line["seed"], line["verdict"]) for line in lines] == [
        ("sgd", "3", "finished"),
        ("sgd", "4", "finished"),
        ("apollo", "3", "finished"),
        ("apollo", "4", "unfinished"),
    ]
    assert [float(line["accuracy"]) for line in lines[:2]] == finals
    assert lines[3]["accuracy"] == ""
    assert lines[3]["done"] == "1 of 2 epochs"


def test_the_same_runs_draw_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        page.write([finished], folder)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert len(written[0]) == 3 + 2 * len(PICTURES)


def summarize(folder: Path, plan: recipe.Recipe, finals: dict[str, list[float]]) -> Summary:
    for name, values in finals.items():
        for seed, value in enumerate(values):
            made_up(folder, plan.run(name, seed), [50.0, value])
    return collect([folder])[0]


@pytest.mark.parametrize(
    ("finals", "expected"),
    [
        (
            {"sgd": [90.0, 90.2], "apollo": [88.0, 88.3]},
            "Best mean test accuracy: SGD, 90.10 ± 0.14 %. Apollo is 1.95 worse than SGD (95 % "
            "interval of its lead -2.59 to -1.31, p = 0.016, 2 seeds).",
        ),
        (
            {"sgd": [90.0], "adam": [91.0], "apollo": [93.5]},
            "Best mean test accuracy: Apollo, 93.50 %. Apollo is 2.50 better than Adam.",
        ),
        ({"sgd": [90.0]}, "Best mean test accuracy: SGD, 90.00 %."),
        (
            {"sgd": [90.0], "apollo": [90.0]},
            "Best mean test accuracy: SGD, 90.00 %. Apollo is level with SGD.",
        ),
    ],
)
def test_the_headline_names_the_winner(
    recipe_file: Path, tmp_path: Path, finals: dict[str, list[float]], expected: str
) -> None:
    summary = summarize(tmp_path, recipe.load(str(recipe_file)), finals)
    assert narrative.headline(summary) == expected


def cells(summary: Summary, title: str) -> dict[str, str]:
    """Return a column of the first table, by optimizer."""
    table = tables.tables(summary)[0]
    place = [column.title for column in table.columns].index(title)
    return {row[0].text: row[place].text for row in table.rows}


def test_leads_are_paired_by_seed(recipe_file: Path, tmp_path: Path) -> None:
    """Apollo is ahead with every seed, though the spread over seeds is larger than the lead."""
    plan = recipe.load(str(recipe_file))
    finals = {"sgd": [80.0, 85.0, 90.0, 95.0], "apollo": [81.0, 86.2, 91.1, 95.9]}
    finals["adam"] = [80.0, 85.0]  # two seeds are missing
    summary = summarize(tmp_path, plan, finals)
    leads = cells(summary, "Apollo's lead [95 % interval]")
    assert leads["Apollo"] == "-"
    low, high = (float(text) for text in re.findall(r"[+-][0-9.]+", leads["SGD"])[1:])
    assert leads["SGD"].startswith("+1.05 [")
    assert (low, high) == (0.84, 1.26)
    assert leads["Adam"].startswith("+1.10 [")
    assert float(cells(summary, "p")["SGD"]) < 0.001
    assert bold(summary) == []  # the interval of the lead over Adam, of two seeds, contains 0


def bold(summary: Summary) -> list[str]:
    rows = tables.tables(summary)[0].rows
    return [row[0].text for row in rows if any(cell.best for cell in row)]


@pytest.mark.parametrize(
    ("apollo", "winners"),
    [
        ([81.0, 86.2, 91.1, 95.9], ["Apollo"]),  # ahead with every seed
        ([81.0, 86.2, 89.9, 95.9], []),  # better on average
        ([79.0, 84.1, 88.8, 94.1], ["SGD"]),
    ],
)
def test_a_tie_has_no_winner_in_bold(
    apollo: list[float], winners: list[str], recipe_file: Path, tmp_path: Path
) -> None:
    finals = {"sgd": [80.0, 85.0, 90.0, 95.0], "apollo": apollo}
    assert bold(summarize(tmp_path, recipe.load(str(recipe_file)), finals)) == winners


def test_one_seed_has_no_winner(recipe_file: Path, tmp_path: Path) -> None:
    finals = {"sgd": [80.0], "apollo": [90.0]}
    assert bold(summarize(tmp_path, recipe.load(str(recipe_file)), finals)) == []


def test_time_to_target(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(TINY.replace("epochs = 2", "epochs = 4"))
    plan = recipe.load(str(recipe_file))
    for name, seed, values in (
        ("sgd", 1, [10.0, 20.0, 60.0, 70.0]),
        ("sgd", 2, [10.0, 20.0, 64.0, 70.0]),
        ("adam", 1, [10.0, 61.0, 50.0, 62.0]),
        ("adam", 2, [10.0, 20.0, 50.0, 61.0]),
        ("apollo", 1, [10.0, 65.0, 66.0, 68.0]),
        ("apollo", 2, [63.0, 65.0, 66.0, 68.0]),
    ):
        made_up(tmp_path, plan.run(name, seed), list(values))
    # the best of the others has 62 after three of four epochs
    times = cells(collect([tmp_path])[0], "time to 62.00 (s)")
    # a run that misses the target counts with its full length
    assert times == {
        "SGD": "35.0 ± 7.1",
        "Adam": "> 40.0 ± 0.0 (1 of 2)",
        "Apollo": "15.0 ± 7.1",
    }
    times = cells(collect([tmp_path], target=69.5)[0], "time to 69.50 (s)")
    missed = "> 40.0 ± 0.0 (0 of 2)"
    assert times == {"SGD": "40.0 ± 0.0", "Adam": missed, "Apollo": missed}
    assert "time to" not in tables.tables(collect([tmp_path])[0])[0].heading
    assert cells(collect([tmp_path])[0], "share of a step (%)")["SGD"] == "4.0 ± 0.0"


FORMS = """
[optimizers.apollow]
method = "apollow"
lr = 0.5

[optimizers.apollo-belief]
method = "apollo"
rebound = "belief"
lr = 0.5

[quick]
"""


def test_variants_of_apollo_are_compared_with_the_best_other_optimizer(
    recipe_file: Path, tmp_path: Path
) -> None:
    recipe_file.write_text(TINY.replace("[quick]", FORMS).replace("epochs = 2", "epochs = 4"))
    plan = recipe.load(str(recipe_file))
    for name, seed, values in (
        ("sgd", 1, [10.0, 20.0, 60.0, 70.0]),
        ("sgd", 2, [10.0, 20.0, 64.0, 74.0]),
        ("apollo", 1, [10.0, 65.0, 66.0, 68.0]),
        ("apollo", 2, [63.0, 65.0, 66.0, 76.0]),
        ("apollow", 1, [10.0, 20.0, 30.0, 40.0]),
        ("apollow", 2, [10.0, 65.0, 30.0, 40.0]),
    ):
        made_up(tmp_path, plan.run(name, seed), list(values))
    for seed in (1, 2):  # reaches the target, then diverges
        made_up(tmp_path, plan.run("apollo-belief", seed), [70.0, None], "diverged")
    summary = collect([tmp_path])[0]
    updates = cells(summary, "updates to 62.00")
    assert updates["SGD"] == "4 ± 1"
    assert updates["Apollo"] == "2 ± 1"
    assert updates["ApolloW"] == "> 3 ± 1 (1 of 2)"
    assert updates["Apollo, belief"] == "> 2 ± 0 (0 of 2)"
    fewer = cells(summary, "fewer updates than SGD [95 %]")
    assert fewer["SGD"] == "-"
    assert fewer["Apollo"].startswith("+2 [")
    leads = cells(summary, "lead over SGD [95 % interval]")
    assert leads["Apollo"].startswith("+0.00 [-25.41, +25.41]")
    assert leads["ApolloW"].startswith("-32.00 [")
    assert leads["Apollo, belief"] == "-"
    assert summary.sections[0].best_other is not None
    assert summary.sections[0].best_other.name == "sgd"
    assert "; no other variant of Apollo has a better mean." in narrative.headline(summary)
    for seed in (3, 4):
        made_up(tmp_path, plan.run("apollow", seed), [10.0, 30.0, 80.0, 109.0])
    expected = "; the variant of Apollo with the best mean is ApolloW, 74.50"
    assert expected in narrative.headline(collect([tmp_path])[0])


def test_a_missing_pair_is_reported(recipe_file: Path, tmp_path: Path) -> None:
    plan = recipe.load(str(recipe_file))
    for seed, value in enumerate([80.0, 81.0, 82.0]):
        made_up(tmp_path, plan.run("sgd", seed), [50.0, value])
        verdict = "diverged" if seed else "finished"
        made_up(tmp_path, plan.run("apollo", seed), [50.0, 90.0], verdict)
    assert cells(collect([tmp_path])[0], "Apollo's lead [95 % interval]")["SGD"] == (
        "+10.00 (1 of 3 pairs)"
    )


def test_an_optimizer_that_diverges_is_not_robust(recipe_file: Path, tmp_path: Path) -> None:
    """An optimizer that diverges at one rate must not have the smallest span."""
    settings = ["sweeps.lr-robustness.values=[1, 10]"]
    plan = recipe.load(str(recipe_file), settings)
    for spec in plan.sweep("lr-robustness", ["sgd", "apollo"], 1):
        assert spec.sweep is not None
        bad = spec.name == "apollo" and spec.sweep.value == 10
        made_up(tmp_path, spec, [50.0, 60.0 + spec.sweep.value], "diverged" if bad else "finished")
    [summary] = collect([tmp_path])
    assert cells(summary, "lr × 10") == {"SGD": "70.00", "Apollo": "diverged"}
    assert cells(summary, "best - worst") == {"SGD": "9.00", "Apollo": "diverged"}
    assert "differs by: SGD 9.00, Apollo diverged at one." in narrative.headline(summary)


def test_diverged_and_unfinished_runs_are_reported(recipe_file: Path, tmp_path: Path) -> None:
    plan = recipe.load(str(recipe_file))
    made_up(tmp_path, plan.run("sgd", 1), [], "diverged")
    made_up(tmp_path, plan.run("sgd", 2), [50.0, None])
    made_up(tmp_path, plan.run("apollo", 1), [50.0], None)
    [summary] = collect([tmp_path])
    assert cells(summary, "runs") == {
        "SGD": "1 of 2 finished, 1 diverged",
        "Apollo": "0 of 1 finished, 1 unfinished",
    }
    assert narrative.headline(summary) == "No run has finished yet. Diverged: SGD (1 of 2 runs)."
    page.write([tmp_path], tmp_path / "page")


def test_a_mean_without_its_diverged_runs_is_not_the_best(
    recipe_file: Path, tmp_path: Path
) -> None:
    recipe_file.write_text(f"{TINY}\n[sweeps.lr-robustness]\nvalues = [1.0]\n")
    plan = recipe.load(str(recipe_file))
    for folder, spec_of in (
        ("compared", lambda name, seed: plan.run(name, seed)),
        (
            "swept",
            lambda name, seed: next(
                spec for spec in plan.sweep("lr-robustness", [name]) if spec.seed == seed
            ),
        ),
    ):
        place = tmp_path / folder
        for seed in (3, 4):
            made_up(place, spec_of("sgd", seed), [50.0, 60.0 + seed])
            made_up(place, spec_of("adam", seed), [50.0, 50.0 + seed])
        made_up(place, spec_of("apollo", 3), [50.0, 90.0])
        made_up(place, spec_of("apollo", 4), [], "diverged")
        [summary] = collect([place])
        best = [row[0].text for row in tables.tables(summary)[0].rows if any(c.best for c in row)]
        assert best == ["SGD"]
        text = narrative.headline(summary)
        assert text.endswith(" Diverged: Apollo (1 of 2 runs).")
        if folder == "compared":
            assert text.startswith("Best mean test accuracy: SGD, 63.50 ± 0.71 %. Apollo is 27.00")
            assert "seeds 3, 4." in narrative.notes(summary)[0]
    # if all rows have diverged runs, the best of them is the best
    for name in ("sgd", "adam"):
        made_up(tmp_path / "compared", plan.run(name, 5), [], "diverged")
    [summary] = collect([tmp_path / "compared"])
    best_row = summary.sections[0].best
    assert best_row is not None
    assert best_row.name == "apollo"
    assert "seeds 3, 4 of all, also 5 of SGD; 5 of Adam." in narrative.notes(summary)[0]
    for name in ("sgd", "adam", "apollo"):
        made_up(tmp_path / "none", plan.run(name, 3), [], "diverged")
    [summary] = collect([tmp_path / "none"])
    assert narrative.headline(summary).startswith(
        "No run has finished. Diverged: SGD (1 of 1 runs), "
    )


def test_where_runs_were_trained(recipe_file: Path, tmp_path: Path) -> None:
    plan = recipe.load(str(recipe_file))
    made_up(tmp_path, plan.run("sgd", 3), [50.0])
    [summary] = collect([tmp_path])
    assert "1 thread per process, precision 32-true; torch " in narrative.notes(summary)[-1]
    made_up(tmp_path, plan.run("sgd", 4), [50.0])
    manifest = RunDirectory(tmp_path / "runs" / plan.run("sgd", 4).label).manifest
    record = json.loads(manifest.read_text())
    record["execution"] |= {"accelerator": "gpu", "devices": 2, "nodes": 3}
    record["machine"]["gpu"] = "NVIDIA H200"
    manifest.write_text(json.dumps(record))
    *_, where, warning = narrative.notes(collect([tmp_path])[0])
    assert "; 2 x NVIDIA H200, " in where
    assert "3 such machines, precision 32-true; torch" in where
    assert "their times are not comparable" in warning


def test_beside_the_papers_numbers(tmp_path: Path) -> None:
    plan = recipe.load("cifar10", ["model.depth=20", "schedules.cosine.epochs=2"])
    for name in ("sgd", "apollo"):
        for schedule in ("milestone", "cosine"):
            made_up(tmp_path, plan.run(name, 1, schedule), [50.0, 60.0])
    [summary] = page.write([tmp_path], tmp_path / "page")
    text = (tmp_path / "page" / "results.md").read_text()
    assert [table.heading for table in tables.tables(summary)] == [
        "Schedule milestone, 164 epochs",
        "Schedule cosine, 2 epochs",
    ]
    assert cells(summary, "in the paper") == {"SGD": "93.91 ± 0.07", "Apollo": "94.20 ± 0.12"}
    assert (
        "for ResNet-110, width 16, batch 128, 164 epochs (milestone), 200 epochs (cosine)" in text
    )
    assert "Ours differ in model and schedule: they are not comparable." in text
    assert "Schedule milestone: Best mean test accuracy: " in text
    whole = recipe.load("cifar10")
    made_up(tmp_path / "whole", whole.run("sgd", 1, "cosine"), [50.0, 60.0])
    assert "Ours differ" not in " ".join(narrative.notes(collect([tmp_path / "whole"])[0]))
    for setting, what in (
        ("train.batch_size=64", "batch size"),
        ("train.clip_norm=1", "gradient clipping"),
        ("data.train_examples=100", "data"),
        ("optimizers.sgd.lr=0.2", "the settings of SGD"),
    ):
        folder = tmp_path / what
        made_up(folder, recipe.load("cifar10", [setting]).run("sgd", 1, "cosine"), [50.0, 60.0])
        assert f" Ours differ in {what}: " in " ".join(narrative.notes(collect([folder])[0]))
    # an optimizer without a number in the paper
    wmt = recipe.load("wmt14-en-de", ["optimizers.sgd.lr=0.2"])
    for name in ("sgd", "adam"):
        made_up(tmp_path / "wmt", wmt.run(name, 1), [9.0, 8.0], metric="valid_perplexity")
    assert "Ours differ" not in " ".join(narrative.notes(collect([tmp_path / "wmt"])[0]))


@pytest.mark.parametrize("published", [False, True])
def test_other_data_beside_the_papers_numbers(tmp_path: Path, published: bool) -> None:
    """With the paper's settings but other images, the paper's numbers are not comparable."""
    spec = recipe.load("cifar10").run("sgd", 1, "cosine")
    RunDirectory(tmp_path / "run").prepare(spec, "0123456789abcdef", None, [], published=published)
    text = " ".join(narrative.notes(collect([tmp_path])[0]))
    assert "The paper's numbers are for ResNet-110" in text
    told = "Our data (fingerprint 0123456789ab) are not known to be the paper's."
    assert (told in text) == (not published)


def test_runs_that_do_not_compare(recipe_file: Path, tmp_path: Path) -> None:
    plan = recipe.load(str(recipe_file))
    base = tmp_path / "base"
    made_up(base, plan.run("sgd", 1), [50.0, 60.0])
    for name, settings, expected in (
        ("longer", ["schedule.epochs=3"], "differ in train: they cannot stand in one table"),
        ("other", ["model.width=4"], "differ in model: they cannot stand in one table"),
        ("rate", ["optimizer.lr=1.0"], "differ in optimizer settings: they cannot stand"),
        ("data", ["data.flip=false"], "differ in data: they cannot stand"),
    ):
        changed = recipe.load(str(recipe_file), settings)
        made_up(tmp_path / name, changed.run("sgd", 9), [50.0])
        with pytest.raises(ExperimentError, match=expected):
            collect([base, tmp_path / name])
    of_other_data = made_up(tmp_path / "fingerprint", plan.run("sgd", 9), [50.0])
    text = of_other_data.manifest.read_text()
    of_other_data.manifest.write_text(text.replace('"made up"', '"of other data"'))
    with pytest.raises(ExperimentError, match="differ in data: they cannot stand"):
        collect([base, tmp_path / "fingerprint"])
    made_up(tmp_path / "copy", plan.run("sgd", 1), [50.0, 60.0])
    with pytest.raises(ExperimentError, match="are the same run twice"):
        collect([base, tmp_path / "copy"])
    with pytest.raises(ExperimentError, match="no runs in it"):
        collect([base / "runs" / plan.run("sgd", 1).label / "checkpoint"])


def test_colors_differ_and_belong_to_the_optimizer() -> None:
    styles = STYLES.values()
    assert len({one.color for one in styles}) == len({one.marker for one in styles}) == len(styles)
    unknown = [f"mine-{i}" for i in range(3)]
    found = [*styles, *map(style_of, unknown)]
    assert len({one.color for one in found}) == len({one.marker for one in found}) == len(found)
    assert list(map(style_of, reversed(unknown)))[::-1] == found[-3:]
    assert [style_of(name).label for name in ("mine-0", "sgd-no-warmup", "apollo-belief-2")] == [
        "mine-0",
        "SGD, no warmup",
        "Apollo, belief, 2",
    ]


def test_values_on_an_axis() -> None:
    assert [short(x) for x in (0.2, 10.0, 5e-4, 2.5e-5)] == ["0.2", "10", "5e-4", "2.5e-5"]


def test_a_metric_that_is_better_when_lower(tmp_path: Path) -> None:
    """Several tasks in one report, each by its own metric."""
    plan = recipe.load("wordnet")
    for name, values in (("sgd", [300.0, 310.0]), ("apollo", [280.0, 292.0])):
        for seed, value in enumerate(values):
            made_up(tmp_path, plan.run(name, seed), [500.0, value], metric="valid_perplexity")
    images = recipe.load("fashion-mnist").run("apollo", 1)
    made_up(tmp_path / "images", images, [50.0, 60.0])
    first, second = page.write([tmp_path, tmp_path / "images"], tmp_path / "page")
    assert (first.task, second.task) == ("fashion-mnist", "wordnet")
    assert narrative.headline(second) == (
        "Best mean test perplexity: Apollo, 286.00 ± 8.49. Apollo is 19.00 better than SGD (95 % "
        "interval of its lead +6.29 to +31.71, p = 0.033, 2 seeds)."
    )
    assert cells(second, "Apollo's lead [95 % interval]")["SGD"].startswith("+19.00 [+6.29")
    # the first of two evaluations is the last one before three quarters of the run
    assert cells(second, "time to 500.00 (s)") == {"SGD": "10.0 ± 0.0", "Apollo": "10.0 ± 0.0"}
    assert (tmp_path / "page" / "wordnet_validation_perplexity.png").exists()
    text = (tmp_path / "page" / "results.md").read_text()
    assert "## fashion-mnist" in text
    assert "## wordnet" in text
    with (tmp_path / "page" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["test_perplexity"] for line in lines] == ["", "300.0", "310.0", "280.0", "292.0"]
    assert [line["accuracy"] for line in lines] == ["60.0", "", "", "", ""]
