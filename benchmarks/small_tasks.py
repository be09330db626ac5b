"""Six small training tasks on the embedded data, a few milliseconds per step on one core.

``learning_rates.py`` trains them. The models are written here and are not those of apollo-bench, so
that a rule that was found there is tried on something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from apollo_bench.workloads.image_classification import fashion_mnist
from apollo_bench.workloads.language_modeling import wordnet
from apollo_bench.workloads.language_modeling.text_files import gzipped_lines
from apollo_bench.workloads.translation import phrases

Batch = tuple[Tensor, Tensor]
BATCH, LENGTH = 16, 48  # pieces of text per batch, and their length
WORDS = 1000  # vocabulary of the LSTM
PRETRAINING = 800  # steps of AdamW of the model that is fine-tuned


@dataclass(frozen=True)
class Task:
    """A model and its data."""

    name: str
    make_model: Callable[[], nn.Module]  # seeded by torch's generator
    batch: Callable[[torch.Generator], Batch]  # a random batch of the training data
    held_out: Callable[[], list[Batch]]
    clip: float | None  # norm of the gradient, None: not clipped

    def batches(self, seed: int, steps: int) -> list[Batch]:
        """Return the batches of a training run."""
        generator = torch.Generator().manual_seed(seed)
        return [self.batch(generator) for _ in range(steps)]

    def held_out_loss(self, model: nn.Module) -> float:
        """Return the mean loss on held-out data."""
        model.eval()
        with torch.no_grad():
            losses = [float(loss_of(model, batch)) for batch in self.held_out()]
        model.train()
        return sum(losses) / len(losses)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross entropy of a batch of images or of text."""
    inputs, labels = batch
    outputs = model(inputs)
    return functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    clip: float | None,
    schedule: Any = None,
) -> bool:
    """Train, and return whether every loss was finite."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        if not math.isfinite(loss.item()):
            return False
        torch.autograd.backward(loss)
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return True


# data


@cache
def images(split: str) -> Batch:
    found = fashion_mnist.load()
    if split == "train":
        return found.train_images.float() / 255 - 0.29, found.train_labels
    return found.test_images[:1000].float() / 255 - 0.29, found.test_labels[:1000]


@cache
def words(split: str) -> Tensor:
    corpus = wordnet.load(size=WORDS)
    return torch.from_numpy(getattr(corpus, split)[:]).long()


@cache
def definitions(split: str) -> Tensor:
    """Return the characters of WordNet's definitions."""
    name = f"wordnet_{split}.txt.gz"
    lines = gzipped_lines(wordnet.EMBEDDED / name, "reinstall apollo-bench")
    return characters("\n".join(" ".join(line) for line in lines[:30000]))


@cache
def sentences(split: str) -> Tensor:
    """Return the characters of English phrases and of their translations."""
    pairs = getattr(phrases.load(), split)
    return characters("\n".join(f"{en}\t{de}" for en, de in zip(*pairs, strict=True)))


def characters(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def image_batch(generator: torch.Generator) -> Batch:
    inputs, labels = images("train")
    chosen = torch.randint(len(inputs), (64,), generator=generator)
    return inputs[chosen], labels[chosen]


def text_batch(
    text: Callable[[str], Tensor], generator: torch.Generator, split: str = "train"
) -> Batch:
    tokens = text(split)
    starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH, 1), generator=generator)
    chosen = tokens[starts + torch.arange(LENGTH + 1)]
    return chosen[:, :-1], chosen[:, 1:]


def held_out_images() -> list[Batch]:
    return [images("test")]


def held_out_text(text: Callable[[str], Tensor]) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [text_batch(text, generator, "valid") for _ in range(20)]


# models


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16), (16, 32)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


class LSTM(nn.Module):
    """A language model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 64)
        self.lstm = nn.LSTM(64, 96, batch_first=True)
        self.output = nn.Linear(96, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(self.lstm(self.embedding(x))[0])
        return logits


class Block(nn.Module):
    """A pre-norm block: attention and two linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        y: Tensor = x + self.down(functional.gelu(self.up(self.norms[1](x))))
        return y


class Transformer(nn.Module):
    """A language model on bytes."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(LENGTH, width)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.position.weight[: x.shape[1]]
        x = self.embedding(x) + positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.output(self.norm(x))
        return logits


class LoRA(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices (Hu et al., 2021)."""

    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = functional.linear(functional.linear(x, self.a), self.b)
        y: Tensor = self.base(x) + self.scale * low
        return y


@cache
def pretrained_weights(folder: Path | None = None) -> dict[str, Tensor]:
    """Return the weights of a Transformer that was trained on WordNet's definitions.

    Args:
        folder: where they are kept for the next process; None: nowhere.
    """
    file = folder / "pretrained.pt" if folder else None
    if file is not None and file.exists():
        found: dict[str, Tensor] = torch.load(file, weights_only=True)
        return found
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=PRETRAINING)
    generator = torch.Generator().manual_seed(0)
    batches = [text_batch(definitions, generator) for _ in range(PRETRAINING)]
    assert train(model, optimizer, batches, 1.0, schedule)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    return model.state_dict()


def pretrained(folder: Path | None = None) -> Transformer:
    model = Transformer()
    model.load_state_dict(pretrained_weights(folder))
    return model


def with_lora(folder: Path | None = None) -> nn.Module:
    model = pretrained(folder).requires_grad_(False)
    for block in model.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, LoRA(getattr(block, name)))
    return model


def tasks(folder: Path | None = None) -> dict[str, Task]:
    """Return the tasks by name; ``folder`` keeps the weights that are fine-tuned."""

    def text(name: str, make_model: Callable[[], nn.Module], of: Any, clip: float | None) -> Task:
        return Task(name, make_model, lambda g: text_batch(of, g), lambda: held_out_text(of), clip)

    found = [
        Task("cnn", cnn, image_batch, held_out_images, None),
        Task("mlp", mlp, image_batch, held_out_images, None),
        text("lstm", LSTM, words, 1.0),
        text("transformer", Transformer, sentences, 1.0),
        text("lora", lambda: with_lora(folder), sentences, 1.0),
        text("finetuning", lambda: pretrained(folder), sentences, 1.0),
    ]
    return {task.name: task for task in found}
