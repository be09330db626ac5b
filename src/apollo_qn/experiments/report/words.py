"""The outcome and what the numbers stand for, in words."""

from __future__ import annotations

from apollo_qn.experiments.recipe import RunSpec
from apollo_qn.experiments.report.summary import Section, Summary


def finding(summary: Summary) -> str:
    """The outcome, whoever wins."""
    if all(row.score is None for row in summary.rows):
        return "No run has finished yet."
    one = len(summary.sections) == 1
    say = _compared if summary.sweep is None else _swept
    texts = [say(section, summary) for section in summary.sections]
    if not one:
        texts = [
            f"Schedule {section.schedule}: {text}"
            for section, text in zip(summary.sections, texts, strict=True)
        ]
    if not all(run.finished for run in summary.runs):
        texts.append("Not all runs have finished: see the last column of the table.")
    return " ".join(texts)


def _compared(section: Section, summary: Summary) -> str:
    best, rival, ours = section.best, section.rival, section.ours
    if best is None or best.score is None:
        return "no run has finished yet."
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
    return text + "."


def _swept(section: Section, summary: Summary) -> str:
    means: dict[str, list[float]] = {}
    for row in section.rows:
        if row.score is not None:
            means.setdefault(row.label, []).append(row.score.mean)
    spans = sorted((max(found) - min(found), label) for label, found in means.items())
    if not spans:
        return "no run has finished yet."
    told = ", ".join(f"{label} {span:.2f}" for span, label in spans)
    return f"Between its best and worst value the mean {summary.metric.label} differs by: {told}."


def notes(summary: Summary) -> list[str]:
    """What the numbers stand for."""
    spec = summary.runs[0].spec
    examples = spec.data.train_examples
    seeds = sorted({run.spec.seed for run in summary.runs})
    part = f", the first {examples} training examples" if examples else ""
    schedules = ", ".join(f"{section.schedule} ({section.length})" for section in summary.sections)
    found = [
        f"{spec.task}{part}; {spec.model}; batch {spec.train.batch_size}; "
        f"schedule {schedules}; seeds {', '.join(map(str, seeds))}.",
        "Mean ± standard deviation over the seeds of the runs that finished, of the trained model. "
        "Wall time is that of training and evaluation in one process of several; optimizer step: "
        "the median of optimizer.step() alone, and its share of forward pass, backward pass and "
        "step together.",
    ]
    remarks = [text for run in summary.runs for text in run.manifest["data"].get("remarks", [])]
    found += dict.fromkeys(remarks)
    if summary.sweep is None:
        found.append(_on_differences(summary))
    elif summary.sweep == "lr-robustness":
        found.append(
            "Each column multiplies the learning rates (and where Apollo's warmup begins) by a "
            "factor and divides weight decay by it, so that their product stays (eq. 14)."
        )
    else:
        found.append(
            "Each column is the weight decay of the optimizers that state a number; those whose "
            "decay is coupled have the decay of equal strength (eq. 14)."
        )
    if summary.paper is not None:
        found.append(_on_paper(summary, spec))
    machines = {run.manifest["machine"]["cpu"]: run.manifest["machine"] for run in summary.runs}
    versions = summary.runs[0].manifest["versions"]
    where = "; ".join(f"{m['cpu']}, {m['cores']} cores" for m in machines.values())
    found.append(
        f"Measured on {where}; torch {versions['torch']}, apollo-qn {versions['apollo_qn']}."
    )
    if len(machines) > 1:
        found.append("The runs come from different machines: their times do not compare.")
    return found


def _on_differences(summary: Summary) -> str:
    text = (
        "Apollo's lead: by how much its metric is better, paired by seed, with a 95 % bootstrap "
        "interval (percentiles; of a few seeds it is too narrow) and the p-value of a two-sided "
        "paired t-test, not corrected for the number of rows."
    )
    targets = [
        f"{section.target:.2f}" + (f" ({section.schedule})" if len(summary.sections) > 1 else "")
        for section in summary.sections
        if section.target is not None
    ]
    if targets:
        text += (
            f" Time to target: wall time to the first evaluation at which the "
            f"{summary.curve.label} reaches {', '.join(targets)}"
        )
        if all(section.asked_target is None for section in summary.sections):
            text += ", which is what the best of the others has after three quarters of a run"
        text += "."
    return text


def _on_paper(summary: Summary, spec: RunSpec) -> str:
    assert summary.paper is not None
    theirs = summary.paper
    lengths = ", ".join(
        f"{theirs.schedules[name]} ({name})" for name in theirs.paper if name in theirs.schedules
    )
    text = (
        f"The paper's numbers are of {theirs.model}, batch {theirs.train.batch_size}, {lengths}, "
        f"{len(theirs.seeds)} runs."
    )
    same = (
        spec.model == theirs.model
        and spec.data == theirs.data
        and all(
            theirs.schedules.get(section.schedule) == section.rows[0].runs[0].spec.train.schedule
            for section in summary.sections
        )
    )
    return text if same else text + " Ours are of another size: they do not compare with them."
