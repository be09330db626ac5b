"""Faults of the readers of data sets: images, text and sentence pairs."""

from __future__ import annotations

from tests.faults import BENCH, BENCH_TESTS, Fault

WORKLOADS = f"{BENCH}/workloads"
TESTS = f"{BENCH_TESTS}/workloads"
IMAGES = f"{WORKLOADS}/image_classification"
LANGUAGE = f"{WORKLOADS}/language_modeling"
TRANSLATION = f"{WORKLOADS}/translation"
CIFAR10 = (f"{TESTS}/image_classification/test_cifar10.py",)
FASHION = (f"{TESTS}/image_classification/test_fashion_mnist.py",)
IMAGENET = (f"{TESTS}/image_classification/test_imagenet.py",)
TOKENS = (f"{TESTS}/language_modeling/test_token_files.py",)
WORDNET = (f"{TESTS}/language_modeling/test_wordnet.py",)
BPTT = (f"{TESTS}/language_modeling/test_bptt_batches.py",)
MULTI30K = (f"{TESTS}/translation/test_multi30k.py",)
CUSTOM = (f"{TESTS}/test_custom_parts.py",)

FAULTS = [
    # what several workloads use
    Fault(
        "all processes train on the same rows",
        f"{WORKLOADS}/batch_shares.py",
        "return range(rank * share, (rank + 1) * share)",
        "return range(share)",
        (f"{TESTS}/image_classification/test_image_workload.py",),
    ),
    Fault(
        "a missing shard is not noticed",
        f"{WORKLOADS}/arrow_tables.py",
        "missing = sorted(set(range(total)) - set(numbers))",
        "missing: list[int] = []",
        CIFAR10,
    ),
    Fault(
        "a row without an image is skipped",
        f"{WORKLOADS}/arrow_tables.py",
        'raise ExperimentError(f"{where}, row {number}: holds no image")',
        "continue",
        CIFAR10,
    ),
    Fault(
        "embedded files are not compared with their checksums",
        f"{WORKLOADS}/checksums.py",
        "if recorded.get(name) != digests[name]:",
        "if False:",
        FASHION,
    ),
    Fault(
        "a validated file may have changed",
        f"{WORKLOADS}/validation_cache.py",
        "                if _sha256(file) != sha256:\n",
        "                if False:\n",
        (f"{TESTS}/test_validation_cache.py",),
    ),
    Fault(
        "what was found in files is kept for other files",
        f"{WORKLOADS}/validation_cache.py",
        "return found if separator and known == digest else None",
        "return found if separator else None",
        (f"{TESTS}/test_validation_cache.py",),
    ),
    Fault(
        "hidden files are counted by their ending",
        f"{WORKLOADS}/unused_files.py",
        'if name[0] == ".":',
        "if False:",
        ("bench/tests/test_docstrings.py",),
    ),
    Fault(
        "the recipe's arguments of a model are ignored",
        f"{WORKLOADS}/custom_model.py",
        "arguments = call_arguments(factory, model.arguments)",
        "arguments: dict[str, Any] = {}",
        CUSTOM,
    ),
    Fault(
        "the state of an own language model is lost between batches",
        f"{LANGUAGE}/custom_language_model.py",
        "before = (state[0] if len(state) == 1 else state) if state else None",
        "before = None",
        (f"{TESTS}/language_modeling/test_custom_language_model.py",),
    ),
    Fault(
        "an own translator's next word is its first",
        f"{TRANSLATION}/custom_translator.py",
        "return logits[:, -1].view(n, beams, -1)",
        "return logits[:, 0].view(n, beams, -1)",
        (f"{TESTS}/translation/test_custom_translator.py",),
    ),
    # images
    Fault(
        "a label may be the number of classes",
        f"{IMAGES}/image_set.py",
        "(classes is not None and value >= classes)",
        "(classes is not None and value > classes)",
        CIFAR10,
    ),
    Fault(
        "labels beyond the last class are taken",
        f"{IMAGES}/fashion_mnist.py",
        "if int(classes.max()) >= len(CLASSES):",
        "if False:",
        FASHION,
    ),
    Fault(
        "the header of an IDX file is not compared with its length",
        f"{IMAGES}/idx_format.py",
        "if len(content) - header != expected or expected == 0:",
        "if expected == 0:",
        FASHION,
    ),
    Fault(
        "the pixels of an IDX file begin too early",
        f"{IMAGES}/idx_format.py",
        "dtype=torch.uint8, offset=header)",
        "dtype=torch.uint8, offset=header - 4)[: expected]",
        FASHION,
    ),
    Fault(
        "rows of CIFAR-10 are read with the colors last",
        f"{IMAGES}/cifar10.py",
        "data.reshape(-1, 3, _SIDE, _SIDE).copy()",
        "data.reshape(-1, _SIDE, _SIDE, 3).transpose(0, 3, 1, 2).copy()",
        CIFAR10,
    ),
    Fault(
        "any pickles of CIFAR-10 count as the published ones",
        f"{IMAGES}/cifar10.py",
        "published &= hashlib.md5(content, usedforsecurity=False).hexdigest() == _MD5[name]",
        "published &= name in _MD5",
        CIFAR10,
    ),
    Fault(
        "classes of ImageNet are numbered by their order on the disk",
        f"{IMAGES}/imagenet.py",
        'for number, name in enumerate(classes["train"])',
        'for number, name in enumerate(reversed(classes["train"]))',
        IMAGENET,
    ),
    Fault(
        "an image of a folder is its neighbor",
        f"{IMAGES}/encoded_images.py",
        "return self._folder / os.fsdecode(self._names[index])",
        "return self._folder / os.fsdecode(self._names[index - 1])",
        IMAGENET,
    ),
    # language
    Fault(
        "the line of damaged text is counted from the block",
        f"{LANGUAGE}/text_files.py",
        'line += content.count(b"\\n", 0, error.start)',
        "line += 0",
        (f"{TESTS}/language_modeling/test_one_billion_word.py",),
    ),
    Fault(
        "a slice of a token stream loses what is before the end of a part",
        f"{LANGUAGE}/token_corpus.py",
        "first = bisect.bisect_right(self._ends, start)",
        "first = bisect.bisect_left(self._ends, start + 1) + (start > 0)",
        BPTT,
    ),
    Fault(
        "a truncated token file is read",
        f"{LANGUAGE}/token_files.py",
        "    if there != expected:\n",
        "    if False:\n",
        TOKENS,
    ),
    Fault(
        "tokens of another vocabulary are read",
        f"{LANGUAGE}/token_files.py",
        "if vocabulary not in (None, description.vocabulary):",
        "if False:",
        TOKENS,
    ),
    Fault(
        "the vocabulary of WordNet sees the test text",
        f"{LANGUAGE}/wordnet.py",
        "itertools.chain.from_iterable(texts[0])",
        "itertools.chain.from_iterable(itertools.chain(*texts))",
        WORDNET,
    ),
    # translation
    Fault(
        "chosen sentences begin where the first ones did",
        f"{TRANSLATION}/encoded_pairs.py",
        "indices += numpy.repeat(self.offsets[:-1][numbers] - offsets[:-1], lengths)",
        "indices += 0",
        (f"{TESTS}/translation/test_subwords.py",),
    ),
    Fault(
        "the token for begin or end is not counted",
        f"{TRANSLATION}/encoded_pairs.py",
        "return 1 + numpy.maximum(",
        "return numpy.maximum(",
        (f"{TESTS}/translation/test_subwords.py",),
    ),
    Fault(
        "a prepared corpus of another number of subwords is read",
        f"{TRANSLATION}/encoded_corpus.py",
        "    if there != size:\n",
        "    if False:\n",
        (f"{TESTS}/translation/test_encoded_corpus.py",),
    ),
    Fault(
        "a row of the hub without text is skipped",
        f"{TRANSLATION}/hub_text.py",
        "if not isinstance(text, str):",
        "if False:",
        MULTI30K,
    ),
    Fault(
        "only the first part of WMT14 is trained on",
        f"{TRANSLATION}/wmt14.py",
        "for part in sorted(parts):",
        "for part in sorted(parts)[:1]:",
        MULTI30K,
    ),
]
