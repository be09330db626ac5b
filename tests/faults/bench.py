"""Faults of the evaluation."""

from __future__ import annotations

from tests.faults import Fault

BENCH = "bench/src/apollo_bench"
TESTS = "bench/tests"
IMAGES = f"{TESTS}/workloads/image_classification"
LANGUAGE = f"{TESTS}/workloads/language_modeling"
TRANSLATION = f"{TESTS}/workloads/translation"
LOOP = (f"{TESTS}/training/test_loop.py",)
REPORT = (f"{TESTS}/report",)

FAULTS = [
    # training
    Fault(
        "the first line of the metrics is lost on resumption",
        BENCH,
        "self.metrics.truncate(offset)",
        "self.metrics.truncate(0)",
        LOOP,
    ),
    Fault(
        "lines after the checkpoint stay",
        BENCH,
        "            self.metrics.truncate(offset)\n",
        "",
        LOOP,
    ),
    Fault(
        "the best checkpoint is the last",
        BENCH,
        "if self.best is not None and not metric.better(value, self.best):",
        "if False:",
        LOOP,
    ),
    Fault(
        "the loss of a line is that of all lines",
        BENCH,
        "        self.line_loss.zero_()\n",
        "",
        LOOP,
    ),
    Fault(
        "the random numbers are not restored",
        BENCH,
        'torch.set_rng_state(mine["random"])',
        "pass",
        (*LOOP, LANGUAGE + "/test_language_workload.py"),
    ),
    Fault(
        "gradients are not clipped",
        BENCH,
        "max_norm=self.spec.train.clip_norm",
        "max_norm=1e9",
        (f"{TESTS}/launch/test_local_processes.py",),
    ),
    Fault(
        "parts of a batch count alike",
        BENCH,
        "return loss * (len(labels) / len(batch[1])), ()",
        "return loss, ()",
        (f"{TESTS}/launch/test_local_processes.py", IMAGES),
    ),
    Fault(
        "the average is of the last evaluation alone",
        BENCH,
        "[-self.spec.train.average_checkpoints :]",
        "[-1:]",
        (LANGUAGE + "/test_language_workload.py",),
    ),
    # schedules and recipes
    Fault(
        "a milestone is one step late",
        BENCH,
        "sum(step >= edge for edge in edges)",
        "sum(step > edge for edge in edges)",
        (f"{TESTS}/config",),
    ),
    Fault(
        "a cosine ends one step early",
        BENCH,
        "math.cos(math.pi * min(step, steps) / steps)",
        "math.cos(math.pi * min(step + 1, steps) / steps)",
        (f"{TESTS}/config",),
    ),
    Fault(
        "a warmup is one step late",
        BENCH,
        "min(1.0, (step + 1) / warmup)",
        "min(1.0, step / warmup)",
        (f"{TESTS}/config",),
    ),
    Fault(
        "a shortened schedule keeps its milestones",
        BENCH,
        "milestone * share for milestone",
        "milestone for milestone",
        (f"{TESTS}/config",),
    ),
    # images
    Fault(
        "accuracy is of batches",
        BENCH,
        "100.0 * right / images",
        "100.0 * right / (images + 1)",
        (IMAGES, *LOOP),
    ),
    Fault(
        "each image of a batch is shifted alike",
        BENCH,
        "rows = shifts.top[:, None] +",
        "rows = shifts.top[:1, None] +",
        (IMAGES,),
    ),
    Fault(
        "every image is mirrored",
        BENCH,
        "mirrored = torch.rand(n, generator=generator) < 0.5",
        "mirrored = torch.rand(n, generator=generator) < 1.5",
        (IMAGES,),
    ),
    Fault(
        "the standard deviation is of the population",
        BENCH,
        "(count.sum() - 1)",
        "count.sum()",
        (IMAGES,),
    ),
    Fault(
        "the shorter side is stretched",
        BENCH,
        "shorter = min(image.size)",
        "shorter = max(image.size)",
        (IMAGES,),
    ),
    Fault(
        "a random crop's aspect is not uniform in the logarithm",
        BENCH,
        "math.exp(random.uniform(lowest, highest))",
        "random.uniform(*_ASPECTS)",
        (IMAGES,),
    ),
    Fault(
        "weights are initialised by the fan in", BENCH, 'mode="fan_out"', 'mode="fan_in"', (IMAGES,)
    ),
    # language
    Fault(
        "the last token of an epoch is predicted from the wrong stream",
        BENCH,
        "offset + stream * self._length + step",
        "offset + step",
        (LANGUAGE,),
    ),
    Fault(
        "held-out text is read without its first input",
        BENCH,
        "lead = int(begin == 0)",
        "lead = 0",
        (LANGUAGE,),
    ),
    Fault(
        "the hidden state is not cut off",
        BENCH,
        "(hidden.detach().float(), cell.detach().float())",
        "(hidden.float(), cell.float())",
        (LANGUAGE,),
    ),
    Fault(
        "the forget gate's bias is the input gate's",
        BENCH,
        "nn.init.ones_(parameter.chunk(4)[1])",
        "nn.init.ones_(parameter.chunk(4)[0])",
        (LANGUAGE,),
    ),
    # translation
    Fault(
        "BLEU has no brevity penalty",
        BENCH,
        "right, all_of_them, words, reference_words, smooth_method",
        "right, all_of_them, words, words, smooth_method",
        (TRANSLATION, LANGUAGE),
    ),
    Fault(
        "perplexity counts padding",
        BENCH,
        "(wanted != PADDING).sum()",
        "torch.tensor(wanted.numel())",
        (TRANSLATION, LANGUAGE),
    ),
    Fault(
        "labels are not smoothed",
        BENCH,
        "label_smoothing=self._data.label_smoothing",
        "label_smoothing=0.0",
        (TRANSLATION, LANGUAGE),
    ),
    Fault(
        "the length penalty multiplies",
        BENCH,
        "length**self.length_penalty",
        "length**-self.length_penalty",
        (TRANSLATION,),
    ),
    Fault(
        "beams take each other's past",
        BENCH,
        "        self.cache.reorder(beams)\n",
        "",
        (TRANSLATION,),
    ),
    Fault(
        "a target sees what follows",
        BENCH,
        "self.attention.project(x), causal=True",
        "self.attention.project(x), causal=False",
        (TRANSLATION,),
    ),
    Fault(
        "a batch has too many tokens",
        BENCH,
        "width * (place - starts[-1] + 1) > max_tokens",
        "width * (place - starts[-1]) > max_tokens",
        (TRANSLATION,),
    ),
    Fault(
        "pairs of unlike lengths are kept",
        BENCH,
        "longer > limits.ratio * shorter",
        "longer > limits.ratio * longer",
        (TRANSLATION,),
    ),
    # optimizers
    Fault(
        "embeddings go to Muon",
        BENCH,
        "p.dim() >= 2 and id(p) not in outer",
        "p.dim() >= 2",
        (f"{TESTS}/optimizers",),
    ),
    Fault(
        "the average of B is not corrected",
        BENCH,
        "correction = 1 - beta**steps if steps else 1.0",
        "correction = 1.0",
        (f"{TESTS}/optimizers",),
    ),
    # the search
    Fault(
        "the search takes the worst",
        BENCH,
        "known[number] * (1 if curve.higher_is_better else -1)",
        "known[number] * (-1 if curve.higher_is_better else 1)",
        (f"{TESTS}/search",),
    ),
    Fault(
        "trials are spaced evenly, not by factors",
        BENCH,
        "math.exp(math.log(low) + share * math.log(high / low))",
        "low + share * (high - low)",
        (f"{TESTS}/search",),
    ),
    # runs that are kept, and what is shown of them
    Fault(
        "an archive loses the last evaluation",
        BENCH,
        "    for line in lines:\n        times = _rounded",
        "    for line in lines[:-1]:\n        times = _rounded",
        (f"{TESTS}/runs",),
    ),
    Fault(
        "lines of the curvature after the checkpoint stay",
        BENCH,
        "self._file.truncate(_bytes_until(path, step))",
        "pass",
        (f"{TESTS}/runs",),
    ),
    Fault(
        "the time left counts no jobs",
        BENCH,
        "max([sum(rest) / jobs, *rest], default=0.0)",
        "sum(rest)",
        (f"{TESTS}/cli",),
    ),
    Fault(
        "a step's ratio is of the means",
        BENCH,
        "statistics.median(a / b for a, b in zip(self.times, self.peer, strict=True))",
        "statistics.fmean(self.times) / statistics.fmean(self.peer)",
        (f"{TESTS}/steptime",),
    ),
    Fault(
        "equally frequent words are in no order",
        BENCH,
        "    kept.sort()\n",
        "    kept.sort(key=lambda pair: pair[0])\n",
        (LANGUAGE,),
    ),
    # the report
    Fault(
        "the spread is of the population",
        BENCH,
        "statistics.stdev(known)",
        "statistics.pstdev(known)",
        REPORT,
    ),
    Fault(
        "a difference has the wrong sign",
        BENCH,
        "one[seed] - other[seed] for seed in seeds",
        "other[seed] - one[seed] for seed in seeds",
        REPORT,
    ),
    Fault(
        "a row with diverged runs may be the best",
        BENCH,
        "sound = [row for row in scored if not row.diverged] or scored",
        "sound = scored",
        REPORT,
    ),
    Fault(
        "the target is reached one evaluation late",
        BENCH,
        'lines[0]["step"], lines[0]["time"]["seconds"], True',
        'lines[-1]["step"], lines[-1]["time"]["seconds"], True',
        REPORT,
    ),
]
