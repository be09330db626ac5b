"""The workload of language modeling: predict the next word (section 4.2 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from apollo_bench.errors import ExperimentError
from apollo_bench.workloads.custom_model import CustomModel, make_model
from apollo_bench.workloads.language_modeling import (
    bptt_batches,
    custom_text,
    one_billion_word,
    wordnet,
)
from apollo_bench.workloads.language_modeling.bptt_batches import IGNORED, BPTTBatches
from apollo_bench.workloads.language_modeling.custom_language_model import CustomLanguageModel
from apollo_bench.workloads.language_modeling.language_settings import (
    LSTMModel,
    TextData,
    TextFileData,
)
from apollo_bench.workloads.language_modeling.lstm import LanguageModel
from apollo_bench.workloads.language_modeling.token_corpus import Corpus, TokenStream
from apollo_bench.workloads.workload import Batch, HiddenState, Metric, Resources, WorkloadSpec

VALIDATION = Metric("valid_perplexity", "validation perplexity", "", higher_is_better=False)
TEST = Metric("test_perplexity", "test perplexity", "", higher_is_better=False)
_ROWS = 64  # streams of an evaluation


class LanguageModeling:
    """Language modeling by truncated back-propagation through time.

    The hidden state after a batch is the initial state of the next batch of the same streams.
    Perplexity counts every token, ends of sentences included. During training it is measured on the
    validation text, at the end also on the test text.

    Args:
        corpus: the text.
        model: settings of the network.
        data: settings of the streams.
        batch_size: streams, over all processes.
        device: device of the batches.

    Raises:
        ExperimentError: the text is too short for one step, or a cut-off lies beyond the
            vocabulary.
    """

    monitored, final = VALIDATION, TEST
    has_final_test = True
    unit = "words"
    published = False

    def __init__(
        self,
        corpus: Corpus,
        model: LSTMModel | CustomModel,
        data: TextData,
        batch_size: int,
        device: torch.device,
    ) -> None:
        words = len(corpus.vocabulary)
        if isinstance(model, LSTMModel) and model.cutoffs and model.cutoffs[-1] >= words:
            raise ExperimentError(
                f"model.cutoffs is {model.cutoffs}, allowed are numbers below the vocabulary's "
                f"size, {words}"
            )
        train = corpus.train
        if data.train_examples is not None:
            train = TokenStream([train[: data.train_examples]])
        self._sequences = BPTTBatches(train, batch_size, data.bptt_steps)
        self.steps_per_epoch = self._sequences.batches
        self.fingerprint = corpus.fingerprint
        empty = f"; {corpus.empty_lines:,} empty lines skipped" if corpus.empty_lines else ""
        if isinstance(data, TextFileData):
            self.unit = f"{data.unit}s"
        self.remarks = [
            f"A vocabulary of {words:,} {self.unit}; perplexity is that of every "
            f"{self.unit.removesuffix('s')} and every sentence's end, {len(corpus.test):,} in the "
            f"test text{empty}.",
            *corpus.remarks,
        ]
        self.units_per_step = float(batch_size * data.bptt_steps)
        self._corpus, self._model, self._data, self._device = corpus, model, data, device

    def model(self) -> nn.Module:
        """Return a new network, initialized as in the authors' release."""
        words = len(self._corpus.vocabulary)
        if isinstance(self._model, CustomModel):
            return CustomLanguageModel(make_model(self._model, vocabulary=words), words)
        return LanguageModel(words, **self._model.model_dump(exclude={"family"}))

    def batches(
        self, seed: int, epoch: int, start: int, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield tokens and the tokens after them, each of shape (batch / world, steps), int64.

        Each epoch begins at another token, given by seed and epoch.

        Raises:
            ExperimentError: the processes cannot share a batch equally.
        """
        offset = self._sequences.offset(seed, epoch)
        for pair in self._sequences.epoch(start, offset, rank, world):
            yield tuple(x.to(self._device, non_blocking=True) for x in pair)

    def loss(
        self, model: nn.Module, part: Batch, batch: Batch, hidden_state: HiddenState
    ) -> tuple[Tensor, HiddenState]:
        """Return the mean negative log likelihood, and the state, shape (rows, layers, hidden)."""
        tokens, targets = part
        share = len(tokens) / len(batch[0])
        if isinstance(self._model, CustomModel):
            losses, after = model(tokens, targets, hidden_state)
            return losses.mean() * share, after
        if hidden_state:
            state = tuple(x.transpose(0, 1).contiguous() for x in hidden_state)
        else:
            state = self._begin(len(tokens))
        losses, after = model(tokens, targets, state)
        return losses.mean() * share, tuple(x.transpose(0, 1) for x in after)

    def _begin(self, rows: int) -> tuple[Tensor, ...]:
        if isinstance(self._model, CustomModel):
            return ()
        shape = (self._model.layers, rows, self._model.hidden)
        return torch.zeros(shape, device=self._device), torch.zeros(shape, device=self._device)

    def evaluate(
        self, model: nn.Module, rank: int = 0, world: int = 1, final: bool = False
    ) -> Tensor:
        """Return summed negative log likelihood and words of each evaluated text."""
        texts = [self._corpus.valid, self._corpus.test] if final else [self._corpus.valid]
        sums = [self._sums(model, text, rank, world) for text in texts]
        return torch.cat(sums).to(self._device)

    def _sums(self, model: nn.Module, text: TokenStream, rank: int, world: int) -> Tensor:
        total = torch.zeros(2, dtype=torch.float64)
        state = None
        end = self._corpus.vocabulary.end
        for pair in bptt_batches.evaluation_batches(
            text, _ROWS, self._data.bptt_steps, end, rank, world
        ):
            tokens, targets = (x.to(self._device) for x in pair)
            counts = targets != IGNORED
            state = self._begin(len(tokens)) if state is None else state
            losses, state = model(tokens, targets.masked_fill(~counts, end), state)
            found = torch.stack([losses.double()[counts].sum(), counts.sum().double()])
            total = total.to(found.device) + found
        return total

    def metrics(self, sums: Tensor, final: bool = False) -> dict[str, float]:
        """Return perplexity of the validation text and, for the trained model, of the test text."""
        found = {}
        names = (VALIDATION.name, TEST.name) if final else (VALIDATION.name,)
        for name, (nats, words) in zip(names, sums.view(-1, 2).tolist(), strict=True):
            mean = nats / words
            found[name] = math.exp(mean) if mean < 700 else math.inf
        return found


def make_wordnet(spec: WorkloadSpec, resources: Resources) -> LanguageModeling:
    """Make WordNet, embedded or from a folder; raise ExperimentError for bad files."""
    return _make_workload(spec, resources, wordnet.load)


def make_text_file(spec: WorkloadSpec, resources: Resources) -> LanguageModeling:
    """Make the workload of the user's text; raise ExperimentError for bad files."""
    data = spec.data
    if not isinstance(data, TextFileData):
        raise ExperimentError(f"data.kind is {data.kind!r}, the task {spec.task} needs 'text-file'")
    return _make_workload(spec, resources, lambda path: custom_text.load(path, data))


def make_one_billion_word(spec: WorkloadSpec, resources: Resources) -> LanguageModeling:
    """Make the prepared benchmark; raise ExperimentError if it is missing or damaged."""
    if resources.folder is None:
        raise ExperimentError(
            "one-billion-word needs --data with the prepared text; "
            "`apollo-bench prepare one-billion-word --raw DIR --out DIR` makes it"
        )
    folder = resources.folder
    return _make_workload(spec, resources, lambda _: one_billion_word.load(folder))


def _make_workload(
    spec: WorkloadSpec, resources: Resources, load: Callable[[Path | None], Corpus]
) -> LanguageModeling:
    models = LSTMModel | CustomModel
    if not isinstance(spec.data, TextData) or not isinstance(spec.model, models):
        raise ExperimentError(
            f"data.kind is {spec.data.kind!r} and model.family {spec.model.family!r}, the task "
            f"{spec.task} needs 'text' and 'lstm' or 'custom'"
        )
    corpus = load(resources.folder)
    return LanguageModeling(corpus, spec.model, spec.data, spec.train.batch_size, resources.device)
