"""Faults of what a user brings: optimizers, models and data."""

from __future__ import annotations

from tests.faults import BENCH, Fault

CUSTOM = ("bench/tests/optimizers/test_custom.py",)
BASELINE = ("bench/tests/runs/test_baseline.py",)
CUSTOM_PARTS = ("bench/tests/workloads/test_custom_parts.py",)
OVERVIEW = ("bench/tests/report/test_overview.py",)
CURVES = ("bench/tests/report/test_curves.py",)
UNUSABLE = ("bench/tests/workloads/test_unusable_files.py",)

FAULTS = [
    Fault(
        "unknown arguments of a class are passed over",
        BENCH,
        "        for name in given.keys() - named.keys():\n",
        "        for name in ():\n",
        CUSTOM,
    ),
    Fault(
        "a list stays a list where the class has a tuple",
        BENCH,
        "        name: tuple(value)\n",
        "        name: value\n",
        CUSTOM,
    ),
    Fault(
        "an evaluation has the weights of training",
        BENCH,
        "        self.model.eval()\n        self.set_optimizer_mode(training=False)\n",
        "        self.model.eval()\n",
        CUSTOM,
    ),
    Fault(
        "a resumed run is not in training mode",
        BENCH,
        "        self.set_optimizer_mode(training=True)  # as when the checkpoint was written\n",
        "",
        CUSTOM,
    ),
    Fault(
        "second derivatives have no graph",
        BENCH,
        "create_graph=self.needs_graph",
        "create_graph=False",
        CUSTOM,
    ),
    Fault(
        "other code goes on with a run",
        BENCH,
        'if one["version"] != other["version"] and one["path"] == other["path"]:',
        "if False:",
        CUSTOM,
    ),
    Fault(
        "a trial step draws the run's random numbers",
        BENCH,
        "    with torch.random.fork_rng(devices=gpus):\n",
        "    if True:\n",
        CUSTOM,
    ),
    Fault(
        "a name may be a path",
        BENCH,
        'r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"',
        'r"[A-Za-z0-9./][A-Za-z0-9._+/-]{0,63}"',
        CUSTOM,
    ),
    # comparisons with finished runs
    Fault(
        "other settings are compared with a baseline",
        BENCH,
        "            found = differences(shared[spec.schedule], spec.shared())\n",
        "            found: list[str] = []\n",
        BASELINE,
    ),
    Fault(
        "other data are compared with a baseline",
        BENCH,
        "            if wanted not in (None, fingerprint):\n",
        "            if False:\n",
        BASELINE,
    ),
    # models and data
    Fault(
        "every class gives its first images to the test",
        BENCH,
        "        order = torch.randperm(count, generator=generator).tolist()\n",
        "        order = list(range(count)) if label else []\n",
        CUSTOM_PARTS,
    ),
    Fault(
        "the fingerprint of images does not see their pixels",
        BENCH,
        "folder.files, folder.contents)\n",
        "folder.files, folder.sizes)\n",
        CUSTOM_PARTS,
    ),
    Fault(
        "12 bits are taken for 16",
        BENCH,
        "            return bits - 8\n        return 8\n",
        "            return 8\n        return 8\n",
        UNUSABLE,
    ),
    Fault(
        "pixels of an unknown range are used",
        BENCH,
        "            return unknown_range(image, content)\n",
        "",
        UNUSABLE,
    ),
    Fault(
        "the test text is the validation text",
        BENCH,
        "        pieces = (line[: cuts[0]], line[cuts[0] : cuts[1]], line[cuts[1] :])\n",
        "        pieces = (line[: cuts[0]], line[cuts[1] :], line[cuts[0] : cuts[1]])\n",
        CUSTOM_PARTS,
    ),
    Fault(
        "held-out pairs are trained on",
        BENCH,
        "    edges = (0, kept.size - 2 * held_out, kept.size - held_out, kept.size)\n",
        "    edges = (0, kept.size, kept.size, kept.size)\n",
        CUSTOM_PARTS,
    ),
    Fault(
        "the state of a model of the user is lost",
        BENCH,
        "            return losses.mean() * share, after\n",
        "            return losses.mean() * share, ()\n",
        CUSTOM_PARTS,
    ),
    Fault(
        "own data stand beside the paper's numbers",
        BENCH,
        "            if self.task in ours and self.task != self.data.kind:\n",
        "            if False:\n",
        CUSTOM_PARTS,
    ),
    # the score over tasks
    Fault(
        "the target of a score is what the best optimizer reaches",
        BENCH,
        "    last = math.ceil(_REACHED_BY * len(found)) - 1\n",
        "    last = 0\n",
        OVERVIEW,
    ),
    Fault(
        "a run that does not reach the target counts with its length",
        BENCH,
        "    updates = [one.updates if one.reached else math.inf for one in reached]\n",
        "    updates = [float(one.updates) for one in reached]\n",
        OVERVIEW,
    ),
    Fault(
        "ratios are to the slowest",
        BENCH,
        "    best = min(found[index][unit] for found in times.values())\n",
        "    best = max(found[index][unit] for found in times.values())\n",
        OVERVIEW,
    ),
    # the curves of many optimizers
    Fault(
        "two optimizers have one marker on the page",
        BENCH,
        '"p": ("circle_cross", "⊕")',
        '"p": ("circle", "●")',
        CURVES,
    ),
    Fault(
        "a dark color is that of another optimizer",
        BENCH,
        '"#CC79A7", "D", "#FA57E9"',
        '"#CC79A7", "D", "#F697E8"',
        CURVES,
    ),
    Fault(
        "learning rates are always on a linear axis",
        BENCH,
        '        figure["log"] |= max(peaks) > _RATES_APART * min(peaks)\n',
        "",
        CURVES,
    ),
]
