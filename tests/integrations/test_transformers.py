"""The Hugging Face Trainer: a GPT-2 of a few thousand weights on definitions of WordNet."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apollo_bench.workloads.language_modeling import wordnet
from apollo_qn import Apollo, ApolloW, GradientRelease, lr_range_test
from tests.helpers import same, snapshot

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

WORDS, LENGTH, STEPS = 300, 12, 8
SETTINGS = {"lr": 2.0, "warmup_steps": 3}


@cache
def sentences() -> list[dict[str, Tensor]]:
    tokens = torch.from_numpy(wordnet.load(size=WORDS).train[: 4 * STEPS * LENGTH]).long()
    return [{"input_ids": piece, "labels": piece} for piece in tokens.view(-1, LENGTH)]


def network() -> Any:
    transformers.set_seed(0)
    shape = {"n_positions": LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=WORDS, **shape))


def arguments(folder: Path, **others: Any) -> Any:
    return transformers.TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "weight_decay": 0.01,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **others,
        },
    )


def by_class(folder: Path, kind: type[Apollo] = Apollo, **others: Any) -> Any:
    given = {"optimizer_cls_and_kwargs": (kind, SETTINGS), "train_dataset": sentences()}
    return transformers.Trainer(network(), arguments(folder, **others), **given)


def ready_made(
    folder: Path, release: bool = False, kind: Any = transformers.Trainer, **others: Any
) -> Any:
    """Return a trainer whose optimizer and schedule are made by hand."""
    model = network()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": 0.01},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = Apollo(groups, **SETTINGS)
    if release:
        GradientRelease(optimizer)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    given = {"optimizers": (optimizer, schedule), "train_dataset": sentences()}
    return kind(model, arguments(folder, **others), **given)


def losses(trainer: Any) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def ordinary(optimizer: Any) -> Any:
    """Return the optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def weights(trainer: Any) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_a_class_is_as_an_optimizer_made_by_hand(tmp_path: Path) -> None:
    results = []
    for make in (by_class, ready_made):
        trainer = make(tmp_path)
        trainer.train()
        optimizer = ordinary(trainer.optimizer)
        assert type(optimizer) is Apollo
        assert {float(state["step"]) for state in optimizer.state.values()} == {STEPS}
        assert optimizer.param_groups[0]["lr"] < 1e-12  # the cosine's end
        assert sum(losses(trainer)[-2:]) < sum(losses(trainer)[:2])
        results.append(weights(trainer))
    assert same(*results)


def test_groups_without_decay(tmp_path: Path) -> None:
    trainer = by_class(tmp_path, ApolloW)
    optimizer = ordinary(trainer.create_optimizer())
    assert type(optimizer) is ApolloW
    with_decay, without = optimizer.param_groups
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.01, 0.0)
    names = {p: name for name, p in trainer.model.named_parameters()}
    assert all(names[p].endswith(("bias", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
               for p in without["params"])  # fmt: skip
    assert len(with_decay["params"]) + len(without["params"]) == len(names)
    assert all(group["lr"] == SETTINGS["lr"] for group in optimizer.param_groups)
    assert all(group["decoupled_weight_decay"] for group in optimizer.param_groups)


@pytest.mark.parametrize("make", [by_class, ready_made])
def test_saved_in_mid_run_and_resumed(make: Any, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = make(tmp_path / "whole", **saving)
    whole.train()
    fresh = make(tmp_path / "fresh", **saving)
    fresh.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert fresh.state.global_step == STEPS
    assert same(weights(whole), weights(fresh))
    assert same(snapshot(ordinary(whole.optimizer)), snapshot(ordinary(fresh.optimizer)))


def test_the_range_test_takes_the_trainer_s_batches(tmp_path: Path) -> None:
    trainer = by_class(tmp_path)
    before = weights(trainer)
    result = lr_range_test(
        trainer.model, lambda model, batch: model(**batch).loss, trainer.get_train_dataloader(),
        [0.01, 1.0, 1000.0], steps=12, clip_norm=1.0,
    )  # fmt: skip
    assert result.proposal == pytest.approx(1.0)
    assert same(before, weights(trainer))


def test_the_logged_rate_has_the_warmup(tmp_path: Path) -> None:
    """Log the rate as examples/huggingface_trainer.py does."""

    class Logging(transformers.Trainer):  # type: ignore[misc, name-defined]
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "learning_rate" in logs:
                logs["learning_rate"] = ordinary(self.optimizer).effective_lrs()[0]
            super().log(logs, *args, **kwargs)

    trainer = ready_made(tmp_path, kind=Logging)
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
    peak = SETTINGS["lr"]
    # after one and two of three warmup steps, and then the rate of the cosine
    assert rates[0] == pytest.approx(peak * factor(1) * (1e-3 + 0.999 / 3), rel=1e-6)
    assert rates[1] == pytest.approx(peak * factor(2) * (1e-3 + 0.999 * 2 / 3), rel=1e-6)
    assert rates[3] == pytest.approx(peak * factor(4), rel=1e-6)


def factor(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / STEPS))


class WithoutNorms(transformers.Trainer):  # type: ignore[misc, name-defined]
    """A Trainer that does not read the gradients' norm, which others log even without clipping."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        return None


def test_gradient_release(tmp_path: Path) -> None:
    results = []
    for release in (False, True):
        trainer = ready_made(tmp_path, release, WithoutNorms, max_grad_norm=0.0)
        trainer.train()
        results.append(weights(trainer))
    assert same(*results)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_gradient_release_with_the_trainer_s_norm(max_grad_norm: float, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"has been released.*clip_grad_norm_"):
        ready_made(tmp_path, release=True, max_grad_norm=max_grad_norm).train()
