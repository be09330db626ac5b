"""The headline of a report and the notes below its tables, as sentences."""

from __future__ import annotations

import math

from apollo_bench.config.custom_optimizer import CustomSettings
from apollo_bench.config.recipe import Recipe, RunSpec
from apollo_bench.report.run_table import sampled_settings
from apollo_bench.report.statistics import number_text
from apollo_bench.report.summary import Row, ScheduleSection, Summary, best_of
from apollo_bench.runs.loading import Run


def headline(summary: Summary) -> str:
    """Return the outcome in a few sentences, whichever optimizer wins.

    Example:
        >>> from pathlib import Path
        >>> from apollo_bench.report.summary import collect
        >>> [summary] = collect([Path("runs/compare")])
        >>> headline(summary)
        'Best mean test perplexity: ...'
    """
    unfinished = any(run.verdict == "unfinished" for run in summary.runs)
    diverged = _diverged(summary)
    if all(row.score is None for row in summary.rows):
        return f"No run has finished{' yet' if unfinished else ''}.{diverged}"
    one = len(summary.sections) == 1
    say = {None: _compared, "tuning": _tuned}.get(summary.sweep, _swept)
    texts = [say(section, summary) for section in summary.sections]
    if not one:
        texts = [
            f"Schedule {section.schedule}: {text}"
            for section, text in zip(summary.sections, texts, strict=True)
        ]
    if unfinished:
        texts.append("Some runs have not finished: see the last column of the table.")
    return " ".join(texts) + diverged


def _diverged(summary: Summary) -> str:
    """Return a sentence on the optimizers with diverged runs; "" if there are none."""
    parts = []
    for label, rows in _by_label(summary).items():
        count, total = sum(row.diverged for row in rows), sum(len(row.runs) for row in rows)
        if count:
            parts.append(f"{label} ({count} of {total} runs)")
    return f" Diverged: {', '.join(parts)}." if parts else ""


def _by_label(summary: Summary) -> dict[str, list[Row]]:
    """Return the rows of each optimizer, and of each schedule if there are several."""
    found: dict[str, list[Row]] = {}
    for section in summary.sections:
        for row in section.rows:
            one = len(summary.sections) == 1
            label = row.label if one else f"{row.label}, {section.schedule}"
            found.setdefault(label, []).append(row)
    return found


def _compared(section: ScheduleSection, summary: Summary) -> str:
    return _on_apollo(section, summary) + _on_custom(section)


def _on_custom(section: ScheduleSection) -> str:
    """Return the ranks of custom optimizers."""
    text = ""
    for row in section.rows:
        settings = row.runs[0].spec.optimizer
        ours = not isinstance(settings, CustomSettings) or settings.class_path.startswith("torch.")
        if ours or row.score is None or row is section.best:
            continue
        better = sum(section.is_ahead(other, row) for other in section.rows)
        scored = sum(other.score is not None for other in section.rows)
        text += f" {row.label} is number {better + 1} of {scored}, {row.score.text(2)}."
    return text


def _on_apollo(section: ScheduleSection, summary: Summary) -> str:
    best, rival, ours = section.best, section.best_other, section.apollo_row
    if best is None or best.score is None:
        return "no run has finished."
    unit = f" {summary.metric.unit}".rstrip()
    text = f"Best mean {summary.metric.label}: {best.label}, {best.score.text(2)}{unit}."
    lead = None if rival is None else section.lead(rival)
    if ours is None or rival is None or lead is None:
        return text
    gap = f"{abs(lead.mean):.2f}"
    way = (
        "level with" if float(gap) == 0 else f"{gap} {'better' if lead.mean > 0 else 'worse'} than"
    )
    text += f" {ours.label} is {way} {rival.label}"
    if lead.low is not None and lead.high is not None:
        text += f" (95 % interval of its lead {lead.low:+.2f} to {lead.high:+.2f}"
        text += "" if lead.p is None else f", p = {lead.p:.2g}"
        text += f", {lead.pairs} seeds)"
    if len(section.apollo_variants) > 1:
        form = best_of(section.apollo_variants)
        if form is ours:
            text += "; no other variant of Apollo has a better mean"
        elif form is not None and form.score is not None:
            text += f"; the variant of Apollo with the best mean is {form.label}, "
            text += form.score.text(2)
            text += unit
    return text + "."


def _tuned(section: ScheduleSection, summary: Summary) -> str:
    names = dict.fromkeys(row.name for row in section.rows)
    chosen = [
        best_of([row for row in section.rows if row.name == name and not row.diverged])
        for name in names
    ]
    parts = [
        f"{row.label} {sampled_settings(row.runs[0].spec)} ({row.score.text(2)})"
        for row in chosen
        if row is not None and row.score is not None
    ]
    return f"Best {summary.metric.label}: {', '.join(parts)}."


def _swept(section: ScheduleSection, summary: Summary) -> str:
    rows: dict[str, list[Row]] = {}
    for row in section.rows:
        rows.setdefault(row.label, []).append(row)
    spans = []
    for label, rows_of_label in rows.items():
        means = [row.score.mean for row in rows_of_label if row.score is not None]
        bad = any(row.diverged for row in rows_of_label)  # divergence is worse than any number
        if means or bad:
            spans.append((math.inf if bad else max(means) - min(means), label))
    if not spans:
        return "no run has finished."
    parts = ", ".join(
        f"{label} {'diverged at one' if math.isinf(span) else number_text(span, 2)}"
        for span, label in sorted(spans)
    )
    return f"Between its best and worst value the mean {summary.metric.label} differs by: {parts}."


def notes(summary: Summary) -> list[str]:
    """Return the notes that explain the numbers."""
    spec = summary.runs[0].spec
    examples = spec.data.train_examples
    part = f", the first {examples} training examples" if examples else ""
    schedules = ", ".join(f"{section.schedule} ({section.length})" for section in summary.sections)
    found = [
        f"{spec.task}{part}; {spec.model}; batch {spec.train.batch_size}; "
        f"schedule {schedules}; {_seeds(summary)}.",
        "Values are mean ± standard deviation of the trained model over the finished seeds. "
        "An optimizer with diverged runs is best only if all optimizers have some. "
        "Wall time covers training and evaluation; other runs may have shared the machine. "
        "Optimizer step is the median time of optimizer.step(), and its share of forward pass, "
        "backward pass and step.",
    ]
    remarks = [text for run in summary.runs for text in run.manifest["data"].get("remarks", [])]
    found += dict.fromkeys(remarks)
    if summary.sweep is None:
        found.append(_on_differences(summary))
    elif summary.sweep == "tuning":
        found.append(
            "Each optimizer's trials lie at the same relative positions in its log-uniform ranges. "
            "They are scored at the end of the run, on data that is neither trained on nor used "
            "for the final metric of a comparison. Weight decay follows the learning rate, so "
            "that their product is unchanged (eq. 14). A choice at the end of its range may not "
            "be the optimum."
        )
    elif summary.sweep == "lr-robustness":
        found.append(
            "Each column multiplies the learning rates (and Apollo's warmup_init_lr) by a factor "
            "and divides weight decay by it, so that their product is unchanged (eq. 14)."
        )
    else:
        found.append(
            "Each column is the weight decay of the optimizers that state a number; coupled decay "
            "has equal strength (eq. 14)."
        )
    if summary.paper is not None:
        found.append(_on_paper(summary, spec))
    executions = list(dict.fromkeys(describe_execution(run) for run in summary.runs))
    versions = summary.runs[0].manifest["versions"]
    found.append(
        f"Measured on {'; '.join(executions)}; torch {versions['torch']}, "
        f"apollo-qn {versions['apollo_qn']}."
    )
    if len(executions) > 1:
        found.append("The runs were executed in different ways: their times are not comparable.")
    return found


def _seeds(summary: Summary) -> str:
    by_row = {
        (label, str(row.point)): {run.spec.seed for run in row.runs}
        for label, rows in _by_label(summary).items()
        for row in rows
    }
    common = set.intersection(*by_row.values())
    parts = f"seeds {_listed(common)}" if common else "no common seed"
    more: dict[str, set[int]] = {}
    for (label, _), seeds in by_row.items():
        if seeds - common:
            more.setdefault(label, set()).update(seeds - common)
    if not more:
        return parts
    beyond = "; ".join(f"{_listed(seeds)} of {label}" for label, seeds in more.items())
    return f"{parts}{' of all' if common else ''}, also {beyond}"


def _listed(numbers: set[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))


def describe_execution(run: Run) -> str:
    """Return where and how a run was trained, as far as its times depend on it."""
    machine, execution = run.manifest["machine"], run.execution
    parts = [machine["cpu"], f"{machine['cores']} cores"]
    if execution.accelerator == "gpu":
        parts.insert(0, f"{execution.devices} x {machine.get('gpu', 'GPU')}")
    elif execution.devices > 1:
        parts.append(f"{execution.devices} processes per run")
    if execution.nodes > 1:
        parts.append(f"{execution.nodes} such machines")
    if execution.accelerator == "cpu":
        threads = execution.threads
        parts.append(f"{threads} thread{'s' if threads > 1 else ''} per process")
    parts.append(f"precision {run.spec.train.precision}")
    return ", ".join(parts)


def _on_differences(summary: Summary) -> str:
    text = (
        "Apollo's lead is the mean paired difference over seeds. Brackets give Student's 95 % "
        "interval. p is from a two-sided paired t-test, without correction for multiple rows. A "
        "mean is bold if the interval of its lead over each other row does not contain 0."
    )
    targets = [
        f"{section.target:.2f}" + (f" ({section.schedule})" if len(summary.sections) > 1 else "")
        for section in summary.sections
        if section.target is not None
    ]
    if targets:
        text += (
            f" Updates and time to a target count until the first evaluation at which the "
            f"{summary.curve.label} reaches {', '.join(targets)}"
        )
        if all(section.given_target is None for section in summary.sections):
            text += ", the value of the best other optimizer after three quarters of a run"
        text += (
            "; seconds include evaluations. A run that does not reach the target, or diverges, "
            "counts with its whole length. The mean is then marked >, with the number of runs that "
            "reach the target."
        )
    return text


def _on_paper(summary: Summary, spec: RunSpec) -> str:
    assert summary.paper is not None
    theirs = summary.paper
    lengths = ", ".join(
        f"{theirs.schedules[name]} ({name})" for name in theirs.paper if name in theirs.schedules
    )
    text = (
        f"The paper's numbers are for {theirs.model}, batch {theirs.train.batch_size}, {lengths}, "
        f"{len(theirs.seeds)} runs."
    )
    differing = _differing(summary, spec, theirs)
    if differing:
        *most, last = differing
        parts = f"{', '.join(most)} and {last}" if most else last
        text += f" Ours differ in {parts}: they are not comparable."
    data = [run.manifest["data"] for run in summary.runs]
    unknown = dict.fromkeys(one["fingerprint"][:12] for one in data if not one.get("published"))
    if unknown:
        text += f" Our data (fingerprint {', '.join(unknown)}) are not known to be the paper's."
    return text


def _differing(summary: Summary, spec: RunSpec, theirs: Recipe) -> list[str]:
    """Return the settings in which our runs differ from the paper's."""
    steps = theirs.train
    shapes = [
        theirs.schedules.get(section.schedule) == section.rows[0].runs[0].spec.train.schedule
        for section in summary.sections
    ]
    settings = {
        row.label
        for row in summary.rows
        if summary.published(row) is not None
        for run in row.runs
        if run.spec.optimizer != theirs.run(row.name, run.spec.seed, row.schedule).optimizer
    }
    labels = [row.label for row in summary.rows if row.label in settings]
    same = {
        "model": spec.model == theirs.model,
        "data": spec.data == theirs.data,
        "batch size": all(run.spec.train.batch_size == steps.batch_size for run in summary.runs),
        "schedule": all(shapes),
        "gradient clipping": all(
            run.spec.train.clip_norm == steps.clip_norm for run in summary.runs
        ),
        "averaging": all(
            run.spec.train.average_checkpoints == steps.average_checkpoints for run in summary.runs
        ),
        f"the settings of {', '.join(dict.fromkeys(labels))}": not labels,
    }
    return [what for what, equal in same.items() if not equal]
