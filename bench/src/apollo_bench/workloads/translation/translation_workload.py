"""The workload of translation from English to German (section 4.3 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import sacrebleu
import torch
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from torch import Tensor, nn
from torch.nn import functional

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.custom_model import CustomModel, make_model
from apollo_bench.workloads.translation import (
    custom_pairs,
    encoded_corpus,
    multi30k,
    phrases,
    wmt14,
)
from apollo_bench.workloads.translation.beam_search import beam_search
from apollo_bench.workloads.translation.custom_translator import CustomTranslator
from apollo_bench.workloads.translation.encoded_corpus import EncodedCorpus
from apollo_bench.workloads.translation.encoded_pairs import EncodedPairs
from apollo_bench.workloads.translation.parallel_text import ParallelCorpus
from apollo_bench.workloads.translation.subwords import BEGIN, END, PADDING
from apollo_bench.workloads.translation.token_batches import TokenBatches, group, padded
from apollo_bench.workloads.translation.transformer import Transformer
from apollo_bench.workloads.translation.translation_settings import (
    AlignedTextData,
    SentencePairData,
    TransformerModel,
)
from apollo_bench.workloads.workload import Batch, HiddenState, Metric, Resources, WorkloadSpec

VALIDATION = Metric("valid_perplexity", "validation perplexity", "", higher_is_better=False)
TEST = Metric("test_bleu", "test BLEU", "", higher_is_better=True)
_SMOOTHING = "exp"
_ORDERS = 4  # BLEU counts n-grams of 1 to 4 words
_MAX_LENGTH = 1024  # subwords per sentence of a model without an argument of this name
_EVALUATION_TOKENS = 4096  # per batch


def signature(tokenizer: str) -> str:
    """Return the signature of sacrebleu, to reproduce the number."""
    version = sacrebleu.__version__
    return f"nrefs:1|case:mixed|eff:no|tok:{tokenizer}|smooth:{_SMOOTHING}|version:{version}"


class Translation:
    """Translation with label smoothing; BLEU of a beam search at the end.

    During training it measures the perplexity of the validation translations, per subword and
    without smoothing.

    Args:
        corpus: the sentences.
        model: settings of the network.
        data: subwords, smoothing and search.
        tokens: tokens per batch over all processes, for either side, padding included.
        device: device of the batches.

    Raises:
        ExperimentError: no sentence is short enough for the model, or one of the test set is not.
    """

    monitored, final = VALIDATION, TEST
    has_final_test = True
    unit = "subwords"
    published = False

    def __init__(
        self,
        corpus: EncodedCorpus,
        model: TransformerModel | CustomModel,
        data: SentencePairData,
        tokens: int,
        device: torch.device,
    ) -> None:
        self._subwords, self._references = corpus.subwords, corpus.references
        self._tokenizer = data.bleu_tokenizer if isinstance(data, AlignedTextData) else "13a"
        train = corpus.train
        if data.train_examples is not None:
            train = train.chosen(numpy.arange(min(data.train_examples, train.size)))
        self._max_length = longest = _max_length(model)
        self._train, too_long = train.fitting(min(longest, tokens))
        if not self._train.size:
            raise ExperimentError(
                f"every training pair has more than {min(longest, tokens)} subwords; "
                "check train.batch_size and model.max_length"
            )
        self._valid, self._test = corpus.valid, corpus.test
        self._valid.check_fitting(longest, "the validation sentences")
        self._test.check_fitting(longest, "the test sentences")
        self._model, self._data, self._tokens, self._device = model, data, tokens, device
        self._shared: dict[int, TokenBatches] = {}  # by the number of processes
        self.steps_per_epoch = len(self._batches(1))
        used = self._train.target.lengths.sum() + self._train.size
        self.units_per_step = float(used / self.steps_per_epoch)
        self.fingerprint = corpus.fingerprint
        beyond = f", without {too_long:,} of more subwords than the model takes" if too_long else ""
        self.remarks = [
            f"Of the training text {corpus.counts}; trained on {self._train.size:,}{beyond}; "
            f"{corpus.subwords.size:,} subwords.",
            f"BLEU of sacrebleu, {signature(self._tokenizer)}; {data.beam_size} beams, length "
            f"penalty {data.length_penalty:g}.",
            *corpus.remarks,
        ]

    def _batches(self, world: int) -> TokenBatches:
        if world not in self._shared:
            self._shared[world] = TokenBatches(self._train, self._tokens, world)
        return self._shared[world]

    def model(self) -> nn.Module:
        """Return a new network, initialized as in fairseq."""
        size = self._subwords.size
        if isinstance(self._model, CustomModel):
            network = make_model(self._model, vocabulary=size, padding=PADDING)
            return CustomTranslator(network, size, PADDING, self._max_length)
        return Transformer(size, padding=PADDING, **self._model.model_dump(exclude={"family"}))

    def batches(
        self, seed: int, epoch: int, start: int, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield source, target input, target output and the weight of each row.

        All but the weights, shape (rows,), are int64 of shape (rows, time). A process has every
        ``world``-th pair of a batch. A weight is ``world`` over the tokens of the whole batch.

        Raises:
            ExperimentError: the processes cannot share every batch.
        """
        batches = self._batches(world)
        for number in batches.order(seed, epoch)[start:]:
            source, before, wanted, _ = batches.part(number, rank)
            weights = torch.full((len(source),), world / batches.tokens(number))
            columns = (source, before, wanted, weights)
            yield tuple(x.to(self._device, non_blocking=True) for x in columns)

    def loss(
        self, model: nn.Module, part: Batch, batch: Batch, hidden_state: HiddenState
    ) -> tuple[Tensor, HiddenState]:
        """Return the mean cross entropy per subword with smoothed labels."""
        source, before, wanted, weights = part
        losses = functional.cross_entropy(
            model(source, before).flatten(0, 1).float(),
            wanted.flatten(),
            ignore_index=PADDING,
            reduction="none",
            label_smoothing=self._data.label_smoothing,
        )
        return (losses.view(wanted.shape) * weights[:, None]).sum(), ()

    def evaluate(
        self, model: nn.Module, rank: int = 0, world: int = 1, final: bool = False
    ) -> Tensor:
        """Return summed negative log likelihood and subwords; at the end also BLEU's counts."""
        sums = torch.zeros(2, dtype=torch.float64)
        for rows in self._evaluation(self._valid, rank, world):
            source, before, wanted = (x.to(self._device) for x in padded(self._valid, rows)[:3])
            losses = functional.cross_entropy(
                model(source, before).flatten(0, 1).float(),
                wanted.flatten(),
                ignore_index=PADDING,
                reduction="sum",
            )
            sums += torch.stack([losses, (wanted != PADDING).sum()]).double().cpu()
        if final:
            sums = torch.cat([sums, self._counts(model, rank, world)])
        return sums.to(self._device)

    def _counts(self, model: nn.Module, rank: int, world: int) -> Tensor:
        """Return the counts of BLEU: matching n-grams, all n-grams, and the words of both sides."""
        found, references = [], []
        for rows in self._evaluation(self._test, rank, world):
            source = padded(self._test, rows).source
            found += self._translate(model, source.to(self._device))
            references += [self._references[row] for row in rows]
        if not found:
            return torch.zeros(2 * _ORDERS + 2, dtype=torch.float64)
        score = sacrebleu.corpus_bleu(found, [references], tokenize=self._tokenizer)
        numbers = [*score.counts, *score.totals, score.sys_len, score.ref_len]
        return torch.tensor(numbers, dtype=torch.float64)

    def _translate(self, model: nn.Module, source: Tensor) -> list[str]:
        data = self._data
        assert isinstance(model, Transformer | CustomTranslator)
        found = beam_search(
            model,
            source,
            begin=BEGIN,
            end=END,
            beam_size=data.beam_size,
            length_penalty=data.length_penalty,
            max_length=(data.length_factor, data.length_constant),
        )
        return [self._subwords.decode(numbers) for numbers in found]

    def _evaluation(
        self, pairs: EncodedPairs, rank: int, world: int
    ) -> Iterator[NDArray[numpy.int64]]:
        """Yield the batches of this process, as indices of pairs."""
        local = numpy.arange(rank, pairs.size, world)
        source, target = (1 + side.lengths[local] for side in pairs)
        tokens = max(_EVALUATION_TOKENS, self._max_length)
        return (local[rows] for rows in group(source, target, tokens))

    def metrics(self, sums: Tensor, final: bool = False) -> dict[str, float]:
        """Return validation perplexity and, for the trained model, BLEU of the test text."""
        numbers = sums.tolist()
        mean = numbers[0] / numbers[1]
        found = {VALIDATION.name: math.exp(mean) if mean < 700 else math.inf}
        if final:
            counts = [round(number) for number in numbers[2:]]
            right, all_of_them = counts[:_ORDERS], counts[_ORDERS : 2 * _ORDERS]
            words, reference_words = counts[2 * _ORDERS :]
            # sacrebleu smooths, and the signature says so; compute_bleu does not by default
            score = BLEU.compute_bleu(
                right, all_of_them, words, reference_words, smooth_method=_SMOOTHING
            )
            found[TEST.name] = score.score
        return found


def make_phrases(spec: WorkloadSpec, resources: Resources) -> Translation:
    """Return the workload of the embedded phrases; raise ExperimentError for bad files."""
    return _make_workload(spec, resources, phrases.load, clean=False)


def make_multi30k(spec: WorkloadSpec, resources: Resources) -> Translation:
    """Return the Multi30k workload; raise ExperimentError for bad files."""
    return _make_workload(spec, resources, multi30k.load)


def make_wmt14(spec: WorkloadSpec, resources: Resources) -> Translation:
    """Return the WMT14 workload; raise ExperimentError for bad files."""
    return _make_workload(spec, resources, wmt14.load)


def make_aligned_text(spec: WorkloadSpec, resources: Resources) -> Translation:
    """Make the workload of the user's sentences; raise ExperimentError for bad files."""
    data = spec.data
    if not isinstance(data, AlignedTextData):
        raise ExperimentError(
            f"data.kind is {data.kind!r}, the task {spec.task} needs 'aligned-text'"
        )
    if data.languages is None:
        raise ExperimentError(
            "data.languages is missing: source and target, the endings of the files' names, as in "
            "--set data.languages=fr,it"
        )
    languages = (data.languages[0], data.languages[1])
    return _make_workload(
        spec,
        resources,
        lambda folder: custom_pairs.load(folder, languages, data.test_share),
        clean=False,
    )


def _max_length(model: TransformerModel | CustomModel) -> int:
    """Return the largest number of subwords per sentence."""
    if isinstance(model, TransformerModel):
        return model.max_length
    longest = model.arguments.get("max_length", _MAX_LENGTH)
    if not isinstance(longest, int) or longest < 2:
        raise ExperimentError(f"model.max_length is {longest!r}, allowed are 2 and more")
    return longest


def _make_workload(
    spec: WorkloadSpec,
    resources: Resources,
    load: Callable[[Path | None], ParallelCorpus],
    clean: bool = True,
) -> Translation:
    models = TransformerModel | CustomModel
    if not isinstance(spec.data, SentencePairData) or not isinstance(spec.model, models):
        raise ExperimentError(
            f"data.kind is {spec.data.kind!r} and model.family {spec.model.family!r}, the task "
            f"{spec.task} needs 'sentence-pairs' and 'transformer' or 'custom'"
        )
    folder, size = resources.folder, spec.data.subwords
    if folder is not None and encoded_corpus.is_prepared(folder):
        corpus = encoded_corpus.load(folder, size)
    else:
        corpus = encoded_corpus.encode(load(folder), size, clean)
    return Translation(corpus, spec.model, spec.data, spec.train.batch_size, resources.device)
