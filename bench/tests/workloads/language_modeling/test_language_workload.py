"""The workloads on text: losses for any number of processes, and resumed runs."""

from __future__ import annotations

import gzip
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy
import pytest
import sacrebleu
import torch

from apollo_bench.config import recipe
from apollo_bench.config.execution import Execution
from apollo_bench.config.recipe import RunSpec
from apollo_bench.errors import ExperimentError
from apollo_bench.launch.run_scheduler import worker_command
from apollo_bench.training.loop import train
from apollo_bench.workloads import tasks
from apollo_bench.workloads.language_modeling import wordnet
from apollo_bench.workloads.translation import encoded_corpus, phrases
from apollo_bench.workloads.translation.subwords import PADDING
from apollo_bench.workloads.translation.token_batches import padded
from apollo_bench.workloads.translation.translation_workload import Translation, signature
from bench.tests.helpers import PATIENCE, assert_identical, prepared, result, stop_after

SETTINGS = {
    "wordnet": [
        *("model.embedding=8", "model.hidden=8", "model.cutoffs=[]", "data.train_examples=8200"),
        *("train.batch_size=8", "train.log_every=5", "train.evaluate_every=20"),
        *("train.checkpoint_every=0.05", "schedule.updates=102"),
    ],
    "phrases": [
        *("model.width=16", "model.inner=16", "model.heads=2", "model.layers=1"),
        *("data.train_examples=600", "data.beam_size=2", "train.batch_size=1024"),
        *("train.log_every=5", "train.evaluate_every=10", "train.checkpoint_every=0.05"),
        *("train.average_checkpoints=2", "schedule.updates=25"),
    ],
}


def spec_of(task: str, *settings: str, name: str = "apollo") -> RunSpec:
    return recipe.load(task, [*SETTINGS[task], *settings]).run(name, 3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cut the held-out sets of the embedded texts, because there are many runs."""
    folder = tmp_path_factory.mktemp("texts")
    for split, count in (("train", 2000), ("valid", 70), ("test", 20)):
        sources = [wordnet.EMBEDDED / f"wordnet_{split}.txt.gz"]
        sources += [phrases.EMBEDDED / f"{split}.{side}.gz" for side in ("en", "de")]
        for source in sources:
            lines = gzip.decompress(source.read_bytes()).splitlines()
            (folder / source.name).write_bytes(gzip.compress(b"\n".join(lines[:count]) + b"\n"))
    return folder


@pytest.mark.parametrize("task", SETTINGS)
def test_stopped_many_times_is_equal_to_never(task: str, texts: Path, tmp_path: Path) -> None:
    spec = spec_of(task)
    whole, made = prepared(tmp_path / "whole", spec, folder=texts)
    assert train(whole, spec, made) == "finished"
    pieces, made = prepared(tmp_path / "pieces", spec, folder=texts)
    outcomes = []
    while not outcomes or outcomes[-1] == "stopped":
        torch.manual_seed(len(outcomes))
        outcomes.append(train(pieces, spec, made, stop_after(6)))
    assert len(outcomes) > 2
    assert_identical(result(whole), result(pieces))
    lines = [line for line in whole.records() if line["kind"] == "evaluation"]
    found = whole.verdict()
    assert found is not None
    if task == "wordnet":
        assert [line["step"] for line in lines] == [20, 40, 60, 80, 100, 102]
        assert lines[1]["epoch"] == pytest.approx(40 / 51)
        assert found["test_perplexity"] < len(made._corpus.vocabulary)  # type: ignore[attr-defined]
        assert found["valid_perplexity"] == pytest.approx(lines[-1]["valid_perplexity"])
    else:
        assert [line["step"] for line in lines] == [10, 20, 25]
        assert 0 <= found["test_bleu"] <= 100
        states = [torch.load(path, weights_only=True) for path in whole.kept_evaluations(10**8)]
        assert len(states) == 2
        mean = torch.load(whole.averaged, weights_only=True)["model"]
        for name, value in mean.items():
            torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2)
        assert found["valid_perplexity"] != lines[-1]["valid_perplexity"]


def test_the_loss_of_a_translation_has_smoothed_labels(texts: Path) -> None:
    """Each target has 0.9 of the weight, all words share 0.1, and padding has none."""
    made = tasks.make(spec_of("phrases", "model.dropout=0.0", "data.label_smoothing=0.1"), texts)
    torch.manual_seed(0)
    model = made.model()
    batch = next(made.batches(1, 0, 2))
    source, before, wanted, _ = batch
    with torch.no_grad():
        loss, _ = made.loss(model, batch, batch, ())
        nats = -model(source, before).float().log_softmax(-1)
    right = nats.gather(-1, wanted[..., None]).squeeze(-1)
    smoothed = 0.9 * right + 0.1 * nats.mean(-1)
    assert loss.item() == pytest.approx(smoothed[wanted != PADDING].mean().item(), rel=1e-5)


@pytest.mark.parametrize("task", SETTINGS)
def test_the_loss_is_the_same_in_parts_and_by_several_processes(task: str, texts: Path) -> None:
    settings = ("model.dropout=0.0",)
    made = tasks.make(spec_of(task, *settings), texts)
    torch.manual_seed(0)
    model = made.model()

    def gradient(batches: list[Any], parts: int) -> tuple[float, torch.Tensor]:
        total = 0.0
        model.zero_grad()
        for batch in batches:
            for chunk in zip(*(column.chunk(parts) for column in batch), strict=True):
                loss, _ = made.loss(model, chunk, batch, ())
                (loss / len(batches)).backward()
                total += loss.item() / len(batches)
        slopes = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return total, torch.cat(slopes)

    whole = gradient([next(made.batches(1, 0, 2))], 1)
    for world, parts in ((1, 3), (2, 1), (2, 2)):
        batches = [next(made.batches(1, 0, 2, rank, world)) for rank in range(world)]
        loss, slope = gradient(batches, parts)
        assert loss == pytest.approx(whole[0], rel=1e-5)
        torch.testing.assert_close(slope, whole[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", SETTINGS)
def test_tallies_of_several_processes_add_up(task: str, texts: Path) -> None:
    made = tasks.make(spec_of(task), texts)
    torch.manual_seed(0)
    model = made.model().eval()
    with torch.no_grad():
        whole = made.evaluate(model, final=True)
        parts = [made.evaluate(model, rank, 3, final=True) for rank in range(3)]
    summed = torch.stack(parts).sum(0)
    torch.testing.assert_close(summed[:2], whole[:2], rtol=1e-5, atol=1e-4)
    if task == "wordnet":
        torch.testing.assert_close(summed, whole, rtol=1e-5, atol=1e-4)
    else:  # beams of an untrained model are nearly tied, and rounding decides
        assert summed[-1] == whole[-1]
    both = made.metrics(whole, final=True)
    assert both.keys() >= {made.monitored.name, made.final.name}
    assert made.metrics(made.evaluate(model), final=False).keys() == {made.monitored.name}


def test_perplexity_counts_every_word_and_end(texts: Path) -> None:
    made = tasks.make(spec_of("wordnet"), texts)
    torch.manual_seed(0)
    model: Any = made.model().eval()
    corpus = made._corpus  # type: ignore[attr-defined]
    for parameter in model.parameters():
        parameter.data.zero_()  # every word is as likely as any other
    with torch.no_grad():
        sums = made.evaluate(model, final=True)
    assert sums[1::2].tolist() == [len(corpus.valid), len(corpus.test)]
    assert made.metrics(sums, final=True)["test_perplexity"] == pytest.approx(
        len(corpus.vocabulary), rel=1e-5
    )
    sums[0] = 1e9
    assert made.metrics(sums, final=True)["valid_perplexity"] == math.inf


def test_the_hidden_state_is_passed_on(texts: Path) -> None:
    made = tasks.make(spec_of("wordnet", "model.dropout=0.0"), texts)
    torch.manual_seed(0)
    model = made.model()
    steps = list(zip(range(3), made.batches(1, 0, 0), strict=False))
    hidden_state: Any = ()
    losses = []
    for _, batch in steps:
        loss, hidden_state = made.loss(model, batch, batch, hidden_state)
        losses.append(loss.item())
    assert [tuple(x.shape) for x in hidden_state] == [(8, 1, 8)] * 2
    afresh, _ = made.loss(model, steps[1][1], steps[1][1], ())
    assert afresh.item() != losses[1]
    long = tuple(torch.cat([batch[side] for _, batch in steps], 1) for side in (0, 1))
    whole, _ = made.loss(model, long, long, ())
    assert whole.item() == pytest.approx(sum(losses) / 3, rel=1e-5)


class Oracle(Translation):
    """A translator that returns the references."""

    wrong: list[str] = []  # noqa: RUF012

    def _translate(self, model: Any, source: torch.Tensor) -> list[str]:
        known = {}
        for row in range(20):
            known[tuple(padded(self._test, numpy.array([row])).source[0].tolist())] = row
        rows = [known[tuple(x for x in one.tolist() if x)] for one in source]
        return [self.wrong[row] if self.wrong else self._references[row] for row in rows]


def test_bleu_is_sacrebleus_in_any_division(texts: Path) -> None:
    made = tasks.make(spec_of("phrases"), texts)
    made.__class__ = Oracle
    assert isinstance(made, Oracle)
    torch.manual_seed(0)
    model = made.model().eval()

    def measured(world: int) -> float:
        parts = [made.evaluate(model, rank, world, final=True) for rank in range(world)]
        return made.metrics(torch.stack(parts).sum(0), final=True)["test_bleu"]

    with torch.no_grad():
        assert measured(1) == pytest.approx(100.0)
        made.wrong = [text[: -len(text) // 4] + " und" for text in made._references]
        expected = sacrebleu.corpus_bleu(made.wrong, [made._references]).score
        assert 0 < expected < 90
        assert measured(1) == pytest.approx(expected)
        assert measured(3) == pytest.approx(expected)
        # no four words in a row are right, so that BLEU is smoothed
        made.wrong = [text.split()[0] + " und so weiter" for text in made._references]
        score = sacrebleu.corpus_bleu(made.wrong, [made._references])
        assert score.counts[3] == 0
        assert 0 < score.score < 20
        assert measured(1) == pytest.approx(score.score)
        assert measured(3) == pytest.approx(score.score)
    metric = sacrebleu.metrics.BLEU()
    metric.corpus_score(made.wrong, [made._references])
    assert str(metric.get_signature()) == signature("13a")


def test_remarks_for_the_report(tmp_path: Path) -> None:
    for task, expected in (
        ("wordnet", "A vocabulary of 23,916 words; perplexity is that of every word and every"),
        ("phrases", f"BLEU of sacrebleu, {signature('13a')}; 2 beams, length penalty 0.6."),
    ):
        assert any(text.startswith(expected) for text in tasks.make(spec_of(task)).remarks)
    for split in ("train", "val", "test_2016_flickr"):
        for side, dog in (("en", "a dog"), ("de", "ein Hund")):
            lines = [f"{dog} {i}" for i in range(30)]
            if split == "train":
                lines += ["", f"{dog} " * (20 if side == "de" else 1), f"{dog} " * 100]
            (tmp_path / f"{split}.{side}").write_text("\n".join(lines) + "\n")
    settings = ["model.max_length=64", "data.subwords=300", "train.batch_size=512"]
    made = tasks.make(recipe.load("multi30k", settings).run("sgd", 1), tmp_path)
    assert made.remarks[0] == (
        "Of the training text 31 of 33 pairs, without 1 empty, 1 of unlike lengths; trained on 30, "
        "without 1 of more subwords than the model takes; 300 subwords."
    )


def test_settings_that_do_not_fit(texts: Path) -> None:
    for task, setting, expected in (
        (
            "wordnet",
            "data.train_examples=100",
            "100 tokens do not fill a batch of 8 .* check train.batch",
        ),
        ("wordnet", "model.cutoffs=[30000]", "allowed are numbers below the vocabulary's size"),
        (
            "phrases",
            "model.max_length=12",
            "model.max_length is 12, but line 6 of the validation sentences has 21",
        ),
        ("phrases", "train.batch_size=1", "every training pair has more than 1 subwords"),
    ):
        with pytest.raises(ExperimentError, match=expected):
            tasks.make(spec_of(task, setting), texts)
    images = recipe.load("fashion-mnist").run("sgd", 1)
    for task in SETTINGS:
        wrong = spec_of(task).model_copy(update={"data": images.data})
        with pytest.raises(ExperimentError, match=r"data.kind is 'small-images'"):
            tasks.make(wrong, texts)
    few = tasks.make(spec_of("phrases", "train.batch_size=60"), texts)
    with pytest.raises(
        ExperimentError, match=r"train.batch_size is 60: for sentences of 45 tokens shared by 99"
    ):
        next(few.batches(1, 0, 0, 0, 99))


def test_a_prepared_corpus_is_the_raw_one(tmp_path: Path) -> None:
    raw = encoded_corpus.encode(phrases.load(), 400, clean=False)
    assert not encoded_corpus.is_prepared(tmp_path)
    encoded_corpus.prepare(raw, tmp_path, lambda *_: None)
    assert encoded_corpus.is_prepared(tmp_path)
    ready = encoded_corpus.load(tmp_path, 400)
    for split in ("train", "valid", "test"):
        for one, other in zip(getattr(raw, split), getattr(ready, split), strict=True):
            assert (one.tokens == other.tokens).all()
            assert (one.offsets == other.offsets).all()
    assert ready.references == raw.references
    assert ready.counts == raw.counts
    text = raw.references[4]
    assert ready.subwords.encode(text) == raw.subwords.encode(text)
    with pytest.raises(ExperimentError, match=r"data.subwords is 500, .* was prepared for 400"):
        encoded_corpus.load(tmp_path, 500)
    path = tmp_path / "train.source.tokens"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    manifest = tmp_path / "corpus.json"
    listing = manifest.read_text()
    for file, damaged, message in (
        (path, bytes(content[:-1]), "train.source.tokens: not the file that was prepared"),
        (path, bytes(content), "train.source.tokens: not the file that was prepared"),
        (path, None, "train.source.tokens: No such file"),
        (tmp_path / "references.txt", b"", "references.txt: not the file that was prepared"),
        (manifest, b"[]", "corpus.json: damaged"),
        (manifest, listing.replace('"files"', '"fires"').encode(), "corpus.json: damaged"),
        (manifest, listing.replace('"train.', '"trail.').encode(), "corpus.json: damaged"),
    ):
        before = file.read_bytes()
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with pytest.raises(ExperimentError, match=message):
            encoded_corpus.load(tmp_path, 400)
        file.write_bytes(before)
    (tmp_path / "subwords.json").write_text("{}")
    with pytest.raises(ExperimentError, match=r"does not fit subwords.json; prepare it again"):
        encoded_corpus.load(tmp_path, 400)


@pytest.mark.slow
@pytest.mark.parametrize("task", SETTINGS)
def test_two_processes_train_as_one(task: str, texts: Path, tmp_path: Path) -> None:
    short = "schedule.updates=12"
    spec = spec_of(task, "model.dropout=0.0", short, "train.average_checkpoints=1", name="sgd")
    found = []
    for devices in (1, 2):
        directory, _ = prepared(tmp_path / str(devices), spec, Execution(devices=devices), texts)
        command = [*worker_command(directory.execution()), str(directory.path)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        state = torch.load(directory.checkpoint, weights_only=True)
        found.append((directory.verdict(), state["model"]))
    one, two = found
    for name, value in one[1].items():
        torch.testing.assert_close(two[1][name], value, rtol=1e-4, atol=1e-5)
    for key in ("train_loss", "valid_perplexity"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-4)
