"""Faults of the evaluation: options, runs, step times, figures, and scripts."""

from __future__ import annotations

from tests.faults import BENCH, BENCH_TESTS, Fault

CUSTOM = (f"{BENCH_TESTS}/optimizers/test_custom.py",)
LOCAL = (f"{BENCH_TESTS}/launch/test_local_processes.py",)
REPORT = (f"{BENCH_TESTS}/report/test_report.py",)
FIGURES = (f"{BENCH_TESTS}/report/test_figures.py",)
OVERVIEW = (f"{BENCH_TESTS}/report/test_overview.py",)
STEPTIME = (f"{BENCH_TESTS}/steptime/test_steptime.py",)
RESULTS = (f"{BENCH_TESTS}/test_results.py",)
LENGTHS = (f"{BENCH_TESTS}/test_lengths.py",)
RELEASE = ("tests/test_release.py",)

FAULTS = [
    # files and options
    Fault(
        "a file is written in its place",
        f"{BENCH}/atomic_write.py",
        'temporary = path.with_name(path.name + ".tmp")',
        "temporary = path",
        (f"{BENCH_TESTS}/runs/test_damaged_runs.py",),
    ),
    Fault(
        "defaults of an own optimizer are not completed",
        f"{BENCH}/config/custom_optimizer.py",
        "arguments = complete_arguments(target, arguments, key)",
        "arguments = dict(arguments)",
        CUSTOM,
    ),
    Fault(
        "runs share no cores",
        f"{BENCH}/config/execution.py",
        "threads = threads or max(1, available_cores() // (jobs * devices))",
        "threads = threads or available_cores()",
        LOCAL,
    ),
    Fault(
        "--set changes the first of the selected optimizers alone",
        f"{BENCH}/config/overrides.py",
        "for name in chosen[first] or tables:",
        "for name in list(chosen[first] or tables)[:1]:",
        (f"{BENCH_TESTS}/config/test_recipe.py",),
    ),
    Fault(
        "a config error names no allowed keys",
        f"{BENCH}/config/config_errors.py",
        "if owner is not None:\n                message +=",
        "if False:\n                message +=",
        (f"{BENCH_TESTS}/config/test_recipe.py",),
    ),
    Fault(
        "own data have the name of a recipe",
        f"{BENCH}/cli/selection.py",
        'return f"own-{name}" if name in recipe.recipe_names() else name or kind',
        "return name or kind",
        (f"{BENCH_TESTS}/workloads/test_custom_parts.py",),
    ),
    Fault(
        "own code may change between preparation and training",
        f"{BENCH}/user_code.py",
        'if source["version"] != now["version"] and now["folder"] is not None:',
        "if False:",
        CUSTOM,
    ),
    # launch
    Fault(
        "a killed worker counts as stopped",
        f"{BENCH}/launch/run_scheduler.py",
        'self.status = "failed"\n            lines',
        'self.status = "stopped"\n            lines',
        (f"{BENCH_TESTS}/launch/test_run_scheduler.py",),
    ),
    Fault(
        "the time left is that of the whole run",
        f"{BENCH}/launch/run_scheduler.py",
        "return self.seconds / self.step * (self.steps - self.step)",
        "return self.seconds / self.step * self.steps",
        (f"{BENCH_TESTS}/launch/test_progress.py",),
    ),
    Fault(
        "two runs may share a directory",
        f"{BENCH}/launch/run_experiment.py",
        "if other is not spec and other != spec:",
        "if False:",
        (f"{BENCH_TESTS}/cli/test_compare.py",),
    ),
    Fault(
        "an own model is not tried before the runs",
        f"{BENCH}/launch/custom_code_checks.py",
        "    _check_models(specs, workloads)\n",
        "",
        (f"{BENCH_TESTS}/workloads/test_custom_parts.py",),
    ),
    # runs
    Fault(
        "runs with other data stand in one table",
        f"{BENCH}/runs/compatibility.py",
        "(spec.data, run.fingerprint)",
        "spec.data",
        REPORT,
    ),
    Fault(
        "a timer counts seconds",
        f"{BENCH}/training/step_timer.py",
        "1e3 * (time.perf_counter() - before)",
        "time.perf_counter() - before",
        (f"{BENCH_TESTS}/training/test_step_timer.py",),
    ),
    # step times
    Fault(
        "the scaled vocabulary keeps its cutoffs",
        f"{BENCH}/steptime/parameter_sets.py",
        "[cutoff // scale for cutoff in cutoffs]",
        "cutoffs",
        STEPTIME,
    ),
    Fault(
        "AdamW is measured if it is named",
        f"{BENCH}/steptime/candidates.py",
        "if c.name in names or c.name == PEER]",
        "if c.name in names]",
        STEPTIME,
    ),
    Fault(
        "a table of step times leaves out what is not available",
        f"{BENCH}/steptime/presentation.py",
        'f"{timings.name}: not available, {timings.unavailable}"',
        'f"{timings.name}: not available"',
        STEPTIME,
    ),
    Fault(
        "an interrupted benchmark writes an incomplete set",
        f"{BENCH}/steptime/benchmark.py",
        "            if result.copy_times:\n",
        "            if True:\n",
        STEPTIME,
    ),
    # figures and tables
    Fault(
        "bars show the standard deviation",
        f"{BENCH}/report/figures.py",
        "index, value.mean, xerr",
        "index, value.std or 0.0, xerr",
        FIGURES,
    ),
    Fault(
        "an axis shows 5e-04",
        f"{BENCH}/report/figure_axes.py",
        'return f"{float(digits):g}e{int(exponent)}"',
        'return f"{float(digits):g}e{exponent}"',
        REPORT,
    ),
    Fault(
        "the share that sigma rectifies is no percentage",
        f"{BENCH}/report/curvature_figures.py",
        "lambda tensors: 100 * tensors.rectified",
        "lambda tensors: tensors.rectified",
        FIGURES,
    ),
    Fault(
        "a trial's rate is not a multiple of the best",
        f"{BENCH}/report/sweep_figures.py",
        "(first_setting(row) / setting, row.score.mean)",
        "(first_setting(row), row.score.mean)",
        FIGURES,
    ),
    Fault(
        "seconds of differently executed runs are compared",
        f"{BENCH}/report/overview.py",
        'return ["updates", "seconds"] if same_execution else ["updates"]',
        'return ["updates", "seconds"]',
        OVERVIEW,
    ),
    Fault(
        "the table of runs has the value of the first seed",
        f"{BENCH}/report/run_table.py",
        '"seed": spec.seed,',
        '"seed": 0,',
        REPORT,
    ),
    # scripts
    Fault(
        "a committed table is not compared",
        "scripts/results.py",
        "    if there != content:\n",
        "    if False:\n",
        RESULTS,
    ),
    Fault(
        "runs with other settings than the protocol's pass",
        "scripts/results.py",
        "elif there[label] != asked[label]:",
        "elif False:",
        RESULTS,
    ),
    Fault(
        "the worse warmup is chosen",
        "scripts/lengths.py",
        "score > best[method][0]:",
        "score < best[method][0]:",
        LENGTHS,
    ),
    Fault(
        "an interval of 95 % is one of 90 %",
        "bench/src/apollo_bench/report/statistics.py",
        "test.confidence_interval(0.95)",
        "test.confidence_interval(0.90)",
        LENGTHS,
    ),
    Fault(
        "a lower perplexity counts as behind",
        "scripts/lengths.py",
        "if metric.higher_is_better else difference(other, ours)",
        "if True else difference(other, ours)",
        LENGTHS,
    ),
    Fault(
        "a tag is released without a date",
        "scripts/check_release.py",
        'found.append(f"{name} has no date of the release, such as 2030-01-31")',
        "pass",
        RELEASE,
    ),
]
