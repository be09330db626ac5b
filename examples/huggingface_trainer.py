"""Apollo in the Hugging Face Trainer: a small GPT-2 on definitions of WordNet.

    pip install . ./bench transformers accelerate
    python examples/huggingface_trainer.py

By default the Trainer clips gradients to a norm of 1 and has a schedule. Apollo warms up by itself,
so the schedule begins without a warmup.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from apollo_bench.workloads.language_modeling import wordnet
from apollo_qn import Apollo

STEPS, BATCH, LENGTH = 60, 8, 32


def sentences(words: int) -> list[dict[str, torch.Tensor]]:
    """Return pieces of LENGTH words; the model itself shifts the labels."""
    corpus = wordnet.load(size=words)
    tokens = torch.from_numpy(corpus.train[: STEPS * BATCH * LENGTH]).long()
    return [{"input_ids": piece, "labels": piece} for piece in tokens.view(-1, LENGTH)]


class ApolloTrainer(Trainer):
    """Logs the rate of the next step, with Apollo's warmup."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Replace the rate of the schedule in the log."""
        if "learning_rate" in logs:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
            logs["learning_rate"] = optimizer.effective_lrs()[0]
        super().log(logs, *args, **kwargs)


def main() -> None:
    """Train, and print how the loss fell."""
    set_seed(0)
    words = 2000
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=words, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = ApolloTrainer(
            model,
            TrainingArguments(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=BATCH,
                weight_decay=1e-4,  # the Trainer exempts biases and norms
                lr_scheduler_type="cosine",
                max_grad_norm=1.0,
                logging_steps=5,
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True,
            ),
            train_dataset=sentences(words),
            # Apollo's lr, not Adam's; learning_rate above is not used
            optimizer_cls_and_kwargs=(Apollo, {"lr": 5.0, "warmup_steps": 5}),
            # or, made by hand: optimizers=(Apollo(groups, lr=5.0), scheduler)
        )
        trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"learning rate {rates[0]:.3f} after 5 steps, {max(rates):.3f} at its highest")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}")


if __name__ == "__main__":
    main()
