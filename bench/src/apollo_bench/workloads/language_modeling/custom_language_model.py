"""The user's network as a language model: from logits to negative log likelihoods."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from apollo_bench.errors import ExperimentError


class CustomLanguageModel(nn.Module):
    """A network that predicts the next word, with or without a recurrent state.

    Args:
        network: ``network(tokens)`` returns logits, (rows, time, vocabulary), of tokens
            (rows, time), int64. If it takes a second argument, ``network(tokens, state)`` returns
            logits and the next state: a tensor or a tuple of them, one row per row of tokens. The
            first state is None.
        vocabulary: number of words.
    """

    def __init__(self, network: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.network = network
        self._vocabulary = vocabulary
        self._has_state = len(inspect.signature(network.forward).parameters) > 1
        if isinstance(own := getattr(network, "output", None), str):
            self.output = f"network.{own}"

    def forward(
        self, tokens: Tensor, targets: Tensor, state: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the negative log likelihood of every target in nats, float32, and the state."""
        after: Any = ()
        if self._has_state:
            before = (state[0] if len(state) == 1 else state) if state else None
            logits, after = self.network(tokens, before)
        else:
            logits = self.network(tokens)
        shape = (*tokens.shape, self._vocabulary)
        if not isinstance(logits, Tensor) or logits.shape != shape:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ExperimentError(
                f"model.factory: its network must return logits of shape {shape}, got {found}"
            )
        nats = functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        after = (after,) if isinstance(after, Tensor) else tuple(after)
        return nats.view_as(targets), tuple(x.detach() for x in after)
