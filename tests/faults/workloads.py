"""Faults of the workloads: files of the user, data, models, losses and metrics."""

from __future__ import annotations

from tests.faults import Fault

BENCH = "bench/src/apollo_bench"
TESTS = "bench/tests"
IMAGES = f"{TESTS}/workloads/image_classification"
LANGUAGE = f"{TESTS}/workloads/language_modeling"
TRANSLATION = f"{TESTS}/workloads/translation"
LOOP = (f"{TESTS}/training/test_loop.py",)
UNUSABLE = (f"{TESTS}/workloads/test_unusable_files.py",)

FAULTS = [
    # files of the user
    Fault(
        "prepare overwrites what it did not make",
        BENCH,
        "if os.path.lexists(folder / name):",
        "if False:",
        (f"{TESTS}/workloads/test_output_files.py",),
    ),
    Fault(
        "prepare removes all that lies beside its counts",
        BENCH,
        "    for path in counted:\n        path.unlink()\n",
        "    for path in counted[0].parent.iterdir():\n        path.unlink()\n",
        (f"{TESTS}/workloads/test_output_files.py",),
    ),
    Fault(
        "an archive is written among its runs",
        BENCH,
        "    if compatibility.find_run_directories(out):\n",
        "    if False:\n",
        (f"{TESTS}/workloads/test_output_files.py",),
    ),
    Fault(
        "a pipe is waited for",
        BENCH,
        "    if not stat.S_ISREG(mode):\n",
        "    if False:\n",
        UNUSABLE,
    ),
    Fault(
        "a pickle may make arrays of objects",
        BENCH,
        '_NUMBERS = "buif"',
        '_NUMBERS = "buifOVM"',
        UNUSABLE,
    ),
    Fault(
        "an array need not have the bytes of its shape",
        BENCH,
        "            or any(size < 0 for size in shape)\n",
        "",
        UNUSABLE,
    ),
    Fault(
        "what unpacks without end is unpacked",
        BENCH,
        "if self._read > self._limit:",
        "if False:",
        UNUSABLE,
    ),
    Fault(
        "grey of 16 bits becomes white",
        BENCH,
        'if image.mode[0] != "I":',
        "if True:",
        UNUSABLE,
    ),
    Fault(
        "a picture of any size is decoded",
        BENCH,
        "if image.width * image.height > MAX_PIXELS:",
        "if False:",
        UNUSABLE,
    ),
    Fault(
        "files of other endings are counted nowhere",
        BENCH,
        "                    unused[kind] += 1\n",
        "                    pass\n",
        UNUSABLE,
    ),
    Fault(
        "a zero byte in a translation passes",
        BENCH,
        'if b"\\0" in row:',
        "if False:",
        UNUSABLE,
    ),
    Fault(
        "lines that end in CR alone are one line",
        BENCH,
        "    if problem := line_end_error(returns, len(lines)):\n",
        "    if problem := None:\n",
        UNUSABLE,
    ),
    Fault(
        "text in UTF-16 is read as UTF-8",
        BENCH,
        "    if not marked and not unmarked:\n",
        "    if True:\n",
        UNUSABLE,
    ),
    Fault(
        "a small shared memory is filled",
        BENCH,
        "return size * in_flight <= _SHARE * free.f_bavail * free.f_frsize",
        "return True",
        (f"{IMAGES}/test_imagenet.py",),
    ),
    Fault(
        "a worker that hangs is waited for without end",
        BENCH,
        "timeout=_TIMEOUT if self._workers else 0",
        "timeout=0",
        (f"{IMAGES}/test_imagenet.py",),
    ),
    # images
    Fault(
        "accuracy is of batches",
        BENCH,
        "100.0 * right / images",
        "100.0 * right / (images + 1)",
        (f"{IMAGES}/test_image_workload.py",),
    ),
    Fault(
        "each image of a batch is shifted alike",
        BENCH,
        "rows = shifts.top[:, None] +",
        "rows = shifts.top[:1, None] +",
        (f"{IMAGES}/test_fashion_mnist.py",),
    ),
    Fault(
        "every image is mirrored",
        BENCH,
        "mirrored = torch.rand(n, generator=generator) < 0.5",
        "mirrored = torch.rand(n, generator=generator) < 1.5",
        (f"{IMAGES}/test_fashion_mnist.py",),
    ),
    Fault(
        "the standard deviation is of the population",
        BENCH,
        "(count.sum() - 1)",
        "count.sum()",
        (f"{IMAGES}/test_fashion_mnist.py",),
    ),
    Fault(
        "the shorter side is stretched",
        BENCH,
        "shorter = min(image.size)",
        "shorter = max(image.size)",
        (f"{IMAGES}/test_cropping.py",),
    ),
    Fault(
        "a random crop's aspect is not uniform in the logarithm",
        BENCH,
        "math.exp(random.uniform(lowest, highest))",
        "random.uniform(*_ASPECTS)",
        (f"{IMAGES}/test_cropping.py",),
    ),
    Fault(
        "weights are initialized by the fan in",
        BENCH,
        'mode="fan_out"',
        'mode="fan_in"',
        (f"{IMAGES}/test_resnet.py",),
    ),
    # language
    Fault(
        "the last token of an epoch is predicted from the wrong stream",
        BENCH,
        "offset + stream * self._length + step",
        "offset + step",
        (f"{LANGUAGE}/test_bptt_batches.py",),
    ),
    Fault(
        "held-out text is read without its first input",
        BENCH,
        "lead = int(begin == 0)",
        "lead = 0",
        (f"{LANGUAGE}/test_bptt_batches.py",),
    ),
    Fault(
        "the hidden state is not cut off",
        BENCH,
        "(hidden.detach().float(), cell.detach().float())",
        "(hidden.float(), cell.float())",
        (f"{LANGUAGE}/test_language_workload.py",),
    ),
    Fault(
        "the forget gate's bias is the input gate's",
        BENCH,
        "nn.init.ones_(parameter.chunk(4)[1])",
        "nn.init.ones_(parameter.chunk(4)[0])",
        (f"{LANGUAGE}/test_lstm.py",),
    ),
    # translation
    Fault(
        "BLEU has no brevity penalty",
        BENCH,
        "right, all_of_them, words, reference_words, smooth_method",
        "right, all_of_them, words, words, smooth_method",
        (f"{LANGUAGE}/test_language_workload.py",),
    ),
    Fault(
        "perplexity counts padding",
        BENCH,
        "(wanted != PADDING).sum()",
        "torch.tensor(wanted.numel())",
        (f"{LANGUAGE}/test_language_workload.py",),
    ),
    Fault(
        "labels are not smoothed",
        BENCH,
        "label_smoothing=self._data.label_smoothing",
        "label_smoothing=0.0",
        (f"{LANGUAGE}/test_language_workload.py",),
    ),
    Fault(
        "the length penalty multiplies",
        BENCH,
        "length**self.length_penalty",
        "length**-self.length_penalty",
        (f"{TRANSLATION}/test_beam_search.py",),
    ),
    Fault(
        "beams take each other's past",
        BENCH,
        "        self.cache.reorder(beams)\n",
        "",
        (f"{TRANSLATION}/test_beam_search.py",),
    ),
    Fault(
        "a target sees what follows",
        BENCH,
        "self.attention.project(x), causal=True",
        "self.attention.project(x), causal=False",
        (f"{TRANSLATION}/test_beam_search.py",),
    ),
    Fault(
        "a batch has too many tokens",
        BENCH,
        "width * (index - starts[-1] + 1) > max_tokens",
        "width * (index - starts[-1]) > max_tokens",
        (f"{TRANSLATION}/test_token_batches.py",),
    ),
    Fault(
        "pairs of unlike lengths are kept",
        BENCH,
        "longer > limits.ratio * shorter",
        "longer > limits.ratio * longer",
        (f"{TRANSLATION}/test_parallel_text.py",),
    ),
    # networks and losses
    Fault(
        "a residual block has no shortcut",
        f"{BENCH}/workloads/image_classification/resnet.py",
        "torch.relu(y + self.shortcut(x))",
        "torch.relu(y)",
        (f"{IMAGES}/test_resnet.py",),
    ),
    Fault(
        "a bottleneck has no shortcut",
        f"{BENCH}/workloads/image_classification/resnext.py",
        "torch.relu(y + self.shortcut(x))",
        "torch.relu(y)",
        (f"{IMAGES}/test_resnext.py",),
    ),
    Fault(
        "a bottleneck's convolution is not grouped",
        f"{BENCH}/workloads/image_classification/resnext.py",
        "groups=groups, bias=False",
        "groups=1, bias=False",
        (f"{IMAGES}/test_resnext.py",),
    ),
    Fault(
        "parts of a batch of text count alike",
        f"{BENCH}/workloads/language_modeling/language_workload.py",
        "share = len(tokens) / len(batch[0])",
        "share = 1.0",
        (f"{LANGUAGE}/test_language_workload.py",),
    ),
    Fault(
        "perplexity counts the filling of short streams",
        f"{BENCH}/workloads/language_modeling/language_workload.py",
        "losses.double()[counts].sum()",
        "losses.double().sum()",
        (f"{LANGUAGE}/test_language_workload.py",),
    ),
    Fault(
        "the shards of test and validation are swapped",
        f"{BENCH}/workloads/language_modeling/one_billion_word.py",
        'return "test" if file == f"{TEST:05}.tokens" else "valid"',
        'return "valid" if file == f"{TEST:05}.tokens" else "test"',
        (f"{LANGUAGE}/test_one_billion_word.py",),
    ),
    Fault(
        "an end marker in the text is the end of a sentence",
        f"{BENCH}/workloads/language_modeling/one_billion_word.py",
        "for marker in (START, END):",
        "for marker in (START,):",
        (f"{LANGUAGE}/test_one_billion_word.py",),
    ),
    Fault(
        "decoding drops the first byte of the vocabulary",
        f"{BENCH}/workloads/translation/subwords.py",
        "if n >= len(SPECIAL)",
        "if n > len(SPECIAL)",
        (f"{TRANSLATION}/test_subwords.py",),
    ),
]
